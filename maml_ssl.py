"""MAML over self-supervised tasks: pretext tasks in the inner loop, the desired one in the outer.

    python maml_ssl.py                                  # drawn shapes: 90% in 3 minutes, 2 cores
    python maml_ssl.py --dataset coloured_shapes        # where the inner loop is the reason
    python maml_ssl.py --dataset cifar10                # downloads CIFAR-10
    python maml_ssl.py --dataset FOLDER --labels-per-class 100

Model-agnostic meta-learning (Finn et al. 2017, arXiv 1703.03400), where both loops share one loss.
Here the inner loss L_t is that of a pretext task t, on support images without their labels, and the
outer loss classifies query images x, labelled y, with the weights to which K steps have led:

    inner loop   w_{k+1} = w_k - alpha grad L_t(w_k),   w_0 = (theta, phi_t)
    outer loss   mean_t [ CE(psi(f_{w_K}(x)), y)  +  beta L_t(w_0) ]

theta: the encoder f. phi_t: the head of pretext task t. psi: the head of the desired task.
alpha: --inner-lr, K: --inner-steps, beta: --pretext-weight. AdamW moves theta, all phi_t and psi
along the outer loss's exact gradient, which goes through the inner loop (second order). With
--inner joint there is one inner loop, by the mean of all L_t.
"""

import argparse
import io
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import pretext


# --- the algorithm ---
def adapt(loss, params, lr, steps, first_order=False, flat_memory=False):
    """The inner loop (MAML, section 2.2), differentiable in `params`: -> w_K and loss(w_0).

    loss: {name: tensor} -> scalar, the same function at each step. params: w_0, by name.
    first_order (section 5.2): take grad L for a constant when the outer loss is differentiated.
    flat_memory: compute each step again in the backward pass instead of keeping its graph.
    """

    def step(params):
        value = loss(params)
        gradient = torch.autograd.grad(
            value,
            params.values(),
            create_graph=not first_order,
            retain_graph=True,  # for loss(w_0), which the outer loss uses too
            materialize_grads=True,  # zeros for what the loss ignores, such as psi
        )
        # w_{k+1} = w_k - alpha grad L(w_k)
        return {n: w - lr * g for (n, w), g in zip(params.items(), gradient, strict=True)}, value

    if steps == 0:
        return params, loss(params)
    if flat_memory:
        step = partial(checkpoint, step, use_reentrant=False)
    params, before = step(params)
    for _ in range(steps - 1):
        params, _ = step(params)
    return params, before


def pretext_loss(model, tasks, batches):
    """-> the mean of L_t over the tasks, as a function of the parameters (theta and every phi_t).

    batches: {task: (inputs, targets)}, the same for all K steps.
    """

    def loss(params):
        outputs = {t: functional_call(model, params, (x, t)) for t, (x, _) in batches.items()}
        return torch.stack([tasks[t].loss(outputs[t], y) for t, (_, y) in batches.items()]).mean()

    return loss


def outer_loss(model, tasks, batches, images, labels, **inner):
    """-> CE(psi(f_{w_K}(images)), labels), and the pretext loss before adapting (0: no tasks)."""
    params, before = dict(model.named_parameters()), 0.0
    if tasks:
        params, before = adapt(pretext_loss(model, tasks, batches), params, **inner)
    return F.cross_entropy(functional_call(model, params, (images,)), labels), before


