"""Compare the arms: accuracy against steps, FLOPs, images or time, as a figure and a table.

    python compare.py runs                                     # compare every run below runs/
    python compare.py --run --dataset shapes --seeds 3         # run the three arms, then compare
    python compare.py --run --seeds 3 --jobs 2 -- --steps 100  # after --: arguments of every arm

It reads `metrics.csv` and `config.json` of each run and imports no arm. Runs that differ in nothing
but the seed are one configuration. Intervals are 95% Student t intervals over seeds. An arm has
reached the baseline at the step from which on its accuracy stays at or above what the baseline of
the same seed ended with. A seed that never gets there is censored: counted, never averaged away.
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from array import array
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from tqdm import tqdm

COLUMNS = ["phase", "step", "total_step", "images", "labels", "flops", "seconds", "train_loss"]
COLUMNS += ["accuracy", "accuracy_adapted"]
PHASES = {"pretrain": 0.0, "target": 1.0}
AXES = {  # column: (words, unit); where equal budgets end at one x, labels stand best: third, sixth
    "step": ("steps on the desired task", ""),
    "flops": ("training compute", "FLOPs"),
    "total_step": ("steps, pretraining included", ""),
    "seconds": ("training time", "s"),
    "images": ("images seen in training", ""),
    "labels": ("labelled images seen", ""),
}
ARMS = ("maml_ssl", "pretrain_finetune", "linear_probe")
# Arguments that say where, how watched and how often a run was, not what was run.
NO_SETTING = ["seed", "out", "name", "device", "data_dir", "resume", "overwrite", "eval_every"]
# Okabe and Ito's colours less yellow; styles and markers tell the lines apart in gray print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
PRINT = {"font.size": 8, "axes.linewidth": 0.6, "pdf.fonttype": 42}
PRINT |= {"axes.spines.top": False, "axes.spines.right": False}
ONE_SEED = " " + "(1 seed, no band)".replace(" ", "\N{NO-BREAK SPACE}")
STYLES, MARKERS = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (1.2, 1.2))), "osD^vPX*"


class BadInput(Exception):
    """What the user can mend: one line that names the value and the remedy; exit code 2."""


@dataclass
class Run:
    """One seed of one configuration, with its evaluations of the desired task."""

    folder: Path
    arm: str
    arguments: dict
    log: dict[str, np.ndarray]  # column -> [evaluations], in the order of total_step
    pretrained: dict[str, float]  # column -> its value where pretraining ended


@dataclass
class Arm:
    """One configuration: its runs in the order of seeds, and how many unfinished were left out."""

    label: str
    runs: list[Run]
    left_out: int


# --- reading ---
def warn(message: str) -> None:
    print(f"compare.py: warning: {message}", file=sys.stderr)


def read_log(path: Path) -> np.ndarray:
    """Read and check one metrics.csv: float64 [rows, columns], sorted; phase is 1 for target.

    Mended with a warning: a half-written last line, unordered rows, rows that stand there twice.
    Raises BadInput, naming file and line, for whatever else no arm writes.
    """
    try:
        lines = path.read_bytes().decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: byte {error.start} is not text; remove this run") from None
    if lines.pop():  # an arm ends every row with a newline: what follows the last one is torn
        warn(f"{path}: half-written last line dropped; used up to there")
    header = lines[0].strip().split(",") if lines else COLUMNS
    for number, (name, found) in enumerate(zip_longest(COLUMNS, header), 1):
        if name != found:
            raise BadInput(f"{path}: column {number} is {found!r}, not {name!r}; no arm's log")
    cells, blanks = array("d"), array("b")
    for number, line in enumerate(lines[1:], 2):
        phase, *rest = line.strip().split(",")
        try:
            if len(rest) != len(COLUMNS) - 1:
                raise ValueError
            cells.append(PHASES[phase])
            cells.extend([float(cell or "nan") for cell in rest])
            blanks.append(rest.count(""))
        except (KeyError, ValueError):
            bad = f"{path}, line {number}: no row of a log: {line[:99]!r}; rerun that run"
            raise BadInput(bad) from None
    table = np.array(cells).reshape(-1, len(COLUMNS))
    order = np.argsort(table[:, 2], kind="stable")
    if np.any(np.diff(order) < 0):
        warn(f"{path}: rows are not in order; sorted by total_step")
    table, blanks = table[order], np.array(blanks)[order]
    target, accuracy = table[:, 0] == 1, table[:, 8:]
    with np.errstate(invalid="ignore"):  # infinite cells are refused below
        rise = np.diff(table, axis=0, prepend=table[:1])  # [rows, columns]; the first row's is 0
    twice = (rise[:, 2] == 0) & (np.arange(len(table)) > 0)
    differs = (np.diff(np.nan_to_num(table), axis=0, prepend=np.nan_to_num(table[:1])) != 0).any(1)
    for wrong, what in (
        (np.isinf(table).any(1) | (np.isnan(table).sum(1) != blanks), "a number is not finite"),
        (np.isnan(table[:, :8]).any(1), "an empty cell"),
        ((np.delete(table, 7, axis=1) < 0).any(1), "a negative number"),  # 7: a loss may be
        ((table[:, 1:5] % 1 != 0).any(1), "a count is not a whole number"),
        ((accuracy > 1).any(1), "an accuracy above 1"),
        (np.isnan(accuracy[:, 0]) == target, "accuracy belongs to all rows of target and no other"),
        (target & (table[:, [2, 5]] == 0).any(1), "a result of no steps or no FLOPs"),
        (twice & differs, "another row has the same total_step and other numbers"),
        ((rise[:, [0, 3, 4, 5, 6]] < 0).any(1), "phase, images, labels, flops or seconds fall"),
        ((rise[:, 0] == 0) & (rise[:, 1] != rise[:, 2]), "step and total_step disagree"),
    ):
        if np.any(wrong):
            line = order[np.argmax(wrong)] + 2  # the header is line 1
            raise BadInput(f"{path}, line {line}: {what}: {lines[line - 1][:99]!r}; rerun that run")
    if np.any(twice):
        warn(f"{path}: {np.sum(twice)} repeated row(s) dropped")
    return table[~twice]


def read_runs(folders: list[Path]) -> list[Run]:
    """Read every run below `folders`; one without an accuracy yet is left out with a warning.

    Raises BadInput where none is left, and for a mixture of datasets or of val and test.
    """
    runs = []
    for folder in folders:
        if not folder.is_dir():
            raise BadInput(f"{folder} is no directory; give one that holds runs")
    for path in sorted({p.resolve() for folder in folders for p in folder.rglob("metrics.csv")}):
        path = Path(os.path.relpath(path))
        try:
            config = json.loads(path.with_name("config.json").read_bytes())
            arm, arguments = str(config["arm"]), dict(config["arguments"])
            for key, kind in {"dataset": str, "eval_on": str, "seed": int, "steps": int}.items():
                if not isinstance(arguments[key], kind):
                    raise ValueError(f"{key} is {arguments[key]!r}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
            raise BadInput(f"{path.parent} has no good config.json ({why}); remove it") from None
        table = read_log(path)
        if not np.any(table[:, 0]):
            warn(f"{path.parent} is left out: it has no accuracy yet; --resume continues it")
            continue
        log = dict(zip(COLUMNS, table[table[:, 0] == 1].T, strict=True))
        begin = log["total_step"][0] - log["step"][0]
        table = np.vstack([np.zeros(len(COLUMNS)), table])
        pretrained = {c: np.interp(begin, table[:, 2], table[:, i]) for i, c in enumerate(COLUMNS)}
        if log["total_step"][-1] != arguments["steps"]:
            at = f"step {log['total_step'][-1]:.0f} of {arguments['steps']}"
            warn(f"{path.parent} is unfinished, at {at}; --resume continues it")
        runs.append(Run(path.parent, arm, arguments, log, pretrained | {"step": 0.0}))
    if not runs:
        raise BadInput(f"no run with an accuracy below {', '.join(map(str, folders))}; run an arm")
    for key in ("dataset", "eval_on"):
        first = {run.arguments[key]: run.folder for run in runs}
        if len(first) > 1:
            where = ", ".join(f"{value} ({folder})" for value, folder in sorted(first.items()))
            raise BadInput(f"runs of different {key} do not compare: {where}; give those of one")
    return runs


def settings(run: Run) -> dict:
    return {key: value for key, value in run.arguments.items() if key not in NO_SETTING}


def say(key: str, value: object) -> str:
    """One setting in words: ('inner_lr', 0.01) -> 'inner lr 0.01'; lists are joined by +."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{key.replace('_', ' ')} {text}".strip()


