"""Our experiment: what is run, what is asked of it, how it is judged, its figures.

    python results/experiment.py run readers --jobs 2   # trains, or goes on
    python results/experiment.py gather readers         # its logs -> a CSV file
    python results/experiment.py report                 # CSV files -> the rest

`run` keeps logs and checkpoints below runs/PROTOCOL/; `gather` writes
results/PROTOCOL.csv; `report` draws every figure and writes every verdict.

What is asked (QUESTIONS, CONTRASTS) was written down before the runs, as was what is
tried (protocols.py). Asked afterwards: on CIFAR-10 MAML against joint training, both
retuned; how many steps joint training needs; on photographs steps, FLOPs and MAML
against colorization; on shapes colorization against from scratch.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
sys.path.insert(0, str(ROOT))
import compare  # noqa: E402
import pretext  # noqa: E402
from results import folders, judge, measure, outer_step, reading  # noqa: E402
from results.protocols import FEW_FIRST, FINE_TUNED, PRETRAINED, PROTOCOLS  # noqa: E402


# --- what is asked ---
class Question(NamedTuple):
    """Asked wherever two seeds of both arms were run.

    counts: total_step, step, flops: times to fixed targets, the arm's over the
    other's. end: points at the end, at equal steps.
    """

    text: str
    arm: str
    others: list[str]  # it is compared with each of them
    counts: list[str]


STEPS, FLOPS, END = ["total_step"], ["flops"], ["end"]
TUNED = ["fine-tuned", *FINE_TUNED]
QUESTIONS = []
for arm in PRETRAINED:
    text = f"as worded: fewer steps, {arm[-2:]}%"
    QUESTIONS.append(Question(text, "maml", [arm], STEPS))
QUESTIONS += [
    Question("as worded: fewer steps", "maml", ["fine-tuned", "probed"], STEPS),
    Question("fewer steps on the desired task alone", "maml", TUNED, ["step"]),
    Question("fewer FLOPs", "maml", TUNED, FLOPS),
    Question("fewer steps without MAML", "scratch", TUNED, STEPS),
    Question("fewer steps without MAML", "joint", TUNED, STEPS),
    Question("fewer steps with source images", "maml-both", TUNED, STEPS),
    Question("source images help", "maml-both", ["maml"], END),
    Question("better than fine-tuning", "maml", FINE_TUNED, END),
    Question("better than nothing", "maml", ["scratch"], END),
    Question("better than nothing", "maml-alpha-1", ["scratch"], END),
    Question("better than nothing", "colorization", ["scratch"], END),
    Question(
        "the inner loop helps",
        "maml",
        ["joint", "joint-tuned", "no-inner-loop"],
        END,
    ),
    Question(
        "the inner loop helps, retuned",
        "joint-settings",
        ["joint", "joint-tuned", "scratch"],
        END,
    ),
    Question("the second order helps", "maml", ["first-order"], END),
    Question("the content of the tasks helps", "maml", ["random-labels"], END),
    Question(
        "better than pretraining on the same tasks", "maml", ["self-supervised"], END
    ),
    Question("better than fine-tuning", "maml", ["fine-tuned"], END),
    Question("several tasks help", "maml", ["colorization"], END),
    Question("pretraining pays", "fine-tuned", ["scratch"], END),
    Question("better than fine-tuning", "maml-both", ["fine-tuned"], END),
    Question("better than fine-tuning", "learned-labels", ["fine-tuned"], END),
    Question(
        "from the pretrained weights: fewer steps on the desired task",
        "maml-pretrained",
        ["fine-tuned", "joint-pretrained"],
        ["step"],
    ),
    Question(
        "from the pretrained weights: better than fine-tuning",
        "maml-pretrained",
        ["fine-tuned", "joint-pretrained"],
        END,
    ),
    Question(
        "from the pretrained weights: better than fine-tuning",
        "joint-pretrained",
        ["fine-tuned"],
        END,
    ),
]


class Contrast(NamedTuple):
    """One of the four that were fixed before the runs.

    The accuracy of the claim after the last step, arm - other, paired by seed, over all
    environments or sites of the test. Two-sided t tests, together at 5% (Holm). All
    else is an interval without a word.
    """

    text: str
    protocol: str
    arm: str
    other: str


CONTRASTS = [
    Contrast(
        "many images: MAML, four tasks, against a network that is shown them",
        "readers",
        "maml-128",
        "context-128",
    ),
    Contrast(
        "few images: an inner loop against a network that is shown them",
        "readers",
        "learned-labels-32",
        "context-32",
    ),
    Contrast(
        "what tasks ask: four tasks against labels that nothing trains",
        "readers",
        "maml-128",
        "detached-labels-128",
    ),
    Contrast(
        "sites: an inner loop against a network that is shown the images",
        "sites-0.2",
        "learned-labels-128",
        "context-128",
    ),
]
# Other differences: an interval, no verdict. Protocol, arm and how it is measured, and
# the other arm's. Chosen when most of them had been measured, and not corrected.
DIFFERENCES = [
    ("readers", "maml-tuned-128", "own", "context-128", "own"),
    ("readers", "maml-tuned-128", "own", "maml-128", "own"),
    ("readers", "maml-tuned-128", "own", "detached-labels-128", "own"),
    ("readers", "maml-32", "own", "context-32", "own"),
    ("readers", "learned-labels-128", "own", "context-128", "own"),
    ("readers", "learned-labels-128", "own", "maml-128", "own"),
    ("readers", "learned-labels-128", "own", "detached-labels-128", "own"),
    ("readers", "random-labels-128", "own", "maml-128", "own"),
    ("readers", "colorization-128", "own", "maml-128", "own"),
    ("readers", "batchnorm-128", "own", "context-128", "own"),
    ("readers", "first-order", "own", "maml-128", "own"),
    ("readers", "no-pretext-loss", "own", "maml-128", "own"),
    ("readers", "nash", "own", "maml-128", "own"),
    ("readers", "learned-loss-128", "own", "context-128", "own"),
    ("readers", "learned-loss-32", "own", "context-32", "own"),
    ("readers", "detached-labels-32", "own", "context-32", "own"),
    ("readers", "inferred-32", "own", "context-32", "own"),
    ("readers", "joint", "own", "joint", "none"),
    ("readers", "normalised", "own", "nash", "own"),
    ("sites-0.2", "scratch", "em", "scratch", "plain"),
    ("sites-0.2", "prior-128", "plain", "scratch", "plain"),
    ("sites-0.2", "scratch", "em", "prior-128", "plain"),
    ("sites-0.2", "prior-128", "plain", "learned-labels-128", "plain"),
    ("sites-0.2", "prior-32", "plain", "learned-labels-32", "plain"),
    ("sites-0.2", "learned-labels-32", "plain", "context-32", "plain"),
    ("sites-0.2", "learned-labels-32", "plain", "scratch", "plain"),
    ("sites-0.2", "context-128", "plain", "scratch", "plain"),
    ("sites-0.2", "contrastive-32", "plain", "scratch", "plain"),
    ("sites-0.2", "colorization-32", "plain", "scratch", "plain"),
    ("sites-0.2", "colorization-32", "plain", "contrastive-32", "plain"),
    ("sites-0.2", "colorization-32", "plain", "detached-labels-32", "plain"),
    ("sites-0.2", "colorization-32", "plain", "learned-labels-32", "plain"),
    ("sites-0.2", "detached-labels-32", "plain", "learned-labels-32", "plain"),
    ("sites-0.2", "detached-labels-32", "plain", "scratch", "plain"),
    ("sites-0.2", "colorization-32", "plain", "context-32", "plain"),
    ("sites-0.2", "prior-32", "plain", "colorization-32", "plain"),
    ("sites-0.2", "scratch", "em", "colorization-32", "plain"),
    ("sites-0.2", "prior-32", "plain", "context-32", "plain"),
    ("sites-0.2", "prior-128", "plain", "context-128", "plain"),
    ("sites-0.2", "inner-prior-32", "plain", "colorization-32", "plain"),
    ("sites-0.2", "inner-prior-32", "plain", "log-prior-32", "plain"),
    ("sites-0.2", "prior-32", "plain", "scratch", "plain"),
    ("sites-0.2", "log-prior-32", "plain", "scratch", "plain"),
    ("sites-0.2", "scratch-long", "plain", "scratch", "plain"),
    ("sites-0.2", "scratch-long", "em", "inner-prior-32", "plain"),
    ("sites-0.2", "context-32", "plain", "scratch-long", "plain"),
    ("sites-0.2", "prior-32", "plain", "scratch-long", "plain"),
    ("sites-0.2", "learned-labels-32", "plain", "scratch-long", "plain"),
    ("sites-0.2", "colorization-32", "plain", "scratch-long", "plain"),
    ("sites-0.2", "inner-prior-32", "plain", "scratch-long", "plain"),
    ("sites-0.2", "inner-prior-32", "plain", "prior-32", "plain"),
    ("sites-0.2", "inner-prior-128", "plain", "prior-128", "plain"),
    ("sites-0.2", "inner-prior-32", "plain", "learned-labels-32", "plain"),
    ("sites-0.2", "inner-prior-32", "plain", "scratch", "plain"),
    ("sites-0.2", "log-prior-32", "plain", "prior-32", "plain"),
    ("sites-0.2", "log-prior-128", "plain", "prior-128", "plain"),
    ("sites-0.2", "scratch", "em", "log-prior-128", "plain"),
    ("sites-0.2", "scratch", "em", "inner-prior-128", "plain"),
    ("sites-0.2", "inner-weights-32", "plain", "inner-prior-32", "plain"),
    ("sites-0.2", "inner-weights-32", "plain", "learned-labels-32", "plain"),
    ("sites-0.2", "inner-weights-32", "plain", "scratch", "plain"),
    ("sites-0.2", "inner-prior-32-long", "plain", "inner-prior-32", "plain"),
    ("sites-0.2", "scratch-long", "em", "inner-prior-32-long", "plain"),
    ("sites-0.2", "scratch", "em prior", "scratch", "em"),
    ("sites-0.2", "scratch-long", "em prior", "scratch-long", "em"),
    ("sites-0.2", "scratch-long", "em prior", "inner-prior-32", "plain"),
    ("sites-0.2", "joint", "plain", "scratch", "plain"),
    ("sites-0.2", "learned-labels-32", "em", "scratch", "em"),
    ("sites-0.2", "context-32", "em", "scratch", "em"),
    ("sites-1.0", "prior-32", "plain", "scratch", "plain"),
    ("sites-1.0", "learned-labels-32", "plain", "scratch", "plain"),
    ("sites-1.0", "scratch", "em", "scratch", "plain"),
    ("sites-1.0", "scratch", "em prior", "scratch", "plain"),
    ("sites-1.0", "scratch", "em prior", "prior-32", "plain"),
    ("sites-inf", "prior-32", "plain", "scratch", "plain"),
    ("sites-inf", "learned-labels-32", "plain", "scratch", "plain"),
    ("sites-inf", "scratch", "em", "scratch", "plain"),
    ("sites-inf", "scratch", "em prior", "scratch", "plain"),
]
# protocols with several environments
SEVERAL = ("tinted", "readers", "readers-more")
# Mean over the three environments (%). A rule for one image can reach CEILING at most:
# a quarter of the labels is flipped, and colour agrees with only 60% of them. One that
# knows the environment can reach KNOWING: there it follows the colour, which in 80, 10
# or 90% of the images is the label's.
CEILING, KNOWING = 75.0, 86.7


# --- how it is judged ---
def scores(run: compare.Run) -> np.ndarray:
    """The accuracy of the claim: adapted if there are environments to adapt to."""
    adapted = run.log["accuracy_adapted"]
    if run.dataset in SEVERAL and not np.isnan(adapted).all():
        return adapted
    return run.log["accuracy"]


def first_times(runs: list[compare.Run], column: str, percent: float) -> np.ndarray:
    """Where in `column` each run's accuracy of the claim is first there, [seeds]."""
    found = []
    for run in runs:
        x, goal = run.log[column], percent / 100
        found.append(compare.first_time(x, scores(run), goal))
    return np.array(found)