def main():
    args = parse_args()
    load = partial(pretext.load, data_dir=args.data_dir, side=args.image_size, device=args.device)
    data = pretext.limit_labels(load(args.dataset), args.labels_per_class, args.eval_on, args.seed)
    pretext_data = [data]  # whose images the pretext tasks may see
    if args.pretext_images == "both":
        pretext_data.append(load(args.source, source=True))
    pool, pool_environments = pretext.pool(pretext_data)
    tasks = {name: pretext.TASKS[name](pool) for name in args.pretext}
    heads = {name: task.make_head for name, task in tasks.items()}
    model = make_model({"target": classifier(data.classes)} | heads, args)
    # A group of tasks has one inner loop and a share of the query: each task is one, or all are
    together = args.inner == "joint" or not args.inner_steps
    task_groups = [tasks] if together else [{name: task} for name, task in tasks.items()]
    inner = {"lr": args.inner_lr, "steps": args.inner_steps}
    outer = inner | {"first_order": args.first_order, "flat_memory": args.flat_memory}

    def backward(model, step):
        """Adds the outer gradient to every p.grad; -> classification loss, images, labels used."""
        images, labels, index = pretext.labelled_batch(data, step, args.batch_size, args.seed)
        # [B, 3, H, H], [B], [B]; each inner loop gets a share of the B, without tasks one gets all
        environments = data.environments[index] if tasks else torch.zeros_like(index)
        inner_loops = share_out(task_groups, environments)
        total, seen, labelled = 0.0, 0, 0
        for group, environment, share in inner_loops[RANK::RANKS]:  # one graph is alive at a time
            if args.support == "query":
                support = images[share], index[share]
            else:  # other images of the same environment
                others = (pool_environments == environment).index_fill(0, index, False)
                support = pool, others, args.support_batch_size, data.flip
                if step == 0 and group and others.sum() < args.support_batch_size:
                    print(f"a support batch has {others.sum()} images: there are no more")
            purpose = f"pretext{environment or ''}"
            batches = pretext.batches(group, args.seed, purpose, step, *support)
            loss, before = outer_loss(model, group, batches, images[share], labels[share], **outer)
            loss = len(share) / len(index) * loss
            (loss + args.pretext_weight * before / len(inner_loops)).backward()
            total += loss.item()
            labelled += len(share)
            seen += len(share) + max(1, args.inner_steps) * sum(len(x) for x, _ in batches.values())
        return total, seen, labelled

    def evaluate(averaged):
        """-> accuracy, the same after adapting, pretext loss, the same after adapting."""
        params, plain = dict(averaged.named_parameters()), predict(averaged, {}, data.test_images)
        votes, losses = torch.zeros_like(plain), []
        for scored, *support in pretext.adaptations(data, args.support == "query", args.batch_size):
            for group in task_groups if tasks else ():
                batches = pretext.batches(group, args.seed, "evaluation", 0, *support)
                loss = pretext_loss(averaged, group, batches)
                adapted, before = adapt(loss, params, first_order=True, **inner)
                losses.append([before.item(), loss(adapted).item()])
                votes[scored] += predict(averaged, adapted, data.test_images[scored])
        before, after = torch.tensor(losses).mean(0).tolist() if losses else (None, None)
        plain, adapted = (accuracy(p, data.test_labels) for p in (plain, votes))
        return (plain, adapted, before, after) if args.inner_steps else (plain, None, before, None)

    run = Run(args, model, pretext.checksum(*pretext_data))
    train(run, "target", args.steps, model, backward, evaluate, args)


def share_out(task_groups, environments):
    """-> (group, environment, share) for each inner loop of a step, the same in every process.

    environments: of the query [B]. share: the positions in it, all of one environment, that fall to
    this group.
    """
    inner_loops = []
    for environment in environments.unique().tolist():
        members = (environments == environment).nonzero().squeeze(1)
        if len(members) < len(task_groups):
            raise ValueError(f"--batch-size {len(environments)}: fewer images than inner loops")
        for group, share in zip(task_groups, members.tensor_split(len(task_groups)), strict=True):
            inner_loops.append((group, environment, share))
    return inner_loops