def short_name(run: Run) -> str:
    """What figure and table call an arm, before the settings that tell two of a name apart."""
    before = say("", run.arguments.get("pretrain"))
    name = {
        "maml_ssl": "MAML",
        "pretrain_finetune": "from scratch" if before == "none" else f"{before}, fine-tuned",
        "linear_probe": f"{before}, probed",
    }.get(run.arm, run.arm)
    return name + (" (transductive)" if run.arguments.get("support") == "query" else "")


def group_runs(runs: list[Run]) -> list[Arm]:
    """Gather and label configurations; an unfinished seed is left out where others are finished.

    Raises BadInput where one seed of a configuration is there twice.
    """
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.arguments["seed"]):
        groups.setdefault(json.dumps([run.arm, settings(run)], sort_keys=True), []).append(run)
    arms = []
    for group in groups.values():
        for one, two in pairwise(group):
            if one.arguments["seed"] == two.arguments["seed"]:
                raise BadInput(f"{one.folder} and {two.folder} are the same run; give one of them")
        name, mine = short_name(group[0]), settings(group[0])
        namesakes = [settings(g[0]) for g in groups.values() if short_name(g[0]) == name]
        differ = [k for k in mine if any(other.get(k) != mine[k] for other in namesakes)]
        used = [r for r in group if r.log["total_step"][-1] == r.arguments["steps"]]
        name += "" if used else " (unfinished)"
        label = ", ".join([name, *(say(key, mine[key]) for key in differ)])
        arms.append(Arm(label, used or group, len(group) - len(used or group)))
    order = [*ARMS, *(run.arm for run in runs)]  # other arms stand after the three
    return sorted(arms, key=lambda arm: (order.index(arm.runs[0].arm), arm.label))


