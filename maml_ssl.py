"""MAML over self-supervised tasks: pretext tasks inside, the desired task outside.

    python maml_ssl.py                              # drawn shapes: 3 minutes, 2 cores
    python maml_ssl.py --dataset cifar10            # downloads CIFAR-10
    python maml_ssl.py --dataset FOLDER --labels-per-class 100
    python maml_ssl.py --dataset FOLDER --environments

Model-agnostic meta-learning (Finn et al. 2017, arXiv 1703.03400) has one loss for both
loops. Here the inner loss L_t is that of a pretext task t, on support images without
their labels. The outer loss classifies query images x, labelled y, with the weights to
which K inner steps have led:

    inner loop   w_{k+1} = w_k - alpha grad L_t(w_k),   w_0 = (theta, phi_t)
    outer loss   mean_t [ CE(psi(f_{w_K}(x)), y)  +  beta L_t(w_0) ]

theta: the encoder f. phi_t: the head of pretext task t. psi: the head of the desired
task, which no inner step moves. alpha: --inner-lr. K: --inner-steps. beta:
--pretext-weight. AdamW moves theta, all phi_t and psi along the exact gradient of the
outer loss, which goes through the inner loop (second order). With --inner joint, the
default with several environments, each environment has one inner loop, by the mean of
all L_t, or by their sum with Nash's weights, which count as constants. What is scored
is a running average of the weights.
"""

import argparse
import contextlib
import csv
import ctypes
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import pretext

Weights = dict[str, Tensor]  # theta, every phi_t and psi, by name
Loss = Callable[[Weights], Tensor]  # -> a scalar


# --- the algorithm ---
def inner_step(
    loss: Loss, weights: Weights, lr: float, first_order: bool = False
) -> tuple[Weights, Tensor]:
    """One step of the inner loop: w - alpha grad L(w), and L(w)."""
    value = loss(weights)
    gradients = torch.autograd.grad(
        value,
        weights.values(),
        create_graph=not first_order,  # the outer gradient goes through it
        retain_graph=True,  # the outer loss uses L(w_0) too
        materialize_grads=True,  # zeros for what the loss ignores, such as psi
    )
    pairs = zip(weights.items(), gradients, strict=True)
    return {name: w - lr * gradient for (name, w), gradient in pairs}, value


def adapt(
    loss: Loss, weights: Weights, lr: float, steps: int, first_order=False, flat=False
) -> tuple[Weights, Tensor]:
    """The inner loop (MAML, section 2.2): w_K and L(w_0). K = 0 adapts nothing.

    first_order (section 5.2): the outer gradient takes the inner ones for constants.
    flat: a step's graph is not kept, but made again when `backward()` gets there.
    """
    if steps == 0:
        return weights, loss(weights)
    step = flat_step if flat else inner_step
    for k in range(steps):
        weights, value = step(loss, weights, lr, first_order)
        if k == 0:
            loss_0 = value
    return weights, loss_0


def pretext_loss(weights, model, tasks, batches, balance="mean") -> Tensor:
    """L: the mean of L_t, or the sum with Nash's weights.

    batches: {task: (inputs, targets)}.
    """
    inputs = {name: batch[0] for name, batch in batches.items()}
    outputs = functional_call(model, weights, (inputs,))  # of each task's head, by name
    losses = []
    for name, (_, targets) in batches.items():
        losses.append(tasks[name].loss(outputs[name], targets))
    losses = torch.stack(losses)
    if balance == "nash":
        return nash_weights(losses, weights) @ losses
    return losses.mean()


def outer_loss(
    model, tasks, batches, images: Tensor, labels: Tensor, balance="mean", **inner
) -> tuple[Tensor, Tensor]:
    """What the outer loss adds up: CE(psi(f_{w_K}(images)), labels) and L(w_0).

    inner: the settings that `adapt` takes.
    """
    loss = partial(
        pretext_loss, model=model, tasks=tasks, batches=batches, balance=balance
    )
    weights, loss_0 = adapt(loss, dict(model.named_parameters()), **inner)
    outputs = functional_call(model, weights, ({"target": images},))
    return F.cross_entropy(outputs["target"], labels), loss_0


