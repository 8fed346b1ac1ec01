"""Pretrain on one task, freeze the encoder, train a linear classifier for the desired task on it.

    python linear_probe.py                              # embedded dataset: 58%, 15 s, 2 CPU cores
    python linear_probe.py --dataset cifar10            # pretrained on CIFAR-100; downloads both
    python linear_probe.py --pretrain contrastive --pretrain-steps 250

    --pretrain-steps times   (theta, phi) <- AdamW step on the pretraining loss
    the rest of --steps      psi <- AdamW step on CE(psi(f_theta(images)), labels), theta frozen

theta: encoder f, phi: head of the pretraining task, psi: head of the desired task. The loss is
cross-entropy on the source's labels, or the mean of pretext losses. The probe reads the running
average of the pretrained weights; that not one of their bytes changes is asserted.
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import distributed
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from tqdm import tqdm

import pretext

# --- shared: arguments ---
DATASETS = {  # name: torchvision's class, default source
    "shapes": (None, "shapes"),
    "cifar10": (torchvision.datasets.CIFAR10, "cifar100"),
    "cifar100": (torchvision.datasets.CIFAR100, "cifar10"),
    "mnist": (torchvision.datasets.MNIST, "fashion_mnist"),
    "fashion_mnist": (torchvision.datasets.FashionMNIST, "mnist"),
}
SMALL = {"steps": 300, "eval_every": 50, "batch_size": 64, "width": 16}  # shapes: 2 CPU cores
LARGE = {"steps": 10_000, "eval_every": 500, "batch_size": 128, "width": 32}  # others: one GPU
# Arguments that do not tell one configuration from another
ELSEWHERE = ("seed", "out", "name", "device", "data_dir", "resume", "overwrite")
# This process and their number: `torchrun --nproc-per-node=N ARM.py` shares out each step's work
RANK, RANKS = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def fail(message: object, code: int = 2):
    """End with one line that says what is wrong and what to do; code 2: the user can mend it."""
    # print() would put it at the end of a progress bar
    tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def number(low: float, high: float = 1e9) -> Callable[[str], float]:
    """An argparse type: a number of low's type in [low, high), so neither infinite nor nan."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            if low <= (value := type(low)(text)) < high:
                return value
        is_no = f"is no {type(low).__name__} from {low} to below {high:g}"
        raise argparse.ArgumentTypeError(f"{text!r} {is_no}")

    return convert


