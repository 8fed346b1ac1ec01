"""The data that every arm sees, and the pretext tasks made from it: all that the arms share.

    python pretext.py [IMAGE ...] [--out pretext.png]    # draws what each task shows and asks

A pretext task makes labels out of images alone. A new one is a class and a line in TASKS. N:
images of a batch, M: training images, H: their side in pixels, a multiple of 8. Its methods:

    __init__(images)      training images, uint8 [M, 3, H, H]; ValueError: it can't use them
    make_head(channels)   -> a new head: feature map [R, channels, H'/8, H'/8] -> outputs
    make_batch(images, indices, generator)   images [N, 3, H, H] in [0, 1], their indices in the
        training images [N] -> inputs [R, 3, H', H'] in [0, 1] and targets. R is N, or 2N: rows 2i
        and 2i + 1 then come from image i
    loss(outputs, targets)   -> the mean loss, a scalar, twice differentiable in the outputs

Its `answers`, if there are any, name the classes in the figure. Whatever is drawn comes from the
generator, on the images' device, for each image of a batch by itself; once a task is made, nothing
in it makes a GPU wait for the host.
"""

import argparse
import hashlib
import math
import os
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageOps
from torch import Generator, Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from tqdm import tqdm


# --- the pretext tasks ---
def is_gray(images: Tensor) -> bool:
    """Whether the three channels of uint8 images [M, 3, H, W] are equal everywhere."""
    return bool((images[:, :1] == images[:, 1:]).all())


def draws(count: int, images: Tensor, generator: Generator) -> Tensor:
    """[count, N] numbers, uniform in [0, 1), of the type and on the device of images [N, ...]."""
    return images.new_empty(count, len(images)).uniform_(generator=generator)


def pooled(*layers: nn.Module) -> nn.Sequential:
    """A head on the mean feature: [R, C, h, w] -> [R, C] -> layers."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


class Rotation:
    """By which of the four quarter turns is the image rotated? (RotNet, 1803.07728)

    Deviation: RotNet shows each image at all four turns, and gains by it. Here each is shown at
    one, the batch at all four equally often: a support image then costs the same in every task.
    """

    answers = ("0°", "90°", "180°", "270°")  # anticlockwise, as torch.rot90
    loss = staticmethod(F.cross_entropy)

    def __init__(self, images): ...

    def make_head(self, channels):
        return pooled(nn.Linear(channels, 4))

    def make_batch(self, images, indices, generator):
        turns = torch.randperm(len(images), generator=generator, device=images.device) % 4
        turned = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])  # [4, N, 3, H, H]
        return turned[turns, torch.arange(len(images), device=images.device)], turns


# Linear sRGB -> CIE XYZ (IEC 61966-2-1); the sums of the rows are the white point D65
RGB_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB in [0, 1] -> CIE Lab under D65, both [..., 3, H, W]: L in [0, 100], |a|, |b| < 110."""
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    r, g, b = linear.unbind(-3)
    # numbers instead of a matrix, whose copy to a GPU would make the host wait
    xyz = torch.stack([(m[0] * r + m[1] * g + m[2] * b) / sum(m) for m in RGB_TO_XYZ], -3)
    f = torch.where(xyz > (6 / 29) ** 3, xyz ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f.unbind(-3)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -3)