# --- training ---
def main() -> None:
    args = parse_args()
    data = load_data(args)
    pool, sources = data.train, []  # pool: the images that pretext tasks see
    if args.pretext_images == "both":
        sources = [load_data(args, source=True)]
        pool = pretext.join(data.train, sources[0].train)
    tasks = pretext.make_tasks(args.pretext, pool.images, data.mirror)
    args.pretext = list(tasks)
    groups = make_groups(tasks, args)
    check_sizes(data, groups, args)
    model = make_model(args, {"target": len(data.classes)}, tasks)
    args.encoder_weights = load_encoder(model, args.encoder)
    inner = {"lr": args.inner_lr, "steps": args.inner_steps}
    inner |= {"first_order": args.first_order, "flat": args.flat_memory}
    if args.flat_memory:
        return_large_blocks()

    def backward(model: nn.Module, step: int) -> Used:
        """Adds the gradient of one step's outer loss to every p.grad."""
        size, most = args.batch_size, args.meta_batch_size
        query = pretext.labelled_batch(data, step, size, most, args.seed)
        loops = share_out(groups, query.environments)
        rank, ranks = process()
        total, seen, labelled = 0.0, 0, 0
        for loop in loops[rank::ranks]:  # this process's; one graph at a time
            batches = support_batches(data, pool, query, loop, step, args)
            x, y = query.images[loop.share], query.labels[loop.share]
            ce, loss_0 = outer_loss(
                model, loop.tasks, batches, x, y, balance=args.balance, **inner
            )
            # this loop has B_t of the B query images: B_t / B CE + beta / loops L(w_0)
            ce = len(y) / size * ce
            (ce + args.pretext_weight * loss_0 / len(loops)).backward()
            shown = sum(len(inputs) for inputs, _ in batches.values())
            total += ce.item()
            seen += len(y) + max(1, args.inner_steps) * shown
            labelled += len(y)
        return Used(total, seen, labelled)

    def evaluate(model: nn.Module) -> Evaluation:
        """Scores the test images before and after adapting; model: the average."""
        labels, losses = data.test.labels, []
        plain = predict(model, {}, data.test.images)
        adapted = torch.zeros_like(plain)
        for scored, batches in adaptations(data, tasks, args):
            images = data.test.images[scored]
            found = predict_adapted(model, tasks, batches, images, args)
            adapted[scored] = found.probabilities
            losses += found.losses
        before, after = torch.tensor(losses).mean(0).tolist()
        correct = plain.argmax(1) == labels
        if args.inner_steps == 0:
            return Evaluation(correct, pretext_loss=before)
        return Evaluation(correct, adapted.argmax(1) == labels, before, after)

    run = Run(args, model, data, sources, tasks)
    # each step: backward, AdamW; now and then: evaluate the averaged weights, a log row
    train(run, "target", args.steps, model, backward, evaluate, args)
    run.conclude()


# --- the batches ---
class Loop(NamedTuple):
    """An inner loop of one step, and its share of the query."""

    tasks: dict
    environment: int
    share: Tensor  # places in the query, all of this environment


def make_groups(tasks: dict, args: argparse.Namespace) -> list[dict]:
    """The tasks of each inner loop: all in one, or one in each."""
    if args.inner == "joint":
        return [tasks]
    return [{name: task} for name, task in tasks.items()]


def share_out(groups: list[dict], environments: Tensor) -> list[Loop]:
    """The inner loops of a step, whose query has these environments, [B]."""
    loops = []
    for environment in environments.unique().tolist():
        members = (environments == environment).nonzero().squeeze(1)
        shares = members.tensor_split(len(groups))
        for tasks, share in zip(groups, shares, strict=True):
            loops.append(Loop(tasks, environment, share))
    return loops


def support_batches(data, pool, query, loop: Loop, step: int, args) -> pretext.Batches:
    """For each task of a loop a batch of other images of the loop's environment.

    With --support query they are the query images of this loop.
    """
    # environment 0 has no number: it draws as a dataset's only environment does
    key = (args.seed, f"pretext{loop.environment or ''}", step)
    if args.support == "query":
        images, indices = query.images[loop.share], query.indices[loop.share]
        return pretext.make_batches(loop.tasks, images, indices, key)
    others = pool.environments == loop.environment
    # the training set comes first in the pool: so these are the query's places there
    others = others.index_fill(0, query.indices, False)
    size = args.support_batch_size
    return pretext.draw_batches(loop.tasks, pool, others, size, data.mirror, key)


def adaptations(data, tasks: dict, args) -> Iterator[tuple[Tensor, pretext.Batches]]:
    """Yields places of test images, and the batches to adapt to before scoring these.

    For each environment they are made of images that are never scored, with --support
    query for each batch of test images of these, unlabelled.
    """
    key, home = (args.seed, "evaluation", 0), data.test.environments
    for environment in home.unique():
        scored = (home == environment).nonzero().squeeze(1)
        if args.support == "query":
            for part in scored.split(args.batch_size):
                images = data.test.images[part] / 255
                places = torch.arange(len(part), device=part.device)
                yield part, pretext.make_batches(tasks, images, places, key)
            continue
        split, count, flip = data.unlabelled, pretext.ADAPT_TO, data.mirror
        chosen = data.aside & (split.environments == environment)
        yield scored, pretext.draw_batches(tasks, split, chosen, count, flip, key)