def as_table(head: str, rows: list[list]) -> str:
    """A Markdown table; '' without rows. head: its columns, `|` between them."""
    if not rows:
        return ""
    lines = [head.split("|"), *rows]
    lines = [f"| {' | '.join(map(str, line))} |" for line in lines]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def verdicts(arms: compare.Arms, targets: tuple) -> str:
    """The tables of all questions that the runs answer: times, then points.

    targets: accuracies (%); without them nothing is said of times.
    """
    times, points = [], []
    for text, arm, others, counts in QUESTIONS:
        for against, count in product(others, counts):
            bases = {run.seed: run for run in arms.get(against, [])}
            mine = [run for run in arms.get(arm, []) if run.seed in bases]
            base = [bases[run.seed] for run in mine]
            if len(mine) < 2:
                continue
            row = [text, arm, against]
            if count == "end":
                last = [scores(run)[-1] for run in mine]
                base_last = [scores(run)[-1] for run in base]
                values = 100 * (np.array(last) - base_last)
                as_good = "yes" if judge.equal(values) else ""
                points.append([*row, *judge.points(values), as_good])
            elif targets:
                ends = zip(mine, base, strict=True)
                ends = [min(a.log[count][-1], b.log[count][-1]) for a, b in ends]
                row.append(count)
                for target in targets:
                    found = first_times(mine, count, target)
                    base_found = first_times(base, count, target)
                    verdict = judge.times(found, base_found, ends)
                    row.append(" ".join(verdict).strip())
                times.append(row)
    head = "question|arm|against|times in|"
    tables = [as_table(head + "|".join(f"to {g}%" for g in targets), times)]
    head = "question|arm|against|points at the end|verdict|as good, within 2"
    tables.append(as_table(head, points))
    return "\n\n".join(table for table in tables if table)


