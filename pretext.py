"""The data that every arm sees, and the pretext tasks made from it: all they share.

    python pretext.py [IMAGE ...] [--out pretext.png]    # draws what each task asks

The data stand here because they belong to the problem and not to a way of solving it:
every arm must see the same images, labels and batches. A pretext task makes labels
out of images alone; a new one is a class like `Task` and a line in TASKS.

In shapes: N images of a batch, M of a set, H their side in pixels, a multiple of 8.
Whatever is drawn at random comes from a generator that is handed in.
"""

import argparse
import hashlib
import inspect
import math
import os
import re
import stat
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Generator, Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from tqdm import tqdm

# --- the data: what a dataset is ---
# name: (its class in torchvision or None, the default --source). Another one is a line:
# the class takes a folder, train and download, and gives (Pillow image, label) pairs
DATASETS = {
    "coloured_shapes": (None, "shapes"),
    "shapes": (None, "shapes"),
    "cifar10": (torchvision.datasets.CIFAR10, "cifar100"),
    "cifar100": (torchvision.datasets.CIFAR100, "cifar10"),
    "mnist": (torchvision.datasets.MNIST, "fashion_mnist"),
    "fashion_mnist": (torchvision.datasets.FashionMNIST, "mnist"),
}
LIMITS = {"coloured_shapes": 0.75}  # the most that a rule for one image can expect
ADAPT_TO = 256  # evaluation adapts to so many unlabelled images of an environment


class Split(NamedTuple):
    """M images on the device. An environment has a distribution of its own: a camera,
    a hospital, a writer. Most datasets have one."""

    images: Tensor  # uint8 [M, 3, H, H]
    labels: Tensor  # int64 [M], places in Data.classes
    environments: Tensor  # int64 [M], places in Data.environments

    def take(self, index: Tensor) -> "Split":
        """The part that an index or a mask picks."""
        return Split(*(tensor[index] for tensor in self))


class Data(NamedTuple):
    """A dataset. Its test set may have environments that training has not."""

    train: Split
    test: Split  # what is scored
    classes: list[str]
    environments: list[str]
    mirror: bool  # may images be mirrored?
    unlabelled: Split | None = None  # evaluation adapts to some of these ...
    aside: Tensor | None = None  # ... namely to those, bool [M]


class Batch(NamedTuple):
    """Labelled images of one step, augmented."""

    images: Tensor  # [B, 3, H, H] in [0, 1]
    labels: Tensor  # [B]
    indices: Tensor  # [B], places in the training set
    environments: Tensor  # [B]


def rng(seed: int, purpose: str, step: int = 0, device: str = "cpu") -> Generator:
    """The generator of one purpose at one step: no draw shifts another."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def say(text: str) -> None:
    """Prints a line, once, however many processes there are."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(text)


# --- the data: reading it ---
def is_gray(images: Tensor) -> bool:
    """Whether the three channels of uint8 images [M, 3, H, W] are equal everywhere."""
    return bool((images[:, :1] == images[:, 1:]).all())


def is_deep(image: Image.Image) -> bool:
    """Whether a file has more than 8 bits a channel: Pillow would cut some off."""
    tiff_bits = getattr(image, "tag_v2", {}).get(258, (8,))
    if image.mode[0] in "IF" or max(tiff_bits) > 8:
        return True
    for codec, _, _, layout in image.tile:  # layout: such as RGB;16B
        if re.search(";16[BLN]", str(layout)) or (codec == "ppm" and layout[1] > 255):
            return True
    return False


def decode(path: str | Path, side: int) -> Tensor:
    """The central square of an image file, upright, scaled: uint8 [3, side, side].

    Transparent pixels lie on mid-gray. ValueError: it can't be read, holds several
    pictures, or has more than 8 bits a channel.
    """
    formats = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")
        with Image.open(path, formats=formats) as image:
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise ValueError(f"it has {image.n_frames} pictures")
            if is_deep(image):
                raise ValueError("it has more than 8 bits a channel")
            image.draft(None, (2 * side, 2 * side))  # a large JPEG is read at less
            with suppress(Exception):  # bad metadata are not bad pixels
                image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                gray = Image.new("RGBA", image.size, (128, 128, 128))
                image = Image.alpha_composite(gray, image.convert("RGBA"))
            return pil_to_tensor(ImageOps.fit(image.convert("RGB"), (side, side)))
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"{path}: it is none of {', '.join(formats)}") from error
    except Exception as error:  # Pillow's decoders raise all kinds
        raise ValueError(f"{path}: {error}") from error


def decode_all(paths: list[str], side: int) -> Tensor:
    """uint8 [M, 3, side, side]. ValueError names the files that can't be read."""
    good, bad = [], []

    def attempt(path: str) -> Tensor | str:
        try:
            return decode(path, side)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(attempt, paths)
        for each in tqdm(found, "decoding", len(paths), leave=False, disable=None):
            (bad if isinstance(each, str) else good).append(each)
    if bad:
        which = "; ".join(bad[:10]) + ("; ..." if len(bad) > 10 else "")
        raise ValueError(f"{len(bad)} files are no images, remove or convert: {which}")
    return torch.stack(good)


def is_shown(name: str) -> bool:
    """Whether a file or folder is the user's own: not hidden, not the system's."""
    system = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found")
    return name[0] not in ".@$#" and name.lower() not in system


