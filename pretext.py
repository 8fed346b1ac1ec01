"""The data that every arm sees, and the pretext tasks made from it: all they share.

    python pretext.py [IMAGE ...] [--out pretext.png]    # draws what each task asks

Every arm must see the same images, labels and batches, so they are made here. A pretext
task makes labels out of images alone: a class like `Task`, and a line in TASKS.

N: images of a batch. M: of a set. H: their side in pixels, a multiple of 8.
"""

import argparse
import hashlib
import inspect
import math
import os
import textwrap
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from itertools import zip_longest
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
# name: (its class in torchvision or None, the default --source). Another one is a line
# if its class takes train and download, and has the names of its classes
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
    """M images, each from an environment: a camera, a hospital, a writer."""

    images: Tensor  # uint8 [M, 3, H, H]
    labels: Tensor  # int64 [M], places in Data.classes
    environments: Tensor  # int64 [M], places in Data.environments

    def take(self, index: Tensor | slice) -> "Split":
        return Split(*(tensor[index] for tensor in self))

    def to(self, device: str) -> "Split":
        return Split(*(tensor.to(device) for tensor in self))


class Data(NamedTuple):
    """A dataset. The test may have environments that training has not."""

    train: Split
    test: Split  # what is scored
    classes: list[str]
    environments: list[str]  # most datasets have one
    mirror: bool = True  # may images be mirrored?
    unlabelled: Split | None = None  # evaluation adapts to some of these ...
    aside: Tensor | None = None  # ... namely to those, bool [M]
    notes: tuple[str, ...] = ()  # what a user should know of it


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
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def is_gray(images: Tensor) -> bool:
    """Whether the three channels of uint8 images [M, 3, H, W] are equal everywhere."""
    return bool((images[:, :1] == images[:, 1:]).all())


def is_deep(image: Image.Image, layout: str | tuple) -> bool:
    """Whether it has more than 8 bits a channel: Pillow would cut some off."""
    if image.mode[0] in "IF" or ";16B" in layout:
        return True
    if image.format == "PPM" and isinstance(layout, tuple):
        return layout[1] > 255  # the value of white
    return image.format == "TIFF" and max(image.tag_v2.get(258, (1,))) > 8


def read(file: str | Path | BytesIO, formats: tuple, side: int) -> Tensor:
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's -> Image.Transpose
    with Image.open(file, formats=formats) as image:
        layout = image.tile[0].args if image.tile else ""
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"it holds {image.n_frames} pictures")
        if is_deep(image, layout):
            raise ValueError("it has more than 8 bits a channel")
        image.draft(None, (4 * side, 4 * side))  # a large JPEG is read at less
        image.load()
        with suppress(Exception):  # bad metadata are not bad pixels
            image = image.transpose(turns[image.getexif()[274]])
        with suppress(KeyError):  # of 4 or 16 grays: Pillow stretches all but this
            image.info["transparency"] *= {"L;2": 85, "L;4": 17}[layout]
        if image.has_transparency_data:
            gray = Image.new("RGBA", image.size, (128, 128, 128))
            image = Image.alpha_composite(gray, image.convert("RGBA"))
        return pil_to_tensor(ImageOps.fit(image.convert("RGB"), (side, side)))


def bare_png(path: str | Path) -> BytesIO:
    """A PNG without metadata: Pillow would refuse it for an error in these."""
    data, begin = Path(path).read_bytes(), 8
    kept = bytearray(data[:8])
    while begin < len(data):
        end = begin + 12 + int.from_bytes(data[begin : begin + 4], "big")
        kind = data[begin + 4 : begin + 8]
        if kind.isupper() or kind in (b"tRNS", b"acTL", b"fcTL", b"fdAT"):
            kept += data[begin:end]
        begin = end
    return BytesIO(kept)


def decode(path: str | Path, side: int) -> Tensor:
    """The central square of an image file, upright, scaled: uint8 [3, side, side].

    Transparent pixels lie on mid-gray. ValueError: it can't be read, holds several
    pictures, or more than 8 bits a channel.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: it is no regular file")
    try:
        return read(path, FORMATS, side)
    except Exception as error:  # Pillow's decoders raise all kinds
        with suppress(Exception):
            return read(bare_png(path), ("PNG",), side)
        unknown = isinstance(error, PIL.UnidentifiedImageError)
        why = f"Pillow reads it as none of {', '.join(FORMATS)}" if unknown else error
        raise ValueError(f"{path}: {why}") from error


def decode_all(paths: list[Path], side: int) -> Tensor:
    """uint8 [M, 3, side, side]. ValueError names the files that can't be used."""
    pool = ThreadPoolExecutor()
    jobs = [pool.submit(decode, path, side) for path in paths]
    try:
        errors = [job.exception() for job in tqdm(jobs, leave=False, disable=None)]
    finally:
        pool.shutdown(cancel_futures=True)
    if bad := [str(error) for error in errors if error]:
        few = "; ".join(bad[:10]) + "; ..." * (len(bad) > 10)
        count = f"{len(bad)} of {len(paths)} files"
        raise ValueError(f"{count} can't be used, remove or convert them: {few}")
    return torch.stack([job.result() for job in jobs])


