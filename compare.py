"""Compare runs: `python compare.py runs` draws accuracy against steps.

It also writes a table. Both show means over seeds with 95% t intervals.
"""

import argparse
import csv
import json
import re
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import cycler, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

HEADER = (
    "phase,step,total_step,images,labels,flops,seconds,train_loss,"
    "accuracy,accuracy_adapted,pretext_loss,pretext_loss_adapted"
)
FIELDS = [(column, float) for column in HEADER.split(",")[1:]]
AXES = {
    "total_step": "training steps",
    "step": "steps on the desired task",
    "flops": "FLOPs",
    "seconds": "seconds",
    "images": "images",
    "labels": "labelled images",
}
# Okabe and Ito's, and gray
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9 #888888"
STYLE = {
    "axes.prop_cycle": cycler(color=COLOURS.split() * 7, marker=[*"osD^vPX" * 8]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.ymargin": 0.12,
    "font.size": 8,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,
}
# Student's t for 2 to 10 seeds; for more, a bit too wide
T95 = (12.706205, 4.302653, 3.18245, 2.776445, 2.57058, 2.44691, 2.36462, 2.306, 2.2622)
WAY = (0.6, 0.8, 0.95)  # where the targets are
NOT_ADAPTED = {"ls": "--", "lw": 0.8, "marker": ""}


@dataclass
class Run:
    """One seed of one arm. Its logs have FIELDS, NaN where a cell is empty."""

    label: str
    dataset: str
    seed: int
    log: np.ndarray  # [evaluations], on the desired task
    finished: bool
    folder: Path


Arms = dict[str, list[Run]]  # by label


def describe(path: Path) -> dict:
    """Return what the rows of a CSV file do not say themselves."""
    if path.name != "metrics.csv":  # a protocol's file, of finished runs
        return {"dataset": path.stem, "steps": 0}
    config = json.loads(path.with_name("config.json").read_bytes())
    dataset = Path(config["dataset"]).resolve().name
    name = f"-{path.absolute().parts[-3]}-"  # ARM-DATASET-flags
    label = name.replace(f"-{dataset}-", "-").strip("-") or dataset
    if config["eval_on"] != "test":
        dataset += f"-{config['eval_on']}"
    return config | {"dataset": dataset, "run": label}


def read_file(path: Path) -> list[Run]:
    """Return the run of a metrics.csv, or the runs of a CSV file with `run,seed`."""
    told = describe(path)
    logs = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file, restval="(cut off)"):
            row = told | row
            cells = tuple(float(row[column] or "nan") for column, _ in FIELDS)
            logs.setdefault((row["run"], int(row["seed"])), []).append(cells)
    dataset, runs = told["dataset"], []
    for (label, seed), rows in logs.items():
        log = np.array(rows, FIELDS)
        before = np.isnan(log["accuracy"])
        done = log["total_step"][-1] >= told["steps"]
        run = Run(label, dataset, seed, log[~before], done, path.parent)
        runs.append(run)
    return [run for run in runs if len(run.log)]  # the others still pretrain


def read(paths: list[Path]) -> list[Run]:
    """Return every run with an accuracy below `paths`, folders or CSV files."""
    runs = []
    for path in paths:
        for file in sorted(path.rglob("metrics.csv")) if path.is_dir() else [path]:
            try:
                runs += read_file(file)
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file} or its config.json: {error!r}") from error
    if not runs:
        raise ValueError(f"{[*map(str, paths)]}: no run has an accuracy; run an arm")
    return runs


def group(runs: list[Run]) -> dict[str, Arms]:
    """Return each dataset's arms, without unfinished seeds beside finished ones."""
    finished = {(run.dataset, run.label) for run in runs if run.finished}
    groups = {}
    for run in sorted(runs, key=lambda run: run.seed):
        label = run.label if run.finished else f"{run.label} (unfinished)"
        if label != run.label and (run.dataset, run.label) in finished:
            print(f"compare.py: left out, unfinished: {run.folder}", file=sys.stderr)
            continue
        seeds = groups.setdefault(run.dataset, {}).setdefault(label, [])
        if seeds and seeds[-1].seed == run.seed:
            raise ValueError(f"{seeds[-1].folder}, {run.folder}: one run; give one")
        seeds.append(run)
    return groups


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and half width of the 95% t interval over axis 0; NaN for one."""
    mean, n = np.mean(values, axis=0), len(values)
    if n == 1:
        return mean, np.full_like(mean, np.nan)
    t = T95[min(n, 10) - 2]
    return mean, t * np.std(values, axis=0, ddof=1) / np.sqrt(n)


def first_time(x: np.ndarray, accuracy: np.ndarray, goal: float) -> float:
    """Return the first x with `goal`, linear between evaluations; inf: never there."""
    there = np.flatnonzero(accuracy >= goal)
    if not len(there):
        return np.inf
    pair = slice(max(there[0] - 1, 0), there[0] + 1)
    return np.interp(goal, accuracy[pair], x[pair])


def times(runs: list[Run], x: str, y: str, percent: float) -> np.ndarray:
    """Return where in column x each run's y is first at `percent`, [seeds]."""
    return np.array([first_time(run.log[x], run.log[y], percent / 100) for run in runs])


