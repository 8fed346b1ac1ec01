"""What is measured of a run after training: adapted to what, how accurate?"""

import csv
import functools
import json
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import maml_ssl
import pretext
from results import readers, sites
from results.protocols import SITES_TRIALS, TRIALS


# --- the environments of drawn shapes: adapted to what? ---
def seen(data: pretext.Data, environment: int, support: str, seed: int) -> readers.Seen:
    """The images that a run may read before it classifies those of an environment.

    own: what an evaluation takes. own-N: N of these. other: those of the environment
    that differs most. shuffled: own, red and green exchanged in half of them, so that
    colour says nothing of shape. constant: all gray.
    """
    split, home = data.unlabelled, environment
    if support == "other":  # colour agrees in 80, 10 and 90%
        home = (1, 2, 1)[environment]
    images = split.images.clone()
    if support == "shuffled":
        images[::2] = images[::2, [1, 0, 2]]
    if support == "constant":
        images[:] = 128
    chosen = data.aside & (split.environments == home)
    if support.startswith("own-"):
        count = int(support.removeprefix("own-"))
        chosen = torch.zeros_like(chosen).index_fill(
            0, pretext.draw(chosen, count, pretext.rng(seed, support)), True
        )
    return readers.Seen(split._replace(images=images), chosen, environment)


def by_environment(run: readers.Finished, data, support: str) -> list[float]:
    """The accuracy in each environment of the test set, with this support."""
    accuracies = []
    for environment in data.test.environments.unique().tolist():
        scored = data.test.take(data.test.environments == environment)
        what = seen(data, environment, support, run.args.seed)
        correct = run.predict(what, scored.images).argmax(1) == scored.labels
        accuracies.append(correct.sum().item() / len(correct))
    return accuracies


def not_adapted(folder: Path) -> list[float]:
    """The accuracy in each environment, as a run of any arm wrote it itself."""
    with (folder / "environments.csv").open(encoding="utf-8") as file:
        return [float(row["accuracy"]) for row in csv.DictReader(file)]


class Rate(NamedTuple):
    lr: float
    steps: int


@functools.cache
def best_rate(tuned: Path) -> Rate:
    """At what joint training is adapted: what is best for its tuned run."""
    data = maml_ssl.load_data(readers.load(tuned).args)

    def mean_accuracy(rate: Rate) -> float:
        trial = readers.load(tuned, inner_lr=rate[0], inner_steps=rate[1])
        return np.mean(by_environment(trial, data, "own"))

    rates = product((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), (1, 3, 10))
    return Rate(*max(rates, key=mean_accuracy))


SUPPORT_HEADER = "run,seed,support,inner_lr,inner_steps,80%,10%,90% (new)"
FEWER = ("own-8", "own-32", "own-128")
BREAKS = ("other", "shuffled", "constant")


def by_support(folder: Path, out: Path) -> list[str]:
    """The lines of one run in NAME_support.csv. out: where the runs are."""
    tuned = out / "tune" / f"joint-{TRIALS['joint'].best}" / "seed100"
    name, seed = folder.parts[-2], folder.name.removeprefix("seed")
    config = json.loads((folder / "config.json").read_bytes())
    found = []
    if "reader" not in config:
        found.append(("none", Rate(0, 0), not_adapted(folder)))
    if config["arm"] == "maml_ssl":
        rate = Rate(config.get("inner_lr", 0), config.get("inner_steps", 0))
        if config.get("inner_lr") == 0:
            rate = best_rate(tuned)
        run = readers.load(folder, inner_lr=rate.lr, inner_steps=rate.steps)
        data = maml_ssl.load_data(run.args)
        for support in ("own", *FEWER, *BREAKS):
            found.append((support, rate, by_environment(run, data, support)))
    lines = []
    for support, (lr, steps), accuracies in found:
        cells = ",".join(f"{accuracy:.4f}" for accuracy in accuracies)
        lines.append(f"{name},{seed},{support},{lr},{steps},{cells}")
    return lines


# --- sites: read in what way? ---
def calibrated(run: str, out: Path) -> Path | None:
    """The trial on validation images that gives the temperature of a run's output."""
    for arm, trials in SITES_TRIALS.items():
        if run.startswith(arm):
            return out / "tune-sites" / f"{arm}-{trials.best}" / "seed100"
    return None


def load(folder: Path) -> tuple[sites.Predict, pretext.Data]:
    """A finished run, as sites.py takes it, and its data."""
    run = readers.load(folder)
    data = maml_ssl.load_data(run.args)

    def predict(support, images):
        places = torch.zeros(len(support), dtype=torch.long)
        split = pretext.Split(support, places, places)
        return run.predict(readers.Seen(split, places == 0, -1), images)

    return predict, data


@functools.cache
def temperature(trial: Path) -> float:
    return sites.calibrate(*load(trial))


WAYS_HEADER = "run,seed,way,all,seen,new,error"


def by_way(folder: Path, out: Path) -> list[str]:
    """The lines of one run in NAME_ways.csv: the accuracy of each way, over sites.

    error: standard error of the mean over all sites, by bootstrap. out: where the runs
    are, with the trial that gives the temperature; without one only the output as it
    is counts.
    """
    name, seed = folder.parts[-2], folder.name.removeprefix("seed")
    trial = calibrated(name, out)
    T = temperature(trial) if trial else 1.0
    rows, lines = sites.measure(*load(folder), T), []
    for way, accuracy in rows.accuracy.items():
        if way != "plain" and not trial:
            continue
        found = sites.summary(accuracy, rows.new, np.random.default_rng(0))
        values = [found[group].mean for group in ("all", "seen", "new")]
        cells = ",".join(f"{x:.4f}" for x in (*values, found["all"].error))
        lines.append(f"{name},{seed},{way},{cells}")
    return lines