# --- statistics ---
def t_critical(df: int, level: float = 0.95) -> float:
    """Two-sided critical value of Student's t with df >= 1: P(|T| <= t) = level.

    Bisection on the closed form of P for whole df (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1e4
    while high - low > 1e-9:
        t = (low + high) / 2
        angle = math.atan(t / math.sqrt(df))
        term, inside = (math.cos(angle) if df % 2 else 1.0), 0.0
        for k in range(2 + df % 2, df + 1, 2):
            inside += term * math.sin(angle)
            term *= math.cos(angle) ** 2 * (k - 1) / k
        inside = (angle + inside) * 2 / math.pi if df % 2 else inside
        low, high = (t, high) if inside < level else (low, t)
    return high


def mean_interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half width of the 95% t interval over axis 0 (seeds); NaN wide for one seed."""
    mean, n = np.mean(values, axis=0), len(values)
    if n == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, t_critical(n - 1) * np.std(values, axis=0, ddof=1) / math.sqrt(n)


def first_for_good(accuracy: np.ndarray, goal: float) -> float | None:
    """Where accuracy [evaluations] reaches `goal` and is not below it again: a fractional index.

    Linear between the last evaluation below and the next. 0 where no evaluation is below: it may
    have been there earlier, but nobody has measured that. None where the last one is below.
    """
    below = np.flatnonzero(accuracy < goal)
    if not len(below):
        return 0.0
    last = below[-1]
    if last == len(accuracy) - 1:
        return None
    return last + (goal - accuracy[last]) / (accuracy[last + 1] - accuracy[last])