def check_sizes(data: pretext.Data, groups: list[dict], args) -> None:
    """ValueError: a step has too few images for its inner loops or their support."""
    homes, counts = data.train.environments.unique(return_counts=True)
    at_once = min(len(homes), args.meta_batch_size)
    needed = at_once * len(groups)
    if args.batch_size < needed:
        what = f"{at_once} environments with {len(groups)} inner loops each"
        raise ValueError(f"--batch-size {args.batch_size}: {what} need {needed}")
    if args.support == "query" or args.pretext_images == "both":
        return
    images, several = int(counts.min()), len(data.environments) > 1
    name = data.environments[homes[counts.argmin()]] if several else "the dataset"
    taken = share = math.ceil(args.batch_size / at_once)  # of a step, from one
    if several and images <= share:
        taken = max(1, images // 2)  # as labelled_batch does
    if taken >= images:
        if several:
            raise ValueError(f"{name} has one training image: none to adapt to")
        why = f"a step takes all {images} training images; take fewer"
        raise ValueError(f"--batch-size {args.batch_size}: {why}, for the support")
    if images - taken < args.support_batch_size:
        left = f"a support batch has the {images - taken} that the query leaves"
        pretext.say(f"Of the {images} training images of {name} {left}")


# --- an inner step in flat memory ---
def flat_step(
    loss: Loss, weights: Weights, lr: float, first_order: bool
) -> tuple[Weights, Tensor]:
    """`inner_step`, which keeps w_k alone and computes the rest again when needed."""

    def step(*values: Tensor) -> tuple[Tensor, ...]:  # checkpoint takes no dict
        with torch.enable_grad():  # checkpoint's first pass has no gradients
            named = dict(zip(weights, values, strict=True))
            after, value = inner_step(loss, named, lr, first_order)
        return *after.values(), value

    *values, value = checkpoint(step, *weights.values(), use_reentrant=True)
    return dict(zip(weights, values, strict=True)), value


def return_large_blocks() -> None:
    """Makes glibc give free blocks of 4 MiB and more back, which it would keep."""
    m_mmap_threshold = -3  # as in malloc.h
    with contextlib.suppress(Exception):  # another C library needs no such thing
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 4 * 2**20)


# --- the weights of tasks ---
def nash_weights(losses: Tensor, weights: Weights) -> Tensor:
    """The a > 0 with G^T G a = 1 / a (Nash-MTL, 2202.01017, section 3.1), constants.

    The columns of G are the gradients of the losses, [T]. a is where the convex
    1/2 a^T G^T G a - sum log a is least: damped Newton. G a is sqrt(T) long, whatever
    the scale of the losses. Without a gradient, a is 0. Deviations: the heads' weights
    count too (there the shared ones), and G a is not clipped.
    """
    columns = []
    for loss in losses:
        gradients = torch.autograd.grad(
            loss, weights.values(), retain_graph=True, materialize_grads=True
        )
        columns.append(torch.cat([g.flatten() for g in gradients]))
    lengths = torch.stack([column.norm() for column in columns])
    unit = torch.stack(columns) / lengths.clamp(min=1e-30)[:, None]
    ridge = 10 * torch.finfo(unit.dtype).eps  # for gradients that depend on another
    products = unit @ unit.T + ridge * torch.eye(len(unit)).to(unit)
    a = torch.ones_like(lengths)
    for _ in range(50):
        slope = products @ a - 1 / a
        step = torch.linalg.solve(products + torch.diag(a**-2), slope)
        damping = 1 + (slope @ step).clamp(min=0).sqrt()
        a = a - step / damping  # which keeps it positive
    return torch.where(lengths > 0, a / lengths, 0)


# --- a trained model ---
class Adapted(NamedTuple):
    probabilities: Tensor  # [N, classes], the mean over the inner loops
    losses: list[list[float]]  # the pretext loss of each loop, before and after


def predict_adapted(model, tasks: dict, batches, images: Tensor, args) -> Adapted:
    """What is said of uint8 images [N, 3, H, H] after adapting to the batches."""
    weights, total, found = dict(model.named_parameters()), 0.0, []
    groups = make_groups(tasks, args)
    for group in groups:
        mine = {name: batches[name] for name in group}
        mean = partial(pretext_loss, model=model, tasks=group, batches=mine)
        loss = partial(mean, balance=args.balance)
        lr, steps, flat = args.inner_lr, args.inner_steps, args.flat_memory
        adapted, _ = adapt(loss, weights, lr, steps, first_order=True, flat=flat)
        with torch.no_grad():
            found.append([mean(weights).item(), mean(adapted).item()])
        total = total + predict(model, adapted, images)
    return Adapted(total / len(groups), found)


class Trained(NamedTuple):
    model: nn.Module  # with the averaged weights
    tasks: dict
    args: argparse.Namespace  # what config.json says


def load_trained(file: str | Path, device: str = "cpu") -> Trained:
    """A run of this script, from its checkpoint.pt alone."""
    state = torch.load(file, device, weights_only=True)
    args = argparse.Namespace(**state["config"] | {"device": device})
    tasks = pretext.restore_tasks(state["tasks"])
    averaged = AveragedModel(make_model(args, {"target": len(args.classes)}, tasks))
    averaged.load_state_dict(state["averaged"])
    return Trained(averaged.module.eval(), tasks, args)


