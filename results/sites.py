"""Sites: photographs from many places, each with class frequencies of its own.

`write_sites` deals the images of CIFAR-10 out to sites. Pooled over these each class
is equally frequent, so a site's frequencies are all that is to be known of it. What
they are worth to a classifier is measured by its output alone:

    plain          its answer
    em             after the frequencies that EM finds in the site's unlabelled images
    em prior       after those that are found with a prior, fitted to training's sites
    known          after the site's true frequencies
    most frequent  the site's most frequent class, whatever the image

S: sites. C: classes. M, N: images.
"""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

import pretext

SEEN, NEW = 32, 8  # sites with training images, and those of the test alone
TRAIN_IMAGES, TEST_IMAGES = 1000, 200  # of each site

# (unlabelled images of a site [M, 3, H, H], images of the same site [N, 3, H, H]), both
# uint8, -> class probabilities [N, C]
Predict = Callable[[Tensor, Tensor], Tensor]


# --- the images of each site ---
class Counts(NamedTuple):
    """How many images of each class a site has. The new sites are the last."""

    train: np.ndarray  # int [SEEN, C]
    test: np.ndarray  # int [SEEN + NEW, C]


def balance(frequencies: np.ndarray) -> np.ndarray:
    """[S, C] -> [S, C]: rows sum to 1, columns to S / C.

    Iterative proportional fitting (Deming and Stephan 1940).
    """
    sites, classes = frequencies.shape
    for _ in range(10_000):
        frequencies = frequencies / frequencies.sum(0) * sites / classes
        frequencies = frequencies / frequencies.sum(1, keepdims=True)
        if np.ptp(frequencies.sum(0)) < 1e-6:
            break
    return frequencies


def whole(frequencies: np.ndarray, images: int) -> np.ndarray:
    """Frequencies [S, C] -> counts [S, C], so many images in a site.

    All columns have the same sum. ValueError: the images can't be shared out so.
    """
    sites, classes = frequencies.shape
    if sites * images % classes:
        what = f"{sites} sites of {images} images"
        raise ValueError(f"{what} can't have {classes} classes equally often")
    wanted = images * frequencies
    counts = np.floor(wanted).astype(int)
    site_lacks = images - counts.sum(1)
    class_lacks = sites * images // classes - counts.sum(0)
    for _ in range(site_lacks.sum()):
        # one more where most is missing, of the places that both margins leave open
        still_open = np.outer(site_lacks > 0, class_lacks > 0)
        missing = np.where(still_open, wanted - counts, -np.inf)
        site, label = np.unravel_index(missing.argmax(), missing.shape)
        counts[site, label] += 1
        site_lacks[site] -= 1
        class_lacks[label] -= 1
    return counts


def draw_frequencies(
    sites: int, classes: int, concentration: float, generator: Generator
) -> np.ndarray:
    """[S, C], from a Dirichlet distribution, then balanced. inf: uniform."""
    if math.isinf(concentration):
        return np.full((sites, classes), 1 / classes)
    drawn = generator.dirichlet(np.full(classes, concentration), sites)
    return balance(drawn)


def draw_counts(classes: int, concentration: float, generator: Generator) -> Counts:
    """Seen sites have the same frequencies in both splits, as far as counts can."""
    seen = draw_frequencies(SEEN, classes, concentration, generator)
    new = draw_frequencies(NEW, classes, concentration, generator)
    test = np.concatenate((whole(seen, TEST_IMAGES), whole(new, TEST_IMAGES)))
    return Counts(whole(seen, TRAIN_IMAGES), test)


def shuffled(folder: Path, generator: Generator) -> list[list[Path]]:
    """The files of each class."""
    names = pretext.class_names(folder)
    classes = [pretext.files_below(folder / name) for name in names]
    return [[files[i] for i in generator.permutation(len(files))] for files in classes]


def deal(classes: list[list[Path]], counts: np.ndarray, folder: Path) -> None:
    """Links files to CLASS/SITE/ below the folder: counts [S, C] of them."""
    for files, numbers in zip(classes, counts.T, strict=True):
        if numbers.sum() > len(files):
            where = files[0].parent
            raise ValueError(f"{where} has {len(files)} of {numbers.sum()} images")
        rest = iter(files)
        for site, number in enumerate(numbers):
            home = folder / files[0].parent.name / f"site{site:02d}"
            if number:
                home.mkdir(parents=True)
            for _ in range(number):
                file = next(rest)
                (home / file.name).symlink_to(file.resolve())