def reach(run: Run, base: Run) -> np.ndarray:
    """[step, FLOPs, both over base's budget] where `run` has what `base` ended with; NaN: never."""
    place = first_for_good(run.log["accuracy"], base.log["accuracy"][-1])
    if place is None:
        return np.full(4, np.nan)
    pairs = [(run.log[column], base.log[column][-1]) for column in ("total_step", "flops")]
    spent = np.array([np.interp(place, np.arange(len(x)), x) for x, _ in pairs])
    return np.append(spent, spent / [budget for _, budget in pairs])


# --- table ---
def find_baseline(arms: list[Arm], name: str | None) -> Arm | None:
    """The configuration in directory `name`; by default the one pretrained supervised, if one is.

    Raises BadInput for a name that is not there.
    """
    if name is None:
        found = [arm for arm in arms if arm.label.startswith("supervised, fine-tuned")]
        return found[0] if len(found) == 1 else None
    named = {(run.folder.parent.name, arm.label): arm for arm in arms for run in arm.runs}
    found = [arm for (folder, _), arm in named.items() if folder == name]
    if len(found) != 1:
        there = ", ".join(sorted({folder for folder, _ in named}))
        raise BadInput(f"--baseline {name!r} names {len(found)} configurations; there are {there}")
    return found[0]