def predict_new(trained: Trained, images: Tensor) -> Tensor:
    """Adapts to up to 256 of uint8 images [N, 3, H, H], unlabelled; classifies all.

    They come from one environment, which may be new. Returns class probabilities
    [N, classes], in the order of trained.args.classes.
    """
    model, tasks, args = trained
    places = torch.arange(len(images), device=images.device)
    every = torch.ones_like(places, dtype=torch.bool)
    split = pretext.Split(images, places, places)  # labels, environments: never used
    key, count = (args.seed, "evaluation", 0), pretext.ADAPT_TO
    batches = pretext.draw_batches(tasks, split, every, count, args.mirror, key)
    return predict_adapted(model, tasks, batches, images, args).probabilities


# --- shared: network ---
def make_encoder(backbone: str, width: int) -> tuple[nn.Module, int]:
    """f_theta: [N, 3, H, H] -> feature map [N, channels, H/8, H/8]; and its channels.

    conv: three blocks of two 3x3 convolutions and max-pooling (Doon et al. 2018, IEEE
    8745428), padded, without dropout. resnet18: torchvision's, with a 3x3 stem. Another
    one is a branch here and a choice of --backbone, in every arm. Both have GroupNorm:
    BatchNorm would mix the images of a batch, and keep statistics of adapted weights.
    """

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(math.gcd(8, channels), channels)

    if backbone == "resnet18":
        net = torchvision.models.resnet18(norm_layer=norm)
        stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), net.bn1, nn.ReLU())
        blocks = (net.layer1, net.layer2, net.layer3, net.layer4)
        return nn.Sequential(*stem, *blocks), 512
    layers, before = [], 3
    for after in (width, 2 * width, 4 * width):
        for channels in (before, after):
            layers.append(nn.Conv2d(channels, after, 3, padding=1, bias=False))
            layers += [norm(after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        before = after
    return nn.Sequential(*layers), after


def make_classifier(channels: int, classes: int) -> nn.Module:
    """psi: feature map [N, channels, h, w] -> pooled to 4x4 -> logits [N, classes]."""
    pooled = (nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(*pooled, nn.Linear(16 * channels, classes))


class Model(nn.Module):
    """One encoder, and a head for each task."""

    def __init__(self, encoder: nn.Module, heads: dict[str, nn.Module], amp: bool):
        super().__init__()
        self.encoder, self.heads, self.amp = encoder, nn.ModuleDict(heads), amp

    def forward(self, images: dict[str, Tensor]) -> dict[str, Tensor]:
        """{task: images [N, 3, H, H] in [0, 1]} -> {task: what its head says}.

        Pixels are scaled here and nowhere else. Images of one size go through the
        encoder together.
        """
        parts = [(x - 0.5) / 0.25 for x in images.values()]
        with torch.autocast(parts[0].device.type, torch.bfloat16, enabled=self.amp):
            if len({x.shape[1:] for x in parts}) == 1:
                features = self.encoder(torch.cat(parts))
                features = features.split([len(x) for x in parts])
            else:
                features = [self.encoder(x) for x in parts]
            pairs = zip(images, features, strict=True)
            outputs = {task: self.heads[task](x) for task, x in pairs}
        return {task: x.to(parts[0].dtype) for task, x in outputs.items()}


def make_model(args: argparse.Namespace, classes: dict[str, int], tasks: dict) -> Model:
    """The encoder, classifiers for `classes`, and a head for each pretext task.

    Each part starts from a seed of its own: so it starts the same in every arm.
    """

    @contextlib.contextmanager
    def seeded(part: str):
        with torch.random.fork_rng(devices=[]):
            generator = pretext.rng(args.seed, f"init {part}")
            torch.manual_seed(generator.initial_seed())
            yield

    heads = {}
    with seeded("encoder"):
        encoder, channels = make_encoder(args.backbone, args.width)
    for name, count in classes.items():
        with seeded(name):
            heads[name] = make_classifier(channels, count)
    for name, task in tasks.items():
        with seeded(name):
            heads[name] = task.make_head(channels)
    return Model(encoder, heads, args.amp).to(args.device)


def load_encoder(model: Model, file: str | None) -> str | None:
    """Gives the model the averaged encoder of any arm's checkpoint.pt, but no head.

    Returns a digest of its weights: a run goes on only with what it began with. None:
    no file is given. ValueError: it is no such file, or its encoder has other shapes.
    """
    if file is None:
        return None
    try:
        state = torch.load(file, "cpu", weights_only=True)
        backbone, width = (state["config"][name] for name in ("backbone", "width"))
        averaged, encoder = state["averaged"], {}
        for name, x in averaged.items():
            if name.startswith("module.encoder."):
                encoder[name.removeprefix("module.encoder.")] = x
    except Exception as error:  # torch.load raises all kinds
        what = "not a checkpoint.pt of these scripts"
        raise ValueError(f"--encoder {file}: {what}") from error
    try:
        model.encoder.load_state_dict(encoder)
    except RuntimeError as error:  # other names or shapes
        has = f"--backbone {backbone} --width {width}"
        raise ValueError(f"--encoder {file} has {has}, give the same") from error
    weights = nn.utils.parameters_to_vector(encoder.values())
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]


@torch.no_grad()
def predict(model: nn.Module, weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """uint8 [N, 3, H, H] -> class probabilities [N, classes], with weights by name.

    {}: with the model's own.
    """
    found = []
    for part in images.split(100):
        outputs = functional_call(model, weights, ({"target": part / 255},))
        found.append(outputs["target"].softmax(1))
    return torch.cat(found)


# --- shared: training ---
# The log. step: of this phase, pretrain or target. The COUNTS are of training alone,
# since the start: steps, images that went forward, labels used, FLOPs, seconds
COUNTS = ("total_step", "images", "labels", "flops", "seconds")
SCORES = ("accuracy", "accuracy_adapted", "pretext_loss", "pretext_loss_adapted")
COLUMNS = ("phase", "step", *COUNTS, "train_loss", *SCORES)
# These may change while a run stays the same: of data and encoder, digests decide
FREE = {"seed", "out", "name", "device", "data_dir", "overwrite", "eval_every", "steps"}
FREE |= {"flat_memory", "torch", "torchvision"}
FREE |= {"dataset", "source", "environment_names", "encoder"}


class Used(NamedTuple):
    """What a step, or one process's part of it, used."""

    loss: float  # of the labelled images, or what pretraining lowers
    images: int
    labels: int


class Evaluation(NamedTuple):
    """What was found; None: it is not measured."""

    correct: Tensor | None = None  # bool, of each test image
    correct_adapted: Tensor | None = None
    pretext_loss: float | None = None
    pretext_loss_adapted: float | None = None

    def accuracies(self, chosen: Tensor | slice = slice(None)) -> list[float | None]:
        """Not adapted and adapted, of the chosen test images."""
        found = []
        for correct in self.correct, self.correct_adapted:
            part = None if correct is None else correct[chosen]
            found.append(None if part is None else part.sum().item() / len(part))
        return found


def process() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def as_line(cells: list) -> str:
    """A line of a CSV file; None is an empty cell."""
    cells = [f"{x:.6g}" if isinstance(x, float) else x for x in cells]
    csv.writer(line := io.StringIO(), lineterminator="\n").writerow(cells)
    return line.getvalue()


class Run:
    """OUT/NAME/seed<k>/: config.json, metrics.csv, and checkpoint.pt, which holds both.

    Each file is replaced whole. So a run that was stopped, at any moment, goes on from
    its last evaluation when the same command is given again. ValueError: it began with
    other settings. environments.csv, if there are several, has the last scores of each.
    """

    def __init__(self, args, model: nn.Module, data, sources: list, tasks: dict):
        self.data, self.last = data, Evaluation()
        self.folder = Path(args.out, args.name, f"seed{args.seed}")
        self.log, file = self.folder / "metrics.csv", self.folder / "checkpoint.pt"
        self.written = self.log.read_text() if self.log.exists() else ""
        self.config = {"arm": Path(__file__).stem, **vars(args), "mirror": data.mirror}
        self.config["classes"] = data.classes
        self.config["environment_names"] = data.environments
        self.config["data"] = pretext.checksum(data, *sources)
        self.config["parameters"] = sum(p.numel() for p in model.parameters())
        self.config["torch"] = str(torch.__version__)
        self.config["torchvision"] = torchvision.__version__
        self.state = {"phase": None, "rows": [], **dict.fromkeys(COUNTS, 0)}
        self.state["tasks"] = {name: vars(task) for name, task in tasks.items()}
        if args.overwrite or not file.exists():
            return
        try:
            self.state = torch.load(file, args.device, weights_only=True)
            began = dict(self.state["config"])
        except Exception as error:  # torch.load raises all kinds
            raise ValueError(f"{file} is damaged; --overwrite starts again") from error
        for key, now in self.config.items():
            if now != began.get(key) and key not in FREE:
                holds = f"{self.folder} holds a run with {key} {began.get(key)}"
                raise ValueError(f"{holds}, not {now}; take a --name, or --overwrite")
        if self.state["phase"] == "target" and self.state["total_step"] >= args.steps:
            print(f"{self.folder} holds this run, finished; --overwrite runs it again")
            sys.exit()

    def save(self, row: list, found: Evaluation, **state) -> None:
        """Adds a row to the log, and keeps what the run needs to go on from here."""
        self.last, rows = found, [*self.state["rows"], as_line(row)]
        self.state |= {"config": self.config, "rows": rows, **state}
        if (self.log.read_text() if self.log.exists() else "") != self.written:
            raise ValueError(f"{self.folder}: another run writes there; take a --name")
        self.written = as_line(COLUMNS) + "".join(rows)
        torch.save(self.state, checkpoint := io.BytesIO())
        files = {"config.json": json.dumps(self.config, indent=1).encode()}
        files |= {"metrics.csv": self.written.encode()}
        if table := self.by_environment():
            lines = [["environment", "images", *SCORES[:2]], *table]
            files |= {"environments.csv": "".join(map(as_line, lines)).encode()}
        files |= {"checkpoint.pt": checkpoint.getvalue()}
        for name, content in files.items():
            new = self.folder / f"{name}.new"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                new.write_bytes(content)
                os.replace(new, self.folder / name)
            except OSError as error:  # such as a full disk
                with contextlib.suppress(OSError):
                    new.unlink()
                why = error.strerror or error
                raise OSError(f"{self.folder}: {why}") from error

    def by_environment(self) -> list[list]:
        """[name, images, accuracy, adapted] of each; nothing if there is one."""
        home, table = self.data.test.environments, []
        if len(self.data.environments) == 1 or self.last.correct is None:
            return []
        for number in home.unique().tolist():
            members = home == number
            name, images = self.data.environments[number], int(members.sum())
            table.append([name, images, *self.last.accuracies(members)])
        return table

    def conclude(self) -> None:
        """Says in words what came out."""
        if process()[0] > 0:
            return

        def words(accuracies: list[float | None], between: str) -> str:
            return between.join(f"{100 * x:.1f}%" for x in accuracies if x is not None)

        found = {}
        for name, images, *accuracies in self.by_environment():
            found[name] = [x for x in accuracies if x is not None][-1]
            print(f"{name}: {words(accuracies, ', adapted ')} of {images} images")
        if found:
            print(f"The worst is {min(found, key=found.get)}.")
        between = ", after adapting to unlabelled images "
        print(f"In all: {words(self.last.accuracies(), between)}.")
        if limit := pretext.LIMITS.get(self.config["dataset"]):
            print(f"A rule that sees one image at a time reaches {limit:.0%} at most.")
        runs = self.folder.parents[1]
        print(f"Next: the other scripts, then python compare.py {runs}")


class FlopCounter(TorchDispatchMode):
    """Adds up FLOPs as torch's FlopCounterMode, which keeps every graph alive."""

    total = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if count := flop_registry.get(operation.overloadpacket):
            self.total += count(*args, **kwargs, out_val=result)
        return result


def train(run: Run, phase: str, steps: int, model, backward, evaluate, args):
    """One phase: AdamW along what `backward` adds to p.grad. Returns the average.

    backward(model, step) -> Used; evaluate(averaged model) -> Evaluation. Goes on from
    the last row of this phase, if the run has one.
    """
    state, losses, flops = run.state, [], 0
    rank, ranks = process()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr)
    average = get_ema_multi_avg_fn(args.ema)
    averaged = AveragedModel(model, multi_avg_fn=average).eval()
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    first = state["step"] if state["phase"] == phase else 0
    hidden = True if rank else None  # None: where stderr is no terminal
    bar = tqdm(range(first, steps), phase, initial=first, total=steps, disable=hidden)

    def record(step: int) -> None:
        bar.set_description("evaluating")
        loss = sum(losses) / len(losses) if losses else None
        losses.clear()
        found = evaluate(averaged.module) if phase == "target" else Evaluation()
        scores = [*found.accuracies(), found.pretext_loss, found.pretext_loss_adapted]
        row = [phase, step, *(state[name] for name in COUNTS), loss, *scores]
        said = {"loss": loss, "accuracy": scores[0], "adapted": scores[1]}
        said = [f"{name} {x:.4f}" for name, x in said.items() if x is not None]
        if rank == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            run.save(row, found, phase=phase, step=step, **states)
            seconds = f"{state['seconds']:6.0f} s"
            bar.write("  ".join([f"{phase} {step:5}", seconds, *said]))
        bar.set_description(phase)

    if state["phase"] == phase:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    elif phase == "target":
        record(0)
    for step in bar:
        began = time.perf_counter()
        warm = min(1, (step + 1) / max(1, args.warmup_steps))
        optimizer.param_groups[0]["lr"] = args.lr * warm
        optimizer.zero_grad()
        counter = FlopCounter()
        # counted in a phase's first step: all of them do the same work
        with contextlib.nullcontext() if flops else counter:
            used = backward(model, step)
        flops = flops or counter.total
        sums = torch.tensor([*used, flops], dtype=torch.float64)
        for p in trained:  # not all are reached: by this process, or by the loss
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if ranks > 1:
            for tensor in (sums, *(p.grad for p in trained)):
                dist.all_reduce(tensor)
        loss, *work = sums.tolist()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained]).item()
        if not math.isfinite(loss + norm):
            what = f"the loss is {loss}, its gradient's norm {norm}"
            raise ValueError(f"{phase} step {step + 1}: {what}; try a smaller --lr")
        optimizer.step()
        averaged.update_parameters(model)
        losses.append(loss)
        work = (1, *map(int, work), time.perf_counter() - began)
        for name, more in zip(COUNTS, work, strict=True):
            state[name] += more
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            record(step + 1)
    return averaged.module