def class_names(folder: Path) -> list[str]:
    """Its shown folders."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and is_shown(p.name))


class Folder(torchvision.datasets.ImageFolder):
    """CLASS/.../FILE: every shown file, `samples` and `targets` as torchvision's."""

    def __init__(self, root: Path):
        parts = lambda path: Path(path).relative_to(root).parts  # noqa: E731
        super().__init__(root, is_valid_file=lambda p: all(map(is_shown, parts(p))))
        self.between = [parts(path)[1:-1] for path, _ in self.samples]

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        classes = class_names(Path(directory))
        return classes, {name: i for i, name in enumerate(classes)}

    def decoded(self, side: int, data_dir: str) -> Tensor:
        """uint8 [M, 3, side, side], decoded once: until whatever decides it changes."""
        key = [side, PIL.__version__, *map(inspect.getsource, (decode, is_deep))]
        for path, _ in self.samples:
            file = os.stat(path)
            key += [os.path.abspath(path), file.st_dev, file.st_ino, file.st_size]
            key += [file.st_mtime_ns, file.st_ctime_ns]
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        copy = Path(data_dir, f"decoded-{digest}")
        with suppress(Exception):  # there is none yet, or it is damaged
            return torch.load(copy, weights_only=True)
        images = decode_all([path for path, _ in self.samples], side)
        with suppress(OSError, RuntimeError):  # without a copy it is decoded again
            copy.parent.mkdir(parents=True, exist_ok=True)
            torch.save(images, f"{copy}.{os.getpid()}")
            os.replace(f"{copy}.{os.getpid()}", copy)
        return images


def find_splits(root: Path) -> tuple[Path, Path]:
    """The folders train and test, or of what else holds the same classes for a test."""
    names = ("test", "val", "valid", "validation")
    folders = {p.name.lower(): p for p in sorted(root.iterdir()) if p.is_dir()}
    train, tests = folders.get("train"), [folders[n] for n in names if n in folders]
    if not train or not tests:
        looked = f"train and one of {', '.join(names)}, each with a folder for a class"
        raise ValueError(f"{root} has not the folders {looked}")
    classes = class_names(train)
    if len(classes) < 2:
        raise ValueError(f"{train} has {len(classes)} classes: nothing to learn")
    for test in tests:
        if class_names(test) == classes:
            return train, test
    odd = sorted({*classes} ^ {*class_names(tests[0])})
    raise ValueError(f"{train} and {tests[0]} differ in the classes {', '.join(odd)}")


def environment_names(folder: Folder) -> list[str]:
    """Of each file. ValueError: it has none, or several."""
    for (path, _), between in zip(folder.samples, folder.between, strict=True):
        if len(between) != 1:
            raise ValueError(f"--environments: {path} is not in CLASS/ENVIRONMENT/")
    return [name for (name,) in folder.between]


def load_folder(root: Path, data_dir: str, side: int, environments: bool) -> Data:
    """SPLIT/CLASS/.../FILE, or SPLIT/CLASS/ENVIRONMENT/FILE."""
    folders = [Folder(path) for path in find_splits(root)]
    say(f"{root}: {folders[0].root.name} is learned, {folders[1].root.name} is scored")
    if environments:
        homes = [environment_names(folder) for folder in folders]
    else:
        homes = [["all"] * len(folder.samples) for folder in folders]
        if any(any(folder.between) for folder in folders):
            say("Folders below the classes mean nothing without --environments")
    kinds = Counter(home for home, _ in {*zip(homes[0], folders[0].targets)})
    if lonely := sorted(home for home, classes in kinds.items() if classes == 1):
        why = f"training images of one class only in {', '.join(lonely[:10])}"
        raise ValueError(f"--environments: {why}; leave these out, or the flag")
    names = [*sorted({*homes[0]}), *sorted({*homes[1]} - {*homes[0]})]
    places = {name: i for i, name in enumerate(names)}
    splits = []
    for folder, home in zip(folders, homes, strict=True):
        images = folder.decoded(side, data_dir)
        environment = torch.tensor([places[name] for name in home])
        splits.append(Split(images, torch.tensor(folder.targets), environment))
    return Data(*splits, folders[0].classes, names, not is_gray(splits[0].images))


def load_torchvision(name: str, data_dir: str, side: int) -> Data:
    """One of DATASETS; downloads it where it is not there yet."""
    splits = []
    try:
        for train in True, False:
            dataset = DATASETS[name][0](data_dir, train=train, download=True)
            images, labels = zip(*((pil_to_tensor(x), y) for x, y in dataset))
            images, labels = torch.stack(images), torch.tensor(labels)
            images = resize(images, [side, side]).expand(-1, 3, -1, -1).contiguous()
            splits.append(Split(images, labels, torch.zeros_like(labels)))
    except Exception as error:  # of the network, the disk, a reader of damaged files
        why = f"{name} is not in {data_dir} and can't be downloaded ({error})"
        ways = "remove what is damaged; drawn shapes and a folder need no network"
        raise ValueError(f"{why}; {ways}") from error
    numbers = range(int(splits[0].labels.max()) + 1)
    classes = [str(name) for name in getattr(dataset, "classes", numbers)]
    return Data(*splits, classes, ["all"], not is_gray(splits[0].images))


def load_drawn(name: str, source: bool, side: int) -> Data:
    """coloured_shapes, or shapes; source: of the ten other classes."""
    if name == "coloured_shapes":
        sets = [draw_coloured_shapes(5000, (0.8, 0.1), 0)]
        sets += [draw_coloured_shapes(1256, (0.8, 0.1, 0.9), 1)]
        classes, names = ["star", "ring"], ["80%", "10%", "90%"]
    else:
        kind = "source" if source else "target"
        sets = [draw_shapes(2000, kind, 0), draw_shapes(1000, kind, 1)]
        sets = [(*drawn, torch.zeros_like(drawn[1])) for drawn in sets]
        classes, names = [text.split()[0] for text in SHAPES[kind].split(",")], ["all"]
    splits = [Split(resize(drawn[0], [side, side]), *drawn[1:]) for drawn in sets]
    return Data(*splits, classes, names, mirror=True)


def check(name: str | None, environments: bool = False) -> None:
    """ValueError: there is no such dataset. It is quick: nothing is decoded."""
    if name is None:
        raise ValueError("there is no default for --source: name what to pretrain on")
    if name in DATASETS and environments:
        raise ValueError(f"--environments is for a folder, not for {name}")
    if name not in DATASETS and not Path(name).is_dir():
        raise ValueError(f"{name}: no such folder, and none of {', '.join(DATASETS)}")
    if name not in DATASETS:
        find_splits(Path(name))