class Colorization:
    """What colour is each place of a gray image? (1603.08511, section 2)

    The encoder gets lightness; the head gives, at a quarter of the resolution, logits over Q bins:
    the points of a grid of step 10 in the ab plane of CIE Lab that are nearest to some sRGB colour,
    Q = 261 (the paper lists 313). Targets are the 5 nearest bins, softly, with classes rebalanced.
    Deviations: a place has the mean colour of its 4 x 4 pixels, and the prior is that of at most
    2,000 training images. ValueError for gray images.
    """

    sigma = 5.0  # of the soft encoding and of the prior's smoothing, in units of ab
    uniform = 0.5  # lambda: the share of the uniform distribution that the prior is mixed with

    def __init__(self, images):
        if is_gray(images):
            raise ValueError("colorization needs colour, but all images are gray: leave it out")
        axis = torch.linspace(0, 1, 86, device=images.device)
        colours = torch.cartesian_prod(axis, axis, axis).T[:, :, None]  # [3, 86^3, 1]
        self.bins = (rgb_to_lab(colours)[1:, :, 0] / 10).round().unique(dim=1).T * 10  # [Q, 2]
        counts = torch.zeros(len(self.bins), device=images.device)
        sample = images[:: math.ceil(len(images) / 2000)]
        for some in sample.split(200):  # all at once would need a gigabyte at 64 x 64
            bins, _ = self.encode(rgb_to_lab(some / 255))
            counts += bins[:, 0].flatten().bincount(minlength=len(self.bins))
        kernel = torch.exp(-(torch.cdist(self.bins, self.bins) ** 2) / (2 * self.sigma**2))
        self.prior = kernel / kernel.sum(0) @ (counts / counts.sum())  # smoothed, sums to 1
        mixed = (1 - self.uniform) * self.prior + self.uniform / len(self.bins)
        self.weights = 1 / mixed / (self.prior / mixed).sum()  # E[w] = sum_q prior_q w_q = 1

    def encode(self, lab):
        """Lab [N, 3, H, H] -> the 5 nearest bins (nearest first), their shares: [N, 5, H/4, H/4]"""
        ab = F.avg_pool2d(lab[:, 1:], 4)
        distance = torch.cdist(ab.flatten(2).mT, self.bins.to(ab.dtype))  # [N, HH/16, Q]
        distance, bins = (x.mT.unflatten(2, ab.shape[2:]) for x in distance.topk(5, largest=False))
        return bins, (-(distance**2) / (2 * self.sigma**2)).softmax(1)  # Gaussians, with sum 1

    def make_head(self, channels):
        return nn.Sequential(nn.Conv2d(channels, 4 * len(self.bins), 1), nn.PixelShuffle(2))

    def make_batch(self, images, indices, generator):
        lab = rgb_to_lab(images)
        bins, shares = self.encode(lab)
        shares = shares * self.weights[bins[:, :1]]  # v(Z): the weight of the nearest bin
        # side by side in one tensor: 10 numbers a place, where dense targets would be Q
        return (lab[:, :1] / 100).repeat(1, 3, 1, 1), torch.cat((bins, shares), 1)

    def loss(self, outputs, targets):
        bins, shares = targets.chunk(2, dim=1)  # [N, 5, H/4, H/4] each
        log_p = outputs.log_softmax(1).gather(1, bins.long())
        return -(shares.to(outputs.dtype) * log_p).sum(1).mean()