def decode_once(paths: list[Path], side: int, data_dir: str) -> Tensor:
    """The same, from a copy until something that decides it changes."""
    code = map(inspect.getsource, (decode, read, is_deep, bare_png))
    key = [side, PIL.__version__, *code]
    for path in paths:
        with suppress(OSError):  # decode tells what is wrong with it
            file = path.stat()
            key += [path.absolute(), file[:7], file.st_mtime_ns, file.st_ctime_ns]
    name = f"decoded-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}"
    copy, part = Path(data_dir, name), Path(data_dir, f"{name}.{os.getpid()}")
    with suppress(Exception):  # there is none yet, or it is damaged
        return torch.load(copy, weights_only=True)
    images = decode_all(paths, side)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(images, part)
        part.replace(copy)
    except (OSError, RuntimeError):  # the next run decodes again
        part.unlink(missing_ok=True)
    return images


def shown(folder: Path) -> list[Path]:
    """What is in a folder, but for what is hidden or a system's."""
    system = ("__macosx", "thumbs.db", "ehthumbs", "desktop.ini", "icon\r")
    system += ("$recycle.bin", "#recycle", "lost+found", "system volume information")
    paths = sorted(folder.iterdir())
    return [x for x in paths if not x.name.lower().startswith((".", "@", *system))]


def class_names(folder: Path) -> list[str]:
    return [path.name for path in shown(folder) if path.is_dir()]


def files_below(folder: Path) -> list[Path]:
    """At any depth, in the order of torchvision's ImageFolder."""
    files = []
    for path in shown(folder):
        files += files_below(path) if path.is_dir() else [path]
    return sorted(files, key=os.path.split)


def list_files(folder: Path) -> list[Path]:
    files = []
    for name in class_names(folder):
        found = files_below(folder / name)
        if not found:
            raise ValueError(f"{folder / name} holds no image")
        files += found
    return files


def find_splits(root: Path) -> tuple[Path, Path]:
    """train, and the first test set with the same classes."""
    names = ("test", "val", "valid", "validation")
    folders = [path for path in shown(root) if path.is_dir()]
    trains = [path for path in folders if path.name.lower() == "train"]
    tests = [path for name in names for path in folders if path.name.lower() == name]
    if not trains or not tests:
        raise ValueError(f"{root} needs the folders train and {' or '.join(names)}")
    train = trains[-1]
    classes = class_names(train)
    if len(classes) < 2:
        raise ValueError(f"{train} needs two classes or more, not {len(classes)}")
    for test in tests:
        if class_names(test) == classes:
            return train, test
    odd = sorted({*classes} ^ {*class_names(tests[0])})[:10]
    raise ValueError(f"{train} and {tests[0]} differ in the classes {', '.join(odd)}")


def check_environments(root: Path, train: list[Path], test: list[Path]) -> None:
    for path in train + test:
        if len(path.relative_to(root).parts) != 4:
            raise ValueError(f"--environments: {path} is not in CLASS/ENVIRONMENT/")
    if len({path.parent.name for path in train + test}) == 1:
        raise ValueError(f"--environments: there is one only, {train[0].parent.name}")
    counts = Counter(folder.name for folder in {path.parent for path in train})
    single = sorted(name for name, classes in counts.items() if classes == 1)
    if 2 * len(single) >= len(counts):
        which = f"{len(single)} of {len(counts)} ({', '.join(single[:10])})"
        why = f"{which} have training images of one class only"
        raise ValueError(f"--environments: {why}; leave out the flag, or these")


def load_folder(root, train, test, environments: bool, side, data_dir) -> Data:
    paths, cut, notes = train + test, len(train), ()
    parts = [path.relative_to(root).parts for path in paths]  # SPLIT, CLASS, ..., FILE
    if parts[-1][0] != "test":
        notes += (f"{root / parts[-1][0]} is scored",)
    if not environments and max(map(len, parts)) > 3:
        notes += ("Folders below the classes mean nothing without --environments",)
    kinds = [part[1] for part in parts]
    homes = [part[2] if environments else "all" for part in parts]
    classes, names = sorted({*kinds}), sorted({*homes[:cut]})
    names += sorted({*homes} - {*names})  # those of the test alone
    images = decode_once(paths, side, data_dir)
    both = Split(images, places(kinds, classes), places(homes, names))
    train, test = both.take(slice(cut)), both.take(slice(cut, None))
    return Data(train, test, classes, names, notes=notes)


def places(values: list[str], names: list[str]) -> Tensor:
    numbers = {name: i for i, name in enumerate(names)}
    return torch.tensor([numbers[value] for value in values])