def load(
    name: str, data_dir: str, side: int, device: str, source=False, environments=False,
    mirror: bool | None = None,
) -> Data:  # fmt: skip
    """A whole dataset, by its name or folder.

    source: as what is pretrained on (of shapes the other classes). environments: they
    are a folder's folders below its classes. mirror: None mirrors images that are not
    gray, as digits are not mirror-symmetric. ValueError: it can't be had or read.
    """
    check(name, environments)
    rank = dist.get_rank() if dist.is_initialized() else None
    if rank:
        dist.barrier()  # the first process downloads and decodes, the others find it
    if name in ("shapes", "coloured_shapes"):
        data = load_drawn(name, source, side)
    elif name in DATASETS:
        data = load_torchvision(name, data_dir, side)
    else:
        data = load_folder(Path(name), data_dir, side, environments)
    if rank == 0:
        dist.barrier()
    if name in DATASETS and Path(name).is_dir():
        say(f"{name} is the built-in dataset; your folder is ./{name}")
    train, test = (Split(*(x.to(device) for x in split)) for split in data[:2])
    mirror = data.mirror if mirror is None else mirror
    return data._replace(train=train, test=test, mirror=mirror)


# --- the data: what the desired task has of it ---
def desired_task(data: Data, per_class: int | None, eval_on: str, seed: int) -> Data:
    """Its labelled images, `per_class` or all, and what is set aside to adapt to.

    eval_on "val": a fifth of them is held out and takes the place of the test set.
    """
    train, test = limit_labels(data, per_class, seed), data.test
    if eval_on == "val":
        train, test = hold_out(train)
    if len(data.environments) > 1:
        train, test = without_single(train), without_single(test)
    return set_aside(data._replace(train=train, test=test), seed)


def by_kind(split: Split, order: Tensor) -> list[Tensor]:
    """`order`, indices of the split, in parts of one class and environment each."""
    kinds = split.labels * (split.environments.max() + 1) + split.environments
    order = order[kinds[order].argsort(stable=True)]
    counts = kinds[order].unique_consecutive(return_counts=True)[1]
    return list(order.split(counts.tolist()))


