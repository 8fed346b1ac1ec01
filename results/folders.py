"""The folders that some protocols need, made of those in data/."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import pretext
from results import sites
from results.protocols import OTHERS

ROOT = Path(__file__).resolve().parents[1]


# --- the folders of other environments ---
def draw_tinted(count: int, shares: tuple, split: int) -> tuple:
    """Draws photographs as pretext.draw_coloured_shapes draws shapes.

    CIFAR-10's animals and vehicles, gray, tinted.
    """
    folder = ROOT / "data/cifar10" / ("train", "test")[split]
    kinds = ("bird cat deer dog frog horse", "airplane automobile ship truck")
    piles = []
    for kind in kinds:
        paths = [path for name in kind.split() for path in (folder / name).iterdir()]
        paths = sorted(map(str, paths))
        piles.append(np.random.default_rng(split).permutation(paths).tolist())
    drawn = pretext.coloured_labels(count, shares, split)
    shapes, colours, labels = (numbers.flatten() for numbers in drawn)
    images = []
    for shape, colour in zip(shapes, colours, strict=True):
        gray = Image.open(piles[shape].pop()).convert("L")
        tint = ("#ff6060", "#60ff60")[colour]
        picture = np.array(ImageOps.colorize(gray, "black", tint))
        images.append(torch.from_numpy(picture).permute(2, 0, 1))
    environments = torch.arange(len(shares)).repeat_interleave(count)
    return images, torch.from_numpy(labels), environments


def write_environments(folder: Path, draw, shares: tuple) -> None:
    """Writes SPLIT/CLASS/ENVIRONMENT/*.png; shares: as in pretext.coloured_labels."""
    splits = {"train": (5000, shares[:-1]), "test": (1256, shares)}  # the last is new
    for number, (split, (count, agreement)) in enumerate(splits.items()):
        drawn = zip(*draw(count, agreement, number), strict=True)
        for i, (image, label, environment) in enumerate(drawn):
            place = folder / split / f"class{label}" / f"environment{environment}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = image.permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(place / f"{i}.png")


# --- the folders of few labels ---
def link(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file)


def prepare_few() -> None:
    """Links to CIFAR-10's files, with fewer test images, in two folders.

    cifar10-few: 200 test images of each class. cifar10-few-val: 200 training images in
    their place, and training without these.
    """
    photos = (ROOT / "data/cifar10").resolve()
    test, val = ROOT / "data/cifar10-few", ROOT / "data/cifar10-few-val"
    if test.exists() and val.exists():
        return
    for kind in pretext.class_names(photos / "train"):
        train = pretext.shown(photos / "train" / kind)
        link(train, test / "train" / kind)
        link(pretext.shown(photos / "test" / kind)[::5], test / "test" / kind)
        link(train[::25], val / "test" / kind)
        kept = [file for i, file in enumerate(train) if i % 25]
        link(kept, val / "train" / kind)


def prepare_sites(concentration: str, seeds: Iterable[int]) -> None:
    for seed in seeds:
        folder = ROOT / f"data/sites-{concentration}-{seed}"
        if not folder.exists():
            photos = ROOT / "data/cifar10"
            sites.write_sites(folder, photos, float(concentration), seed)


# --- for a protocol ---
def prepare(name: str, seeds: Iterable[int]) -> None:
    """Makes what a protocol's runs with these seeds need, if it is not there."""
    for other, shares in OTHERS.items():
        folder = ROOT / "data" / f"coloured-{other}"
        draw = pretext.draw_coloured_shapes
        if other == "photographs":
            draw = draw_tinted
        if name in ("where", "tinted", "dear-tune") and not folder.exists():
            write_environments(folder, draw, shares)
    if "few" in name or name == "gate":
        prepare_few()
    if "sites" in name:  # sites-CONCENTRATION; the others are of 0.2
        _, is_one, concentration = name.partition("sites-")
        prepare_sites(concentration if is_one else "0.2", seeds)