def load_torchvision(name: str, side: int, data_dir: str) -> Data:
    splits = []
    try:
        for train in True, False:
            dataset = DATASETS[name][0](data_dir, train=train, download=True)
            images, labels = zip(*dataset, strict=True)
            images = torch.stack([pil_to_tensor(image) for image in images])
            images = resize(images, [side, side]).expand(-1, 3, -1, -1).contiguous()
            labels = torch.tensor(labels)
            splits.append(Split(images, labels, torch.zeros_like(labels)))
    except Exception as error:  # of the network, the disk, a reader of damaged files
        why = f"{name} is not in {data_dir} and can't be downloaded ({error}); remove"
        rest = "what is damaged; drawn shapes and a folder need no network"
        raise ValueError(f"{why} {rest}") from error
    return Data(*splits, dataset.classes, ["all"])


def load_drawn(name: str, side: int, source: bool, seed: int) -> Data:
    """Other images for each seed. source: shapes of ten other classes."""
    train, test = 2 * seed, 2 * seed + 1
    if name == "coloured_shapes":
        sets = [draw_coloured_shapes(5000, (0.8, 0.1), train)]
        sets += [draw_coloured_shapes(1256, (0.8, 0.1, 0.9), test)]
        classes, names = ["star", "ring"], ["80%", "10%", "90%"]
    else:
        kind = "source" if source else "target"
        sets = [draw_shapes(2000, kind, train), draw_shapes(1000, kind, test)]
        sets = [(*drawn, torch.zeros_like(drawn[1])) for drawn in sets]
        classes, names = [text.split()[0] for text in SHAPES[kind]], ["all"]
    splits = [Split(resize(drawn[0], [side, side]), *drawn[1:]) for drawn in sets]
    return Data(*splits, classes, names)


def check(name: str | None, environments: bool = False) -> list[list[Path]]:
    """Lists a folder's files. ValueError: there is no such dataset, or it is unfit."""
    if name is None:
        raise ValueError("there is no default for --source: name what to pretrain on")
    if name in DATASETS:
        if environments:
            raise ValueError(f"--environments is for a folder, not for {name}")
        return []
    if not (root := Path(name)).is_dir():
        raise ValueError(f"{name} is neither a folder nor one of {', '.join(DATASETS)}")
    splits = [list_files(folder) for folder in find_splits(root)]
    if environments:
        check_environments(root, *splits)
    return splits


def load(
    name: str,
    data_dir: str,
    side: int,
    device: str,
    source: bool = False,
    environments: bool = False,
    mirror: bool | None = None,
    seed: int = 0,
) -> Data:
    """A whole dataset, by its name or folder. ValueError: it can't be had.

    source: to pretrain on; of shapes the other classes. environments: the folders below
    the classes are. mirror: None is yes, but for gray images: digits have two sides.
    seed: of drawn images.
    """
    files = check(name, environments)
    rank = dist.get_rank() if dist.is_initialized() else None
    if rank:
        dist.barrier()  # the first process downloads and decodes, the others find it
    if files:
        data = load_folder(Path(name), *files, environments, side, data_dir)
    elif name in ("shapes", "coloured_shapes"):
        data = load_drawn(name, side, source, seed)
    else:
        data = load_torchvision(name, side, data_dir)
    if rank == 0:
        dist.barrier()
    if not files and Path(name).is_dir():
        data = data._replace(notes=(f"It is built in; your folder is ./{name}",))
    mirror = not is_gray(data.train.images) if mirror is None else mirror
    train, test = data.train.to(device), data.test.to(device)
    return data._replace(train=train, test=test, mirror=mirror)


# --- the data: what the desired task has of it ---
def desired_task(data: Data, per_class: int | None, eval_on: str, seed: int) -> Data:
    """Within its label budget. eval_on "val": a fifth of that becomes the test set."""
    train, test = limit_labels(data, per_class, seed), data.test
    if eval_on == "val":
        train, test = hold_out(train)
    data = data._replace(train=train, test=test)
    if len(data.environments) > 1:
        data = without_single(data)
    return set_aside(data, seed)


def by_kind(split: Split, order: Tensor) -> dict:
    """{(label, environment): its indices}, sorted, each in the given order."""
    kinds = defaultdict(list)
    labels, homes = split.labels.tolist(), split.environments.tolist()
    for i in order.tolist():
        kinds[labels[i], homes[i]].append(i)
    return dict(sorted(kinds.items()))


def limit_labels(data: Data, per_class: int | None, seed: int) -> Split:
    """Training images: so many of a class, by turns out of its environments."""
    kept, generator = [], rng(seed, "labels")
    order = torch.randperm(len(data.train.labels), generator=generator)
    kinds = by_kind(data.train, order)
    for label, name in enumerate(data.classes):
        members = [kind for (of, _), kind in kinds.items() if of == label]
        size = sum(map(len, members))
        if per_class is not None and not 1 <= per_class <= size:
            why = f"class {name} has {size} images; take 1 to {size}"
            raise ValueError(f"--labels-per-class {per_class}: {why}")
        turns = [i for turn in zip_longest(*members) for i in turn if i is not None]
        chosen = {*turns[:per_class]}
        kept += [i for kind in members for i in kind if i in chosen]
    return data.train.take(torch.tensor(kept))