def common_arguments(prog: str, about: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every arm has; None stands for a default found later."""
    parser = argparse.ArgumentParser(prog, description=about)
    parser.error = lambda message: fail(f"{message}; see --help")
    sized = {k: f"(default: {SMALL[k]} for shapes, {LARGE[k]} otherwise)" for k in SMALL}
    is_ = "(default: %(default)s)"
    add = parser.add_argument_group("run").add_argument
    add("--steps", type=number(1), help=f"optimizer steps, pretraining included {sized['steps']}")
    add("--eval-every", type=number(1), help=f"steps between evaluations {sized['eval_every']}")
    add("--lr", type=number(1e-9), default=1e-3, help=f"learning rate of AdamW {is_}")
    add("--weight-decay", type=number(0.0), default=0.01, help=f"of AdamW {is_}")
    add("--warmup-steps", type=number(0), default=50, help=f"at the start of a phase {is_}")
    add("--schedule", choices=("constant", "cosine"), default="constant", help=f"of lr {is_}")
    add("--ema", type=number(0.0, 1), default=0.98, help=f"decay of averaged weights, or 0 {is_}")
    add("--seed", type=number(0), default=0, help=f"of everything that is drawn {is_}")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=best, help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--amp", action="store_true", help="bfloat16 autocast: faster where the hardware has it")
    add("--out", default="runs", help=f"the log goes to OUT/NAME/seed<k>/ {is_}")
    add("--name", help="(default: the arm, the dataset and the flags not at their defaults)")
    add("--resume", action="store_true", help="go on where the run broke off, if it did")
    add("--overwrite", action="store_true", help="drop what the run directory holds")
    add = parser.add_argument_group("data and backbone").add_argument
    kinds = f"{', '.join(DATASETS)}, or a folder with train/CLASS/ and test/CLASS/ (or val/CLASS/)"
    known = [f"{source} for {name}" for name, (_, source) in DATASETS.items() if name != source]
    other = ", ".join(["ten other classes for shapes", *known])
    add("--dataset", default="shapes", help=f"desired task: {kinds}; shapes are drawn {is_}")
    add("--source", help=f"second dataset, named like --dataset (default: {other})")
    add("--data-dir", default="data", help=f"for downloads and decoded folders {is_}")
    add("--labels-per-class", type=number(1), help="the rest are dropped (default: all)")
    add("--eval-on", choices=("test", "val"), default="test", help=f"val: 1/5 of labels {is_}")
    add("--batch-size", type=number(1), help=f"labelled images a step {sized['batch_size']}")
    add("--image-size", type=number(8), default=32, help=f"pixels, a multiple of 8 {is_}")
    add("--backbone", choices=("conv", "resnet18"), default="conv", help=f"of the encoder {is_}")
    add("--width", type=number(1), help=f"channels of conv's first block {sized['width']}")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Fill in the defaults that depend on others, name the run, check what all arms share."""
    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(**(SMALL if dataset == "shapes" else LARGE))
    args, plain = parser.parse_args(argv), vars(parser.parse_args([f"--dataset={dataset}"]))
    changed = {k: v for k, v in vars(args).items() if v != plain[k] and k not in ELSEWHERE}
    flags = [f"{k}={'+'.join(v) if isinstance(v, list) else v}" for k, v in changed.items()]
    name = "-".join([Path(parser.prog).stem, dataset, *flags])
    args.name = args.name or re.sub(r"[^\w.=+-]", "_", name)
    args.source = args.source or DATASETS.get(dataset, (None, None))[1]
    for flag, name in ("--dataset", dataset), ("--source", args.source):
        if name is not None and name not in DATASETS and not os.path.isdir(name):
            fail(f"{flag} {name!r}: no such folder, and none of {', '.join(DATASETS)}")
    if args.source == dataset != "shapes":
        fail(f"--source {args.source}: the same as --dataset; take another")
    if RANKS > 1 and args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=args.device).item()
    except Exception:  # each kind of device has its own
        fail(f"--device {args.device!r} is not available here; --device cpu always is")
    if args.batch_size < RANKS:
        fail(f"--batch-size {args.batch_size}: each of {RANKS} processes needs an image")
    if RANKS > 1 and not distributed.is_initialized():
        gpu = None if args.device == "cpu" else torch.device(args.device)
        distributed.init_process_group(device_id=gpu)  # gloo on CPUs, NCCL on GPUs
    if args.image_size % 8:
        fail(f"--image-size {args.image_size}: take a multiple of 8")
    return args


# --- end shared: arguments ---


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common_arguments("linear_probe.py", __doc__.split("\n")[0])
    add = parser.add_argument_group("algorithm").add_argument
    kinds = ("supervised", "none", *pretext.TASKS)
    add("--pretrain", nargs="+", choices=kinds, default=["supervised"], help="supervised: on the"
        " source's labels (default); or pretext tasks; or none")  # fmt: skip
    add("--pretrain-steps", type=number(0), help="of all --steps (default: half of them)")
    add("--pretext-images", choices=("target", "source", "both"), default="target", help="images of"
        " the pretext tasks, without labels (default: %(default)s)")  # fmt: skip
    args = parse(parser, argv)
    if len(args.pretrain) > max(1, len({*args.pretrain} & {*pretext.TASKS})):
        fail(f"--pretrain {' '.join(args.pretrain)}: supervised, none, or pretext tasks, each once")
    if args.pretrain_steps is None:
        args.pretrain_steps = args.steps // 2 if args.pretrain != ["none"] else 0
    if args.pretrain == ["none"] and args.pretrain_steps > 0:
        fail(f"--pretrain none --pretrain-steps {args.pretrain_steps}: nothing to train; take 0")
    if args.pretrain_steps > args.steps:
        fail(f"--pretrain-steps {args.pretrain_steps}: more than the {args.steps} of --steps")
    supervised = args.pretrain == ["supervised"]
    needs_source = supervised or (args.pretext_images != "target" and args.pretrain != ["none"])
    if needs_source and not args.source:
        fail(f"--dataset {args.dataset} has no default source; name one with --source")
    return args