# --- shared: arguments ---
# Defaults that depend on the dataset. DEPENDS: such an argument is absent if not given
USUAL = {"steps": 2000, "image_size": 32, "width": 16, "batch_size": 64}
COLOURED = {"steps": 600, "image_size": 16, "width": 8, "batch_size": 128}
DEFAULTS = {"shapes": USUAL | {"steps": 300}, "coloured_shapes": COLOURED}
DEPENDS = {"default": argparse.SUPPRESS}


def fail(message: object, code: int = 2) -> None:
    """Ends with one line that says what is wrong and what to do."""
    text = " ".join(str(message).split())
    tqdm.write(f"{Path(__file__).name}: {text}", file=sys.stderr)
    sys.exit(code)


def common_arguments() -> argparse.ArgumentParser:
    """What all arms have."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    title, path = (__doc__ or "").partition("\n")[0], os.path.expanduser
    parser = argparse.ArgumentParser(description=title, formatter_class=formatter)
    parser.error = fail
    add = parser.add_argument_group("data").add_argument
    names, yes_no = ", ".join(pretext.DATASETS), argparse.BooleanOptionalAction
    what = f"{names}, or a folder with train/CLASS/ and test/CLASS/"
    add("--dataset", type=path, default="coloured_shapes", help=what)
    add("--source", type=path, help="second dataset; None: cifar100 for cifar10 etc.")
    add("--environments", action="store_true", help="a folder's CLASS/ENVIRONMENT/")
    add("--mirror", action=yes_no, help="mirror images; None: if they have colour")
    add("--data-dir", type=path, default="data", help="downloads and decoded folders")
    add("--labels-per-class", type=int, help="others are not used; None: all are")
    add(
        "--eval-on",
        choices=("test", "val"),
        default="test",
        help="val: a fifth of them",
    )
    add(
        "--image-size", type=int, help="pixels, a multiple of 8 (usually 32)", **DEPENDS
    )
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=int, help="pretraining included (usually 2000)", **DEPENDS)
    add("--eval-every", type=int, help="steps; None: a tenth of all")
    add("--batch-size", type=int, help="labelled images (usually 64)", **DEPENDS)
    add("--meta-batch-size", type=int, default=4, help="environments, at most, a step")
    add("--lr", type=float, default=1e-3, help="of AdamW")
    add(
        "--warmup-steps", type=int, default=50, help="lr rises over these in each phase"
    )
    add(
        "--ema", type=float, default=0.98, help="decay of the averaged weights; 0: none"
    )
    add("--backbone", choices=("conv", "resnet18"), default="conv", help="the encoder")
    add(
        "--width",
        type=int,
        help="channels of conv's first block (usually 16)",
        **DEPENDS,
    )
    what = "checkpoint.pt to start the encoder from; its run may be pretraining alone"
    add("--encoder", type=path, metavar="FILE", help=what)
    add("--amp", action="store_true", help="bfloat16, where the hardware has it")
    found = torch.accelerator.current_accelerator(check_available=True)
    devices = [found.type, "cpu"] if found else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="what is available here")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add = parser.add_argument_group("log").add_argument
    add("--out", type=path, default="runs", help="the log goes to OUT/NAME/seed<k>/")
    add("--name", help="None: arm, dataset, and what is not at its default")
    add("--overwrite", action="store_true", help="start again")
    return parser


def parse(parser: argparse.ArgumentParser, one: dict, several: dict):
    """The arguments, and a name made of those that are not at their defaults.

    one, several: the arm's own defaults with one environment, and with several.
    """
    given = parser.parse_args()
    apart = given.environments or given.dataset == "coloured_shapes"
    defaults = DEFAULTS.get(given.dataset, USUAL) | (several if apart else one)
    args = argparse.Namespace(**defaults | vars(given))
    words = [Path(__file__).stem, Path(args.dataset).resolve().name]
    for key, value in vars(args).items():
        default = defaults.get(key, parser.get_default(key))
        if value != default and key not in FREE - {"source", "steps", "encoder"}:
            text = "+".join(value) if isinstance(value, list) else str(value)
            if key == "encoder":  # OUT/NAME/seed<k>/checkpoint.pt
                text = Path(text).resolve().parent.parent.name
            words.append(f"{key}={Path(text).name}")
    args.name = args.name or "-".join(words)[:120]
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.source = args.source or pretext.DATASETS.get(args.dataset, (None, None))[1]
    if min(args.steps, args.width, args.batch_size, args.meta_batch_size) < 1:
        fail("--steps, --width, --batch-size and --meta-batch-size: from 1 up")
    if args.image_size not in range(8, 4096, 8):
        fail(f"--image-size {args.image_size}: take a multiple of 8")
    if args.encoder is not None and not Path(args.encoder).is_file():
        fail(f"--encoder {args.encoder}: there is no such file")
    pretext.check(args.dataset, args.environments)
    return args


def load_data(args: argparse.Namespace, source: bool = False) -> pretext.Data:
    """The desired task's data, or all of the source; says what was read."""
    name, apart = args.dataset, args.environments
    if source:
        name, apart = args.source, False
    where = (args.data_dir, args.image_size, args.device)
    data = pretext.load(name, *where, source, apart, args.mirror, args.seed)
    if not source:
        budget = args.labels_per_class
        data = pretext.desired_task(data, budget, args.eval_on, args.seed)
    pretext.say(pretext.describe(name, data))
    return data