def share_out(budget: int, rooms: list[int]) -> list[int]:
    """The budget in parts that are as equal as can be, none larger than its room."""
    parts = [0] * len(rooms)
    while budget:
        free = [i for i, room in enumerate(rooms) if parts[i] < room]
        each = max(1, budget // len(free))
        for i in free[:budget]:
            more = min(each, rooms[i] - parts[i])
            parts[i] += more
            budget -= more
    return parts


def limit_labels(data: Data, per_class: int | None, seed: int) -> Split:
    """Training images: so many of a class, in equal parts from its environments."""
    train, kept = data.train, []
    order = torch.randperm(len(train.labels), generator=rng(seed, "labels"))
    kinds = by_kind(train, order.to(train.labels.device))
    if per_class is None:
        return train.take(torch.cat(kinds))
    labels = [int(train.labels[kind[0]]) for kind in kinds]
    for label, name in enumerate(data.classes):
        members = [k for k, of in zip(kinds, labels, strict=True) if of == label]
        rooms = [len(kind) for kind in members]
        if not 1 <= per_class <= sum(rooms):
            why = f"class {name} has {sum(rooms)} images; take 1 to {sum(rooms)}"
            raise ValueError(f"--labels-per-class {per_class}: {why}")
        parts = zip(members, share_out(per_class, rooms), strict=True)
        kept += [kind[:part] for kind, part in parts]
    return train.take(torch.cat(kept))


def hold_out(train: Split) -> tuple[Split, Split]:
    """Training images without a fifth of each class and environment, and this fifth."""
    kept, held = [], []
    everything = torch.arange(len(train.labels), device=train.labels.device)
    for kind in by_kind(train, everything):
        cut = max(1, len(kind) // 5) if len(kind) > 1 else 0
        held.append(kind[:cut])
        kept.append(kind[cut:])
    if not sum(map(len, held)):
        why = "a fifth of each class is held out, but there is one image of each"
        raise ValueError(f"--eval-on val: {why}; raise --labels-per-class")
    return train.take(torch.cat(kept)), train.take(torch.cat(held))


def without_single(split: Split) -> Split:
    """Without environments of one image: nothing would be left to adapt to."""
    counts = split.environments.bincount()
    return split.take(counts[split.environments] > 1)


def set_aside(data: Data, seed: int) -> Data:
    """Chooses what evaluation adapts to: up to ADAPT_TO images of each environment.

    With one environment they are training images. Where there are several they are
    test images, at most half of an environment, and are then scored by nobody.
    """
    several = bool(data.train.environments.any() or data.test.environments.any())
    home = data.test if several else data.train
    aside = torch.zeros_like(home.labels, dtype=torch.bool)
    for environment in home.environments.unique():
        members = (home.environments == environment).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=rng(seed, "evaluation"))
        count = min(ADAPT_TO, len(members) // 2) if several else ADAPT_TO
        aside[members[order[:count].to(members.device)]] = True
    test = data.test.take(~aside) if several else data.test
    return data._replace(test=test, unlabelled=home, aside=aside)


def describe(name: str, data: Data) -> str:
    """One line that says what was read."""
    train, test = data.train, data.test
    text = f"{name}: {len(train.labels):,} images of {len(data.classes)} classes"
    homes, tested = (set(split.environments.tolist()) for split in (train, test))
    new = [data.environments[i] for i in sorted(tested - homes)]
    if len(data.environments) > 1:
        text += f" in {len(homes)} environments"
    text += f"; {len(test.labels):,} are scored"
    if len(data.environments) > 1:
        text += f" in {len(tested)}, of which {len(new)} are new"
        text += f" ({', '.join(new[:5])}{', ...' * (len(new) > 5)})" if new else ""
    return text + ("; mirrored" if data.mirror else "; not mirrored")


def checksum(*datasets: Data) -> str:
    """A digest of all images and labels: a run goes on only with what it began with."""
    digest = hashlib.sha256()
    for data in datasets:
        for tensor in (*data.train, *data.test):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- the data: batches ---
def mirror(images: Tensor, generator: Generator, allowed: bool) -> Tensor:
    """uint8 [N, 3, H, H] -> in [0, 1], each mirrored or not.

    That is all that is done to support images: a shift would fill a border with black,
    which tells a pretext task what it should not know.
    """
    how = {"generator": generator, "device": images.device}
    coin = torch.randint(2, (len(images), 1, 1, 1), **how)
    return torch.where(coin * allowed == 1, images.flip(3), images) / 255


def shift(images: Tensor, generator: Generator) -> Tensor:
    """[N, 3, H, H], each moved by up to H/8 pixels both ways, out of black borders."""
    n, _, side, _ = images.shape
    how = {"generator": generator, "device": images.device}
    top, left = (torch.randint(side // 4 + 1, (n,), **how) for _ in range(2))
    windows = F.pad(images, [side // 8] * 4).unfold(2, side, 1).unfold(3, side, 1)
    return windows[torch.arange(n, device=images.device), :, top, left]


def draw_query(images: int, count: int, turn: int, seed: int, name: str) -> Tensor:
    """`count` of so many images, out of shuffled epochs end to end.

    Of an environment with no more images than that, half are taken again and again: so
    the other half is left for the support.
    """
    if images <= count:
        order = torch.randperm(images, generator=rng(seed, name, turn))
        return order[torch.arange(count) % max(1, images // 2)]
    epoch, begin = divmod(turn * count, images)
    epochs = [rng(seed, name, epoch), rng(seed, name, epoch + 1)]
    orders = [torch.randperm(images, generator=generator) for generator in epochs]
    return torch.cat(orders)[begin:][:count]


def labelled_batch(
    data: Data, step: int, size: int, most: int, seed: int, purpose: str = "query"
) -> Batch:
    """`size` images in equal parts from `most` environments, or from all there are.

    Of more than that each step takes others, out of shuffled epochs.
    """
    train, parts, turn = data.train, [], step
    homes = train.environments.unique().cpu()
    if len(homes) > most:
        turn, place = divmod(step, len(homes) // most)
        order = torch.randperm(len(homes), generator=rng(seed, "environments", turn))
        homes = homes[order[most * place :][:most].sort().values]
    for i, environment in enumerate(homes.tolist()):
        members = (train.environments == environment).nonzero().squeeze(1)
        count = size // len(homes) + (i < size % len(homes))
        # the first one's draws are those of a dataset with one environment
        name = f"{purpose} {environment}" if environment else purpose
        drawn = draw_query(len(members), count, turn, seed, name)
        parts.append(members[drawn.to(members.device)])
    index = torch.cat(parts)
    generator = rng(seed, f"{purpose} augmentation", step, index.device)
    images = mirror(shift(train.images[index], generator), generator, data.mirror)
    return Batch(images, train.labels[index], index, train.environments[index])


def join(train: Split, source: Split) -> Split:
    """The images of both, for pretext tasks: those of the source have no label here."""
    if train.environments.any():
        raise ValueError("--pretext-images: the source's are of no known environment")
    images = torch.cat((train.images, source.images))
    labels = torch.cat((train.labels, torch.full_like(source.labels, -1)))
    return Split(images, labels, torch.zeros_like(labels))


def draw(candidates: Tensor, count: int, generator: Generator) -> Tensor:
    """Indices of `count` of the candidates, bool [M], or of all if there are fewer."""
    how = {"generator": generator, "device": candidates.device}
    order = torch.rand(len(candidates), **how).masked_fill(~candidates, 2.0)
    return order.topk(min(count, int(candidates.sum())), largest=False).indices


Batches = dict[str, tuple[Tensor, Tensor]]  # {task: (inputs, targets)}
Key = tuple[int, str, int]  # seed, purpose, step: what a draw is for


def make_batches(tasks: dict, images: Tensor, indices: Tensor, key: Key) -> Batches:
    """What each task makes of the same images, [N, 3, H, H] in [0, 1]."""
    made, (seed, purpose, step) = {}, key
    for name, task in tasks.items():
        generator = rng(seed, f"{purpose} {name}", step, images.device)
        made[name] = task.make_batch(images, indices, generator)
    return made


def draw_batches(
    tasks: dict, split: Split, candidates: Tensor, count: int, flip: bool, key: Key
) -> Batches:
    """What each task makes of images that it draws for itself out of the candidates."""
    made, (seed, purpose, step) = {}, key
    for name, task in tasks.items():
        generator = rng(seed, f"{purpose} {name}", step, candidates.device)
        indices = draw(candidates, count, generator)
        images = mirror(split.images[indices], generator, flip)
        made[name] = task.make_batch(images, indices, generator)
    return made


# --- the pretext tasks ---
class Task(Protocol):
    """What a pretext task has. Its attributes, tensors and numbers, are saved with it.

    `answers`, if it has any, name its classes in the figure. Nothing in it makes a GPU
    wait for the host, once it is made.
    """

    def __init__(self, images: Tensor, mirror: bool = True):
        """images: for training, uint8 [M, 3, H, H]. mirror: may they be mirrored?

        ValueError: the task can't use them.
        """

    def make_head(self, channels: int) -> nn.Module:
        """A new head: feature map [R, channels, H'/8, H'/8] -> outputs."""

    def make_batch(self, images, indices, generator) -> tuple[Tensor, Tensor]:
        """Images [N, 3, H, H] in [0, 1] and their places in the training set [N]
        -> inputs [R, 3, H', H'] in [0, 1], and targets.

        R is N, or 2N: rows 2i and 2i + 1 then come from image i.
        """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, a scalar, twice differentiable in the outputs."""


def make_tasks(names: list[str] | None, images: Tensor, flip: bool) -> dict[str, Task]:
    """These tasks, or those of DEFAULT_TASKS that can use the images."""
    tasks = {}
    for name in names or DEFAULT_TASKS:
        try:
            tasks[name] = TASKS[name](images, flip)
        except ValueError as error:
            if names:
                raise
            say(f"Without {name}: {error}")
    return tasks


def restore_tasks(saved: dict[str, dict]) -> dict[str, Task]:
    """{task: its attributes} -> the tasks, without their training images."""
    tasks = {name: TASKS[name].__new__(TASKS[name]) for name in saved}
    for name, attributes in saved.items():
        vars(tasks[name]).update(attributes)
    return tasks


def draws(count: int, images: Tensor, generator: Generator) -> Tensor:
    """[count, N] numbers, uniform in [0, 1), of the images' type and on their device."""
    return images.new_empty(count, len(images)).uniform_(generator=generator)


def pooled(*layers: nn.Module) -> nn.Sequential:
    """A head on the mean feature: [R, C, h, w] -> [R, C] -> layers."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


class Rotation:
    """By which of the four quarter turns is the image rotated? (RotNet, 1803.07728)

    Deviation: RotNet shows each image at all four turns, and gains by it. Here each is
    shown at one, the batch at all four equally often: a support image then costs the
    same in every task.
    """

    answers = ("0°", "90°", "180°", "270°")  # anticlockwise, as torch.rot90
    loss = staticmethod(F.cross_entropy)

    def __init__(self, images, mirror=True): ...

    def make_head(self, channels):
        return pooled(nn.Linear(channels, 4))

    def make_batch(self, images, indices, generator):
        turns = (
            torch.randperm(len(images), generator=generator, device=images.device) % 4
        )
        turned = torch.stack(
            [images.rot90(k, (2, 3)) for k in range(4)]
        )  # [4, N, 3, H, H]
        return turned[turns, torch.arange(len(images), device=images.device)], turns


# Linear sRGB -> CIE XYZ (IEC 61966-2-1); the sums of the rows are the white point D65
RGB_TO_XYZ = (
    (0.4124, 0.3576, 0.1805),
    (0.2126, 0.7152, 0.0722),
    (0.0193, 0.1192, 0.9505),
)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> CIE Lab under D65, both [..., 3, H, W]: L in [0, 100], |a|, |b| < 110."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    r, g, b = linear.unbind(-3)
    # numbers instead of a matrix, whose copy to a GPU would make the host wait
    xyz = torch.stack(
        [(m[0] * r + m[1] * g + m[2] * b) / sum(m) for m in RGB_TO_XYZ], -3
    )
    f = torch.where(
        xyz > (6 / 29) ** 3, xyz ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29
    )
    x, y, z = f.unbind(-3)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -3)


class Colorization:
    """What colour is each place of a gray image? (1603.08511, section 2)

    The encoder gets lightness. The head gives, at a quarter of the resolution, logits
    over Q bins: the points of a grid of step 10 in the ab plane of CIE Lab that are
    nearest to some sRGB colour, Q = 261 (the paper lists 313). Targets are the 5 nearest
    bins, softly, with classes rebalanced. Deviations: a place has the mean colour of its
    4 x 4 pixels, and the prior is that of at most 2,000 training images. ValueError for
    gray images.
    """

    sigma = 5.0  # of the soft encoding and of the prior's smoothing, in units of ab
    uniform = 0.5  # lambda: the uniform distribution's share in the mixed prior

    def __init__(self, images, mirror=True):
        if is_gray(images):
            raise ValueError("colorization needs colour, and all images are gray")
        axis = torch.linspace(0, 1, 86, device=images.device)
        colours = torch.cartesian_prod(axis, axis, axis).T[:, :, None]  # [3, 86^3, 1]
        self.bins = (rgb_to_lab(colours)[1:, :, 0] / 10).round().unique(
            dim=1
        ).T * 10  # [Q, 2]
        counts = torch.zeros(len(self.bins), device=images.device)
        sample = images[:: math.ceil(len(images) / 2000)]
        for some in sample.split(200):  # all at once would need a gigabyte at 64 x 64
            bins, _ = self.encode(rgb_to_lab(some / 255))
            counts += bins[:, 0].flatten().bincount(minlength=len(self.bins))
        kernel = torch.exp(
            -(torch.cdist(self.bins, self.bins) ** 2) / (2 * self.sigma**2)
        )
        self.prior = (
            kernel / kernel.sum(0) @ (counts / counts.sum())
        )  # smoothed, sums to 1
        mixed = (1 - self.uniform) * self.prior + self.uniform / len(self.bins)
        self.weights = (
            1 / mixed / (self.prior / mixed).sum()
        )  # E[w] = sum_q prior_q w_q = 1

    def encode(self, lab):
        """Lab [N, 3, H, H] -> the 5 nearest bins, and their shares, [N, 5, H/4, H/4]."""
        ab = F.avg_pool2d(lab[:, 1:], 4)
        distance = torch.cdist(
            ab.flatten(2).mT, self.bins.to(ab.dtype)
        )  # [N, HH/16, Q]
        nearest = distance.topk(5, largest=False)
        distance, bins = (x.mT.unflatten(2, ab.shape[2:]) for x in nearest)
        return bins, (-(distance**2) / (2 * self.sigma**2)).softmax(1)  # Gaussians

    def make_head(self, channels):
        logits = nn.Conv2d(channels, 4 * len(self.bins), 1)
        return nn.Sequential(logits, nn.PixelShuffle(2))

    def make_batch(self, images, indices, generator):
        lab = rgb_to_lab(images)
        bins, shares = self.encode(lab)
        shares = (
            shares * self.weights[bins[:, :1]]
        )  # v(Z): the weight of the nearest bin
        # side by side in one tensor: 10 numbers a place, where dense targets would be Q
        return (lab[:, :1] / 100).repeat(1, 3, 1, 1), torch.cat((bins, shares), 1)

    def loss(self, outputs, targets):
        bins, shares = targets.chunk(2, dim=1)  # [N, 5, H/4, H/4] each
        log_p = outputs.log_softmax(1).gather(1, bins.long())
        return -(shares.to(outputs.dtype) * log_p).sum(1).mean()


class RelativePosition:
    """At which of 8 places around the first patch is the second? (1505.05192; 1708.07860)

    Sides are H/4, gaps 3H/32, and each patch is shifted by up to H/32 each way. Colour
    dropping keeps one channel of a patch; the others become noise about mid-gray.
    Deviations: the image has room for one grid only, so the first patch is always its
    centre, gaps are 3/8 of a patch (there 1/2) and shifts 1/8 (there 7/96); no patch is
    downsampled. ValueError unless 32 divides H.
    """

    answers = "↖↑↗←→↙↓↘"
    loss = staticmethod(F.cross_entropy)

    def __init__(self, images, mirror=True):
        if (side := images.shape[-1]) % 32:
            needs = "relative_position needs a multiple of 32 pixels"
            raise ValueError(f"{needs}, not {side}: use --image-size 32")

    def make_head(self, channels):
        pair = (nn.Unflatten(0, (-1, 2)), nn.Flatten())  # [2N, C] -> [N, 2C]
        # a linear head could only add up what each patch says alone: hence the hidden layer
        hidden = (nn.Linear(2 * channels, channels), nn.ReLU())
        return pooled(*pair, *hidden, nn.Linear(channels, 8))

    def make_batch(self, images, indices, generator):
        count, unit, device = len(images), images.shape[-1] // 32, images.device
        how = {"generator": generator, "device": device}
        targets = torch.randint(8, (count,), **how)
        second = targets + (targets > 3)  # cell 4 is the centre
        cell = torch.stack((torch.full_like(targets, 4), second), 1).flatten()
        jitter = torch.randint(-unit, unit + 1, (2, 2 * count), **how)
        top, left = (
            unit + 11 * unit * torch.stack((cell // 3, cell % 3)) + jitter
        )  # [2N] each
        windows = images.unfold(2, 8 * unit, 1).unfold(3, 8 * unit, 1)
        image = torch.arange(count, device=device).repeat_interleave(2)
        patches = windows[image, :, top, left]  # [2N, 3, H/4, H/4]

        channel = torch.arange(3, device=device).view(3, 1, 1)
        kept = torch.randint(3, (2 * count, 1, 1, 1), **how)
        deviation = patches.std((2, 3), keepdim=True).gather(1, kept) / 100
        noise = torch.empty_like(patches).normal_(generator=generator)
        return torch.where(channel == kept, patches, 0.5 + deviation * noise), targets


class MaskedAutoencoding:
    """What is behind the masked three quarters of the image? (2111.06377)

    48 of the 8 x 8 patches of side H/8 are masked. Their pixels are regressed, normalised
    by mean and (as in the authors' code, unbiased) variance of the patch. Deviations: a
    dense convolution can't skip patches, so the encoder sees mid-gray in their place; the
    decoder is one layer. ValueError for H = 8: of one pixel normalising leaves nothing.
    """

    def __init__(self, images, mirror=True):
        if images.shape[-1] == 8:
            needs = "masked_autoencoding needs more than 8 pixels"
            raise ValueError(f"{needs}: use --image-size 16")

    def make_head(self, channels):
        return nn.Sequential(nn.Conv2d(channels, 3 * 64, 1), nn.PixelShuffle(8))

    def make_batch(self, images, indices, generator):
        side = images.shape[-1] // 8  # of a patch
        ranks = draws(64, images, generator).T.argsort(1).argsort(1)
        masked = (ranks < 48).view(-1, 1, 8, 8)
        patches = F.pixel_unshuffle(images, side)  # [N, 3 * side^2, 8, 8]
        variance, mean = torch.var_mean(patches, 1, keepdim=True)
        normalised = (patches - mean) / (variance + 1e-6).sqrt()
        inputs = torch.where(masked, 0.5, patches)
        targets = torch.cat((normalised, masked.expand(-1, side**2, -1, -1)), 1)
        # [N, 3, H, H], and [N, 4, H, H]: pixels and mask
        return F.pixel_shuffle(inputs, side), F.pixel_shuffle(targets, side)

    def loss(self, outputs, targets):
        pixels, masked = targets.to(outputs.dtype).split((3, 1), dim=1)
        return (masked * (outputs - pixels) ** 2).mean() / masked.mean()


class Contrastive:
    """Which other view of the batch shows the same image? (SimCLR, 2002.05709, app. A, B.9)

    Random resized crop, flip, colour jitter of strength 0.5, grayscale; no blur.
    Deviations: images that may not be mirrored are not flipped; a crop larger than the
    image is cut, not drawn again; the jitters' order is fixed, hue turns chroma in YIQ,
    and colours are clipped once, at the end; the projection (hidden width: the encoder's,
    128 outputs) has no BatchNorm.
    """

    temperature = 0.5

    def __init__(self, images, mirror=True):
        self.flip = 0.5 if mirror else 0.0

    def make_head(self, channels):
        hidden = (nn.Linear(channels, channels), nn.ReLU())
        return pooled(*hidden, nn.Linear(channels, 128))

    def make_batch(self, images, indices, generator):
        views = images.repeat_interleave(2, 0)
        partners = (
            torch.arange(len(views), device=images.device) ^ 1
        )  # 1, 0, 3, 2, 5, 4, ...
        return self.jitter(self.crop(views, generator), generator), partners

    def loss(self, outputs, targets):
        """NT-Xent (equation 1), of outputs [2N, D]: row targets[i] shows the image of row i."""
        views = F.normalize(outputs, dim=1)
        similarity = views @ views.T / self.temperature  # [2N, 2N]
        itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        return F.cross_entropy(similarity.masked_fill(itself, -math.inf), targets)

    def crop(self, views, generator):
        """Cuts 8 to 100% of the area out of each of [R, 3, H, H], at ratios of 3/4 to 4/3."""
        area, shape, x, y, coin = draws(5, views, generator)
        ratio = (4 / 3) ** (2 * shape - 1)  # log-uniform
        area = 0.08 + 0.92 * area
        width, height = ((area * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
        x, y = (1 - width) * (2 * x - 1), (1 - height) * (2 * y - 1)
        zero = torch.zeros_like(x)
        width = torch.where(coin < self.flip, -width, width)
        # output -> input coordinates, both in [-1, 1]
        theta = torch.stack((width, zero, x, zero, height, y), 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, views.shape, align_corners=False)
        border = {"padding_mode": "border", "align_corners": False}
        return F.grid_sample(views, grid, **border)

    def jitter(self, views, generator):
        """Changes the colours of 80% of [R, 3, H, H], and takes those of 20% away."""
        coin, gray, *factors, hue = draws(6, views, generator)[..., None, None]
        changed = coin < 0.8
        factors = (1 + 0.4 * changed * (2 * factor - 1) for factor in factors)
        contrast, brightness, saturation = factors
        angle = 2 * math.pi * 0.1 * changed * (2 * hue - 1)
        r, g, b = views.unbind(1)  # [R, H, H] each
        y = 0.299 * r + 0.587 * g + 0.114 * b
        u, v = 0.492 * (b - y), 0.877 * (r - y)  # the plane that I and Q span, too
        mean = y.mean((1, 2), keepdim=True)
        y = brightness * (contrast * y + (1 - contrast) * mean)
        chroma = brightness * contrast * saturation * (gray >= 0.2)
        cos, sin = chroma * angle.cos(), chroma * angle.sin()
        r, b = y + (sin * u + cos * v) / 0.877, y + (cos * u - sin * v) / 0.492
        g = (y - 0.299 * r - 0.114 * b) / 0.587
        return torch.stack((r, g, b), 1).clamp(0, 1)


class RandomLabels:
    """Which of 10 labels was drawn for this image? (the control: no paper)

    Labels mean nothing, so what another task gains above this one is due to what it asks.
    The seed is fixed: images that are appended leave the earlier ones' labels as they are.
    """

    loss = staticmethod(F.cross_entropy)

    def __init__(self, images, mirror=True):
        generator = Generator().manual_seed(0)
        labels = torch.randint(10, (len(images),), generator=generator)
        self.labels = labels.to(images.device)

    def make_head(self, channels):
        return pooled(nn.Linear(channels, 10))

    def make_batch(self, images, indices, generator):
        # test images have no labels of their own
        return images, self.labels[indices % len(self.labels)]


class LearnedLabels:
    """What? Nothing: the outer loop decides. (MAXL, 1901.08933, sections 3.1, 3.2)

    One part of the head makes soft labels, another answers. Both move in the inner loop,
    and what the labels become is learned by the outer one, through the second order
    alone. Deviations: no hierarchy of classes, no entropy term, and the labels come from
    the same encoder, not from a network of their own.
    """

    def __init__(self, images, mirror=True): ...

    def make_head(self, channels):
        return pooled(nn.Linear(channels, 2 * 10))

    def make_batch(self, images, indices, generator):
        return images, indices  # which are not used

    def loss(self, outputs, targets):
        answers, labels = outputs.chunk(2, dim=1)  # [N, 10] each
        return F.cross_entropy(answers, labels.softmax(1))


class LearnedLoss:
    """What? Nothing: the outer loop decides. (ARM-LL, 2007.02931, section 4)

    The loss is the mean square of what a learned head says. Deviations: the head reads
    features, where the paper's reads logits, and it moves in the inner loop too.
    """

    def __init__(self, images, mirror=True): ...

    def make_head(self, channels):
        hidden = (nn.Linear(channels, channels), nn.ReLU())
        return pooled(*hidden, nn.Linear(channels, 1))

    def make_batch(self, images, indices, generator):
        return images, indices  # which are not used

    def loss(self, outputs, targets):
        return outputs.square().mean()


TASKS: dict[str, type] = {
    "rotation": Rotation,
    "colorization": Colorization,
    "relative_position": RelativePosition,
    "masked_autoencoding": MaskedAutoencoding,
    "contrastive": Contrastive,
    "random_labels": RandomLabels,
    "learned_labels": LearnedLabels,
    "learned_loss": LearnedLoss,
}
DEFAULT_TASKS = ("rotation", "colorization", "masked_autoencoding", "contrastive")
LEARNED = ("learned_labels", "learned_loss")  # by the outer loop, by second order alone


# --- drawn images ---
# Outlines: column and row of each corner on a grid of 9 x 9 points
SHAPES = {
    "target": """triangle 40 87 07, square 11 71 77 17, pentagon 40 83 67 27 03,
        star 40 53 83 55 68 46 28 35 03 33, cross 30 50 53 83 85 55 58 38 35 05 03 33,
        ring 30 50 83 85 58 38 05 03 30 42 33 24 35 46 55 64 53 42, arrow 40 74 54 58 38 34 14,
        crescent 50 30 12 03 05 16 38 58 46 35 33 42, house 40 84 74 78 18 14 04,
        heart 42 51 71 83 84 48 04 03 11 31""",
    "source": """octagon 30 50 83 85 58 38 05 03, kite 40 73 48 13, hexagon 20 60 84 68 28 04,
        bolt 50 14 44 28 74 44, dome 20 60 82 85 05 02, tee 10 70 72 52 58 38 32 12,
        hourglass 10 70 54 78 18 34, drop 40 65 67 58 38 27 25, bracket 10 70 72 32 36 76 78 18,
        fish 04 21 51 64 81 87 64 57 27""",
}


def render(
    outline: str, lean: float, spread: float, rng: np.random.Generator
) -> np.ndarray:
    """[32, 32, 3] in 0 to 255: the shape (its corners as in SHAPES), its hue `lean` +- `spread`."""
    corners = [complex(*map(int, xy)) / 4 - (1 + 1j) for xy in outline.split()[1:]]

    def hsv(hue, value):  # a Pillow colour: degrees, percent
        return f"hsv({hue % 360:.0f}, 65%, {min(value, 100):.0f}%)"

    size, tilt = rng.uniform(16, 32), rng.normal(0, 0.2)  # on 96 x 96 pixels
    middle = complex(*rng.uniform(size + 6, 90 - size, 2))
    polygon = middle + size * np.exp(1j * tilt) * np.array(corners)
    hue = lean + rng.normal(0, spread)
    picture = Image.new("RGB", (96, 96), hsv(rng.uniform(0, 360), rng.uniform(25, 60)))
    pen = ImageDraw.Draw(picture)
    for ends in rng.uniform(0, 96, (3, 4)):
        pen.line(ends.tolist(), hsv(rng.uniform(0, 360), rng.uniform(20, 90)), 4)
    value = rng.uniform(70, 100)
    for offset, bright in (
        (6j, 20),
        (-2j, value + 20),
        (0, value),
    ):  # shadow, lit edge, shape
        pen.polygon((polygon + offset).view(float).tolist(), hsv(hue, bright))
    return np.asarray(picture.reduce(3), np.float32)


def lit(pictures: list[np.ndarray], rng: np.random.Generator) -> Tensor:
    """-> uint8 [count, 3, 32, 32]: light falls from above, with some texture and noise."""
    images = np.stack(pictures)
    y, x = np.mgrid[0:32, 0:32].astype(np.float32)[..., None]
    dx, dy, phase = rng.uniform(-1, 1, (3, len(images), 1, 1, 1)).astype(np.float32)
    images *= 1.1 - 0.3 * y / 31 + 0.12 * np.sin(dx * x + dy * y + 3 * phase)
    images += 10 * rng.standard_normal(images.shape, np.float32)
    return torch.from_numpy(
        images.clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2).copy()
    )


def draw_shapes(
    count: int, classes: str = "target", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Drawn images, uint8 [count, 3, 32, 32], and their labels, int64 [count], balanced.

    classes: "target" or "source", ten shapes each. A shape's colour leans towards its class.
    """
    rng, shapes = (
        np.random.default_rng([seed, classes == "source"]),
        SHAPES[classes].split(","),
    )
    labels = rng.permutation(count) % len(shapes)
    images = lit([render(shapes[label], 36 * label, 50, rng) for label in labels], rng)
    return images, torch.from_numpy(labels)


def coloured_labels(count: int, agreement: tuple, seed: int) -> tuple[np.ndarray, ...]:
    """-> shape, colour, label, each 0 or 1, int [E, count], for each environment e.

    The recipe of ColoredMNIST (1907.02893, section 5.2): the label is the shape, but for a quarter
    of the images the other one; the colour agrees with the label in the share agreement[e] of them.
    (There in 80 and 90% for training and in 10% for the test.)
    """
    rng = np.random.default_rng([seed, count])
    shape = np.stack([rng.permutation(count) % 2 for _ in agreement])
    label = shape ^ (rng.random(shape.shape) < 0.25)
    return (
        shape,
        label ^ (rng.random(shape.shape) >= np.array(agreement)[:, None]),
        label,
    )


def draw_coloured_shapes(
    count: int, agreement: tuple, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stars and rings, red or green: images, labels, environments, `count` of each environment.

    Colour may tell more than shape, but what it tells depends on the environment.
    """
    rng, shapes = np.random.default_rng(seed), SHAPES["target"].split(",")
    outlines, hues = (shapes[3], shapes[5]), (0, 120)  # star and ring, red and green
    kinds, colours, labels = (
        x.flatten() for x in coloured_labels(count, agreement, seed)
    )
    drawn = zip(kinds, colours, strict=True)
    pictures = [render(outlines[kind], hues[colour], 10, rng) for kind, colour in drawn]
    environments = torch.arange(len(agreement)).repeat_interleave(count)
    return lit(pictures, rng), torch.from_numpy(labels), environments


# --- the figure ---
def draw_figure(images: Tensor, path: str) -> None:
    """Writes a PNG of what each task makes of uint8 images [N, 3, 32, 32], a row per task.

    Beside what is shown stands the answer: a class, or for a task of pixels the image itself.
    """
    from matplotlib.figure import Figure  # here, as the arms draw nothing

    generator, indices = Generator().manual_seed(0), torch.arange(len(images))
    figure = Figure(figsize=(1.9 * len(images) + 2.3, 0.8 * len(TASKS)))
    figure.subplots_adjust(2.3 / figure.get_figwidth(), 0.01, 0.99, 0.99, 0.1, 0.1)
    axes = figure.subplots(len(TASKS), len(images), squeeze=False)
    for (name, make_task), row in zip(TASKS.items(), axes, strict=True):
        question = textwrap.fill((make_task.__doc__ or "").partition("?")[0] + "?", 30)
        row[0].text(
            -4, 16, f"{name.replace('_', ' ')}\n{question}", ha="right", va="center"
        )
        task = make_task(images)
        inputs, targets = task.make_batch(images / 255, indices, generator)
        shown = inputs.unflatten(0, (len(images), -1))  # [N, 1 or 2, 3, H', H']
        if targets.ndim > 1:
            shown = torch.cat((shown, images[:, None] / 255), 1)
        for i, axis in enumerate(row):
            for k, picture in enumerate(shown[i].movedim(1, 3).numpy()):
                axis.imshow(picture, extent=(44 * k, 44 * k + 32, 32, 0))
            if targets.shape == indices.shape:  # a class for each image
                answer = (
                    task.answers[targets[i]]
                    if hasattr(task, "answers")
                    else int(targets[i])
                )
                side = (
                    "left" if len(shown[i]) == 1 else "center"
                )  # beside, or between the two
                axis.text(38, 16, answer, ha=side, va="center")
            axis.set(xlim=(0, 84), ylim=(32, 0))
            axis.axis("off")
    figure.savefig(path, format="png", dpi=200)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Draws what each pretext task shows and asks."
    )
    parser.add_argument(
        "images", nargs="*", metavar="IMAGE", help="files; default: drawn shapes"
    )
    parser.add_argument(
        "--out", default="pretext.png", help="the PNG to write (%(default)s)"
    )
    args = parser.parse_args()
    try:
        images = [decode(path, 32) for path in args.images] or list(
            draw_shapes(4, seed=1)[0]
        )
        draw_figure(torch.stack(images), args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"pretext.py: {error}\n")
    print(f"wrote {args.out}")