# --- shared: data ---
class Data(NamedTuple):
    """A dataset on the device: images [N, 3, H, W] uint8, labels [N] int64."""

    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    flip: bool  # does a mirrored image keep its label?


def rng(seed: int, purpose: str, step: int = 0, device: str = "cpu") -> torch.Generator:
    """The generator of one purpose at one step: no draw shifts another, none needs to be saved."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def check_memory(name: object, images: int, args: argparse.Namespace) -> None:
    """Fail before `images` of three bytes a pixel are loaded that the memory has no room for."""
    rooms, needed = {}, images * 3 * args.image_size**2
    with suppress(OSError):  # a system other than Linux does not tell
        words = Path("/proc/meminfo").read_text().split()
        rooms["memory"] = int(words[words.index("MemAvailable:") + 1]) << 10
    if torch.device(args.device).type == "cuda":
        rooms[args.device] = torch.cuda.mem_get_info(args.device)[0]
    for place, room in rooms.items():
        if needed > room:
            size = f"{images} images of --image-size {args.image_size} need {needed / 1e9:.1f} GB"
            fail(f"{name}: {size}, {place} has {room / 1e9:.1f} GB left; take a smaller size")


def decode(path: str, side: int) -> torch.Tensor:
    """The central square of an image file of any mode, scaled: [3, side, side] uint8."""
    try:
        image = Image.open(path, formats=("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"))
        if image.mode == "F":
            raise ValueError("floating-point pixels, whose range nobody knows")
        if image.mode[0] == "I":  # 16-bit gray, which convert() would clip at 255
            image = image.point(lambda value: value / 257)
        return pil_to_tensor(ImageOps.fit(image.convert("RGB"), (side, side)))
    except Exception as error:  # Pillow's decoders raise all kinds
        fail(f"{path} can't be read as an image ({error}); repair or remove it")


def load_folder(root: Path, args: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """-> (images, labels) of train/ and of test/ or val/; decoded once, until a file changes."""
    names = ("train", "test" if (root / "test").is_dir() else "val")
    shown = lambda path: Path(path).name[0] != "."  # noqa: E731  (every other file is an image)
    try:
        splits = [torchvision.datasets.ImageFolder(root / n, is_valid_file=shown) for n in names]
        stats = [(path, os.stat(path)) for split in splits for path, _ in split.samples]
    except OSError as error:
        fail(f"{root}: {error}; every class needs images, in train/CLASS/ and test/ or val/CLASS/")
    if odd := {*splits[0].classes} ^ {*splits[1].classes}:
        fail(f"{root}: classes in only one of {' and '.join(names)}: {', '.join(sorted(odd))}")
    check_memory(root, len(stats), args)
    state = repr([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    key, name = hashlib.sha256(state.encode()).hexdigest(), "-".join(root.resolve().parts[-2:])
    copy = Path(args.data_dir, f"decoded-{name}-{args.image_size}.pt")
    with suppress(Exception):  # there is none, it is damaged, or (KeyError) of other files
        return torch.load(copy, weights_only=True)[key]
    decoded = []
    for split in splits:
        bar = tqdm(split.samples, f"decoding {split.root}", leave=False, disable=None)
        images = torch.empty(len(bar), 3, args.image_size, args.image_size, dtype=torch.uint8)
        for i, (path, _) in enumerate(bar):
            images[i] = decode(path, args.image_size)
        decoded.append((images, torch.tensor(split.targets)))
    with suppress(OSError, RuntimeError):  # without a copy, the next run decodes again
        copy.parent.mkdir(parents=True, exist_ok=True)
        torch.save({key: decoded}, f"{copy}.{os.getpid()}")
        os.replace(f"{copy}.{os.getpid()}", copy)
    return decoded


def load(name: str, args: argparse.Namespace, source: bool = False) -> Data:
    """A dataset by its name or folder; `source`: the source classes of shapes."""
    if RANK > 0:
        distributed.barrier()  # the first process downloads and decodes, the others find it
    if name == "shapes":
        classes = "source" if source else "target"
        splits = [pretext.draw_shapes(n, classes, seed) for n, seed in ((2000, 0), (1000, 1))]
    elif name in DATASETS:
        try:
            sets = [DATASETS[name][0](args.data_dir, t, download=True) for t in (True, False)]
        except Exception as error:  # of the network, of the disk, of a reader of damaged files
            ways = "remove damaged files there; --dataset shapes and a folder need no network"
            fail(f"{name} is not in {args.data_dir} and can't be downloaded ({error}); {ways}")
        splits = [(torch.as_tensor(s.data), torch.as_tensor(s.targets)) for s in sets]
        splits = [(x[..., None] if x.ndim == 3 else x, y) for x, y in splits]  # [N, H, W, 1 or 3]
        splits = [(x.expand(-1, -1, -1, 3).movedim(3, 1), y) for x, y in splits]
    else:
        splits = load_folder(Path(name), args)
    if RANK == 0 and RANKS > 1:
        distributed.barrier()
    if name in DATASETS:
        check_memory(name, sum(len(y) for _, y in splits), args)
    size = [args.image_size, args.image_size]
    splits = [(resize(x, size).contiguous().to(args.device), y.to(args.device)) for x, y in splits]
    return Data(*splits[0], *splits[1], flip=name != "mnist")


def load_target(args: argparse.Namespace) -> Data:
    """The desired task within its label budget; with --eval-on val a fifth of that is the test."""
    data, kept, held = load(args.dataset, args), [], []
    order = torch.randperm(len(data.labels), generator=rng(args.seed, "labels")).to(args.device)
    val = args.eval_on == "val"
    for label in data.labels.unique():
        members = order[data.labels[order] == label]
        budget = args.labels_per_class or len(members)
        if not 1 + val <= budget <= len(members):
            take = f"take {1 + val} to {len(members)}, all that class {label} has"
            fail(f"--labels-per-class {budget}, --eval-on {args.eval_on}: {take}")
        cut = val * max(1, budget // 5)
        held.append(members[:cut])
        kept.append(members[cut:budget])
    kept, held = torch.cat(kept), torch.cat(held)
    if val:
        data = data._replace(test_images=data.images[held], test_labels=data.labels[held])
    return data._replace(images=data.images[kept], labels=data.labels[kept])


def augment(images: torch.Tensor, generator: torch.Generator, flip: bool) -> torch.Tensor:
    """[N, 3, H, W] uint8 -> in [0, 1], each image moved by up to H/8 pixels and maybe mirrored."""
    n, _, h, w = images.shape
    draw = partial(torch.randint, generator=generator, device=images.device)
    rows = draw(h // 4 + 1, (n, 1)) + torch.arange(h, device=images.device)
    columns = draw(w // 4 + 1, (n, 1)) + torch.arange(w, device=images.device)
    if flip:
        columns = torch.where(draw(2, (n, 1)) == 1, columns.flip(1), columns)
    padded = F.pad(images, [w // 8, w // 8, h // 8, h // 8])
    each = torch.arange(n, device=images.device)[:, None, None]
    moved = padded[each, :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, 3]
    return moved.permute(0, 3, 1, 2).contiguous() / 255


def labelled_batch(data: Data, step: int, args: argparse.Namespace, purpose: str = "query"):
    """-> images [B, 3, H, W] in [0, 1], labels [B], indices [B]; shuffled epochs, end to end."""
    n, first = len(data.labels), step * args.batch_size
    epochs = range(first // n, (first + args.batch_size - 1) // n + 1)
    orders = [torch.randperm(n, generator=rng(args.seed, purpose, epoch)) for epoch in epochs]
    index = torch.cat(orders)[first - epochs[0] * n :][: args.batch_size].to(args.device)
    generator = rng(args.seed, f"{purpose} augmentation", step, args.device)
    return augment(data.images[index], generator, data.flip), data.labels[index], index


# --- end shared: data ---


# --- shared: backbone ---
class Encoder(nn.Module):
    """theta: images [N, 3, H, W] in [0, 1] -> feature map [N, channels, H/8, W/8].

    conv: three blocks of two 3x3 convolutions and max-pooling, after the CIFAR-10 network of Doon
    et al. 2018 (IEEE 8745428), all padded, without dropout. resnet18: torchvision's, with a 3x3
    stem and no pooling after it. Both with GroupNorm, which keeps no running statistics: so a
    functional call has no side effect.
    """

    def __init__(self, backbone: str, width: int):
        super().__init__()
        norm = lambda channels: nn.GroupNorm(math.gcd(8, channels), channels)  # noqa: E731
        self.channels = 512 if backbone == "resnet18" else 4 * width
        if backbone == "resnet18":
            net = torchvision.models.resnet18(norm_layer=norm)
            stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            layers = [stem, net.bn1, nn.ReLU(), net.layer1, net.layer2, net.layer3, net.layer4]
        else:
            layers, before = [], 3
            for i, after in enumerate([width, width, 2 * width, 2 * width, 4 * width, 4 * width]):
                layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), norm(after)]
                layers += [nn.ReLU(), nn.MaxPool2d(2)] if i % 2 else [nn.ReLU()]
                before = after
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers((images - 0.5) / 0.25)


class Model(nn.Module):
    """One encoder, a head for each task: `model(images, "rotation")` is the output of that head."""

    def __init__(self, encoder: Encoder, heads: dict[str, nn.Module], amp: bool = False):
        super().__init__()
        self.encoder, self.heads, self.amp = encoder, nn.ModuleDict(heads), amp

    def forward(self, images: torch.Tensor, task: str = "target") -> torch.Tensor:
        if not self.amp:
            return self.heads[task](self.encoder(images))
        with torch.autocast(images.device.type, torch.bfloat16):  # weights and losses stay float32
            return self.heads[task](self.encoder(images)).float()


def classifier(classes: int, channels: int) -> nn.Module:
    """Feature map [N, channels, h, w] -> pooled to 4x4 -> logits [N, classes]."""
    pool = nn.AdaptiveAvgPool2d(4)  # nothing to pool at 32x32; one pooled vector learns far slower
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(16 * channels, classes))


def make_model(args: argparse.Namespace, heads: dict[str, Callable[[int], nn.Module]]) -> Model:
    """Every part starts from a seed of its own: the same in each arm, on each device."""

    def seeded(part: str, make: Callable[..., nn.Module], *values) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng(args.seed, f"init {part}").initial_seed())
            return make(*values)

    encoder = seeded("encoder", Encoder, args.backbone, args.width)
    made = {name: seeded(name, make, encoder.channels) for name, make in heads.items()}
    return Model(encoder, made, args.amp).to(args.device)


# --- end shared: backbone ---


# --- the pretraining arms: pretraining ---
def labelled_gradient(
    model: Model, data: Data, step: int, args, purpose: str = "query", head: str = "target"
) -> tuple[torch.Tensor, int, int]:
    """Add the gradient of the cross-entropy of a labelled batch; -> it, images, labels.

    With several processes: of this one's part of the batch, a summand of the whole.
    """
    batch = labelled_batch(data, step, args, purpose)
    images, labels, _ = (x.tensor_split(RANKS)[RANK] for x in batch)
    loss = F.cross_entropy(model(images, head), labels) * (len(labels) / args.batch_size)
    loss.backward()
    return loss.detach(), len(images), len(labels)


def pretraining(args: argparse.Namespace, target: Data) -> tuple[dict, Callable]:
    """-> the heads to make, and what finds the gradient of a pretraining step of a model.

    supervised: a labelled batch of the source. Pretext tasks: a batch of --batch-size images for
    each, drawn for it alone, as in 1708.07860; the loss is their mean.
    """
    source = None
    if args.pretrain == ["supervised"] or (
        args.pretrain != ["none"] and args.pretext_images != "target"
    ):
        source = load(args.source, args, source=True)

    def supervised(model: Model, step: int) -> tuple[dict, int, int]:
        loss, *used = labelled_gradient(model, source, step, args, "source", "source")
        return {"pretrain": loss}, *used

    if args.pretrain == ["none"]:
        return {}, supervised
    if args.pretrain == ["supervised"]:
        return {"source": partial(classifier, int(source.labels.max()) + 1)}, supervised
    pools = {"target": target.images, "source": source and source.images}
    pool = pools.get(args.pretext_images)
    pool = torch.cat([*pools.values()]) if pool is None else pool
    try:
        tasks = {name: pretext.TASKS[name](pool) for name in args.pretrain}
    except ValueError as error:
        fail(error)
    if len(tasks) < RANKS:
        fail(f"{RANKS} processes: --nproc-per-node {len(tasks)} is the most that has work here")

    def self_supervised(model: Model, step: int) -> tuple[dict, int, int]:
        losses, images = {}, 0
        for name, task in [*tasks.items()][RANK::RANKS]:
            draw = rng(args.seed, f"pretext {name}", step, args.device)
            index = torch.randint(len(pool), (args.batch_size,), generator=draw, device=args.device)
            inputs, targets = task.make_batch(augment(pool[index], draw, target.flip), index, draw)
            losses[name] = task.loss(model(inputs, name), targets)
            images += len(inputs)
        loss = torch.stack([*losses.values()]).sum() / len(tasks)
        loss.backward()
        return {n: x.detach() for n, x in {"pretrain": loss, **losses}.items()}, images, 0

    return {name: task.make_head for name, task in tasks.items()}, self_supervised


# --- end the pretraining arms: pretraining ---


def digest(module: nn.Module) -> str:
    """A hash of the bytes of all parameters."""
    values = torch.cat([p.detach().flatten() for p in module.parameters()])
    return hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()


# --- shared: training ---
COUNTS = ["total_step", "images", "labels", "flops", "seconds"]
COLUMNS = ["phase", "step", *COUNTS, "train_loss", "accuracy", "accuracy_adapted"]


@torch.no_grad()
def predict(forward: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """[N, 3, H, W] uint8 -> class probabilities [N, classes]."""
    return torch.cat([forward(part / 255).softmax(1) for part in images.split(100)])


def accuracy(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The fraction of images whose most probable class is their label."""
    return (probabilities.argmax(1) == labels).double().mean().item()


