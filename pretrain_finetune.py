"""Pretrain on one task, then fine-tune every weight on the desired task.

    python pretrain_finetune.py                      # drawn shapes, half a minute
    python pretrain_finetune.py --dataset cifar10    # pretrained on CIFAR-100
    python pretrain_finetune.py --pretrain-steps 0   # from scratch
    python pretrain_finetune.py --pretrain rotation contrastive --pretext-images both

    --pretrain-steps times   (theta, phi) <- AdamW step on the pretraining loss
    the rest of --steps      (theta, psi) <- AdamW step on CE(psi(f_theta(x)), y)

theta: the encoder f. phi: the head of the pretraining task. psi: that of the desired
task. The pretraining loss is cross-entropy on the source's labels, or the mean of
pretext losses. Fine-tuning starts from the running average of the weights, with a fresh
optimizer, a fresh head and a fresh warm-up.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
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
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

import pretext


# --- the algorithm ---
def main() -> None:
    args = parse_args()
    data = load_data(args)
    pretraining = make_pretraining(data, args)
    classes = {"target": len(data.classes)} | pretraining.classes
    model = make_model(args, classes, pretraining.tasks)
    args.encoder_weights = load_encoder(model, args.encoder)
    run = Run(args, model, data, pretraining.sources, pretraining.tasks)

    def evaluate(model: nn.Module) -> Evaluation:
        probabilities = predict(model, {}, data.test.images)
        return Evaluation(probabilities.argmax(1) == data.test.labels)

    # A head that a phase does not train stays out of its optimizer: else it would decay
    model.heads["target"].requires_grad_(False)
    if run.state["phase"] != "target":  # else weights come with the checkpoint
        before, steps = pretraining.backward, args.pretrain_steps
        averaged = train(run, "pretrain", steps, model, before, evaluate, args)
        model.load_state_dict(averaged.state_dict())
    model.requires_grad_(False)
    model.encoder.requires_grad_(True)
    model.heads["target"].requires_grad_(True)
    supervised = partial(labelled_backward, data, "target", args)
    steps = args.steps - args.pretrain_steps
    train(run, "target", steps, model, supervised, evaluate, args)
    run.conclude()


# --- the pretraining arms: pretraining ---
def labelled_backward(data, head: str, args, model: nn.Module, step: int) -> "Used":
    """Adds the gradient of a labelled batch's cross-entropy to every p.grad.

    Of several processes each takes a part of the batch: what they return adds up.
    """
    purpose, size, most = head, args.batch_size, args.meta_batch_size
    if head == "target":
        purpose = "query"  # draws the same as MAML
    batch = pretext.labelled_batch(data, step, size, most, args.seed, purpose)
    rank, ranks = process()
    images = batch.images.tensor_split(ranks)[rank]
    labels = batch.labels.tensor_split(ranks)[rank]
    logits = model({head: images})[head]
    loss = F.cross_entropy(logits, labels, reduction="sum") / size
    loss.backward()
    return Used(loss.item(), len(images), len(labels))


class Pretraining(NamedTuple):
    """What is pretrained: a classifier of the source's labels, or pretext tasks."""

    classes: dict[str, int]
    tasks: dict
    sources: list  # the source's data, if it is needed
    backward: Callable[[nn.Module, int], "Used"] | None


def make_pretraining(data: pretext.Data, args: argparse.Namespace) -> Pretraining:
    if not args.pretrain_steps:
        return Pretraining({}, {}, [], None)
    sources = [load_data(args, source=True)] if needs_source(args) else []
    if args.pretrain == ["supervised"]:
        backward = partial(labelled_backward, sources[0], "source", args)
        return Pretraining({"source": len(sources[0].classes)}, {}, sources, backward)
    pool = data.train  # the images that pretext tasks see
    if args.pretext_images == "source":
        pool = sources[0].train
    if args.pretext_images == "both":
        pool = pretext.join(data.train, sources[0].train)
    tasks = pretext.make_tasks(args.pretrain, pool.images, data.mirror)
    backward = partial(pretext_backward, pool, data.mirror, tasks, args)
    return Pretraining({}, tasks, sources, backward)


def pretext_backward(pool, flip: bool, tasks: dict, args, model, step: int) -> "Used":
    """Adds the gradient of the tasks' mean loss, each on images of its own.

    Of several processes each takes some of the tasks.
    """
    rank, ranks = process()
    mine = dict(list(tasks.items())[rank::ranks])
    every = torch.ones_like(pool.labels, dtype=torch.bool)
    key, size = (args.seed, "pretext", step), args.batch_size
    batches = pretext.draw_batches(mine, pool, every, size, flip, key)
    total, seen = 0.0, 0
    for name, (inputs, targets) in batches.items():
        outputs = model({name: inputs})[name]
        loss = mine[name].loss(outputs, targets) / len(tasks)
        loss.backward()
        total += loss.item()
        seen += len(inputs)
    return Used(total, seen, 0)


def needs_source(args: argparse.Namespace) -> bool:
    """Whether pretraining sees images of --source."""
    return args.pretrain == ["supervised"] or args.pretext_images != "target"


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
def parse_args() -> argparse.Namespace:
    parser = common_arguments()
    add = parser.add_argument_group("algorithm").add_argument
    kinds, whose = ("supervised", *pretext.TASKS), ("target", "source", "both")
    what = "labels of the source, or pretext tasks"
    add("--pretrain", nargs="+", choices=kinds, default=["supervised"], help=what)
    add("--pretrain-steps", type=int, help="of --steps; 0: none; None: a quarter")
    add(
        "--pretext-images", choices=whose, default="target", help="what these tasks see"
    )
    args = parse(parser, {}, {})
    if args.pretrain_steps is None:
        args.pretrain_steps = math.ceil(args.steps / 4)
    if len(args.pretrain) > 1 and "supervised" in args.pretrain:
        fail(f"--pretrain {' '.join(args.pretrain)}: supervised, or pretext tasks")
    for name in args.pretrain:
        if name in pretext.LEARNED:
            fail(f"--pretrain {name}: it is learned by an outer loop alone")
    if not 0 <= args.pretrain_steps <= args.steps:
        fail(f"--pretrain-steps {args.pretrain_steps}: not within --steps {args.steps}")
    if args.pretrain_steps and needs_source(args):
        pretext.check(args.source)
    return args


if __name__ == "__main__":
    start(main)