class RelativePosition:
    """At which of 8 places around the first patch is the second? (1505.05192; 1708.07860)

    Sides are H/4, gaps 3H/32, and each patch is shifted by up to H/32 each way. Colour dropping
    keeps one channel of a patch; the others become noise about mid-gray. Deviations: the image has
    room for one grid only, so the first patch is always its centre, gaps are 3/8 of a patch (there
    1/2) and shifts 1/8 (there 7/96); no patch is downsampled. ValueError unless 32 divides H.
    """

    answers = "↖↑↗←→↙↓↘"
    loss = staticmethod(F.cross_entropy)

    def __init__(self, images):
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
        targets = torch.randint(8, (count,), generator=generator, device=device)
        cell = torch.stack((torch.full_like(targets, 4), targets + (targets > 3)), 1).flatten()
        jitter = torch.randint(-unit, unit + 1, (2, 2 * count), generator=generator, device=device)
        top, left = unit + 11 * unit * torch.stack((cell // 3, cell % 3)) + jitter  # [2N] each
        windows = images.unfold(2, 8 * unit, 1).unfold(3, 8 * unit, 1)  # at every top and left
        image = torch.arange(count, device=device).repeat_interleave(2)
        patches = windows[image, :, top, left]  # [2N, 3, H/4, H/4]

        channel = torch.arange(3, device=device).view(3, 1, 1)
        kept = torch.randint(3, (2 * count, 1, 1, 1), generator=generator, device=device)
        deviation = patches.std((2, 3), keepdim=True).gather(1, kept) / 100
        noise = torch.empty_like(patches).normal_(generator=generator)
        return torch.where(channel == kept, patches, 0.5 + deviation * noise), targets


class MaskedAutoencoding:
    """What is behind the masked three quarters of the image? (2111.06377)

    48 of the 8 x 8 patches of side H/8 are masked. Their pixels are regressed, normalised by mean
    and (as in the authors' code, unbiased) variance of the patch. Deviations: a dense convolution
    can't skip patches, so the encoder sees mid-gray in their place; the decoder is one layer.
    ValueError for H = 8: of one pixel normalising leaves nothing.
    """

    def __init__(self, images):
        if images.shape[-1] == 8:
            raise ValueError("masked_autoencoding needs more than 8 pixels: use --image-size 16")

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
        targets = torch.cat((normalised, masked.expand(-1, side**2, -1, -1)), 1)  # pixels, mask
        return F.pixel_shuffle(inputs, side), F.pixel_shuffle(targets, side)  # [N, 3 or 4, H, H]

    def loss(self, outputs, targets):
        pixels, masked = targets.to(outputs.dtype).split((3, 1), dim=1)
        return (masked * (outputs - pixels) ** 2).mean() / masked.mean()


class Contrastive:
    """Which of the batch's other views shows the same image? (SimCLR, 2002.05709, app. A, B.9)

    Random resized crop, flip, colour jitter of strength 0.5, grayscale; no blur. Deviations: gray
    images are not flipped, as digits are not mirror-symmetric; a crop larger than the image is cut,
    not drawn again; the jitters' order is fixed, hue turns chroma in YIQ, and colours are clipped
    once, at the end; the projection (hidden width: the encoder's, 128 outputs) has no BatchNorm.
    """

    temperature = 0.5

    def __init__(self, images):
        self.flip = 0.0 if is_gray(images) else 0.5

    def make_head(self, channels):
        return pooled(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 128))

    def make_batch(self, images, indices, generator):
        views = images.repeat_interleave(2, 0)
        partners = torch.arange(len(views), device=images.device) ^ 1  # 1, 0, 3, 2, 5, 4, ...
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
        width, height = (((0.08 + 0.92 * area) * r).sqrt().clamp(max=1) for r in (ratio, 1 / ratio))
        x, y, zero = (1 - width) * (2 * x - 1), (1 - height) * (2 * y - 1), torch.zeros_like(x)
        width = torch.where(coin < self.flip, -width, width)
        # output -> input coordinates, both in [-1, 1]
        theta = torch.stack((width, zero, x, zero, height, y), 1).view(-1, 2, 3)
        grid = F.affine_grid(theta, views.shape, align_corners=False)
        return F.grid_sample(views, grid, padding_mode="border", align_corners=False)

    def jitter(self, views, generator):
        """Changes the colours of 80% of [R, 3, H, H], and takes those of 20% away."""
        coin, gray, *factors, hue = draws(6, views, generator)[..., None, None]
        changed = coin < 0.8
        contrast, brightness, saturation = (1 + 0.4 * changed * (2 * f - 1) for f in factors)
        angle = 2 * math.pi * 0.1 * changed * (2 * hue - 1)
        r, g, b = views.unbind(1)  # [R, H, H] each
        y = 0.299 * r + 0.587 * g + 0.114 * b
        u, v = 0.492 * (b - y), 0.877 * (r - y)  # the plane that I and Q span, too
        y = brightness * (contrast * y + (1 - contrast) * y.mean((1, 2), keepdim=True))
        chroma = brightness * contrast * saturation * (gray >= 0.2)
        cos, sin = chroma * angle.cos(), chroma * angle.sin()
        r, b = y + (sin * u + cos * v) / 0.877, y + (cos * u - sin * v) / 0.492
        g = (y - 0.299 * r - 0.114 * b) / 0.587
        return torch.stack((r, g, b), 1).clamp(0, 1)


class RandomLabels:
    """Which of 10 labels was drawn for this image? (the control: no paper)

    Labels mean nothing, so what another task gains above this one is due to what it asks. The seed
    is fixed, and images that are appended leave the labels of the earlier ones as they are.
    """

    loss = staticmethod(F.cross_entropy)

    def __init__(self, images):
        labels = torch.randint(10, (len(images),), generator=Generator().manual_seed(0))
        self.labels = labels.to(images.device)

    def make_head(self, channels):
        return pooled(nn.Linear(channels, 10))

    def make_batch(self, images, indices, generator):
        return images, self.labels[indices % len(self.labels)]  # test images have none of their own


TASKS: dict[str, type] = {
    "rotation": Rotation,
    "colorization": Colorization,
    "relative_position": RelativePosition,
    "masked_autoencoding": MaskedAutoencoding,
    "contrastive": Contrastive,
    "random_labels": RandomLabels,
}
DEFAULT_TASKS = ("rotation", "colorization", "masked_autoencoding", "contrastive")


# --- the data ---
DATASETS = {  # name: (torchvision's class or None, default source)
    "shapes": (None, "shapes"),
    "coloured_shapes": (None, "shapes"),
    "cifar10": (torchvision.datasets.CIFAR10, "cifar100"),
    "cifar100": (torchvision.datasets.CIFAR100, "cifar10"),
    "mnist": (torchvision.datasets.MNIST, "fashion_mnist"),
    "fashion_mnist": (torchvision.datasets.FashionMNIST, "mnist"),
}


class Data(NamedTuple):
    """A dataset on the device. Images are uint8 [M, 3, H, H], labels and environments int64 [M].

    An environment is a part with a distribution of its own: a camera, a hospital, a writer. Most
    datasets have one. Training images have environments 0 ... E-1, test images may have more.
    """

    images: Tensor
    labels: Tensor
    environments: Tensor
    test_images: Tensor
    test_labels: Tensor
    test_environments: Tensor
    flip: bool  # are images mirrored? Gray ones are not, as digits are not mirror-symmetric
    unlabelled: tuple = ()  # for each environment of the test set (images, mask): to adapt to

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


def rng(seed: int, purpose: str, step: int = 0, device: str = "cpu") -> Generator:
    """The generator of one purpose at one step: no draw shifts another, none needs to be saved."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def decode(path: str, side: int) -> Tensor:
    """The central square of an image file, upright, scaled: uint8 [3, side, side]."""
    try:
        image = Image.open(path, formats=("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"))
        if image.mode[0] in "IF":  # convert() would clip them at 255
            raise ValueError("it has more than 8 bits a channel")
        image = ImageOps.exif_transpose(image).convert("RGB")
        return pil_to_tensor(ImageOps.fit(image, (side, side)))
    except Exception as error:  # Pillow's decoders raise all kinds
        why = f"{path} is no image that Pillow reads ({error})"
        raise ValueError(f"{why}; remove or convert it") from error


def load_folder(root: Path, data_dir: str, side: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """-> (images, labels, environments) of ROOT/train and of ROOT/test or ROOT/val.

    Files are CLASS/NAME or CLASS/ENVIRONMENT/NAME. They are decoded once, until one changes.
    """
    folders = [root / "train", root / ("test" if (root / "test").is_dir() else "val")]
    shown = lambda path: Path(path).name[0] != "."  # noqa: E731  (every other file is an image)
    sets = [torchvision.datasets.ImageFolder(folder, is_valid_file=shown) for folder in folders]
    if odd := {*sets[0].classes} ^ {*sets[1].classes}:
        raise ValueError(f"{root}: classes in train or test alone: {', '.join(sorted(odd))}")
    stats = [(path, os.stat(path)) for s in sets for path, _ in s.samples]
    state = repr([side, *((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats)])
    copy = Path(data_dir, f"decoded-{hashlib.sha256(state.encode()).hexdigest()[:16]}")
    with suppress(Exception):  # there is none yet, or it is damaged
        return torch.load(copy, weights_only=True)
    names, decoded = [], []
    for folder in sets:
        places = [Path(path).relative_to(folder.root).parts[1:-1] for path, _ in folder.samples]
        names += sorted({*places} - {*names})  # of the environments, training's first
        bar = tqdm(folder.samples, f"decoding {folder.root}", leave=False, disable=None)
        images = torch.stack([decode(path, side) for path, _ in bar])
        environments = torch.tensor([names.index(place) for place in places])
        decoded.append((images, torch.tensor(folder.targets), environments))
    with suppress(OSError, RuntimeError):  # without a copy, the next run decodes again
        copy.parent.mkdir(parents=True, exist_ok=True)
        torch.save(decoded, f"{copy}.{os.getpid()}")
        os.replace(f"{copy}.{os.getpid()}", copy)
    return decoded


def load(name: str, data_dir: str, side: int, device: str, source: bool = False) -> Data:
    """A dataset by its name or folder; source: as what is pretrained on (shapes: other classes).

    ValueError: there is no such dataset, it can't be downloaded, or a file in it is no image.
    """
    if name is None:
        raise ValueError("there is no default for --source; name the dataset to pretrain on")
    rank = dist.get_rank() if dist.is_initialized() else None
    if rank:
        dist.barrier()  # the first process downloads and decodes, the others find it
    if name == "shapes":
        classes = "source" if source else "target"
        splits = [draw_shapes(2000, classes, 0), draw_shapes(1000, classes, 1)]
    elif name == "coloured_shapes":
        train = draw_coloured_shapes(5000, (0.8, 0.1), 0)
        splits = [train, draw_coloured_shapes(1256, (0.8, 0.1, 0.9), 1)]
    elif name in DATASETS:
        try:
            sets = [DATASETS[name][0](data_dir, train, download=True) for train in (True, False)]
        except Exception as error:  # of the network, of the disk, of a reader of damaged files
            why = f"{name} is not in {data_dir} and can't be downloaded ({error}); remove what is"
            raise ValueError(f"{why} damaged; shapes and a folder need no network") from error
        splits = [(torch.as_tensor(s.data), torch.as_tensor(s.targets)) for s in sets]
        # [M, H, W, 3], or gray [M, H, W] -> [M, 3 or 1, H, W]
        splits = [(x.view(*x.shape[:3], -1).movedim(3, 1), y) for x, y in splits]
    elif Path(name).is_dir():
        splits = load_folder(Path(name), data_dir, side)
    else:
        raise ValueError(f"{name}: no such folder, and none of {', '.join(DATASETS)}")
    if rank == 0:
        dist.barrier()
    tensors = []
    for images, labels, *environments in splits:
        tensors += [resize(images, [side, side]).expand(-1, 3, -1, -1).contiguous(), labels]
        tensors += environments or [torch.zeros_like(labels)]
    return Data(*(x.to(device) for x in tensors), flip=not is_gray(tensors[0]))


def limit_labels(data: Data, labels_per_class: int | None, eval_on: str, seed: int) -> Data:
    """The desired task within its label budget, in equal parts from each environment.

    eval_on "val": a fifth of the budget is held out and takes the place of the test set. For each
    environment up to 256 images are set aside to adapt to, unlabelled: training images, or where
    there are several environments test images, which are then scored by nobody.
    """
    val, several = eval_on == "val", int(data.environments.max()) + 1
    order = torch.randperm(len(data.labels), generator=rng(seed, "labels")).to(data.labels.device)
    kept, held = [], []
    kinds = data.labels * several + data.environments
    for kind in kinds.unique():
        members = order[kinds[order] == kind]
        budget = len(members) if labels_per_class is None else labels_per_class // several
        if not 1 + val <= budget <= len(members):
            take = f"take {several * (1 + val)} to {several * len(members)}, all that there are"
            raise ValueError(f"--labels-per-class {labels_per_class}, --eval-on {eval_on}: {take}")
        cut = val * max(1, budget // 5)
        held.append(members[:cut])
        kept.append(members[cut:budget])
    kept, held = torch.cat(kept), torch.cat(held)
    train = tuple(x[kept] for x in data[:3])
    test = tuple(x[held] for x in data[:3]) if val else data[3:6]
    scored, unlabelled = torch.ones_like(test[1], dtype=torch.bool), []
    alone = not train[2].any() and not test[2].any()  # one environment
    images, _, home = train if alone else test
    for environment in home.unique():
        members = (home == environment).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=rng(seed, "evaluation")).to(home.device)
        count = 256 if alone else min(256, len(members) // 2)
        mask = torch.zeros_like(home, dtype=torch.bool).index_fill(0, members[order[:count]], True)
        unlabelled.append((images, mask))
        if not alone:
            scored &= ~mask
    return Data(*train, *(x[scored] for x in test), data.flip, tuple(unlabelled))


def checksum(*datasets: Data) -> str:
    """A digest of all images and labels: a run goes on only with the data that it began with."""
    digest = hashlib.sha256()
    for tensor in (x for data in datasets for x in data[:6]):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def mirror(images: Tensor, generator: Generator, flip: bool) -> Tensor:
    """uint8 [N, 3, H, H] -> in [0, 1], each mirrored or not: all that is done to support images.

    A shift would fill a border with black, which tells a pretext task what it should not know.
    """
    coin = torch.randint(2, (len(images), 1, 1, 1), generator=generator, device=images.device)
    return torch.where(coin * flip == 1, images.flip(3), images) / 255


def shift(images: Tensor, generator: Generator) -> Tensor:
    """[N, 3, H, H], each moved by up to H/8 pixels in both directions; what comes in is black."""
    n, _, side, _ = images.shape
    how = {"generator": generator, "device": images.device}
    top, left = (torch.randint(side // 4 + 1, (n,), **how) for _ in range(2))
    windows = F.pad(images, [side // 8] * 4).unfold(2, side, 1).unfold(3, side, 1)
    return windows[torch.arange(n, device=images.device), :, top, left]


def labelled_batch(data: Data, step: int, size: int, seed: int, purpose: str = "query"):
    """-> images [B, 3, H, H] in [0, 1], labels [B], indices [B]: B = size, augmented.

    Each environment gives an equal part, out of shuffled epochs of its own, end to end.
    """
    parts, several = [], int(data.environments.max()) + 1
    if size < several:
        raise ValueError(f"--batch-size {size}: fewer than the {several} environments")
    for environment in range(several):
        members = (data.environments == environment).nonzero().squeeze(1)
        name = f"{purpose} {environment}" if environment else purpose
        n, count = len(members), size // several + (environment < size % several)
        begin = step * count
        epochs = range(begin // n, (begin + count) // n + 1)
        orders = [torch.randperm(n, generator=rng(seed, name, epoch)) for epoch in epochs]
        part = torch.cat(orders)[begin % n :][:count]
        parts.append(members[part.to(members.device)])
    index = torch.cat(parts)
    generator = rng(seed, f"{purpose} augmentation", step, index.device)
    images = mirror(shift(data.images[index], generator), generator, data.flip)
    return images, data.labels[index], index


def pool(datasets: list[Data]) -> tuple[Tensor, Tensor]:
    """The training images of the datasets together, uint8 [M, 3, H, H], and their environments."""
    images = torch.cat([data.images for data in datasets])
    environments = datasets[0].environments
    if len(datasets) > 1 and environments.any():
        raise ValueError("the source's images belong to no environment of the desired task")
    return images, F.pad(environments, (0, len(images) - len(environments)))


def draw(mask: Tensor, count: int, generator: Generator) -> Tensor:
    """-> indices of `count` of the images that `mask`, bool [M], has, or of all if it has fewer."""
    if not mask.any():
        raise ValueError("no image is left to adapt to: a smaller --batch-size, or --support query")
    order = torch.rand(len(mask), generator=generator, device=mask.device).masked_fill(~mask, 2.0)
    return order.topk(min(count, int(mask.sum())), largest=False).indices


def batches(tasks: dict, seed: int, purpose: str, step: int, images, index, count=0, flip=False):
    """-> {task: (inputs, targets)}, one support batch for each task.

    index: the indices of images [N, 3, H, H] in [0, 1], which every task gets; or a mask of the
    images, uint8 [M, 3, H, H], from which every task draws `count` of its own.
    """
    made = {}
    for name, task in tasks.items():
        generator, x, i = rng(seed, f"{purpose} {name}", step, images.device), images, index
        if index.dtype == torch.bool:
            i = draw(index, count, generator)
            x = mirror(images[i], generator, flip)
        made[name] = task.make_batch(x, i, generator)
    return made


def adaptations(data: Data, transductive: bool, size: int):
    """-> (indices of test images, images, index, count, flip) for each adaptation of an evaluation.

    One for each environment, to images that are never scored; transductive: one for each batch of
    `size` test images, to these very images, unlabelled.
    """
    environments = data.test_environments.unique().tolist()
    for environment, (images, mask) in zip(environments, data.unlabelled, strict=True):
        scored = (data.test_environments == environment).nonzero().squeeze(1)
        if not transductive:
            yield scored, images, mask, len(mask), data.flip
            continue
        for part in scored.split(size):
            index = torch.arange(len(part), device=part.device)
            yield part, data.test_images[part] / 255, index


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


def render(outline: str, lean: float, spread: float, rng: np.random.Generator) -> np.ndarray:
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
    for offset, bright in ((6j, 20), (-2j, value + 20), (0, value)):  # shadow, lit edge, shape
        pen.polygon((polygon + offset).view(float).tolist(), hsv(hue, bright))
    return np.asarray(picture.reduce(3), np.float32)


def lit(pictures: list[np.ndarray], rng: np.random.Generator) -> Tensor:
    """-> uint8 [count, 3, 32, 32]: light falls from above, with some texture and noise."""
    images = np.stack(pictures)
    y, x = np.mgrid[0:32, 0:32].astype(np.float32)[..., None]
    dx, dy, phase = rng.uniform(-1, 1, (3, len(images), 1, 1, 1)).astype(np.float32)
    images *= 1.1 - 0.3 * y / 31 + 0.12 * np.sin(dx * x + dy * y + 3 * phase)
    images += 10 * rng.standard_normal(images.shape, np.float32)
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2).copy())


def draw_shapes(count: int, classes: str = "target", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Drawn images, uint8 [count, 3, 32, 32], and their labels, int64 [count], balanced.

    classes: "target" or "source", ten shapes each. A shape's colour leans towards its class.
    """
    rng, shapes = np.random.default_rng([seed, classes == "source"]), SHAPES[classes].split(",")
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
    return shape, label ^ (rng.random(shape.shape) >= np.array(agreement)[:, None]), label


def draw_coloured_shapes(count: int, agreement: tuple, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stars and rings, red or green: images, labels, environments, `count` of each environment.

    Colour may tell more than shape, but what it tells depends on the environment.
    """
    rng, shapes = np.random.default_rng(seed), SHAPES["target"].split(",")
    outlines, hues = (shapes[3], shapes[5]), (0, 120)  # star and ring, red and green
    kinds, colours, labels = (x.flatten() for x in coloured_labels(count, agreement, seed))
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
        row[0].text(-4, 16, f"{name.replace('_', ' ')}\n{question}", ha="right", va="center")
        task = make_task(images)
        inputs, targets = task.make_batch(images / 255, indices, generator)
        shown = inputs.unflatten(0, (len(images), -1))  # [N, 1 or 2, 3, H', H']
        if targets.ndim > 1:
            shown = torch.cat((shown, images[:, None] / 255), 1)
        for i, axis in enumerate(row):
            for k, picture in enumerate(shown[i].movedim(1, 3).numpy()):
                axis.imshow(picture, extent=(44 * k, 44 * k + 32, 32, 0))
            if targets.shape == indices.shape:  # a class for each image
                answer = task.answers[targets[i]] if hasattr(task, "answers") else int(targets[i])
                side = "left" if len(shown[i]) == 1 else "center"  # beside, or between the two
                axis.text(38, 16, answer, ha=side, va="center")
            axis.set(xlim=(0, 84), ylim=(32, 0))
            axis.axis("off")
    figure.savefig(path, format="png", dpi=200)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws what each pretext task shows and asks.")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="files; default: drawn shapes")
    parser.add_argument("--out", default="pretext.png", help="the PNG to write (%(default)s)")
    args = parser.parse_args()
    try:
        images = [decode(path, 32) for path in args.images] or list(draw_shapes(4, seed=1)[0])
        draw_figure(torch.stack(images), args.out)
    except (OSError, ValueError) as error:
        parser.exit(2, f"pretext.py: {error}\n")
    print(f"wrote {args.out}")