def hold_out(train: Split) -> tuple[Split, Split]:
    """Training images without a fifth of each class and environment, and this fifth."""
    kept, held = [], []
    for kind in by_kind(train, torch.arange(len(train.labels))).values():
        cut = max(1, len(kind) // 5) if len(kind) > 1 else 0
        held += kind[:cut]
        kept += kind[cut:]
    if not held:
        why = "with one image of each class (in each environment) none can be held out"
        raise ValueError(f"--eval-on val: {why}; raise --labels-per-class")
    return train.take(torch.tensor(kept)), train.take(torch.tensor(held))


def without_single(data: Data) -> Data:
    """Without environments of one image: nothing would be left to adapt to."""
    splits, names = [], set()
    for split in data.train, data.test:
        alone = split.environments.bincount()[split.environments] == 1
        if alone.all():
            raise ValueError("of one image each, no environment has any to adapt to")
        names |= {data.environments[i] for i in split.environments[alone].tolist()}
        splits.append(split.take(~alone))
    if names:
        note = f"Left out, as they have one image: {', '.join(sorted(names)[:10])}"
        data = data._replace(notes=(*data.notes, note))
    return data._replace(train=splits[0], test=splits[1])


def set_aside(data: Data, seed: int) -> Data:
    """Chooses up to ADAPT_TO images of each environment, which evaluation adapts to.

    Training images, but where there are several environments test images: at most half
    of one, which nobody scores then.
    """
    several = len(data.environments) > 1
    home = data.test if several else data.train
    aside = torch.zeros_like(home.labels, dtype=torch.bool)
    for environment in home.environments.unique():
        members = (home.environments == environment).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=rng(seed, "evaluation"))
        count = min(ADAPT_TO, len(members) // 2) if several else ADAPT_TO
        aside[members[order[:count]]] = True
    test = data.test.take(~aside) if several else data.test
    return data._replace(test=test, unlabelled=home, aside=aside)


def describe(name: str, data: Data) -> str:
    """What was read: a line, and then what should be known of it."""
    train, test = data.train, data.test
    learned = f"{len(train.labels):,} images of {len(data.classes)} classes"
    scored = f"{len(test.labels):,} are scored"
    if len(data.environments) > 1:
        known, tested = ({*x.environments.tolist()} for x in (train, test))
        new = [data.environments[i] for i in sorted(tested - known)]
        learned += f" in {len(known)} environments"
        scored += f" in {len(tested)} (new: {', '.join(new[:10]) or 'none'})"
    mirrored = "mirrored" if data.mirror else "not mirrored"
    return "\n".join((f"{name}: {learned}; {scored}; {mirrored}", *data.notes))


def checksum(*datasets: Data) -> str:
    """A digest of all images and labels: a run goes on only with what it began with."""
    digest = hashlib.sha256()
    for data in datasets:
        for tensor in (*data.train, *data.test):
            digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- the data: batches ---
def dice(sides: int, shape: tuple, generator: Generator) -> Tensor:
    """Numbers from 0 to sides - 1, on the generator's device."""
    return torch.randint(sides, shape, generator=generator, device=generator.device)


def mirror(images: Tensor, generator: Generator, allowed: bool) -> Tensor:
    """uint8 [N, 3, H, H] -> in [0, 1], each mirrored or not.

    Support images get no more: the black border of a shift would tell a task too much.
    """
    coin = dice(2, (len(images), 1, 1, 1), generator)
    return torch.where(coin * allowed == 1, images.flip(3), images) / 255


def shift(images: Tensor, generator: Generator) -> Tensor:
    """[N, 3, H, H], each moved by up to H/8 pixels both ways, out of black borders."""
    n, _, side, _ = images.shape
    top, left = (dice(side // 4 + 1, (n,), generator) for _ in range(2))
    windows = F.pad(images, [side // 8] * 4).unfold(2, side, 1).unfold(3, side, 1)
    return windows[torch.arange(n, device=images.device), :, top, left]


def draw_epochs(images: int, count: int, turn: int, seed: int, name: str) -> Tensor:
    """The turn's `count` of so many images, out of shuffled epochs end to end."""
    begin = turn * count
    epochs = range(begin // images, (begin + count) // images + 1)
    orders = [torch.randperm(images, generator=rng(seed, name, e)) for e in epochs]
    return torch.cat(orders)[begin % images :][:count]


def labelled_batch(
    data: Data, step: int, size: int, most: int, seed: int, purpose: str = "query"
) -> Batch:
    """`size` images in equal parts from `most` environments, or from all there are.

    Of more than that each step takes others, out of shuffled epochs.
    """
    train, turn, parts = data.train, step, []
    homes = train.environments.unique().cpu()
    if len(homes) > most:
        turn, place = divmod(step, len(homes) // most)
        order = torch.randperm(len(homes), generator=rng(seed, "environments", turn))
        homes = homes[order[most * place :][:most].sort().values]
    for i, home in enumerate(homes.tolist()):
        members = (train.environments == home).nonzero().squeeze(1)
        count = fresh = size // len(homes) + (i < size % len(homes))
        if len(members) <= count and len(data.environments) > 1:
            fresh = max(1, len(members) // 2)  # the others are left to adapt to
        # the first one's draws are those of a dataset that has one
        name = f"{purpose} {home}" if home else purpose
        drawn = draw_epochs(len(members), fresh, turn, seed, name)
        parts.append(members[drawn[torch.arange(count) % fresh]])
    index = torch.cat(parts)
    generator = rng(seed, f"{purpose} augmentation", step, index.device)
    images = mirror(shift(train.images[index], generator), generator, data.mirror)
    return Batch(images, train.labels[index], index, train.environments[index])


def join(train: Split, source: Split) -> Split:
    """The images of both, for pretext tasks: the source's have no label here."""
    if train.environments.any():
        raise ValueError("--pretext-images: the source's are of no known environment")
    images = torch.cat((train.images, source.images))
    labels = torch.cat((train.labels, torch.full_like(source.labels, -1)))
    return Split(images, labels, torch.zeros_like(labels))


def draw(candidates: Tensor, count: int, generator: Generator) -> Tensor:
    """Indices of `count` candidates, or of all if there are fewer."""
    count = min(count, int(candidates.sum()))
    if count == 0:
        why = "no image is left to adapt to: a smaller"
        raise ValueError(f"{why} --batch-size, or --support query")
    how = {"generator": generator, "device": candidates.device}
    order = torch.rand(len(candidates), **how).masked_fill(~candidates, 2.0)
    return order.topk(count, largest=False).indices


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
    """What each task makes of its own draw out of the candidates, bool [M]."""
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

    `answers`, if any, name its classes in the figure. No method makes a GPU wait.
    """

    def __init__(self, images: Tensor, mirror: bool = True):
        """images: for training, uint8 [M, 3, H, H]. ValueError: it can't use them."""

    def make_head(self, channels: int) -> nn.Module:
        """A new head: feature map [R, channels, H'/8, H'/8] -> outputs."""

    def make_batch(self, images, indices, generator) -> tuple[Tensor, Tensor]:
        """[N, 3, H, H] in [0, 1], their places in the training set [N] -> inputs
        [R, 3, H', H'] in [0, 1], targets.

        R is N, or 2N: rows 2i and 2i + 1 then come from image i.
        """

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, twice differentiable in the outputs."""


def make_tasks(names, images: Tensor, flip: bool, default=None) -> dict[str, Task]:
    """The tasks of these names, or those of DEFAULT_TASKS that can use the images."""
    tasks = {}
    for name in names or default or DEFAULT_TASKS:
        try:
            tasks[name] = TASKS[name](images, flip)
        except ValueError as error:
            if names:
                raise
            say(f"Without {name}: {error}")
    return tasks


def restore_tasks(saved: dict[str, dict]) -> dict[str, Task]:
    """{task: its attributes} -> the tasks, without their training images."""
    tasks = {}
    for name, attributes in saved.items():
        tasks[name] = TASKS[name].__new__(TASKS[name])
        vars(tasks[name]).update(attributes)
    return tasks


def draws(count: int, images: Tensor, generator: Generator) -> Tensor:
    """[count, N] numbers in [0, 1), of the images' type and on their device."""
    return images.new_empty(count, len(images)).uniform_(generator=generator)


def pooled(*layers: nn.Module) -> nn.Sequential:
    """A head on the mean feature: [R, C, h, w] -> [R, C] -> layers."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


class Rotation:
    """By which of the four quarter turns is the image rotated? (RotNet, 1803.07728)

    Deviation: RotNet shows each image at all four turns, and gains by it. Here one is
    drawn, all four equally often in a batch: then each task costs about the same.
    """

    answers = ("0°", "90°", "180°", "270°")  # anticlockwise, as torch.rot90
    loss = staticmethod(F.cross_entropy)

    def __init__(self, images, mirror=True): ...

    def make_head(self, channels):
        return pooled(nn.Linear(channels, 4))

    def make_batch(self, images, indices, generator):
        count, device = len(images), images.device
        turns = torch.randperm(count, generator=generator, device=device) % 4
        turned = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])
        return turned[turns, torch.arange(count, device=device)], turns


# Linear sRGB -> CIE XYZ (IEC 61966-2-1); the sums of the rows are the white point D65
RGB_TO_XYZ = (
    (0.4124, 0.3576, 0.1805),
    (0.2126, 0.7152, 0.0722),
    (0.0193, 0.1192, 0.9505),
)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> CIE Lab under D65, both [..., 3, H, W]."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    r, g, b = linear.unbind(-3)
    # no matrix, as its copy to a GPU would make the host wait
    xyz = [(m[0] * r + m[1] * g + m[2] * b) / sum(m) for m in RGB_TO_XYZ]
    xyz = torch.stack(xyz, -3)
    line = xyz * (29 / 6) ** 2 / 3 + 4 / 29
    x, y, z = torch.where(xyz > (6 / 29) ** 3, xyz ** (1 / 3), line).unbind(-3)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -3)


class Colorization:
    """What colour is each place of a gray image? (1603.08511, section 2)

    The encoder gets lightness. The head gives logits over Q bins, at a quarter of the
    resolution: points of a grid of step 10 in the ab plane of CIE Lab, those nearest to
    some sRGB colour. Targets are the 5 nearest bins, softly, with classes rebalanced.
    Deviations: Q = 261 (there 313), a place has the mean colour of its 4 x 4 pixels,
    and the prior is that of at most 2,000 training images.
    """

    sigma = 5.0  # of the soft encoding and of the prior's smoothing, in units of ab

    def __init__(self, images, mirror=True):
        if is_gray(images):
            raise ValueError("colorization needs colour, and all images are gray")
        axis = torch.linspace(0, 1, 86, device=images.device)
        colours = torch.cartesian_prod(axis, axis, axis).T[:, :, None]  # [3, 86^3, 1]
        ab = rgb_to_lab(colours)[1:, :, 0]
        self.bins = (ab / 10).round().unique(dim=1).T * 10  # [Q, 2]
        counts = torch.zeros(len(self.bins), device=images.device)
        sample = images[:: math.ceil(len(images) / 2000)]
        for some in sample.split(200):  # at once they would need a gigabyte
            bins, _ = self.encode(rgb_to_lab(some / 255))
            counts += bins[:, 0].flatten().bincount(minlength=len(self.bins))
        kernel = self.log_gaussian(torch.cdist(self.bins, self.bins)).exp()
        self.prior = kernel / kernel.sum(0) @ (counts / counts.sum())  # sums to 1
        mixed = 0.5 * self.prior + 0.5 / len(self.bins)  # lambda = 1/2
        self.weights = 1 / mixed / (self.prior / mixed).sum()  # sum_q prior_q w_q = 1

    def log_gaussian(self, distance):
        return -(distance**2) / (2 * self.sigma**2)

    def encode(self, lab):
        """Lab [N, 3, H, H] -> the 5 nearest bins, their shares, [N, 5, H/4, H/4]."""
        ab = F.avg_pool2d(lab[:, 1:], 4)
        distance = torch.cdist(ab.flatten(2).mT, self.bins.to(ab.dtype))
        nearest = distance.topk(5, largest=False)  # of [N, HH/16, Q]
        distance, bins = (x.mT.unflatten(2, ab.shape[2:]) for x in nearest)
        return bins, self.log_gaussian(distance).softmax(1)

    def make_head(self, channels):
        logits = nn.Conv2d(channels, 4 * len(self.bins), 1)
        return nn.Sequential(logits, nn.PixelShuffle(2))

    def make_batch(self, images, indices, generator):
        lab = rgb_to_lab(images)
        bins, shares = self.encode(lab)
        shares = shares * self.weights[bins[:, :1]]  # v(Z): of the nearest bin
        # side by side: 10 numbers a place, where dense targets would be Q
        return (lab[:, :1] / 100).repeat(1, 3, 1, 1), torch.cat((bins, shares), 1)

    def loss(self, outputs, targets):
        bins, shares = targets.chunk(2, dim=1)  # [N, 5, H/4, H/4] each
        log_p = outputs.log_softmax(1).gather(1, bins.long())
        return -(shares.to(outputs.dtype) * log_p).sum(1).mean()


class RelativePosition:
    """At which of 8 places around the first patch is the second? (1505.05192)

    Sides are H/4, gaps 3H/32, and each patch is shifted by up to H/32 each way. Colour
    dropping (1708.07860) keeps one channel; the others become noise about mid-gray.
    Deviations: the first patch is the image's centre; gaps are 3/8 of a patch (there
    1/2), shifts 1/8 (there 7/96); nothing is downsampled.
    """

    answers = "↖↑↗←→↙↓↘"
    loss = staticmethod(F.cross_entropy)

    def __init__(self, images, mirror=True):
        if (side := images.shape[-1]) % 32:
            needs = "relative_position needs a multiple of 32 pixels"
            raise ValueError(f"{needs}, not {side}: use --image-size 32")

    def make_head(self, channels):
        pair = (nn.Unflatten(0, (-1, 2)), nn.Flatten())  # [2N, C] -> [N, 2C]
        # a linear one could only add up what each patch says alone
        hidden = (nn.Linear(2 * channels, channels), nn.ReLU())
        return pooled(*pair, *hidden, nn.Linear(channels, 8))

    def make_batch(self, images, indices, generator):
        count, unit, device = len(images), images.shape[-1] // 32, images.device
        targets = dice(8, (count,), generator)
        second = targets + (targets > 3)  # cell 4 is the centre
        cell = torch.stack((torch.full_like(targets, 4), second), 1).flatten()
        corner = 11 * unit * torch.stack((cell // 3, cell % 3))
        top, left = corner + dice(2 * unit + 1, (2, 2 * count), generator)  # [2N] each
        windows = images.unfold(2, 8 * unit, 1).unfold(3, 8 * unit, 1)
        image = torch.arange(count, device=device).repeat_interleave(2)
        patches = windows[image, :, top, left]  # [2N, 3, H/4, H/4]

        kept = dice(3, (2 * count, 1, 1, 1), generator)
        deviation = patches.std((2, 3), keepdim=True).gather(1, kept) / 100
        noise = torch.empty_like(patches).normal_(generator=generator)
        channel = torch.arange(3, device=device).view(3, 1, 1)
        return torch.where(channel == kept, patches, 0.5 + deviation * noise), targets


class MaskedAutoencoding:
    """What is behind the masked three quarters of the image? (2111.06377)

    48 of 8 x 8 patches are masked, and their pixels regressed, normalised by mean and
    (as in the authors' code, unbiased) variance of the patch. Deviations: a convolution
    can't skip patches, so it sees mid-gray there; the decoder is one layer.
    """

    def __init__(self, images, mirror=True):
        if images.shape[-1] == 8:  # of one pixel normalising leaves nothing
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
    """Which other view of the batch shows the same image? (SimCLR, 2002.05709, A, B.9)

    Random resized crop, flip (where allowed), colour jitter of strength 0.5, grayscale;
    no blur. Deviations: a crop larger than the image is cut, not drawn again; the
    jitters' order is fixed, hue turns chroma in YIQ, colours are clipped at the end;
    the projection, as wide as the encoder, has no BatchNorm.
    """

    def __init__(self, images, mirror=True):
        self.flip = 0.5 if mirror else 0.0

    def make_head(self, channels):
        hidden = (nn.Linear(channels, channels), nn.ReLU())
        return pooled(*hidden, nn.Linear(channels, 128))

    def make_batch(self, images, indices, generator):
        views = images.repeat_interleave(2, 0)
        partners = torch.arange(len(views), device=images.device) ^ 1  # 1, 0, 3, 2, ...
        return self.jitter(self.crop(views, generator), generator), partners

    def loss(self, outputs, targets):
        """NT-Xent (equation 1), of [2N, D]: row targets[i] shows the image of row i."""
        views = F.normalize(outputs, dim=1)
        similarity = views @ views.T / 0.5  # [2N, 2N], at a temperature of 0.5
        itself = torch.eye(len(views), dtype=torch.bool, device=views.device)
        return F.cross_entropy(similarity.masked_fill(itself, -math.inf), targets)

    def crop(self, views, generator):
        """Cuts 8 to 100% of the area out of each of [R, 3, H, H], ratio 3/4 to 4/3."""
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
        return F.grid_sample(views, grid, padding_mode="border", align_corners=False)

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

    What another task gains above this one is due to what it asks. The seed is fixed:
    images that are appended leave the earlier ones' labels as they are.
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
    """Nothing: the outer loop decides. (MAXL, 1901.08933, sections 3.1, 3.2)

    One part of the head makes soft labels, another answers; what the labels become is
    learned through the second order. Deviations: the labels move in the inner loop too,
    have no network of their own and do not know the class, so there is no hierarchy; no
    entropy term, no focal loss, no primary loss in the inner loop.
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
    """Nothing: the outer loop decides. (ARM-LL, 2007.02931)

    The loss is the mean square of what a learned head says. Deviations: in the authors'
    code it is the norm over the batch, of what is said of logits, so the inner loop
    moves the classifier too; and the learned part does not move in it.
    """

    def __init__(self, images, mirror=True): ...

    def make_head(self, channels):
        hidden = (nn.Linear(channels, channels), nn.ReLU())
        return pooled(*hidden, nn.Linear(channels, 1))

    def make_batch(self, images, indices, generator):
        return images, indices  # which are not used

    def loss(self, outputs, targets):
        return outputs.square().mean()


# A new task's class stands above this, and it is a line here: then it is drawn, too
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
    "target": """triangle 40 87 07
square 11 71 77 17
pentagon 40 83 67 27 03
star 40 53 83 55 68 46 28 35 03 33
cross 30 50 53 83 85 55 58 38 35 05 03 33
ring 30 50 83 85 58 38 05 03 30 42 33 24 35 46 55 64 53 42
arrow 40 74 54 58 38 34 14
crescent 50 30 12 03 05 16 38 58 46 35 33 42
house 40 84 74 78 18 14 04
heart 42 51 71 83 84 48 04 03 11 31""".splitlines(),
    "source": """octagon 30 50 83 85 58 38 05 03
kite 40 73 48 13
hexagon 20 60 84 68 28 04
bolt 50 14 44 28 74 44
dome 20 60 82 85 05 02
tee 10 70 72 52 58 38 32 12
hourglass 10 70 54 78 18 34
drop 40 65 67 58 38 27 25
bracket 10 70 72 32 36 76 78 18
fish 04 21 51 64 81 87 64 57 27""".splitlines(),
}


def render(outline: str, lean: float, spread: float, rng) -> np.ndarray:
    """[32, 32, 3] in 0 to 255: one of SHAPES, of a hue about `lean`."""
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
    for offset, bright in (6j, 20), (-2j, value + 20), (0, value):  # shadow, edge, ...
        pen.polygon((polygon + offset).view(float).tolist(), hsv(hue, bright))
    return np.asarray(picture.reduce(3), np.float32)


def lit(pictures: list[np.ndarray], rng: np.random.Generator) -> Tensor:
    """uint8 [count, 3, 32, 32]: with light from above, texture and noise."""
    images = np.stack(pictures)
    y, x = np.mgrid[0:32, 0:32].astype(np.float32)[..., None]
    dx, dy, phase = rng.uniform(-1, 1, (3, len(images), 1, 1, 1)).astype(np.float32)
    images *= 1.1 - 0.3 * y / 31 + 0.12 * np.sin(dx * x + dy * y + 3 * phase)
    images += 10 * rng.standard_normal(images.shape, np.float32)
    images = torch.from_numpy(images.clip(0, 255).astype(np.uint8))
    return images.movedim(3, 1).contiguous()


def draw_shapes(count: int, classes: str = "target", seed: int = 0) -> tuple:
    """Images, uint8 [count, 3, 32, 32], and their labels, balanced, int64 [count].

    classes: "target" or "source", ten shapes each, whose colours lean differently.
    """
    rng, outlines = np.random.default_rng([seed, classes == "source"]), SHAPES[classes]
    labels = rng.permutation(count) % len(outlines)
    pictures = [render(outlines[label], 36 * label, 50, rng) for label in labels]
    return lit(pictures, rng), torch.from_numpy(labels)


def coloured_labels(count: int, agreement: tuple, seed: int) -> tuple[np.ndarray, ...]:
    """Shape, colour and label, each 0 or 1, int [E, count], of E environments.

    As ColoredMNIST (1907.02893, section 5.2): the label is the shape, but for a quarter
    of the images the other one; colour and label agree in the share agreement[e].
    """
    rng = np.random.default_rng([seed, count])
    shape = np.stack([rng.permutation(count) % 2 for _ in agreement])
    label = shape ^ (rng.random(shape.shape) < 0.25)
    colour = label ^ (rng.random(shape.shape) >= np.array(agreement)[:, None])
    return shape, colour, label


def draw_coloured_shapes(count: int, agreement: tuple, seed: int) -> tuple:
    """Stars and rings, red or green: images, labels, environments, `count` of each."""
    rng = np.random.default_rng(seed)
    outlines, hues = SHAPES["target"][3:6:2], (0, 120)  # star and ring, red and green
    shapes, colours, labels = map(np.ravel, coloured_labels(count, agreement, seed))
    drawn = zip(shapes, colours, strict=True)
    pictures = [render(outlines[k], hues[colour], 10, rng) for k, colour in drawn]
    environments = torch.arange(len(agreement)).repeat_interleave(count)
    return lit(pictures, rng), torch.from_numpy(labels), environments


# --- the figure ---
def draw_figure(images: Tensor, path: str) -> None:
    """A PNG of what each task makes of uint8 images [N, 3, 32, 32], and its answers."""
    from matplotlib.figure import Figure  # here, as the arms draw nothing

    tasks = make_tasks(None, images, not is_gray(images), TASKS)
    generator, indices = Generator().manual_seed(0), torch.arange(len(images))
    figure = Figure(figsize=(1.9 * len(images) + 2.5, 0.8 * len(tasks)))
    figure.subplots_adjust(2.5 / figure.get_figwidth(), 0.01, 0.99, 0.99, 0.1, 0.1)
    axes = figure.subplots(len(tasks), len(images), squeeze=False)
    for (name, task), row in zip(tasks.items(), axes, strict=True):
        question = (task.__doc__ or "").partition("\n")[0].partition(" (")[0]
        text = f"{name.replace('_', ' ')}\n{textwrap.fill(question, 32)}"
        row[0].text(-4, 16, text, ha="right", va="center")
        inputs, targets = task.make_batch(images / 255, indices, generator)
        shown = inputs.unflatten(0, (len(images), -1))  # [N, 1 or 2, 3, H', H']
        if targets.ndim > 1:
            shown = torch.cat((shown, images[:, None] / 255), 1)
        for i, axis in enumerate(row):
            for k, picture in enumerate(shown[i].movedim(1, 3).numpy()):
                axis.imshow(picture, extent=(44 * k, 44 * k + 32, 32, 0))
            if targets.shape == indices.shape and name not in LEARNED:
                answer = getattr(task, "answers", range(10**9))[targets[i]]
                side = "left" if len(shown[i]) == 1 else "center"
                axis.text(38, 16, answer, ha=side, va="center")
            axis.set(xlim=(0, 84), ylim=(32, 0))
            axis.axis("off")
    figure.savefig(path, format="png", dpi=200)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws what each pretext task asks.")
    add = parser.add_argument
    add("images", nargs="*", metavar="IMAGE", help="files; default: drawn shapes")
    add("--out", default="pretext.png", help="the PNG to write (%(default)s)")
    args = parser.parse_args()
    try:
        images = [decode(path, 32) for path in args.images]
        draw_figure(torch.stack(images or [*draw_shapes(4, seed=1)[0]]), args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"pretext.py: {error}\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
