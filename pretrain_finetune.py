"""Pretrain on one task, then fine-tune every weight on the desired task: the usual transfer.

    python pretrain_finetune.py                         # drawn shapes: 82%
    python pretrain_finetune.py --dataset cifar10       # pretrained on CIFAR-100; downloads both
    python pretrain_finetune.py --pretrain-steps 0      # from scratch
    python pretrain_finetune.py --pretrain rotation contrastive --pretext-images both

    --pretrain-steps times   (theta, phi) <- AdamW step on the pretraining loss
    the rest of --steps      (theta, psi) <- AdamW step on CE(psi(f_theta(images)), labels)

theta: encoder f. phi: head of the pretraining task. psi: head of the desired task. The pretraining
loss is cross-entropy on the source's labels, or the mean of pretext losses. Fine-tuning starts from
the running average of the weights, with a fresh optimizer, a fresh head and a fresh warm-up.
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
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import pretext


# --- the algorithm ---
def main():
    args = parse_args()
    load = partial(pretext.load, data_dir=args.data_dir, side=args.image_size, device=args.device)
    data = pretext.limit_labels(load(args.dataset), args.labels_per_class, args.eval_on, args.seed)
    heads, pretraining, source = make_pretraining(data, load, args)
    model = make_model({"target": classifier(data.classes)} | heads, args)
    run = Run(args, model, pretext.checksum(data, *source))

    def evaluate(averaged):
        probabilities = predict(averaged, {}, data.test_images)
        return accuracy(probabilities, data.test_labels), None, None, None

    # A head that a phase does not train stays out of its optimizer, or weight decay would move it
    model.heads["target"].requires_grad_(False)
    if run.state["phase"] != "target":  # else it is over, and weights come with the checkpoint
        averaged = train(run, "pretrain", args.pretrain_steps, model, pretraining, evaluate, args)
        model.load_state_dict(averaged.state_dict())
    model.requires_grad_(False)
    model.encoder.requires_grad_(True)
    model.heads["target"].requires_grad_(True)
    supervised = partial(labelled_backward, data, "target", args)
    train(run, "target", args.steps - args.pretrain_steps, model, supervised, evaluate, args)


# --- the pretraining arms: pretraining ---
def labelled_backward(data, head, args, model, step):
    """Adds the gradient of a labelled batch's cross-entropy; -> it, images, labels.

    Of several processes each takes a part of the batch: what they return adds up.
    """
    purpose = "query" if head == "target" else head
    batch = pretext.labelled_batch(data, step, args.batch_size, args.seed, purpose)
    images, labels, _ = (x.tensor_split(RANKS)[RANK] for x in batch)
    loss = F.cross_entropy(model(images, head), labels, reduction="sum") / args.batch_size
    loss.backward()
    return loss.item(), len(images), len(labels)


def make_pretraining(data, load, args):
    """-> heads of pretraining, what adds the gradient of one of its steps, [the source] if needed.

    supervised: a labelled batch of the source. Pretext tasks: a batch of --batch-size images for
    each, drawn for it alone; the loss is their mean.
    """
    if not args.pretrain_steps:
        return {}, None, []
    needed = args.pretrain == ["supervised"] or args.pretext_images != "target"
    source = [load(args.source, source=True)] if needed else []
    if args.pretrain == ["supervised"]:
        backward = partial(labelled_backward, source[0], "source", args)
        return {"source": classifier(source[0].classes)}, backward, source
    pool, _ = pretext.pool(source if args.pretext_images == "source" else [data, *source])
    any_image = torch.ones(len(pool), dtype=torch.bool, device=pool.device)
    tasks = {name: pretext.TASKS[name](pool) for name in args.pretrain}

    def backward(model, step):
        mine = dict([*tasks.items()][RANK::RANKS])
        support = pool, any_image, args.batch_size, data.flip
        batches = pretext.batches(mine, args.seed, "pretext", step, *support)
        losses = [mine[t].loss(model(x, t), y) / len(tasks) for t, (x, y) in batches.items()]
        for loss in losses:
            loss.backward()
        return sum(x.item() for x in losses), sum(len(x) for x, _ in batches.values()), 0

    return {name: task.make_head for name, task in tasks.items()}, backward, source


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
def parse_args():
    parser = common_arguments()
    add = parser.add_argument_group("algorithm").add_argument
    kinds, whose = ("supervised", *pretext.TASKS), ("target", "source", "both")
    add("--pretrain", nargs="+", choices=kinds, default=[kinds[0]], help="labels, or pretext tasks")
    add("--pretrain-steps", type=int, help="of all --steps; 0: from scratch; None: a quarter")
    add("--pretext-images", choices=whose, default=whose[0], help="whose the pretext tasks see")
    args = parse(parser)
    if args.pretrain_steps is None:
        args.pretrain_steps = math.ceil(args.steps / 4)
    if len(args.pretrain) > 1 and "supervised" in args.pretrain:
        fail(f"--pretrain {' '.join(args.pretrain)}: supervised, or pretext tasks")
    if not 0 <= args.pretrain_steps <= args.steps:
        fail(f"--pretrain-steps {args.pretrain_steps}: not within the {args.steps} of --steps")
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