def write_sites(folder: Path, source: Path, concentration: float, seed: int) -> None:
    """Makes a new folder SPLIT/CLASS/SITE/ of images in SPLIT/CLASS/ of the source.

    concentration: of the Dirichlet distribution; the lower, the more sites differ; inf
    makes them alike. A seed's images are the same for all: only their sites differ.
    FileExistsError: there is such a folder.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it, or use it as it is")
    generator = np.random.default_rng(seed)
    train = shuffled(source / "train", generator)
    test = shuffled(source / "test", generator)
    counts = draw_counts(len(train), concentration, generator)
    part = folder.with_name(f"{folder.name}.part")  # if interrupted, begin again
    shutil.rmtree(part, ignore_errors=True)
    deal(train, counts.train, part / "train")
    deal(test, counts.test, part / "test")
    part.rename(folder)


# --- label shift: the classifier stays, the class frequencies change ---
def adjust(
    probabilities: np.ndarray, prior: np.ndarray, frequencies: np.ndarray
) -> np.ndarray:
    """[N, C] -> [N, C]: p(y | x) where classes have these frequencies, not the prior's.

    p'(y | x) ~ p(y | x) p'(y) / p(y), as p(x | y) stays (Saerens et al. 2002)
    """
    weighted = probabilities * frequencies / prior
    return weighted / weighted.sum(1, keepdims=True)


def em_frequencies(probabilities: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """The class frequencies [C] of unlabelled images, from p(y | x) [M, C].

    prior: those of the training images, [C]. Saerens, Latinne and Decaestecker 2002,
    Adjusting the outputs of a classifier to new a priori probabilities. Deviations:
    there the same images are then classified; the temperature, as Alexandari et al.
    2020 have it, without their bias terms.
    """
    frequencies = prior
    for _ in range(10_000):
        before = frequencies
        frequencies = adjust(probabilities, prior, before).mean(0)
        if np.abs(frequencies - before).max() < 1e-6:
            break
    return frequencies


def fit_concentration(counts: np.ndarray) -> float:
    """How alike sites are, from how often each class is in each site: int [S, C].

    The concentration, .01 to 10,000, of a symmetric Dirichlet distribution with the
    greatest likelihood when frequencies are drawn from it and then images from these
    (Dirichlet-multinomial: Minka 2000, Estimating a Dirichlet distribution).
    """
    n = torch.from_numpy(counts).double()
    a = torch.from_numpy(np.geomspace(0.01, 10_000, 121))[:, None]  # [121, 1]
    total = n.shape[1] * a
    likelihood = (total.lgamma() - (total + n.sum(1)).lgamma()).sum(1)
    of_class = (n + a[..., None]).lgamma() - a[..., None].lgamma()  # [121, S, C]
    return a[(likelihood + of_class.sum((1, 2))).argmax()].item()


def expected_frequencies(
    probabilities: np.ndarray, prior: np.ndarray, concentration: float
) -> np.ndarray:
    """As em_frequencies, but a site's frequencies are a draw from a Dirichlet.

    It is symmetric: over all sites the classes are equally frequent. Variational Bayes,
    from equal frequencies on: these are a Dirichlet again, each image's class depends
    on the mean of their logarithms (Bishop 2006, section 10.2), and its mean is given
    back. An approximation, and one optimum of several if the concentration is below 1.
    """
    images, classes = probabilities.shape
    counts = np.full(classes, concentration + images / classes)
    for _ in range(10_000):
        before = counts
        weights = torch.from_numpy(counts).digamma().exp().numpy()
        counts = concentration + adjust(probabilities, prior, weights).sum(0)
        if np.abs(counts - before).max() < 1e-6 * images:
            break
    return counts / counts.sum()


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / T), [N, C]; 1 changes nothing."""
    tiny = np.finfo(np.float32).tiny
    logits = np.log(np.maximum(probabilities, tiny)) / temperature
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The T, .01 to 100, with the least cross-entropy (Guo et al. 2017).

    probabilities: [N, C], not zero for any label. labels: int [N].
    """
    tiny = np.finfo(np.float32).tiny
    logits = np.log(np.maximum(probabilities, tiny))
    right = logits[np.arange(len(labels)), labels].mean()
    low, high = 0.01, 100.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        # convex in 1 / T, with the slope E[logit] - logit of the label
        expected = (temper(probabilities, middle) * logits).sum(1).mean()
        if expected < right:  # too flat
            high = middle
        else:
            low = middle
    return math.sqrt(low * high)


def ways(
    support_probabilities: np.ndarray,
    probabilities: np.ndarray,
    labels: np.ndarray,
    frequencies: np.ndarray,
    prior: np.ndarray,
    concentration: float,
    T: float,
) -> dict[str, np.ndarray]:
    """Which images of a site each way gets right, bool [N].

    support_probabilities: of the site's unlabelled images, [M, C], for EM.
    probabilities, labels: of what is scored, [N, C] and [N]. frequencies, prior: the
    site's true ones, and those of training, [C]. concentration: of training's sites.
    T: temperature, before all else.

    For a classifier of single images em, em prior and known are Bayes' rule, with the
    frequencies that they have. One that has seen the site's images (adapted, or with a
    context) may have read the frequencies there and so count them twice: for it they
    are a heuristic, with a uniform prior.
    """
    support, scored = temper(support_probabilities, T), temper(probabilities, T)
    found = em_frequencies(support, prior)
    expected = expected_frequencies(support, prior, concentration)
    answers = {
        "plain": scored.argmax(1),
        "em": adjust(scored, prior, found).argmax(1),
        "em prior": adjust(scored, prior, expected).argmax(1),
        "known": adjust(scored, prior, frequencies).argmax(1),
        "most frequent": np.full(len(labels), frequencies.argmax()),
    }
    return {way: answer == labels for way, answer in answers.items()}


# --- measuring a finished run ---
class Rows(NamedTuple):
    """The accuracy of each way in each site of the test."""

    sites: list[str]
    new: np.ndarray  # bool [S]: has training no image of it?
    accuracy: dict[str, np.ndarray]  # way -> [S]


class Estimate(NamedTuple):
    mean: float
    error: float  # standard error, were other sites drawn


def class_frequencies(labels: Tensor, classes: int) -> np.ndarray:
    """int [M] -> [C]"""
    return np.bincount(labels.cpu().numpy(), minlength=classes) / len(labels)


def site_counts(split: pretext.Split, classes: int) -> np.ndarray:
    """int [S, C]: of each site that has images."""
    pairs = split.environments * classes + split.labels
    counts = pairs.cpu().bincount(minlength=classes * (split.environments.max() + 1))
    counts = counts.reshape(-1, classes).numpy()
    return counts[counts.any(1)]


def run_predict(predict: Predict, support: Tensor, images: Tensor) -> np.ndarray:
    return predict(support, images).detach().cpu().double().numpy()


def support_of(data: pretext.Data, site: int) -> Tensor:
    """The unlabelled images of a site, uint8 [M, 3, H, H]."""
    here = data.unlabelled.environments == site
    return data.unlabelled.images[data.aside & here]


def measure(predict: Predict, data: pretext.Data, T: float) -> Rows:
    """What each way gets right in each site of data.test.

    T: as `calibrate` gives it. Labels of unlabelled images count for the site's true
    frequencies alone, which are those of all its test images. The prior is that of
    training, which write_sites makes uniform.
    """
    classes, names, results = len(data.classes), data.environments, []
    prior = class_frequencies(data.train.labels, classes)
    concentration = fit_concentration(site_counts(data.train, classes))
    sites = data.test.environments.unique().tolist()
    for site in sites:
        support = support_of(data, site)
        scored = data.test.take(data.test.environments == site)
        everything = data.unlabelled.labels[data.unlabelled.environments == site]
        correct = ways(
            run_predict(predict, support, support),
            run_predict(predict, support, scored.images),
            scored.labels.cpu().numpy(),
            class_frequencies(everything, classes),
            prior,
            concentration,
            T,
        )
        results.append({way: right.mean() for way, right in correct.items()})
    seen = data.train.environments.unique().tolist()
    new = np.array([site not in seen for site in sites])
    accuracy = {way: np.array([row[way] for row in results]) for way in results[0]}
    return Rows([names[site] for site in sites], new, accuracy)


def calibrate(predict: Predict, data: pretext.Data) -> float:
    """The temperature of a run with --eval-on val: data.test are validation images.

    It is used for other seeds of the arm; Guo et al. 2017 fit each network its own.
    """
    probabilities, labels = [], []
    for site in data.test.environments.unique().tolist():
        scored = data.test.take(data.test.environments == site)
        support = support_of(data, site)
        probabilities.append(run_predict(predict, support, scored.images))
        labels.append(scored.labels)
    return temperature(np.concatenate(probabilities), torch.cat(labels).cpu().numpy())


def bootstrap(values: np.ndarray, generator: Generator) -> Estimate:
    """The mean over sites, and how it varies over 1,000 resamples of these."""
    index = generator.integers(len(values), size=(1000, len(values)))
    return Estimate(values.mean(), values[index].mean(1).std(ddof=1))


def summary(
    values: np.ndarray, new: np.ndarray, generator: Generator
) -> dict[str, Estimate]:
    """Of a value for each site, [S]: over all, those seen in training, and new ones.

    values: an accuracy of Rows, or the difference of two. Groups of no site are left
    out.
    """
    groups = {"all": values, "seen": values[~new], "new": values[new]}
    return {
        name: bootstrap(group, generator)
        for name, group in groups.items()
        if len(group)
    }