def power_of(value: float) -> int:
    """The power of 10, of those of 1000, in which to write `value`; 0 below 10,000."""
    return 3 * int(math.log10(value) // 3) if value >= 1e4 else 0


def cells(values: np.ndarray) -> list[str]:
    """'mean ± half width' of each column of (step, FLOPs, step ratio, FLOP ratio): [seeds, 4]."""
    texts = []
    for mean, half, digits in zip(*mean_interval(values), (0, 2, 2, 2), strict=True):
        interval = "" if np.isnan(half) else f" ± {half:.{digits}f}"
        texts.append("not reached" if np.isnan(mean) else f"{mean:.{digits}f}{interval}")
    return texts


def compare_table(arms: list[Arm], baseline: Arm | None) -> tuple[list, list]:
    """Rows of text, header first: the table over seeds, and that of the paired seeds one by one."""
    bases = {run.arguments["seed"]: run for run in baseline.runs} if baseline else {}
    power = power_of(max((base.log["flops"][-1] for base in bases.values()), default=0))
    scale = (1, 10**power, 1, 1)
    reached = ["step", f"10^{power} FLOPs" if power else "FLOPs", "step ratio", "FLOP ratio"]
    summary = [["arm", "seeds", "final accuracy (%)", *(["there", *reached] if bases else [])]]
    pairs = [["arm", "seed", "ended with (%)", "baseline (%)", *reached]]
    for arm in arms:
        mean, half = mean_interval([run.log["accuracy"][-1] * 100 for run in arm.runs])
        final = f"{mean:.1f}" + ("" if np.isnan(half) else f" ± {half:.1f}")
        seeds = f"{len(arm.runs)}" + (f" (+{arm.left_out} unfinished)" if arm.left_out else "")
        paired = [(run, bases.get(run.arguments["seed"])) for run in arm.runs]
        found = [reach(run, base) / scale for run, base in paired if base]
        got = sum(bool(np.isfinite(row[0])) for row in found)
        if arm is baseline:  # what it reaches, it reaches with its whole budget
            ends = [[r.log[c][-1] for c in ("total_step", "flops")] + [1, 1] for r in arm.runs]
            row = ["baseline", *cells(np.array(ends) / scale)[:2], "1", "1"]
        elif not found:
            row = ["no paired seed", *["-"] * 4]
        else:
            some = ["censored" if got else "not reached"] * 4
            row = [f"{got} of {len(found)}", *(cells(found) if got == len(found) else some)]
        summary.append([arm.label, seeds, final, *(row if bases else [])])
        for run, base in paired if arm is not baseline else []:
            if base:
                ends = [f"{r.log['accuracy'][-1] * 100:.1f}" for r in (run, base)]
                row = cells([reach(run, base) / scale])
                pairs.append([arm.label, str(run.arguments["seed"]), *ends, *row])
    return summary, pairs


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    rows = [map(str.ljust, row, widths) for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def report(arms: list[Arm], baseline: Arm | None) -> str:
    """Both tables, and what a reader must know to judge them, as Markdown."""
    summary, pairs = compare_table(arms, baseline)
    first, all_settings = arms[0].runs[0].arguments, [settings(arm.runs[0]) for arm in arms]
    notes = [
        f"{first['dataset']}, evaluated on {first['eval_on']}. Mean ± half width of the 95% t"
        " interval over seeds; one seed has none. accuracy: nothing adapted.",
        f"Baseline: {baseline.label}. there: paired seeds that reach for good what the baseline of"
        " the same seed ended with; step and FLOPs: where, pretraining included; ratio: to that"
        " baseline's whole budget. censored: not all seeds get there, so a mean would mislead."
        if baseline
        else "No baseline, so no step counts: not exactly one arm is pretrained supervised and"
        " fine-tuned. --baseline DIRECTORY names one.",
    ]
    for key in sorted(set.intersection(*map(set, all_settings)) - {"pretrain", "source"}):
        values = dict.fromkeys(say(key, s[key]) for s in all_settings)
        notes += [f"The arms differ: {', '.join(values)}."] if len(values) > 1 else []
    if any("transductive" in arm.label for arm in arms):
        notes += ["transductive: adapts to the very images it is to classify, without labels."]
    tables = [markdown(summary)] + ([markdown(pairs)] if len(pairs) > 1 else [])
    return "\n\n".join([tables[0], *notes, *tables[1:]]) + "\n"


# --- figure ---
def mean_curve(runs: list[Run], column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean accuracy in % and half width of its 95% t interval: each [points].

    Seeds are averaged at equal steps (interpolated where their evaluations differ, within what all
    have), and so is x, for seconds differ from seed to seed.
    """
    steps = [run.log["total_step"] for run in runs]
    grid = np.unique(np.concatenate(steps))
    grid = grid[(grid >= max(s[0] for s in steps)) & (grid <= min(s[-1] for s in steps))]
    if not len(grid):
        raise BadInput(f"seeds of {runs[0].folder.parent} share no step; --resume finishes them")
    if len(grid) > 1000:  # more than a figure can show
        grid = grid[np.linspace(0, len(grid) - 1, 1000).astype(int)]
    x, y = (
        np.array([np.interp(grid, run.log["total_step"], run.log[c]) for run in runs])
        for c in (column, "accuracy")
    )
    return x.mean(axis=0), *mean_interval(y * 100)


def spread(wanted: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """The places nearest to `wanted` [n], ascending, whose neighbours stand >= `gaps` [n-1] apart.

    Least squares: with the gaps taken out, isotonic regression by its min-max formula.
    """
    offset, n = np.append(0, np.cumsum(gaps)), range(len(wanted))
    free = wanted - offset
    low = [[min(free[j : k + 1].mean() for k in n[i:]) for j in n[: i + 1]] for i in n]
    return np.array([max(row) for row in low]) + offset


def label_ends(ax, ends: list[tuple]) -> None:
    """Write each label at the end of its line; ends: (y, x, label, colour), in data units."""
    ends = sorted(ends)
    texts = [textwrap.fill(label, 24, break_on_hyphens=False) for _, _, label, _ in ends]
    points = ax.get_window_extent().height * 72 / ax.figure.dpi
    line = 7 * 1.3 / points * np.diff(ax.get_ylim())[0]  # height of a line of text, as data
    tall = np.array([text.count("\n") + 1 for text in texts]) * line
    places = spread(np.array([end[0] for end in ends]), (tall[1:] + tall[:-1]) / 2)
    for (y, x, _, colour), text, place in zip(ends, texts, places, strict=True):
        at = (x + 0.05 * np.diff(ax.get_xlim())[0], place)
        link = {"arrowstyle": "-", "color": colour, "lw": 0.5, "shrinkA": 1, "shrinkB": 3}
        link["relpos"] = (0, 0.5)  # from the middle of the left edge
        note = ax.annotate(text, (x, y), at, color=colour, size=7, va="center", arrowprops=link)
        note.set_parse_math(False)
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])  # over other lines


def draw_axis(ax, arms: list[Arm], column: str) -> list[tuple]:
    """Draw accuracy against `column`; returns what label_ends takes."""
    curves = [mean_curve(arm.runs, column) for arm in arms]
    words, unit = AXES[column]
    power = power_of(max(x[-1] for x, _, _ in curves))
    unit = f"$10^{{{power}}}$ {unit}".strip() if power else unit
    ax.set_xlabel(f"{words} ({unit})" if unit else words)
    floor = ax.get_xaxis_transform()  # x in data units, y from 0 (bottom) to 1
    ends, strip = [], 0.025
    for number, (arm, (x, mean, half)) in enumerate(zip(arms, curves, strict=True)):
        style, mark = STYLES[number % len(STYLES)], MARKERS[number % len(MARKERS)]
        colour, x = COLOURS[number % len(COLOURS)], x / 10**power
        every = max(1, len(x) // 6)
        ax.plot(x, mean, lw=1.2, ls=style, color=colour, marker=mark, ms=3, markevery=every)
        ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        label = arm.label + ("" if len(arm.runs) > 1 else ONE_SEED)
        ends.append((mean[-1], x[-1], label, colour))
        until = np.mean([run.pretrained[column] for run in arm.runs]) / 10**power
        if until > 0:
            ax.plot([0, until], [strip] * 2, lw=1.5, ls=":", color=colour, transform=floor)
            strip += 0.03
    if strip > 0.03:
        ax.text(0, strip, " pretraining", size=6, color="0.4", transform=floor)
    ax.set_xlim(left=0)
    ax.locator_params(axis="x", nbins=5)
    return ends


def draw(arms: list[Arm], columns: list[str], figure: Path) -> None:
    """Draw accuracy against each of `columns`; write `figure` (PNG) and a PDF beside it."""
    wide = min(len(columns), 3)
    high = len(columns) // wide
    canvas = Figure(figsize=(3.4 if wide == 1 else 2.2 * wide, 2.4 * high))
    axes = canvas.subplots(high, wide, sharey=True, squeeze=False)
    ends = [draw_axis(ax, arms, column) for ax, column in zip(axes.flat, columns, strict=True)]
    low, top = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low - 0.12 * (top - low), top)  # room for the strips of pretraining
    for row in axes:
        row[0].set_ylabel(f"{arms[0].runs[0].arguments['eval_on']} accuracy (%)")
    canvas.tight_layout()
    for row, here in zip(axes, ends[wide - 1 :: wide], strict=True):
        label_ends(row[-1], here)
    canvas.savefig(figure, dpi=300, bbox_inches="tight")
    canvas.savefig(figure.with_suffix(".pdf"), bbox_inches="tight")


# --- running ---
def run_arms(args: argparse.Namespace) -> list[str]:
    """Run the three arms for each seed, `args.jobs` side by side: one line for each that failed.

    The arms themselves skip what is finished and continue what broke off.
    """
    here, threads = Path(__file__).resolve().parent, {"OMP_NUM_THREADS": "1"}
    options = ["--dataset", args.dataset, "--out", str(args.folders[0]), "--resume", *args.extra]
    options += ["--source", args.source] if args.source else []
    options += ["--data-dir", args.data_dir] if args.data_dir else []
    waiting = [(arm, str(seed)) for seed in range(args.seeds) for arm in ARMS]
    running: dict[subprocess.Popen, tuple] = {}
    failures = []
    bar = tqdm(total=len(waiting), unit="run")
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                arm, seed = waiting.pop(0)
                process = subprocess.Popen(
                    [sys.executable, str(here / f"{arm}.py"), *options, "--seed", seed],
                    stdout=subprocess.DEVNULL,
                    stderr=(errors := tempfile.TemporaryFile()),  # noqa: SIM115 (read at its end)
                    env=os.environ | (threads if args.jobs > 1 else {}),
                    start_new_session=True,  # Ctrl-C reaches a run once: by the signal below
                )
                running[process] = (f"{arm} seed {seed}", errors)
                bar.set_postfix_str(", ".join(name for name, _ in running.values()))
            time.sleep(0.05)
            for process in [p for p in running if p.poll() is not None]:
                name, errors = running.pop(process)
                bar.update()
                errors.seek(0)
                said = ["no message", *errors.read().decode(errors="replace").splitlines()]
                if process.returncode:
                    failures.append(f"{name} ended with code {process.returncode}: {said[-1]}")
    finally:  # nothing runs by now unless we are interrupted
        for process in running:
            process.send_signal(signal.SIGINT)
        for process in running:
            process.wait()
        bar.close()
    return failures


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what stands after `--` is for the arms. Raises BadInput."""

    def refuse(message: str) -> None:
        raise BadInput(f"{message}; see --help")

    def count(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error, add = refuse, parser.add_argument
    add("folders", nargs="*", type=Path, metavar="RUN_DIR", help="compare all runs below these")
    add("--x", choices=[*AXES, "all"], default="total_step", help="axis (default: %(default)s)")
    add("--figure", type=Path, help="PNG file (default: comparison.png in the first RUN_DIR)")
    add("--baseline", help="run directory's name (default: the arm pretrained supervised)")
    add("--run", action="store_true", help="run the arms first (default: %(default)s)")
    add("--dataset", default="shapes", help="for --run (default: %(default)s)")
    add("--source", help="for --run (default: what the arms take)")
    add("--data-dir", help="for --run (default: what the arms take)")
    add("--seeds", type=count, default=3, help="for --run: seeds 0 to N-1 (default: %(default)s)")
    add("--jobs", type=count, default=1, help="for --run: runs at once (default: %(default)s)")
    add("--out", default="runs", help="for --run: where runs are kept (default: %(default)s)")
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1 :]
    if args.run:  # a directory for each command, so that it compares its own runs alone
        words = [word.lstrip("-") for word in (args.dataset, args.source or "", *args.extra)]
        name = re.sub(r"[^\w.+=-]+", "_", " ".join(words)).strip("_.-")[:120]
        args.folders.insert(0, Path(args.out) / name)
    elif args.extra or not args.folders:
        refuse("arguments after -- need --run" if args.extra else "give RUN_DIR, or --run")
    taken = {"--name", "--seed", "--out", "--dataset", "--source", "--data-dir"}
    for word in args.extra:
        if word.split("=")[0] in taken:
            refuse(f"{word} can not stand after --")
    args.figure = args.figure or args.folders[0] / "comparison.png"
    if args.figure.suffix != ".png":
        refuse(f"--figure {args.figure} does not end in .png")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the arms if asked to, read, group, print, draw. Returns the exit code."""
    failures = []
    try:
        args = parse_args(argv)
        if args.run:
            failures = run_arms(args)
        arms = group_runs(read_runs(args.folders))
        text = report(arms, find_baseline(arms, args.baseline))
        print(text)
        with rc_context(PRINT):
            draw(arms, list(AXES) if args.x == "all" else [args.x], args.figure)
        args.figure.with_suffix(".md").write_text(text, encoding="utf-8")
        print(f"figure: {args.figure} and .pdf; table: {args.figure.with_suffix('.md')}")
    except (BadInput, OSError) as error:
        remedy = "; give a path that works" if isinstance(error, OSError) else ""
        print(f"compare.py: {error}{remedy}", file=sys.stderr)
        return 1 if failures else 2
    except KeyboardInterrupt:
        print("compare.py: stopped; the same command continues", file=sys.stderr)
        return 130
    finally:
        for failure in failures:
            print(f"compare.py: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops its runs as Ctrl-C does
    sys.exit(main())