def lowered(arms: compare.Arms) -> str:
    """The table of how far the inner loop lowers the loss that it descends (%)."""
    rows = []
    for arm, runs in arms.items():
        before = np.array([run.log["pretext_loss"][-1] for run in runs])
        after = np.array([run.log["pretext_loss_adapted"][-1] for run in runs])
        if value := compare.cell(100 * (1 - after / before), ".1f"):
            rows.append([arm, value])
    head = "arm|the inner loop lowers its pretext loss, at the end, by (%)"
    return as_table(head, rows)


# --- running ---
def run_one(command: list[str]) -> bool:
    """Runs an arm with one thread; returns whether it failed, and says how."""
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    how = {"cwd": ROOT, "env": one_thread, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, *command], **how)
    if done.returncode:
        last = (done.stderr or "no message").splitlines()[-1]
        tqdm.write(f"{' '.join(command)}: {last}")
    return done.returncode != 0


def run_protocol(
    name: str, out: str, jobs: int, only: list[str], some: list[int]
) -> int:
    """Runs a protocol, or some of its runs and seeds; returns how many failed."""
    seeds, commands = PROTOCOLS[name]
    seeds, todo = some or seeds, []
    folders.prepare(name, seeds)
    for seed, run in product(seeds, only or commands):
        where = ["--seed", str(seed), "--out", f"{out}/{name}", "--name", run]
        todo.append([*commands[run].format(seed=seed, out=out).split(), *where])
    with ThreadPoolExecutor(jobs) as pool:
        return sum(tqdm(pool.map(run_one, todo), total=len(todo), unit="run"))