# --- shared: network ---
def make_encoder(backbone, width):
    """-> f_theta: [N, 3, H, H] -> feature map [N, channels, H/8, H/8], and its channels.

    conv: three blocks of two 3x3 convolutions and max-pooling (Doon et al. 2018, IEEE 8745428), all
    padded, without dropout. resnet18: torchvision's, with a 3x3 stem. Both with GroupNorm, which
    keeps no running statistics: `functional_call` then has no side effect.
    """
    norm = lambda channels: nn.GroupNorm(math.gcd(8, channels), channels)  # noqa: E731
    if backbone == "resnet18":
        net = torchvision.models.resnet18(norm_layer=norm)
        stem = (nn.Conv2d(3, 64, 3, padding=1, bias=False), net.bn1, nn.ReLU())
        return nn.Sequential(*stem, net.layer1, net.layer2, net.layer3, net.layer4), 512
    layers, before = [], 3
    for i, after in enumerate([width, width, 2 * width, 2 * width, 4 * width, 4 * width]):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), norm(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i % 2 else []
        before = after
    return nn.Sequential(*layers), after


class Model(nn.Module):
    """One encoder, a head for each task: `model(images, "rotation")` is what that head says."""

    def __init__(self, encoder, heads, amp=False):
        super().__init__()
        self.encoder, self.heads, self.amp = encoder, nn.ModuleDict(heads), amp

    def forward(self, images, task="target"):  # images [N, 3, H, H] in [0, 1]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            return self.heads[task](self.encoder((images - 0.5) / 0.25)).to(images.dtype)


def classifier(classes):
    """-> a maker of psi: feature map [N, C, h, w] -> pooled to 4x4 -> logits [N, classes]."""
    pooled = (nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return lambda channels: nn.Sequential(*pooled, nn.Linear(16 * channels, classes))


def make_model(heads, args):
    """-> the Model; each part starts from a seed of its own, so it starts the same in each arm."""

    def seeded(part, make, *values):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(pretext.rng(args.seed, f"init {part}").initial_seed())
            return make(*values)

    encoder, channels = seeded("encoder", make_encoder, args.backbone, args.width)
    made = {name: seeded(name, make_head, channels) for name, make_head in heads.items()}
    return Model(encoder, made, args.amp).to(args.device)


@torch.no_grad()
def predict(model, params, images):
    """uint8 [N, 3, H, H] -> class probabilities [N, classes]; params {}: the model's own."""
    parts = images.split(100)
    return torch.cat([functional_call(model, params, (x / 255,)).softmax(1) for x in parts])


def accuracy(probabilities, labels):
    return (probabilities.argmax(1) == labels).double().mean().item()


# --- shared: training ---
# The log. phase: pretrain or target, step: in it; total_step: in the run. The other counts are of
# training alone, from the start: images that went forward, labels used, FLOPs, seconds
COUNTS = ("total_step", "images", "labels", "flops", "seconds")
SCORES = ("accuracy", "accuracy_adapted", "pretext_loss", "pretext_loss_adapted")
COLUMNS = ("phase", "step", *COUNTS, "train_loss", *SCORES)
# `torchrun --nproc-per-node N ARM.py` shares out each step: this process, and how many there are
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Run:
    """OUT/NAME/seed<k>/: config.json, metrics.csv, and checkpoint.pt, which holds the rows too.

    Each file is replaced whole, so a run that was killed, at any moment, goes on from its last
    evaluation when the same command is given again. ValueError: it began with other settings.
    """

    def __init__(self, args, model, data):
        self.folder = Path(args.out, args.name, f"seed{args.seed}")
        self.log, file = self.folder / "metrics.csv", self.folder / "checkpoint.pt"
        self.written = self.log.exists() and self.log.read_text()
        self.config = {"arm": Path(__file__).stem, **vars(args), "data": data}
        self.config["parameters"] = sum(p.numel() for p in model.parameters())
        self.config |= {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
        self.state = {"phase": None, "rows": [], **dict.fromkeys(COUNTS, 0)}
        if args.overwrite or not file.exists():
            return
        try:
            self.state = torch.load(file, args.device, weights_only=True)
            began = dict(self.state["config"])
        except Exception as error:  # torch.load raises all kinds
            raise ValueError(f"{file} is damaged; --overwrite starts again") from error
        for key, now in self.config.items():
            if now != began.get(key) and key not in {*ELSEWHERE, "steps"}:
                holds = f"{self.folder} holds a run with {key} {began.get(key)}, not {now}"
                raise ValueError(f"{holds}; take another --name, or --overwrite")
        if self.state["phase"] == "target" and self.state["total_step"] >= args.steps:
            print(f"{self.folder} holds this run, finished; --overwrite runs it again")
            sys.exit()

    def save(self, row, **state):
        """Adds a row to the log and keeps what the run needs to go on from here."""
        cells = [f"{x:.6g}" if isinstance(x, float) else x for x in row]
        rows = [*self.state["rows"], ",".join("" if x is None else str(x) for x in cells)]
        self.state |= {"config": self.config, "rows": rows, **state}
        if (self.log.exists() and self.log.read_text()) != self.written:
            raise ValueError(f"{self.folder}: another run has written there; take another --name")
        self.written = "\n".join([",".join(COLUMNS), *rows, ""])
        torch.save(self.state, checkpoint := io.BytesIO())
        files = {"config.json": json.dumps(self.config, indent=1).encode()}
        files |= {"metrics.csv": self.written.encode(), "checkpoint.pt": checkpoint.getvalue()}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.folder / f"{name}.new").write_bytes(content)
            os.replace(self.folder / f"{name}.new", self.folder / name)


def train(run, phase, steps, model, backward, evaluate, args):
    """One phase: AdamW along what backward(model, step) adds to p.grad; -> the averaged model.

    backward -> loss, images and labels used. evaluate(averaged model) -> the four SCORES, each may
    be None; pretraining has none. Goes on from `run`'s last row of this phase, if it has one.
    """
    state, flops, losses = run.state, 0, []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
    first = state["step"] if state["phase"] == phase else 0
    bar = tqdm(range(first, steps), phase, initial=first, total=steps, disable=RANK > 0)

    def record(step):
        bar.set_description("evaluating")
        loss = sum(losses) / len(losses) if losses else None
        losses.clear()
        scores = evaluate(averaged.module) if phase == "target" else [None] * len(SCORES)
        row = [phase, step, *(state[name] for name in COUNTS), loss, *scores]
        results = {"loss": loss, "accuracy": scores[0], "adapted": scores[1]}
        said = "  ".join(f"{name} {x:.4f}" for name, x in results.items() if x is not None)
        if RANK == 0:
            run.save(row, phase=phase, step=step, **{n: p.state_dict() for n, p in parts.items()})
            bar.write(f"{phase} {step:5}  {state['seconds']:6.0f} s  {said}")
        bar.set_description(phase)

    if state["phase"] == phase:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    elif phase == "target":
        record(0)
    for step in bar:
        began = time.perf_counter()
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
        for p in trained:
            p.grad = torch.zeros_like(p)  # one of several processes may not reach every head
        counter = FlopCounterMode(display=False)
        with nullcontext() if flops else counter:  # every step of a phase does the same work
            loss, images, labels = backward(model, step)
        flops = flops or counter.get_total_flops()
        sums = torch.tensor([loss, images, labels, flops], dtype=torch.float64, device=args.device)
        if RANKS > 1:
            for tensor in (sums, *(p.grad for p in trained)):
                dist.all_reduce(tensor)
        loss, *work = sums.tolist()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained]).item()
        if not math.isfinite(loss + norm):
            what = f"{phase} step {step + 1}: the loss is {loss}, its gradient's norm {norm}"
            raise ValueError(f"{what}; try a smaller --lr")
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
ELSEWHERE = {"seed", "out", "name", "device", "data_dir", "overwrite", "eval_every", "flat_memory"}
ELSEWHERE |= {"torch", "torchvision"}  # may change, and it is still the same run
DEFAULTS = {"shapes": {"steps": 300}}  # of a dataset, where they are not the usual ones
DEFAULTS["coloured_shapes"] = {"steps": 1000, "image_size": 16, "width": 8, "batch_size": 128}