def start(main: Callable[[], None]) -> None:
    """Runs main in each process that torchrun has started, or in this one alone."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (it is closed)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    rank, ranks = (os.environ.get(name) or "0" for name in ("RANK", "WORLD_SIZE"))
    try:
        if not (rank + ranks).isdecimal() or int(rank) >= int(ranks) > 1:
            wrong = f"RANK {rank} of WORLD_SIZE {ranks}"
            raise ValueError(f"{wrong}: unset them, or start with torchrun")
        if int(ranks) > 1:
            dist.init_process_group()
            if torch.accelerator.is_available():
                torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        main()
    except (OSError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on from the last row of its log", 130)


# --- the arm's own arguments ---
ONE = {"inner": "per-task", "inner_lr": 0.01, "pretext_weight": 0.3}
SEVERAL = {"inner": "joint", "inner_lr": 3.0, "pretext_weight": 0.1}
NASH = {"inner_lr": 0.3}  # its step is alpha sqrt(T) long, whatever the gradients


def parse_args() -> argparse.Namespace:
    parser = common_arguments()
    parser.set_defaults(lr=2e-3)
    parser.epilog = f"Defaults with one environment: {ONE}, with several: {SEVERAL}"
    parser.epilog += f", then with --balance nash: {NASH}"
    add = parser.add_argument_group("algorithm").add_argument
    usual = f"the inner loop's; None: {' '.join(pretext.DEFAULT_TASKS)}"
    add("--pretext", nargs="+", choices=pretext.TASKS, help=usual)
    add("--inner-lr", type=float, help="alpha; 0: joint training", **DEPENDS)
    add("--inner-steps", type=int, default=1, help="K")
    add("--first-order", action="store_true", help="drop the second derivatives")
    add("--flat-memory", action="store_true", help="the same memory for any K; slower")
    add("--pretext-weight", type=float, help="beta", **DEPENDS)
    choices, how = ("per-task", "joint"), "a loop for each task, or one for all"
    add("--inner", choices=choices, help=how, **DEPENDS)
    choices, how = ("mean", "nash"), "weights of the tasks in one loop"
    add("--balance", choices=choices, default="mean", help=how)
    choices, how = ("disjoint", "query"), "query: the query images, unlabelled"
    add("--support", choices=choices, default="disjoint", help=how)
    add("--support-batch-size", type=int, default=32, help="images of each task")
    choices, how = ("target", "both"), "both: those of --source too, unlabelled"
    add("--pretext-images", choices=choices, default="target", help=how)
    nash = parser.parse_args().balance == "nash"  # read once more by `parse`
    args = parse(parser, ONE, SEVERAL | NASH if nash else SEVERAL)
    learned = [name for name in args.pretext or [] if name in pretext.LEARNED]
    if min(args.inner_steps, args.support_batch_size) < 1 or args.inner_lr < 0:
        fail("--inner-steps and --support-batch-size: from 1 up; --inner-lr: from 0 up")
    if learned and (args.first_order or not args.inner_lr):
        why = f"{learned[0]} learns through the second order of an inner loop alone"
        fail(f"no --first-order or --inner-lr 0: {why}")
    if learned and args.pretext_weight:
        fail(f"--pretext-weight above 0 would make {learned[0]} trivial: give 0")
    if args.first_order and not args.pretext_weight:
        fail("--first-order --pretext-weight 0: the pretext heads would never learn")
    if args.inner_lr == 0:  # joint training: nothing is adapted, so one loop is enough
        args.inner_steps, args.inner = 0, "joint"
    if args.balance == "nash" and (args.inner != "joint" or not args.inner_steps):
        fail("--balance nash weighs the tasks of one inner loop: give --inner joint")
    if args.pretext_images == "both":
        pretext.check(args.source)
    return args


if __name__ == "__main__":
    start(main)