Rows = dict[tuple[str, str], list[str]]  # the lines of a CSV file, by run and seed


def merge(path: Path, header: str, found: Rows) -> None:
    """Writes what was found; keeps the rows of runs that are no longer there."""
    rows: Rows = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines()[1:]:
            run, seed, _ = line.split(",", 2)
            rows.setdefault((run, seed), []).append(line)
    rows |= found
    lines = [line for key in sorted(rows) for line in rows[key]]
    path.write_text("\n".join([header, *lines, ""]), encoding="utf-8")


def gather(name: str, out: Path, only: list[str], some: list[int]) -> None:
    """The logs of finished runs, or of some runs and seeds -> results/NAME.csv.

    With several environments also results/NAME_support.csv, measured now.
    """
    logs: Rows = {}
    supports: Rows = {}
    by_way: Rows = {}
    for log in sorted((out / name).glob("*/seed*/metrics.csv")):
        folder = log.parent
        run, seed = folder.parts[-2], folder.name.removeprefix("seed")
        if run in FEW_FIRST:  # weights to start from, no arm
            continue
        if (only and run not in only) or (some and int(seed) not in some):
            continue
        if not any(run.finished for run in compare.read_file(log)):
            print(f"{folder} is not finished and left out")
            continue
        rows = log.read_text().splitlines()[1:]
        logs[run, seed] = [f"{run},{seed},{row}" for row in rows]
        if name in SEVERAL:
            supports[run, seed] = measure.by_support(folder, out)
        if name.startswith("sites"):
            by_way[run, seed] = measure.by_way(folder, out)
    merge(RESULTS / f"{name}.csv", f"run,seed,{compare.HEADER}", logs)
    if name in SEVERAL:
        merge(RESULTS / f"{name}_support.csv", measure.SUPPORT_HEADER, supports)
    if by_way:
        merge(RESULTS / f"{name}_ways.csv", measure.WAYS_HEADER, by_way)