def fail(message, code=2):
    """Ends with one line that says what is wrong and what to do; code 2: the user can mend it."""
    tqdm.write(f"{Path(__file__).name}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(code)


def common_arguments():
    """-> a parser with what all arms have."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=formatter)
    parser.error = fail
    add = parser.add_argument_group("data").add_argument
    names = ", ".join(pretext.DATASETS)
    add("--dataset", default="shapes", help=f"{names}, or a folder with train/CLASS/, test/CLASS/")
    add("--source", help="second dataset, named likewise; None: cifar100 for cifar10, and so on")
    add("--data-dir", default="data", help="for downloads and decoded folders")
    add("--labels-per-class", type=int, help="the rest are dropped; None: all are kept")
    add("--eval-on", choices=("test", "val"), default="test", help="val: a fifth of the labels")
    add("--image-size", type=int, default=32, help="pixels, a multiple of 8")
    add = parser.add_argument_group("training; for a GPU: --width 64 --steps 20000").add_argument
    add("--steps", type=int, default=2000, help="of the optimizer, pretraining included")
    add("--eval-every", type=int, help="steps; None: a tenth of all")
    add("--batch-size", type=int, default=64, help="labelled images a step")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    add("--warmup-steps", type=int, default=50, help="lr rises over these, in each phase")
    add("--ema", type=float, default=0.98, help="decay of the averaged weights; 0: no average")
    add("--backbone", choices=("conv", "resnet18"), default="conv", help="of the encoder")
    add("--width", type=int, default=16, help="channels of conv's first block")
    add("--amp", action="store_true", help="bfloat16, where the hardware has it")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="what is available here")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add = parser.add_argument_group("log").add_argument
    add("--out", default="runs", help="the log goes to OUT/NAME/seed<k>/")
    add("--name", help="None: arm, dataset, and the flags not at their defaults")
    add("--overwrite", action="store_true", help="start again")
    return parser


def parse(parser):
    """-> the arguments, with the dataset's own defaults, and a name made of what is not default."""
    parser.epilog = f"Defaults that differ with --dataset: {DEFAULTS}"
    parser.set_defaults(**DEFAULTS.get(parser.parse_args().dataset, {}))
    args = parser.parse_args()
    words = [Path(__file__).stem, Path(args.dataset).resolve().name]
    for key, value in vars(args).items():
        if value != parser.get_default(key) and key not in ELSEWHERE | {"dataset"}:
            text = "+".join(value) if isinstance(value, list) else str(value)
            words.append(f"{key}={Path(text).name}")
    args.name = args.name or "-".join(words)[:120]
    args.eval_every = args.eval_every or max(1, args.steps // 10)
    args.source = args.source or pretext.DATASETS.get(args.dataset, (None, None))[1]
    if min(args.steps, args.width, args.batch_size) < 1 or args.image_size not in range(8, 4096, 8):
        fail("--image-size: take a multiple of 8; --steps, --width and --batch-size: from 1 up")
    if RANKS > 1 and args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return args


# --- the arm's own arguments ---
DEFAULTS["coloured_shapes"] |= {"inner": "joint", "inner_lr": 3.0, "pretext_weight": 0.1}


def parse_args():
    parser = common_arguments()
    parser.set_defaults(lr=2e-3)
    add = parser.add_argument_group("algorithm").add_argument
    tasks = [*pretext.DEFAULT_TASKS]
    add("--pretext", nargs="+", choices=pretext.TASKS, default=tasks, help="the inner loop's tasks")
    add("--inner-lr", type=float, default=0.01, help="alpha; 0: joint training, no inner loop")
    add("--inner-steps", type=int, default=1, help="K")
    add("--first-order", action="store_true", help="drop the second derivatives")
    add("--flat-memory", action="store_true", help="memory that does not grow with K; slower")
    add("--pretext-weight", type=float, default=0.3, help="beta")
    inner, support = ("per-task", "joint"), ("disjoint", "query")
    add("--inner", choices=inner, default=inner[0], help="a loop for each task, or one for all")
    add("--support", choices=support, default=support[0], help="query: its own images, unlabelled")
    add("--support-batch-size", type=int, default=32, help="images of each task")
    add("--pretext-images", choices=("target", "both"), default="target", help="both: source's too")
    args = parse(parser)
    if min(args.inner_steps, args.support_batch_size) < 1 or args.inner_lr < 0:
        fail("--inner-steps and --support-batch-size: from 1 up; --inner-lr: from 0 up")
    if args.inner_lr == 0:
        args.inner_steps = 0
        args.pretext = args.pretext if args.pretext_weight else []  # supervised, from scratch
    if args.first_order and args.pretext and not args.pretext_weight:
        fail("--first-order --pretext-weight 0: the pretext heads would never learn; give a weight")
    return args


if __name__ == "__main__":
    try:
        if RANKS > 1:
            dist.init_process_group()
        main()
    except (OSError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail("stopped; the same command goes on from the last row of its log", 130)