def cell(values: np.ndarray, form: str) -> str:
    """Return 'mean ± half width' over seeds, in `form`; '' where one is missing."""
    if not len(values) or not np.isfinite(values).all():
        return ""
    mean, half = mean_interval(values)
    return f"{mean:{form}}" + (f" ± {half:{form}}" if len(values) > 1 else "")


def ratio(mine: np.ndarray, others: np.ndarray) -> str:
    """Return 'geometric mean (interval)' of mine / others; '' if one is inf or 0."""
    both = np.array([mine, others])
    if not both.size or not both.all() or not np.isfinite(both).all():
        return ""
    mean, half = mean_interval(np.log(both[0] / both[1]))
    value, low, high = np.exp([mean, mean - half, mean + half])
    return f"{value:.2f}" + (f" ({low:.2f} to {high:.2f})" if len(mine) > 1 else "")


def choose_targets(arms: Arms, baseline: str | None) -> list[float]:
    """Return accuracies (%) between the lowest first and the baseline's last one.

    Without a baseline, the highest last one.
    """
    first, last = {}, {}
    for label, runs in arms.items():
        ends = [100 * run.log["accuracy"][[0, -1]] for run in runs]
        first[label], last[label] = np.mean(ends, axis=0)
    low, high = min(first.values()), last.get(baseline, max(last.values()))
    return sorted({round(low + way * (high - low)) for way in WAY})