# --- the figures, from the CSV files alone ---
class Look(NamedTuple):
    """An arm in the figures."""

    label: str
    colour: str
    marker: str
    line: str = "-"


BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ARMS = {
    "maml": Look("MAML", BLUE, "o"),
    "maml-128": Look("MAML, adapted", BLUE, "o"),
    "context-128": Look("context network", "#E69F00", "P"),
    "told": Look("environment told", "#56B4E9", "X"),
    "joint": Look("joint training", PURPLE, "s"),
    "scratch": Look("from scratch", "#000000", "D", "--"),
    "fine-tuned": Look("fine-tuned", ORANGE, "^"),
    "fine-tuned-25": Look("fine-tuned", ORANGE, "^"),  # validation prefers these
    "probed": Look("probed", GREEN, "v"),
    "probed-75": Look("probed", GREEN, "v"),
}
PANELS = {
    "one distribution\n(CIFAR-10, 500 labels a class)": ("photos",),
    "one distribution\n(CIFAR-10, 25 labels a class)": ("few",),
    "drawn environments\n(coloured shapes)": ("readers", "readers-more"),
}


def draw_limits(ax: Axes) -> None:
    """Dotted lines for the most that two kinds of rules can expect."""
    for height, what in (CEILING, "one image"), (KNOWING, "known environment"):
        ax.axhline(height, color="0.5", lw=0.8, ls=":")
        place = (ax.get_xlim()[1], height + 0.4)
        ax.text(*place, f"limit: {what}", size=7, color="0.3", ha="right")


