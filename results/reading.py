"""Who reads a support set, and how well: tables and a figure, from CSV files alone."""

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import compare
from results import judge

Seeds = dict[int, float]  # accuracy (%) of each seed
Found = dict[tuple[str, str], Seeds]  # by run, and support or way
RISEN = 76.5  # %: a seed above it has begun to read the support on coloured_shapes


# --- reading the files ---
def read_supports(paths: list[Path]) -> Found:
    """The mean over the environments, by run and support, of NAME_support.csv."""
    found: Found = {}
    for path in paths:
        for row in read_rows(path):
            run, seed, support, _, _, *accuracies = row
            mean = 100 * np.mean([float(x) for x in accuracies])
            found.setdefault((run, support), {})[int(seed)] = float(mean)
    return found


def read_ways(path: Path, column: str = "all") -> Found:
    """The mean over sites, by run and way, of NAME_ways.csv."""
    found: Found = {}
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            seeds = found.setdefault((row["run"], row["way"]), {})
            seeds[int(row["seed"])] = 100 * float(row[column])
    return found


def read_rows(path: Path) -> list[list[str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def cell(seeds: Seeds | None) -> str:
    return compare.cell([*seeds.values()], ".1f") if seeds else ""


def flops_of(arms: compare.Arms, unit: str = "scratch") -> dict[str, float]:
    """What training an arm takes, in units of what training `unit` takes."""
    ends = {arm: np.mean([r.log["flops"][-1] for r in arms[arm]]) for arm in arms}
    return {arm: end / ends[unit] for arm, end in ends.items()} if unit in ends else {}


# --- the tables ---
SUPPORTS = ("none", "own-8", "own-32", "own-128", "own")
BROKEN = ("constant", "shuffled", "other")


def support_rows(found: Found, flops: dict[str, float]) -> list[list[str]]:
    """An arm a row: seeds that rose, accuracy by support, with broken ones, FLOPs."""
    rows = []
    for arm in dict.fromkeys(run for run, _ in found):
        best = found.get((arm, "own")) or found[arm, "none"]
        risen = sum(x > RISEN for x in best.values())
        row = [arm, f"{risen} of {len(best)}"]
        row += [cell(found.get((arm, support))) for support in (*SUPPORTS, *BROKEN)]
        rows.append([*row, f"{flops[arm]:.1f}" if arm in flops else ""])
    return rows


SUPPORT_HEAD = f"arm|seeds above {RISEN}|no support|8 images|32|128|256"
SUPPORT_HEAD += "|256 all gray|256 of shuffled colours|256 of another environment"
SUPPORT_HEAD += "|FLOPs (scratch: 1)"


def site_rows(path: Path, flops: dict[str, float]) -> list[list[str]]:
    """A run and a way a row, and its part of the way from scratch to known (%)."""
    every = read_ways(path)
    groups = [every, read_ways(path, "seen"), read_ways(path, "new")]
    low, high = every["scratch", "plain"], every["scratch", "known"]
    rows = []
    for run, way in every:
        if way == "most frequent" and run != "scratch":
            continue  # the same for all
        part = {}
        for seed, accuracy in every[run, way].items():
            if seed in low and high[seed] > low[seed]:
                part[seed] = 100 * (accuracy - low[seed]) / (high[seed] - low[seed])
        cells = [cell(group[run, way]) for group in groups]
        cost = f"{flops[run]:.1f}" if run in flops else ""
        rows.append([run, way, *cells, cell(part), cost])
    return rows


SITE_HEAD = "arm|its output|all sites|seen|new|part of the way (%)|FLOPs (scratch: 1)"


LONG_HEAD = "arm|steps, chosen on validation|accuracy there|at the end, and steps|"
LONG_HEAD += "FLOPs at the end (MAML: 1)"


def long_row(
    arm: str, trial: compare.Run, runs: list[compare.Run], unit: float
) -> list[str]:
    """A longer run, stopped where the trial's validation accuracy is first highest.

    unit: the FLOPs that count as 1.
    """
    best = int(trial.log["total_step"][trial.log["accuracy"].argmax()])
    there, end = [], []
    for run in runs:
        place = np.flatnonzero(run.log["total_step"] == best)[0]
        there.append(100 * run.log["accuracy"][place])
        end.append(100 * run.log["accuracy"][-1])
    ends = f"{compare.cell(end, '.1f')} ({int(runs[0].log['total_step'][-1])})"
    cost = np.mean([run.log["flops"][-1] for run in runs]) / unit
    return [arm, str(best), compare.cell(there, ".1f"), ends, f"{cost:.2f}"]


class Answer(NamedTuple):
    """One of the contrasts that were fixed beforehand."""

    text: str
    differences: np.ndarray  # points, [seeds]


def paired(found: Found, arm: tuple[str, str], other: tuple[str, str]) -> np.ndarray:
    """The points of an arm above another, [seeds], of the seeds that both have."""
    mine, others = found.get(arm, {}), found.get(other, {})
    return np.array([x - others[seed] for seed, x in mine.items() if seed in others])


def signed(points: np.ndarray) -> str:
    mean, half = compare.mean_interval(points)
    return f"{mean:+.1f} ± {half:.1f}"


def contrast_rows(answers: list[Answer], number: int) -> list[list[str]]:
    """Differences with p values, corrected for the `number` of contrasts (Holm).

    Those that were not run yet count as the least significant.
    """
    ps = [judge.p_value(answer.differences) for answer in answers]
    rows, holm = [], judge.holm([*ps, *[1.0] * (number - len(ps))])
    for answer, p, corrected in zip(answers, ps, holm, strict=False):
        seeds = len(answer.differences)
        word = "undecided"
        if corrected < 0.05:
            word = "above" if answer.differences.mean() > 0 else "below"
        good = "yes" if judge.equal(answer.differences) else ""
        value = signed(answer.differences)
        rows.append(
            [answer.text, seeds, value, f"{p:.2g}", f"{corrected:.2g}", word, good]
        )
    return rows


CONTRAST_HEAD = "contrast|seeds|points|p|p, corrected|verdict|as good, within 2"


# --- the figure ---
class Rung(NamedTuple):
    label: str
    kind: str  # a key of KINDS
    seeds: Seeds
    flops: float | None


KINDS = {
    "one image": "0.45",
    "inner loop": "#0072B2",
    "shown, no inner loop": "#D55E00",
    "told": "#009E73",
}


class Panel(NamedTuple):
    title: str
    rungs: list[Rung]  # from below
    limits: dict[str, float]  # text: accuracy (%)


def draw_panel(ax: Axes, panel: Panel) -> None:
    for height, rung in enumerate(panel.rungs):
        values, colour = [*rung.seeds.values()], KINDS[rung.kind]
        ax.plot(values, [height] * len(values), "o", color=colour, alpha=0.5, mew=0)
        ax.plot(np.mean(values), height, "|", color=colour, ms=11, mew=1.6)
        if rung.flops is not None:
            text = f"{rung.flops:.1f}" if rung.flops < 9.95 else f"{rung.flops:.0f}"
            where = ax.get_yaxis_transform()
            ax.text(
                1.08, height, text, transform=where, size=7, ha="center", va="center"
            )
    ax.set_yticks(range(len(panel.rungs)), [rung.label for rung in panel.rungs])
    for tick, rung in zip(ax.get_yticklabels(), panel.rungs, strict=True):
        tick.set(color=KINDS[rung.kind], size=7)
    top = len(panel.rungs) - 0.4
    ax.set(title=panel.title, xlabel="test accuracy (%)", ylim=(-0.6, top + 0.5))
    ax.text(1.08, top, "FLOPs", transform=ax.get_yaxis_transform(), size=7, ha="center")
    for text, value in panel.limits.items():
        ax.axvline(value, color="0.5", lw=0.8, ls=":")
        ax.text(value - 0.4, top, text, size=6.5, color="0.3", ha="right")
    ax.grid(axis="y", lw=0.3, color="0.85")
    ax.tick_params(axis="y", length=0)


def draw_ladder(panels: list[Panel], path: Path) -> None:
    """A panel a setting: each way of training, a dot a seed, a bar the mean."""
    with rc_context(compare.STYLE):
        most = max(len(panel.rungs) for panel in panels)
        figure = Figure((9.6, 1.3 + 0.19 * most), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, panel in zip(axes, panels, strict=True):
            draw_panel(ax, panel)
        used, marks = {rung.kind for panel in panels for rung in panel.rungs}, []
        for kind, colour in KINDS.items():
            if kind in used:
                marks += axes[0].plot([], [], "o", color=colour, label=kind)
        figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=300)