def table(arms: Arms, baseline: str | None, targets: list[float]) -> str:
    """Return a Markdown table: each arm's steps to each target (%).

    Ratios: of times to the last target, to those of the arm labelled `baseline`.
    """
    bases = {run.seed: run for run in arms.get(baseline, [])}
    head = ["arm", "seeds", "final accuracy (%)"]
    head += [f"steps to {target:g}%" for target in targets]
    for target in targets[-1:]:
        head += [f"ratio of steps to {target:g}%", f"ratio of FLOPs to {target:g}%"]
    rows = [head, ["---"] * len(head)]
    for (label, runs), y in product(arms.items(), ("accuracy", "accuracy_adapted")):
        final = cell([100 * run.log[y][-1] for run in runs], ".1f")
        if not final:  # the arm does not adapt
            continue
        name = label if y == "accuracy" else f"{label}, adapted"
        rows.append([name, str(len(runs)), final])
        for target in targets:
            steps = times(runs, "total_step", y, target)
            there = f"{np.isfinite(steps).sum()} of {len(runs)} seeds"
            rows[-1].append(cell(steps, ".0f") or there)
        mine = [run for run in runs if run.seed in bases]
        others = [bases[run.seed] for run in mine]
        for target, x in product(targets[-1:], ("total_step", "flops")):
            base = times(others, x, "accuracy", target)
            rows[-1].append(ratio(times(mine, x, y, target), base))
    columns = [column for column in zip(*rows, strict=True) if any(column[2:])]
    widths = [max(map(len, column)) for column in columns]
    rows = [map(str.ljust, row, widths) for row in zip(*columns, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def over_steps(runs: list[Run], column: str) -> np.ndarray:
    """Return a column at the first seed's steps that all reached, [seeds, steps]."""
    logs = [run.log for run in runs]
    steps = logs[0]["total_step"]
    steps = steps[steps <= min(log["total_step"][-1] for log in logs)]
    return np.array([np.interp(steps, log["total_step"], log[column]) for log in logs])


def draw(
    ax: Axes,
    arms: Arms,
    column: str,
    y: str = "accuracy",
    colours: dict | None = None,
    **look: object,
) -> list[Line2D]:
    """Draw mean y, with its interval, against `column`. Return the curves.

    colours: by label. look: options of ax.plot.
    """
    curves = []
    for label, runs in arms.items():
        x = over_steps(runs, column).mean(0)
        mean, half = mean_interval(100 * over_steps(runs, y))
        curves += ax.plot(x, mean, color=(colours or {}).get(label), **look)
        colour = curves[-1].get_color()
        ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.1, lw=0)
        ax.hlines(mean[0], 0, x[0], colour, ":")
        if x[0] > 0 and not ax.texts:
            ax.annotate("dotted: pretraining", (4, 2), None, "axes points", size=7)
        curves[-1].set_label(re.sub(r"-(?=\w+=)", "\n", label))
    ax.set(xlabel=AXES[column], ylabel="accuracy (%)")
    return curves


def label_height(curve: Line2D) -> float:
    """Return the height of a curve's label in points."""
    return 9.4 * (1 + curve.get_label().count("\n"))


def label_ends(ax: Axes, curves: list[Line2D]) -> None:
    """Write each label right of `ax`, near the end of its curve."""
    ax.figure.draw_without_rendering()  # settles how high ax is
    points = ax.get_window_extent().height * 72 / ax.figure.dpi
    needed = sum(map(label_height, curves))  # by the labels to come
    free = np.inf  # nothing stands below this height yet
    for curve in sorted(curves, key=lambda curve: -curve.get_ydata()[-1]):
        colour, height = curve.get_color(), label_height(curve)
        end = curve.get_xydata()[-1]
        wanted = ax.transLimits.transform(end)[1] * points
        top = min(max(wanted + height / 2, needed), free)
        free = top - height
        needed -= height
        place = (1.04, (top + free) / 2 / points)
        link = {"arrowstyle": "-", "color": colour, "lw": 0.5, "relpos": (0, 0.5)}
        look = {"color": colour, "size": 7, "va": "center", "arrowprops": link}
        ax.annotate(curve.get_label(), end, place, "data", "axes fraction", **look)


def make_figure(arms: Arms, column: str, title: str) -> Figure:
    """Return the curves of all arms; of one that adapts, with and without it."""
    figure = Figure(layout="constrained")
    ax = figure.subplots(subplot_kw={"title": title})
    curves = []
    for label, runs in arms.items():
        if np.isnan(runs[0].log["accuracy_adapted"][-1]):
            curves += draw(ax, {label: runs}, column)
            continue
        curves += draw(ax, {f"{label}, adapted": runs}, column, "accuracy_adapted")
        name = f"{label}, not adapted"
        colours = {name: curves[-1].get_color()}
        curves += draw(ax, {name: runs}, column, colours=colours, **NOT_ADAPTED)
    figure.set_size_inches(5.5, max(2.8, 0.8 + sum(map(label_height, curves)) / 72))
    label_ends(ax, curves)
    return figure


def report(dataset: str, arms: Arms, args: argparse.Namespace) -> None:
    """Print the table of one dataset; write it and the figure, and say where."""
    pattern = "fine-tuned|pretrain_finetune(?!.*pretrain_steps=0)"
    tuned = [label for label in arms if re.match(pattern, label)]
    baseline = args.baseline or (tuned[0] if len(tuned) == 1 else None)
    note = "none; --baseline ARM names one"
    if baseline:
        note = f"{baseline}; steps: the first time there, pretraining included"
    targets = sorted(args.targets) or choose_targets(arms, baseline)
    text = f"{dataset}, baseline: {note}\n\n{table(arms, baseline, targets)}\n"
    files = [args.out / f"{dataset}.{kind}" for kind in ("md", "png", "pdf")]
    files[0].write_text(text, encoding="utf-8")
    with rc_context(STYLE):
        figure = make_figure(arms, args.x, dataset)
        for file in files[1:]:
            figure.savefig(file, dpi=300)
    print(f"{text}\nwrote {', '.join(map(str, files))}\n")


def main(argv: list[str] | None = None) -> None:
    """Compare the runs; a user's error ends with exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.error = lambda error: parser.exit(2, f"compare.py: {error}\n")
    add = parser.add_argument
    add("paths", nargs="+", type=Path, help="folders of runs, or CSV files")
    add("--baseline", metavar="ARM", help="default: the one fine-tuned arm")
    add("--targets", nargs="+", type=float, default=[], help="accuracies, in percent")
    add("--x", choices=AXES, default="total_step", help="the figure's x")
    add("--out", type=Path, help="default: the first path")
    args = parser.parse_args(argv)
    first = args.paths[0]
    args.out = args.out or (first.parent if first.is_file() else first)
    try:
        groups = group(read(args.paths))
        labels = sorted({label for arms in groups.values() for label in arms})
        if args.baseline not in [None, *labels]:
            raise ValueError(f"--baseline {args.baseline}: the arms are {labels}")
        args.out.mkdir(parents=True, exist_ok=True)
        for dataset, arms in groups.items():
            report(dataset, arms, args)
    except (OSError, ValueError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