def draw_answer(groups: dict[str, compare.Arms], column: str, path: Path) -> None:
    """Accuracy against `column`, a panel for each of PANELS."""
    with rc_context(compare.STYLE):
        figure = Figure((9.6, 2.9), layout="constrained")
        axes = figure.subplots(1, len(PANELS))
        for ax, (title, names) in zip(axes, PANELS.items(), strict=True):
            arms, curves = together(groups, names), []
            for arm, (label, colour, marker, line) in ARMS.items():
                runs, y = arms.get(arm), "accuracy"
                if runs is None:
                    continue
                if arm == "maml-128":
                    y = "accuracy_adapted"
                look = {"colours": {label: colour}, "ls": line}
                look |= {"marker": marker, "markevery": max(1, len(runs[0].log) // 10)}
                curves += compare.draw(ax, {label: runs}, column, y, **look)
            if "readers" in names:
                draw_limits(ax)
            ax.set(title=title, ylabel="test accuracy (%)")
            compare.label_ends(ax, curves)
        figure.savefig(path, dpi=300)


# --- the report, from the CSV files alone ---
READING_NAMES = ("readers", "readers-more")
SITES_NAMES = ("sites-0.2", "sites-1.0", "sites-inf")


def together(groups: dict[str, compare.Arms], names: tuple) -> compare.Arms:
    """The arms of several protocols."""
    arms: compare.Arms = {}
    for name in names:
        arms |= groups.get(name, {})
    return arms


def found_in(protocol: str, column: str = "all") -> reading.Found:
    """What was measured after training; sites: by way, else: by support."""
    if protocol in SITES_NAMES:
        path = RESULTS / f"{protocol}_ways.csv"
        return reading.read_ways(path, column) if path.exists() else {}
    paths = [RESULTS / f"{name}_support.csv" for name in READING_NAMES]
    return reading.read_supports(paths)


def answers() -> list[reading.Answer]:
    """The contrasts whose runs are there."""
    rows = []
    for text, protocol, arm, other in CONTRASTS:
        way = "plain" if protocol in SITES_NAMES else "own"
        points = reading.paired(found_in(protocol), (arm, way), (other, way))
        if len(points) > 1:
            rows.append(reading.Answer(text, points))
    return rows


def differences() -> list[list[str]]:
    """DIFFERENCES as rows, of what two seeds of both arms were measured for."""
    rows = []
    for protocol, arm, way, other, other_way in DIFFERENCES:
        pair = (arm, way), (other, other_way)
        points, new = reading.paired(found_in(protocol), *pair), ""
        if len(points) < 2:
            continue
        if protocol in SITES_NAMES:
            new = reading.signed(reading.paired(found_in(protocol, "new"), *pair))
        text = f"{arm}, {way} - {other}, {other_way}"
        rows.append([protocol, text, len(points), reading.signed(points), new])
    return rows


def longer(groups: dict[str, compare.Arms]) -> list[list[str]]:
    """Runs with about MAML's FLOPs, stopped where validation says."""
    trials, rows = groups.get("dear-tune", {}), []
    shapes = ("dear", "", "readers", "maml-128")
    for name, prefix, others, maml in (shapes, ("tinted", "tinted-", "tinted", "maml")):
        for arm, runs in groups.get(name, {}).items():
            if trial := trials.get(f"{prefix}{arm}"):
                unit = groups[others][maml][0].log["flops"][-1]
                rows.append(reading.long_row(f"{prefix}{arm}", trial[0], runs, unit))
    return rows


def limits_as_drawn(seeds: range) -> list[list[str]]:
    """What the two kinds of rules have on the test images of these seeds."""
    by_shape, by_colour = [], []
    for seed in seeds:
        drawn = pretext.coloured_labels(1256, (0.8, 0.1, 0.9), 2 * seed + 1)
        shape, colour, label = drawn  # [3, 1256] each
        colour[1] = 1 - colour[1]
        by_shape.append(100 * np.mean(shape == label))
        by_colour.append(100 * np.mean(colour == label))
    rules = ("one image: its shape", by_shape), ("environment known: colour", by_colour)
    return [[rule, compare.cell(found, ".1f")] for rule, found in rules]


def who_reads(groups: dict[str, compare.Arms]) -> list[str]:
    """The parts of the report on who reads a support set."""
    parts, found = [], found_in("readers")
    if rows := reading.contrast_rows(answers(), len(CONTRASTS)):
        parts += ["## The four contrasts", as_table(reading.CONTRAST_HEAD, rows)]
    if rows := differences():
        head = "protocol|difference|seeds|points|new sites alone"
        parts += ["## Other differences", as_table(head, rows)]
    if found:
        flops = reading.flops_of(together(groups, READING_NAMES))
        rows = reading.support_rows(found, flops)
        parts += ["## Ways to read a support set: coloured_shapes, 1,000 steps"]
        parts.append(as_table(reading.SUPPORT_HEAD, rows))
        rows = limits_as_drawn(PROTOCOLS["readers"].seeds)
        parts.append(as_table("limit on the images as drawn|accuracy", rows))
    if rows := longer(groups):
        parts += ["## Longer runs of those that do not read"]
        parts.append(as_table(reading.LONG_HEAD, rows))
    for name in SITES_NAMES:
        if (path := RESULTS / f"{name}_ways.csv").exists():
            rows = reading.site_rows(path, reading.flops_of(groups[name]))
            parts += [f"## {name}", as_table(reading.SITE_HEAD, rows)]
    return parts


# The rungs of the ladder from below: run, what it is called there, a key of KINDS
ONE_RUNGS = [
    ("probed", "pretrained, probed", "one image"),
    ("fine-tuned", "pretrained, fine-tuned", "one image"),
    ("scratch", "from scratch", "one image"),
    ("joint", "joint training", "one image"),
    ("maml", "MAML, four tasks", "inner loop"),
    ("maml-both", "MAML, source images too", "inner loop"),
    ("learned-labels", "MAML, learned labels", "inner loop"),
    ("joint-pretrained", "joint, from pretrained*", "one image"),
    ("maml-pretrained", "MAML, from pretrained*", "inner loop"),
]
SHAPE_RUNGS = [
    ("fine-tuned", "pretrained, fine-tuned", "one image"),
    ("scratch", "from scratch", "one image"),
    ("joint", "joint training", "one image"),
    ("maml-32", "MAML, four tasks, 32", "inner loop"),
    ("maml-tuned-128", "the same, tuned again", "inner loop"),
    ("maml-128", "MAML, four tasks, 128", "inner loop"),
    ("colorization-128", "MAML, colorization, 128", "inner loop"),
    ("first-order", "MAML, first order, 128", "inner loop"),
    ("nash", "MAML, Nash, 128", "inner loop"),
    ("random-labels-128", "MAML, random labels, 128", "inner loop"),
    ("detached-labels-128", "MAML, untrained labels, 128", "inner loop"),
    ("detached-labels-32", "MAML, untrained labels, 32", "inner loop"),
    ("learned-labels-32", "MAML, learned labels, 32", "inner loop"),
    ("learned-labels-128", "MAML, learned labels, 128", "inner loop"),
    ("learned-loss-32", "MAML, learned loss, 32", "inner loop"),
    ("learned-loss-128", "MAML, learned loss, 128", "inner loop"),
    ("context-32", "context network, 32", "shown, no inner loop"),
    ("context-128", "context network, 128", "shown, no inner loop"),
    ("batchnorm-128", "batch normalisation, 128", "shown, no inner loop"),
    ("inferred-32", "environment inferred, 32", "shown, no inner loop"),
    ("inferred-128", "environment inferred, 128", "shown, no inner loop"),
    ("told", "environment told", "told"),
]
SITE_RUNGS = [  # run, way, ...
    ("scratch", "most frequent", "commonest class told", "told"),
    ("fine-tuned", "plain", "pretrained, fine-tuned", "one image"),
    ("scratch", "plain", "from scratch", "one image"),
    ("scratch-long", "plain", "from scratch, longer", "one image"),
    ("joint", "plain", "joint training", "one image"),
    ("contrastive-32", "plain", "MAML, contrastive, 32", "inner loop"),
    ("detached-labels-32", "plain", "MAML, untrained labels, 32", "inner loop"),
    ("colorization-32", "plain", "MAML, colorization, 32", "inner loop"),
    ("learned-labels-32", "plain", "MAML, learned labels, 32", "inner loop"),
    ("learned-labels-128", "plain", "MAML, learned labels, 128", "inner loop"),
    ("inner-weights-32", "plain", "the same, every weight, 32", "inner loop"),
    ("inner-prior-32", "plain", "MAML, logits alone, 32", "inner loop"),
    ("inner-prior-128", "plain", "MAML, logits alone, 128", "inner loop"),
    ("context-32", "plain", "context network, 32", "shown, no inner loop"),
    ("context-128", "plain", "context network, 128", "shown, no inner loop"),
    ("prior-32", "plain", "prior network, 32", "shown, no inner loop"),
    ("prior-128", "plain", "prior network, 128", "shown, no inner loop"),
    ("log-prior-32", "plain", "prior network, log, 32", "shown, no inner loop"),
    ("log-prior-128", "plain", "prior network, log, 128", "shown, no inner loop"),
    ("scratch", "em", "from scratch, EM", "shown, no inner loop"),
    ("scratch-long", "em", "from scratch, longer, EM", "shown, no inner loop"),
    ("scratch", "known", "frequencies told", "told"),
]


def panels(groups: dict[str, compare.Arms]) -> list[reading.Panel]:
    """The panels of the ladder, of what was run."""
    Rung, found = reading.Rung, []
    one, title = groups["few"], "one distribution\n(CIFAR-10, 25 labels a class)"
    flops, rungs = reading.flops_of(one), []
    for arm, label, kind in ONE_RUNGS:
        seeds = {run.seed: 100 * scores(run)[-1] for run in one.get(arm, [])}
        if seeds:
            rungs.append(Rung(label, kind, seeds, flops.get(arm)))
    found.append(reading.Panel(title, rungs, {}))

    flops, rungs = reading.flops_of(together(groups, READING_NAMES)), []
    supports = found_in("readers")
    for arm, label, kind in SHAPE_RUNGS:
        seeds = supports.get((arm, "none"), {})
        if kind != "one image":
            seeds = supports.get((arm, "own"), {})
        if seeds:
            rungs.append(Rung(label, kind, seeds, flops.get(arm)))
    limits = {"one image": CEILING, "told": KNOWING}
    title = "drawn environments\n(coloured shapes)"
    found.append(reading.Panel(title, rungs, limits))

    ways, rungs = found_in("sites-0.2"), []
    flops = reading.flops_of(groups.get("sites-0.2", {}))
    for arm, way, label, kind in SITE_RUNGS:
        if seeds := ways.get((arm, way)):
            cost = None if way == "most frequent" else flops.get(arm)
            rungs.append(Rung(label, kind, seeds, cost))
    found.append(reading.Panel("photographs of sites\n(CIFAR-10)", rungs, {}))
    return [panel for panel in found if panel.rungs]


def report() -> None:
    """Draws every figure; prints every table and verdict, and writes report.md."""
    measured = ("_support.csv", "_ways.csv")
    logs = [p for p in RESULTS.glob("*.csv") if not p.name.endswith(measured)]
    groups = compare.group(compare.read(logs))
    parts = [judge.HOW, *who_reads(groups)]
    for name in [name for name in PROTOCOLS if name in groups]:
        arms = groups[name]
        baseline = "fine-tuned" if "fine-tuned" in arms else "fine-tuned-25"
        targets = judge.TARGETS.get(name, ())
        parts += [f"## {name}", compare.table(arms, baseline, targets)]
        parts += [verdicts(arms, targets), lowered(arms)]
        path = RESULTS / f"{name}_support.csv"
        if path.exists() and name not in READING_NAMES:
            rows = reading.support_rows(reading.read_supports([path]), {})
            head = reading.SUPPORT_HEAD
            parts += [f"## {name}: adapted to what", as_table(head, rows)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (RESULTS / "report.md").write_text(text, encoding="utf-8")
    draw_answer(groups, "total_step", RESULTS / "steps.png")
    draw_answer(groups, "flops", RESULTS / "flops.png")
    outer_step.draw_step(RESULTS / "outer_step.png")
    reading.draw_ladder(panels(groups), RESULTS / "ladder.png")
    print(text, end="")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("what", choices=("run", "gather", "report"))
    add("protocol", nargs="?", choices=PROTOCOLS, default="readers")
    add("--out", default="runs", help="where runs are kept (runs)")
    add("--jobs", type=int, default=1, help="runs at once (1)")
    add("--only", nargs="+", default=[], help="these runs of the protocol")
    add("--seeds", nargs="+", type=int, default=[], help="with these seeds alone")
    args = parser.parse_args()
    if args.what == "run":
        how = (args.out, args.jobs, args.only, args.seeds)
        sys.exit(run_protocol(args.protocol, *how) > 0)
    elif args.what == "gather":
        gather(args.protocol, Path(args.out), args.only, args.seeds)
    else:
        report()


if __name__ == "__main__":
    main()