def commit() -> str | None:
    """The commit of the git repository that holds this file, if one does."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"]
    with suppress(OSError):
        return subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def replace(path: Path, write: Callable) -> None:
    """Write a file beside `path`, then rename it: at any moment the old or the new one is whole."""
    with open(f"{path}.new", "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


class Run:
    """A run directory, OUT/NAME/seed<k>/: config.json, metrics.csv, checkpoint.pt; and signals."""

    def __init__(self, args: argparse.Namespace, model: nn.Module):
        self.args, self.signal, self.state = args, 0, None
        self.counts = dict.fromkeys([*COUNTS, "loss", "losses"], 0)
        self.directory = Path(args.out, args.name, f"seed{args.seed}")
        files = ("config.json", "metrics.csv", "checkpoint.pt")
        self.config, self.log, self.checkpoint = (self.directory / file for file in files)
        config = {
            "arm": Path(__file__).stem,
            "name": args.name,
            "arguments": vars(args).copy(),
            "versions": {m.__name__: m.__version__ for m in (torch, torchvision)},
            "commit": commit(),
            "processes": RANKS,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            held = self.config.exists() or self.checkpoint.exists()
            if held and (args.resume or not args.overwrite):
                self.look_back()
            if RANKS > 1:
                distributed.barrier()  # until each has looked back
            if not self.state and RANK == 0:  # nothing older may be taken for the new run's own
                self.checkpoint.unlink(missing_ok=True)
                self.log.write_text(",".join(COLUMNS) + "\n")
            if RANK == 0:
                replace(self.config, lambda file: file.write(json.dumps(config, indent=1).encode()))
        except OSError as error:
            fail(f"--out {args.out}: {error}; take a directory that can be written")
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, self.stop)

    def look_back(self) -> None:
        """Refuse another configuration, leave a finished run alone, go on with a broken-off one."""
        file = self.config
        try:
            old = dict(json.loads(file.read_bytes())["arguments"])
            longer = self.args.schedule == "constant" and self.args.steps > old["steps"]
            file, done = self.checkpoint, 0
            if not file.exists():  # a finished log may be kept without its checkpoint
                with suppress(OSError, ValueError, IndexError):
                    done = int(self.log.read_text().split("\n")[-2].split(",")[2])  # not a torn row
            else:
                self.state = torch.load(file, "cpu", weights_only=True)
                self.counts = {name: self.state["counts"][name] for name in self.counts}
                done = self.counts["total_step"]
                log_bytes, file = self.state["log_bytes"], self.log
                if file.stat().st_size < log_bytes:
                    raise EOFError
        except Exception as error:
            fail(f"{file} is missing or damaged ({type(error).__name__}); --overwrite starts again")
        for key, value in vars(self.args).items():
            same = (old.get(key) or None) == (value or None)  # older runs lack newer flags
            if key not in ELSEWHERE and not same and not (longer and key == "steps"):
                was = f"--{key.replace('_', '-')} {old.get(key)}, not {value}; take another --name"
                fail(f"{self.directory} holds a run with {was}, or --overwrite")
        if done >= self.args.steps:
            print(f"{self.directory} holds this run, finished; --overwrite runs it again")
            raise SystemExit(0)
        if not self.args.resume:
            ways = "--resume goes on with it, --overwrite starts again"
            fail(f"{self.directory} holds an unfinished run; {ways}")

    def restore(self, phase: str, steps: int, parts: dict) -> int:
        """-> the step to begin a phase at; the parts and the log as the checkpoint has them."""
        if not self.state:
            return 0
        try:
            if phase == "pretrain" and self.state["phase"] == "target":
                return steps
            for name, part in parts.items():
                part.load_state_dict(self.state[name])
            if RANK == 0:
                os.truncate(self.log, self.state["log_bytes"])  # later rows are written again
            step, self.state = int(self.state["step"]), None
            return step
        except Exception as error:
            why = f"does not fit this run ({type(error).__name__})"
            fail(f"{self.checkpoint} {why}; --overwrite starts again")

    def stop(self, number: int, _frame: object) -> None:
        """The first signal ends the run after this step, a second one at once."""
        self.signal = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)

    def save(self, phase: str, step: int, parts: dict, accuracies: tuple | None) -> None:
        """A row of the log, if there are accuracies, and the checkpoint that goes with it."""
        if accuracies:
            self.row(phase, step, accuracies)
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= dict(phase=phase, step=step, counts=self.counts, log_bytes=self.log.stat().st_size)
        replace(self.checkpoint, partial(torch.save, state))

    def row(self, phase: str, step: int, accuracies: tuple[float | None, float | None]) -> None:
        """One line in the log, one on the screen."""
        loss, seconds = self.counts["loss"] / self.counts["losses"], self.counts["seconds"]
        fields = [phase, step, *(self.counts[name] for name in COUNTS), loss, *accuracies]
        self.counts |= {"loss": 0, "losses": 0}
        text = ["" if x is None else f"{x:.6g}" if isinstance(x, float) else str(x) for x in fields]
        with open(self.log, "a") as file:
            file.write(",".join(text) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = " adapted ".join(f"{x:6.2%}" for x in accuracies if x is not None) or "-"
        tqdm.write(f"{phase:8} {step:6} {seconds:8.1f} s  loss {loss:7.4f}  accuracy {shown}")


def over_ranks(numbers: list[int], device: str, op: str = "SUM") -> list[int]:
    """The sum, or MAX, of each number over the processes that torchrun started."""
    if RANKS == 1:
        return numbers
    together = torch.tensor(numbers, device=device)
    distributed.all_reduce(together, getattr(distributed.ReduceOp, op))
    return together.tolist()


def train(
    run: Run,
    phase: str,
    steps: int,
    model: nn.Module,
    step_gradient: Callable[[int], tuple],
    evaluate: Callable[[nn.Module], tuple] = lambda averaged: (None, None),
) -> nn.Module:
    """One phase: AdamW along what `step_gradient` finds; returns the running average of the model.

    step_gradient(step) adds to p.grad and returns (losses by name, images, labels) that it used,
    of several processes each its summand; losses[phase] is logged. evaluate(averaged model)
    returns (accuracy, accuracy_adapted).
    """
    args, flops, shown = run.args, 0, {}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, args.lr, weight_decay=args.weight_decay)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    parts = {"model": model, "average": average, "optimizer": optimizer}
    first = run.restore(phase, steps, parts)
    shape = {"initial": first, "total": steps, "dynamic_ncols": True, "disable": RANK > 0}
    bar = tqdm(range(first, steps), phase, **shape)
    for step in bar:
        began = time.perf_counter()
        warm = min(1.0, (step + 1) / max(1, args.warmup_steps))
        decay = (1 + math.cos(math.pi * step / steps)) / 2 if args.schedule == "cosine" else 1.0
        optimizer.param_groups[0]["lr"] = args.lr * warm * decay
        for p in trained:
            p.grad = torch.zeros_like(p)
        with nullcontext() if flops else FlopCounterMode(display=False) as counter:
            losses, images, labels = step_gradient(step)
        flops = flops or counter.get_total_flops()  # every step of a phase does the same work
        if RANKS > 1:
            summands = [*(p.grad for p in trained), losses[phase]]
            flat = parameters_to_vector(summands)
            distributed.all_reduce(flat)
            vector_to_parameters(flat, summands)
        work = over_ranks([images, labels, flops], args.device)
        losses["gradient"] = torch.nn.utils.get_total_norm([p.grad for p in trained])
        losses = dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True))
        if bad := [f"{name} {x}" for name, x in losses.items() if not math.isfinite(x)]:
            last = run.checkpoint if run.checkpoint.exists() else "none"
            why = f"{phase} step {step + 1}: {', '.join(bad)}, so the step is not taken"
            fail(f"{why}; last checkpoint: {last}; try a smaller --lr", 1)
        optimizer.step()
        average.update_parameters(model)
        used = [1, *work, time.perf_counter() - began, losses[phase], 1]
        run.counts = {k: n + more for (k, n), more in zip(run.counts.items(), used, strict=True)}
        now = (step + 1) % args.eval_every == 0 or step + 1 == steps
        accuracies = evaluate(average.module) if now and RANK == 0 else None
        if accuracies and accuracies[0] is not None:
            shown = {"accuracy": f"{accuracies[0]:.2%}"}
        bar.set_postfix(loss=f"{losses[phase]:.3f}", **shown, refresh=False)
        # A signal that comes from here on waits for the next step
        (stopped,) = over_ranks([run.signal], args.device, "MAX")
        try:
            if RANK == 0 and (now or stopped):
                run.save(phase, step + 1, parts, accuracies)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch.save's, of a full disk
            why = f"can't be written ({error}); make room"
            fail(f"{run.directory} {why}, then --resume: the last checkpoint is whole", 1)
        if stopped:
            where = f"stopped after {phase} step {step + 1}"
            fail(f"{where}; the same command with --resume goes on", 128 + stopped)
    return average.module


# --- end shared: training ---


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    data = load_target(args)
    heads, pretraining_gradient = pretraining(args, data)
    classes = int(data.labels.max()) + 1
    model = make_model(args, {"target": partial(classifier, classes)} | heads)
    run = Run(args, model)

    digests = set()  # of the encoder, before the first step of the probe and after the last

    def probing_gradient(step: int) -> tuple[dict, int, int]:
        if not digests:
            digests.add(digest(model.encoder))
        loss, *used = labelled_gradient(model, data, step, args)
        return {"target": loss}, *used

    def evaluate(averaged: Model) -> tuple[float, None]:
        return accuracy(predict(averaged, data.test_images), data.test_labels), None

    # A head that a phase does not train stays out of its optimizer, or weight decay would move it.
    # Resumed in the second phase, the first does nothing and all weights come with the checkpoint.
    model.heads["target"].requires_grad_(False)
    averaged = train(
        run, "pretrain", args.pretrain_steps, model, partial(pretraining_gradient, model)
    )
    model.load_state_dict(averaged.state_dict())
    model.requires_grad_(False)
    model.heads["target"].requires_grad_(True)
    steps = args.steps - args.pretrain_steps
    train(run, "target", steps, model, probing_gradient, evaluate)
    digests.add(digest(model.encoder))
    assert len(digests) == 1, "the probe has changed the encoder"
    if RANK == 0:
        print(f"log: {run.log}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a Run takes care of it
    main()
    if RANKS > 1:
        distributed.destroy_process_group()
