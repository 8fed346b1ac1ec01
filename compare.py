"""Compare the arms: accuracy against steps, FLOPs, images or time, as a figure and a table.

    python compare.py runs                                     # compare every run below runs/
    python compare.py --run --protocol quick --jobs 2          # run what a protocol lists first
    python compare.py --run --seeds 2 -- --steps 200           # after --: arguments of every run

It reads `metrics.csv` and `config.json` of each run and imports no arm. Runs that differ in nothing
but the seed are one configuration. Intervals are 95% Student t intervals over seeds. An arm has
reached the baseline where its accuracy from then on is at least what the baseline of the same seed
ended with. A seed that never gets there is censored: the first table then gives no mean, the
verdict counts its whole budget, which can refute but not support.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib import cycler, rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tqdm import tqdm

HEADER = "phase,step,total_step,images,labels,flops,seconds,train_loss,accuracy,accuracy_adapted"
PHASES = {"pretrain": 0, "target": 1}
AXES = {  # three to a row; names stand beside the third and sixth, where equal budgets end at one x
    "step": "steps on the desired task",
    "flops": "training compute (FLOPs)",
    "total_step": "steps, pretraining included",
    "seconds": "training time (s)",
    "images": "images seen in training",
    "labels": "labelled images seen",
}
FINE_TUNED = "supervised, fine-tuned"  # the arm that is the baseline unless another is named
# Arguments that say where a run was kept and how often it was evaluated, not what was run.
NO_SETTING = ("seed", "out", "name", "device", "data_dir", "resume", "overwrite", "eval_every")
# Okabe and Ito's colours less yellow; styles and markers tell the lines apart in gray print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
STYLE = {"font.size": 8, "lines.linewidth": 1.2, "lines.markersize": 3, "pdf.fonttype": 42}
STYLE |= {"axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
LINES = cycler(linestyle=["-", "--"]) * cycler(color=COLOURS, marker=list("osD^vPX"))
STYLE |= {"axes.ymargin": 0.15, "axes.prop_cycle": LINES}  # a margin for the pretraining

# --- protocols: what is run, written down before it runs ---
PRETEXT = "rotation colorization masked_autoencoding contrastive"
ARMS = {  # the arms, then the controls: what sets each apart from the others
    "maml": "maml_ssl.py",
    "fine-tuned": "pretrain_finetune.py",
    "probed": "linear_probe.py",
    "scratch": "pretrain_finetune.py --pretrain none",
    "joint": "maml_ssl.py --inner-lr 0",
    "first-order": "maml_ssl.py --first-order",
    "random-labels": "maml_ssl.py --pretext random_labels",
    "self-supervised": f"pretrain_finetune.py --pretrain {PRETEXT}",
    "maml-both": "maml_ssl.py --pretext-images both",
    "joint-both": "maml_ssl.py --inner-lr 0 --pretext-images both",
}
MAIN = ("maml", "fine-tuned", "probed", "scratch", "joint")


def trials(steps: int, **values: str) -> list[str]:
    """Settings to try: the i-th of each flag together. --pretrain-steps: in % of `steps`."""
    flags = [[(f.replace("_", "-"), v) for v in each.split()] for f, each in values.items()]
    if "pretrain_steps" in values:
        flags[-1] = [(flag, steps * int(v) // 100) for flag, v in flags[-1]]
    rows = zip(*flags, strict=True)
    return [" ".join([f"--steps {steps}", *(f"--{f} {v}" for f, v in row)]) for row in rows]


# The eight settings tried for each arm. A step of maml costs ten of scratch, one of joint four:
# what has pretext tasks is tuned over a shorter horizon, if anything to its disadvantage.
SHARES = {"lr": ".001 .001 .001 .002 .002 .002 .0005 .004"}
SHARES |= {"pretrain_steps": "25 50 75 25 50 75 50 50"}
TRIALS = {
    "maml": trials(
        400,
        lr=".001 .001 .001 .001 .002 .002 .002 .002",
        inner_lr=".003 .01 .03 .01 .003 .01 .03 .01",
        pretext_weight=".1 .1 .1 .3 .1 .1 .1 .3",
    ),
    "fine-tuned": trials(1000, **SHARES),
    "probed": trials(1000, **SHARES),
    "scratch": trials(1000, lr=".0003 .0005 .001 .0015 .002 .003 .004 .006"),
    "joint": trials(
        400,
        lr=".001 .001 .001 .001 .002 .002 .002 .002",
        pretext_weight=".03 .1 .3 1 .03 .1 .3 1",
    ),
    "self-supervised": trials(400, **SHARES),
}
CIFAR10 = "--dataset data/cifar10 --source data/tiny-imagenet-32 --width 16 --batch-size 64"
PRIMARY, BUDGETS = "500", ("100", "500", "2500")  # labels per class
CHOSEN = {  # the best of the trials; results/tune holds all of them
    "maml": "--lr .002 --inner-lr .01 --pretext-weight .3",
    "fine-tuned": "--lr .001 --pretrain-steps 1000",
    "probed": "--lr .001 --pretrain-steps 1500",
    "scratch": "--lr .001",
    "joint": "--lr .001 --pretext-weight .03",
    "self-supervised": "--lr .001 --pretrain-steps 500",
}
CHOSEN |= dict.fromkeys(("first-order", "random-labels", "maml-both"), CHOSEN["maml"])
CHOSEN["joint-both"] = CHOSEN["joint"]
VAL = "--eval-on val --eval-every 100"
LABELS = {n: f"{CIFAR10} --labels-per-class {n} --steps 2000 --eval-every 200" for n in BUDGETS}
FINAL = {arm: f"{ARMS[arm]} {LABELS[PRIMARY]} {CHOSEN[arm]}" for arm in ARMS}
SHIFT = f"{CIFAR10} --labels-per-class 500 --steps 1000 --eval-every 500 --shift 1000"
GPU = "--dataset cifar10 --source cifar100 --steps 5000 --width 64 --eval-every 250"
TASKS = PRETEXT.split()
ABLATION = f"maml_ssl.py {CIFAR10} --labels-per-class {PRIMARY} --steps 600 --eval-every 200"
ABLATION += f" {CHOSEN['maml']}"
PROTOCOLS = {  # name: (seeds, {directory: command})
    "quick": (range(3), {arm: f"{ARMS[arm]} --steps 100 --eval-every 20" for arm in MAIN}),
    "tune": (range(100, 101), {
        f"{arm}-{i}": f"{ARMS[arm]} {CIFAR10} --labels-per-class 500 {flags} {VAL}"
        for arm, each in TRIALS.items() for i, flags in enumerate(each, 1)
    }),
    "cpu": (range(5), {arm: FINAL[arm] for arm in MAIN}),
    "controls": (range(5), {
        "no-inner-loop": f"{FINAL['maml']} --inner-lr 0",  # unlike joint, not tuned for itself
        **{arm: FINAL[arm] for arm in ARMS if arm not in MAIN},
    }),
    "budgets": (range(5), {
        f"{arm}-{n}": f"{ARMS[arm]} {LABELS[n]} {CHOSEN[arm]}"
        for n in BUDGETS if n != PRIMARY for arm in ("maml", "fine-tuned", "probed", "scratch")
    }),
    "tasks": (range(3), {
        "all": ABLATION,
        "none": f"{ABLATION} --inner-lr 0 --pretext-weight 0",
        **{f"only-{task}": f"{ABLATION} --pretext {task}" for task in TASKS},
        **{f"without-{task}": f"{ABLATION} --pretext {' '.join(t for t in TASKS if t != task)}"
           for task in TASKS},
    }),
    "inner": (range(3), {  # against tasks' "all": a stronger inner loop? asked after cpu was seen
        "rate-0.03": f"{ABLATION} --inner-lr 0.03",
        "rate-0.1": f"{ABLATION} --inner-lr 0.1",
        "steps-3": f"{ABLATION} --inner-steps 3",
        "one-adaptation": f"{ABLATION} --inner joint",
    }),
    "shift": (range(5), {
        "maml": f"maml_ssl.py --pretext rotation --support query --inner-lr 0.03 {SHIFT}",
        "joint": f"maml_ssl.py --pretext rotation --support query --inner-lr 0 {SHIFT}",
        "scratch": f"maml_ssl.py --inner-lr 0 --pretext-weight 0 {SHIFT}",
    }),
    "gpu": (range(3), {
        f"{arm}{name}": f"{ARMS[arm]} {GPU} {labels}" for arm in ARMS
        for name, labels in {"": "", "-100": "--labels-per-class 100"}.items()
    }),
}  # fmt: skip


@dataclass
class Run:
    """One seed of one configuration."""

    folder: Path
    arm: str
    data: str  # what it was evaluated on
    seed: int
    settings: dict  # the arguments that say what was run
    pretraining: np.ndarray  # [evaluations], its fields those of HEADER
    log: np.ndarray  # the same on the desired task
    finished: bool


def warn(message: str) -> None:
    print(f"compare.py: warning: {message}", file=sys.stderr)


def fail(message: str) -> None:
    """End with one line, which names the value and the remedy, and exit code 2."""
    print(f"compare.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# --- reading ---
def read_log(path: Path) -> np.ndarray:
    """Read one metrics.csv: [rows], its fields those of HEADER, float64; phase is 1 for target.

    Mended with a warning: a half-written last line, rows out of order or repeated.
    Fails, naming file and line, on other columns and on what is no row of a log.
    """
    # An arm ends every row with a newline: what follows the last one is torn.
    *lines, torn = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if torn:
        warn(f"{path}: half-written last line: used up to there, unless other seeds are finished")
    header, *lines = lines or [HEADER]
    if header != HEADER:
        fail(f"{path}: columns are {header[:120]!r}, not {HEADER}; remove it")
    log = np.empty(len(lines), [(column, float) for column in HEADER.split(",")])
    seen: dict[float, str] = {}  # total_step -> its row
    for i, line in enumerate(lines):
        phase, *cells = line.split(",")
        try:
            row = (PHASES[phase], *(float(cell or "nan") for cell in cells))
            log[i] = row  # refuses other lengths
            if not all(0 <= count < math.inf for count in row[1:7]):
                raise ValueError("a count is no number from 0 up")
            if phase == "target" and not 0 <= row[8] <= 1:
                raise ValueError("accuracy is not in 0 to 1")
            if seen.setdefault(row[2], line) != line:
                raise ValueError("another row has the same total_step")
        except (KeyError, ValueError) as error:
            fail(f"{path}, line {i + 2}: no row of a log ({error}): {line[:99]!r}; rerun that run")
    if np.any(np.diff(log["total_step"]) <= 0):
        warn(f"{path}: rows are out of order or repeated; sorted by total_step, each used once")
    return log[np.unique(log["total_step"], return_index=True)[1]]


def say(value: object) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def read_runs(folders: list[Path]) -> list[Run]:
    """Read every run below `folders`; one without an accuracy yet is left out with a warning.

    Fails where none is left, and on a mixture of datasets or of val and test.
    """
    runs = []
    for path in sorted({path for folder in folders for path in folder.rglob("metrics.csv")}):
        log, folder = read_log(path), path.parent
        before, log = (log[log["phase"] == phase] for phase in PHASES.values())
        if not len(log):
            warn(f"{folder} is left out: it has no accuracy yet; --resume continues it")
            continue
        try:
            config = json.loads((folder / "config.json").read_bytes())
            told = config["arguments"]
            data = f"dataset {told['dataset']}, eval_on {told['eval_on']}"
            done = bool(log["total_step"][-1] >= int(told["steps"]))
            settings = {key: say(value) for key, value in told.items() if key not in NO_SETTING}
            run = Run(folder, config["arm"], data, int(told["seed"]), settings, before, log, done)
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"{folder} has no good config.json ({error!r}); remove it")
        runs.append(run)
    if not runs:
        fail(f"no run with an accuracy below {', '.join(map(str, folders))}; run an arm")
    first = {run.data: run.folder for run in runs}
    if len(first) > 1:
        mixture = " and ".join(f"{data} ({folder})" for data, folder in first.items())
        fail(f"{mixture} do not compare; give runs of one")
    return runs


def short_name(run: Run) -> str:
    """What figure and table call an arm, before the settings that tell two of a name apart."""
    told = run.settings.get
    before, tasks = told("pretrain", ""), told("pretext", "")
    before = "self-supervised" if "+" in before else before.replace("_", " ")
    alone = "joint, no inner loop" if float(told("pretext_weight", 1)) else "from scratch"
    name = {
        "maml_ssl": "MAML" if float(told("inner_lr", 1)) else alone,
        "pretrain_finetune": "from scratch" if before == "none" else f"{before}, fine-tuned",
        "linear_probe": f"{before}, probed",
    }.get(run.arm, run.arm)
    if run.arm == "maml_ssl" and name != "from scratch":
        name += ", first order" * (told("first_order") == "True")
        name += ", random labels" * (tasks == "random_labels")
        name += ", source images too" * (told("pretext_images") == "both")
    return name + " (transductive)" * (told("support") == "query")


def label_budget(run: Run) -> str:
    """Labels per class of the desired task; "None": all."""
    return run.settings.get("labels_per_class", "None")


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Gather the runs of each configuration, in the order of seeds, under its label.

    An unfinished seed is left out where others are finished. Fails where one is twice.
    """
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        groups.setdefault(json.dumps([run.arm, run.settings], sort_keys=True), []).append(run)
    arms = {}
    for group in groups.values():
        for one, two in pairwise(group):
            if one.seed == two.seed:
                fail(f"{one.folder} and {two.folder} are the same run; give one of them")
        name, mine = short_name(group[0]), group[0].settings
        namesakes = [g[0].settings for g in groups.values() if short_name(g[0]) == name]
        differ = [k for k in mine if any(other.get(k) != mine[k] for other in namesakes)]
        label = ", ".join([name, *(f"{key.replace('_', ' ')} {mine[key]}" for key in differ)])
        finished = [run for run in group if run.finished]
        unfinished = [str(run.folder) for run in group if not run.finished]
        if unfinished:
            fate = "left out, for other seeds are finished" if finished else "used as it is"
            warn(f"unfinished, {fate}: {', '.join(unfinished)}; --resume continues it")
            label += f" ({len(unfinished)} unfinished)"
        arms[label] = finished or group
    return dict(sorted(arms.items()))


# --- statistics ---
def t_inside(df: int) -> tuple[np.ndarray, np.ndarray]:
    """-> angles, P(|T| <= t) at t = sqrt(df) tan(angle), of Student's t with df >= 1.

    In terms of the angle the density of t is cos(angle)^(df - 1), up to a factor.
    """
    angle = np.linspace(0, np.pi / 2, 10_001)
    density = np.cos(angle) ** (df - 1)
    inside = np.append(0, np.cumsum(density[1:] + density[:-1]))  # trapezoids
    return angle, inside / inside[-1]


def t_critical(df: int, level: float = 0.95) -> float:
    """Two-sided critical value: P(|T| <= t) = level."""
    angle, inside = t_inside(df)
    return math.sqrt(df) * math.tan(np.interp(level, inside, angle))


def p_value(values: np.ndarray, null: float) -> float:
    """Two-sided, of the hypothesis that the mean of values [seeds] is `null`; 1 for one seed."""
    spread, n = np.std(values, ddof=1) if len(values) > 1 else math.inf, len(values)
    t = abs(np.mean(values) - null) / (spread / math.sqrt(n) or 1e-300)
    return 1 - np.interp(math.atan(t / math.sqrt(max(n - 1, 1))), *t_inside(max(n - 1, 1)))


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half width of the t interval over axis 0 (seeds); NaN wide for one seed."""
    mean, n = np.mean(values, axis=0), len(values)
    if n == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, t_critical(n - 1, level) * np.std(values, axis=0, ddof=1) / math.sqrt(n)


def first_for_good(x: np.ndarray, accuracy: np.ndarray, goal: float) -> float:
    """The x where accuracy [evaluations] reaches `goal` and is not below it again; NaN: never.

    Linear between the last evaluation below and the next; the first x where none is below.
    """
    below = np.flatnonzero(accuracy < goal)
    if not len(below):
        return x[0]
    last = below[-1]
    if last == len(x) - 1:
        return np.nan
    return np.interp(goal, accuracy[last : last + 2], x[last : last + 2])


def reach(run: Run, base: Run) -> list[float]:
    """[step, FLOPs, both over base's budget] where `run` has what `base` ended with; NaN: never."""
    goal, columns = base.log["accuracy"][-1], ("total_step", "flops")
    spent = [first_for_good(run.log[column], run.log["accuracy"], goal) for column in columns]
    return spent + [x / base.log[column][-1] for x, column in zip(spent, columns, strict=True)]


# --- table ---
def find_baseline(arms: dict[str, list[Run]], name: str) -> list[str]:
    """The label of the arm, one for each label budget, that `name` begins or whose directory it is.

    Fails where a budget has several, or none has one; [] if `name` is the default.
    """
    names = {label: {run.folder.parent.name for run in runs} for label, runs in arms.items()}
    found = [label for label in arms if label.startswith(name) or name in names[label]]
    single = len({label_budget(arms[label][0]) for label in found}) == len(found) > 0
    if not single and name != FINE_TUNED:
        there = ", ".join(sorted(set.union(*names.values())))
        fail(f"--baseline {name!r} names {len(found)} arms, not one; there are {there}")
    return found if single else []


def plus_minus(values: np.ndarray, form: str) -> str:
    """'mean ± half width' of values [seeds], each written in `form`; the mean alone of one seed."""
    mean, half = mean_interval(values)
    return f"{mean:{form}}" + ("" if np.isnan(half) else f" ± {half:{form}}")


def table_row(label: str, seeds: object, runs: list[Run], bases: dict[tuple, Run]) -> list[str]:
    """What `runs`, of one or more seeds, reach; `bases`: (seed, label budget) -> baseline."""
    paired = [(run, bases.get((run.seed, label_budget(run)))) for run in runs]
    pairs = [pair for pair in paired if pair[1]]
    final = plus_minus([100 * run.log["accuracy"][-1] for run in runs], ".1f")
    ahead = [measure(*pair, "end")[0] for pair in pairs]
    found = np.array([reach(*pair) for pair in pairs]).reshape(-1, 4)
    got = np.isfinite(found[:, 0])
    if len(got) and got.all():
        cells = map(plus_minus, found.T, (".0f", ".2e", ".2f", ".2f"))
    else:
        cells = ["censored" if got.any() else "not reached" if len(got) else "-"] * 4
    difference = plus_minus(ahead, ".1f") if ahead else "-"
    return [label, str(seeds), final, difference, f"{got.sum()} of {len(got)}", *cells]


def markdown(*rows: list[str]) -> str:
    """A Markdown table, header first, whose columns are aligned as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def report(arms: dict[str, list[Run]], baseline: list[str]) -> str:
    """A table over seeds, what a reader must know to judge it, and the same seed by seed."""
    bases = {(run.seed, label_budget(run)): run for label in baseline for run in arms[label]}
    named = "".join(baseline) or "no single arm, so no steps; --baseline names one"
    if len(baseline) > 1:
        named = f"{short_name(arms[baseline[0]][0])}, of the same label budget"
    head = ["arm", "seed(s)", "final accuracy (%)", "difference", "there", "step", "FLOPs",
            "step ratio", "FLOP ratio"]  # fmt: skip
    data = next(iter(arms.values()))[0].data
    over = [table_row(label, len(runs), runs, bases) for label, runs in arms.items()]
    each = [table_row(label, r.seed, [r], bases) for label, runs in arms.items() for r in runs]
    note = f"""{data}. accuracy: nothing adapted; mean ± half width of the 95%
t interval over seeds. Baseline: {named}.
difference: points above the baseline of the same seed at the end.
there: paired seeds that reach for good what the baseline of the same seed ended with. step, FLOPs:
where, pretraining included. ratio: to that baseline's whole budget. censored: not all seeds get
there, so a mean would mislead."""
    return "\n\n".join([markdown(head, *over), note, markdown(head, *each)]) + "\n"


# --- verdict: fixed before the runs that it judges ---
MAML, SCRATCH, JOINT = "MAML", "from scratch", "joint, no inner loop"
SAME = "joint with MAML's settings"
BOTH = ", source images too"
QUESTIONS = [  # (question, arm, against, in which count)
    ("final accuracy not a point below it", MAML, FINE_TUNED, "end"),
    ("as written: steps to its final accuracy", MAML, FINE_TUNED, "total_step"),
    ("as written: steps to its final accuracy", MAML, "supervised, probed", "total_step"),
    ("in steps on the desired task alone", MAML, FINE_TUNED, "step"),
    ("in FLOPs", MAML, FINE_TUNED, "flops"),
    ("is it MAML? the same without it, in steps", SCRATCH, FINE_TUNED, "total_step"),
    ("is it MAML? the same without it, in FLOPs", SCRATCH, FINE_TUNED, "flops"),
    ("better than nothing", MAML, SCRATCH, "equal steps"),
    ("better than nothing", MAML, SCRATCH, "equal FLOPs"),
    ("the inner loop helps", MAML, JOINT, "equal steps"),
    ("the inner loop helps", MAML, JOINT, "equal FLOPs"),
    ("the inner loop alone helps", MAML, SAME, "equal steps"),  # these two: asked after the runs
    ("the inner loop alone helps", MAML, SAME, "equal FLOPs"),  # of the protocol cpu were seen
    ("the second order helps", MAML, f"{MAML}, first order", "equal steps"),
    ("the second order helps", MAML, f"{MAML}, first order", "equal FLOPs"),
    ("the content of the tasks helps", MAML, f"{MAML}, random labels", "equal steps"),
    ("the content of the tasks helps", MAML, f"{MAML}, random labels", "equal FLOPs"),
    (
        "better than pretraining on the same tasks",
        MAML,
        "self-supervised, fine-tuned",
        "equal steps",
    ),
    ("as written, with the source's images", MAML + BOTH, FINE_TUNED, "total_step"),
    ("in FLOPs, with the source's images", MAML + BOTH, FINE_TUNED, "flops"),
    ("the inner loop helps, with the source's images", MAML + BOTH, JOINT + BOTH, "equal steps"),
    ("better than nothing, with the source's images", MAML + BOTH, SCRATCH, "equal steps"),
]


def measure(run: Run, other: Run, count: str) -> tuple[float, bool]:
    """What a question asks of one seed, and whether that is too good for `run` (censored).

    total_step, step, flops: where `run` has for good what `other` ended with, over other's budget.
    end, equal steps, equal FLOPs: points of accuracy by which `run` is ahead.
    """
    y = run.log["accuracy"]
    if count in ("total_step", "step", "flops"):
        x = first_for_good(run.log[count], y, other.log["accuracy"][-1])
        censored = bool(np.isnan(x))
        return (run.log[count][-1] if censored else x) / other.log[count][-1], censored
    column = "flops" if count == "equal FLOPs" else "total_step"
    at = min(run.log[column][-1], other.log[column][-1]) if count != "end" else math.inf
    mine, others = (np.interp(at, r.log[column], r.log["accuracy"]) for r in (run, other))
    return 100 * (mine - others), bool(at < run.log[column][0])  # then its first evaluation counts


def judge(values: np.ndarray, censored: np.ndarray, count: str, level: float) -> tuple[str, str]:
    """-> 'mean ± half width' and supported, refuted or undecided, of values [seeds]."""
    mean, half = mean_interval(values, level)
    ratio = count in ("total_step", "step", "flops")
    null = 1 if ratio else -1 if count == "end" else 0
    good, bad = mean + half < null, mean - half > null  # of a ratio; NaN: neither
    if not ratio:
        good, bad = bad, good
    # What is too good for an arm can refute it, but not support it
    verdict = "supported" if good and not censored.any() else "undecided"
    verdict = "refuted" if bad or (ratio and censored.all() and len(values) > 1) else verdict
    text = f"{mean:{'.2f' if ratio else '+.1f'}}"
    return text + ("" if np.isnan(half) else f" ± {half:{'.2f' if ratio else '.1f'}}"), verdict


def by_budget(arms: dict[str, list[Run]]) -> dict[str, dict[str, list[Run]]]:
    """-> labels per class -> short name -> finished runs, where one configuration has that name."""
    found: dict[str, dict[str, list]] = {}
    for runs in arms.values():
        if runs[0].finished:
            budget = found.setdefault(label_budget(runs[0]), {})
            budget.setdefault(short_name(runs[0]), []).append(runs)
    off = {"inner_lr": "0.0", "inner_steps": "1"}
    for each in found.values():  # set apart joint training that lacks MAML's inner loop alone
        joint = each.get(JOINT, [])
        without = [runs[0].settings | off for runs in each.get(MAML, [])]
        each[SAME] = [runs for runs in joint if runs[0].settings in without]
        each[JOINT] = [runs for runs in joint if runs[0].settings not in without] or joint
    return {n: {k: g[0] for k, g in each.items() if len(g) == 1} for n, each in found.items()}


def verdict(budgets: dict[str, dict[str, list[Run]]]) -> str:
    """The table of all QUESTIONS that the runs answer; budgets: labels per class -> arms.

    The primary budget is judged at 95%; the others together, each question by Holm's procedure,
    with intervals as wide as that asks for. Questions are not corrected for one another.
    """
    rows = [["labels per class", "question", "arm", "against", "counted in", "value", "seeds",
             "censored", "verdict"]]  # fmt: skip
    for question, arm, against, count in QUESTIONS:
        found = {}
        for budget, arms in budgets.items():
            others = {run.seed: run for run in arms.get(against, [])}
            pairs = [(run, others[run.seed]) for run in arms.get(arm, []) if run.seed in others]
            if pairs:
                values, censored = zip(*(measure(*pair, count) for pair in pairs), strict=True)
                found[budget] = np.array(values), np.array(censored)
        null = {"end": -1, "equal steps": 0, "equal FLOPs": 0}.get(count, 1)
        p = {budget: p_value(values, null) for budget, (values, _) in found.items()}
        ranked = [b for b in found if b == PRIMARY] + sorted({*found} - {PRIMARY}, key=p.get)
        rejected = True
        for i, budget in enumerate(ranked):
            level = 0.95 if budget == PRIMARY else 1 - 0.05 / (len(ranked) - i)
            value, said = judge(*found[budget], count, level)
            if budget != PRIMARY:  # Holm: the first that is not rejected ends it
                rejected = rejected and p[budget] <= 1 - level
                said = said if rejected else "undecided"
            values, censored = found[budget]
            about = [budget, question, arm, against, count, value]
            rows.append([*about, str(len(values)), str(censored.sum()), said])
    return markdown(*rows) + "\n" if len(rows) > 1 else ""


def read_table(run: Run, name: str) -> np.ndarray | None:
    """A table beside the log, transfer.csv or shift.csv, with its columns as fields; None: none."""
    path = run.folder / name
    if not path.exists():
        return None
    return np.atleast_1d(
        np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")
    )


def shift_score(run: Run, adapted: bool) -> float:
    """Mean accuracy (%) over families and levels, but noise: steps and rate were chosen on that."""
    table = read_table(run, "shift.csv")
    noise, steps = table[table["family"] == "noise"], 0
    if adapted:
        mean = lambda k: noise["accuracy"][noise["inner_steps"] == k].mean()  # noqa: E731
        steps = max((k for k in np.unique(noise["inner_steps"]) if k), key=mean, default=0)
    rest = ~np.isin(table["family"], ["clean", "noise"]) & (table["inner_steps"] == steps)
    return 100 * table["accuracy"][rest].mean()


def shift_verdict(arms: dict[str, list[Run]]) -> str:
    """Does meta-learned adaptation help under shift? One line for each pair of arms."""
    found = {}
    for runs in arms.values():
        runs = [run for run in runs if (run.folder / "shift.csv").exists()]
        for how in ("adapted", "unadapted") if runs else ():
            scores = {run.seed: shift_score(run, how == "adapted") for run in runs}
            found[f"{short_name(runs[0])}, {how}"] = scores
    tested = f"{MAML} (transductive), adapted"
    rows = [["under shift", "against", "accuracy (%)", "of that", "difference", "verdict"]]
    for other, theirs in found.items() if tested in found else ():
        seeds = [seed for seed in found[tested] if seed in theirs]
        if other != tested and seeds and other != f"{SCRATCH}, adapted":
            a, b = (np.array([each[seed] for seed in seeds]) for each in (found[tested], theirs))
            difference = judge(a - b, np.zeros(len(seeds), bool), "equal steps", 0.95)
            rows.append([tested, other, plus_minus(a, ".1f"), plus_minus(b, ".1f"), *difference])
    return markdown(*rows) + "\n" if len(rows) > 1 else ""


# --- figure ---
def mean_curve(runs: list[Run], column: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, mean accuracy (%) and half width of its interval: [points], over seeds at equal steps."""
    steps = [run.log["total_step"] for run in runs]
    begin, end = max(s[0] for s in steps), min(s[-1] for s in steps)
    grid = np.unique(np.clip(np.concatenate(steps), begin, end))
    grid = grid[np.linspace(0, len(grid) - 1, min(len(grid), 1000)).astype(int)]  # all it can show
    x = [np.interp(grid, run.log["total_step"], run.log[column]) for run in runs]
    y = [np.interp(grid, run.log["total_step"], run.log["accuracy"]) for run in runs]
    return np.mean(x, axis=0), *mean_interval(100 * np.array(y))


def label_ends(ax, ends: list[tuple]) -> None:
    """Write labels beside `ax`, near the ends of their lines: (y, x, label, colour), data units."""
    ends = sorted(ends)
    texts = [textwrap.fill(label, 24, break_on_hyphens=False) for _, _, label, _ in ends]
    line = 7 * 1.3 * ax.figure.dpi / 72 / ax.get_window_extent().height * np.ptp(ax.get_ylim())
    tall = np.array([text.count("\n") + 1 for text in texts]) * line  # heights, in data units
    offset = np.append(0, np.cumsum((tall[1:] + tall[:-1]) / 2))  # the least distances, summed
    wanted = np.array([end[0] for end in ends]) - offset
    up, down = np.maximum.accumulate(wanted), np.minimum.accumulate(wanted[::-1])[::-1]
    places = (up + down) / 2 + offset
    right = ax.get_yaxis_transform()  # x from 0 (left) to 1, y in data units
    for (y, x, _, colour), text, place in zip(ends, texts, places, strict=True):
        link = {"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6, "relpos": (0, 0.5)}
        look = {"color": colour, "size": 7, "va": "center", "arrowprops": link}
        ax.annotate(text, (x, y), (1.05, place), textcoords=right, **look)


def draw_axis(ax, arms: dict[str, list[Run]], column: str) -> list[tuple]:
    """Draw accuracy against `column`; returns what label_ends takes."""
    floor = ax.get_xaxis_transform()  # x in data units, y from 0 (bottom) to 1
    ends, strip = [], 0.025
    for label, runs in arms.items():
        x, mean, half = mean_curve(runs, column)
        (line,) = ax.plot(x, mean, markevery=max(1, len(x) // 6))
        colour = line.get_color()
        ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        one = " (1 seed: no band)" if len(runs) == 1 else ""
        ends.append((mean[-1], x[-1], label + one, colour))
        until = np.mean([run.pretraining[column].max(initial=0) for run in runs])
        if until > 0 and column != "step":  # its steps are not those of the desired task
            ax.hlines(strip, 0, until, colour, ":", lw=1.5, transform=floor)
            strip += 0.03
    if strip > 0.03:
        ax.text(0, strip, " pretraining", size=6, color="0.4", transform=floor)
    ax.set_xlabel(AXES[column])
    ax.set_xlim(left=0)
    ax.locator_params(axis="x", nbins=5)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return ends


def draw(arms: dict[str, list[Run]], columns: list[str], figure: Path) -> None:
    """Draw accuracy against each of `columns`; write `figure` as PNG and as PDF."""
    wide = min(len(columns), 3)
    high = len(columns) // wide
    canvas = Figure(figsize=(3.4 if wide == 1 else 2.2 * wide, 2.4 * high))
    axes = canvas.subplots(high, wide, sharey=True, squeeze=False)
    ends = [draw_axis(ax, arms, column) for ax, column in zip(axes.flat, columns, strict=True)]
    for row in axes:
        row[0].set_ylabel(f"{next(iter(arms.values()))[0].settings['eval_on']} accuracy (%)")
    canvas.tight_layout()
    for row, here in zip(axes, ends[wide - 1 :: wide], strict=True):
        label_ends(row[-1], here)
    for suffix in (".png", ".pdf"):
        canvas.savefig(figure.with_suffix(suffix), dpi=300, bbox_inches="tight")


def draw_panels(
    figure: Path, panels: list[tuple[str, str, dict]], wide: int, x_label: str, ticks: tuple = ()
) -> None:
    """Draw small panels, `wide` to a row: (title, what is upwards, label -> (x, y [seeds, x])).

    With `ticks` the axis across is logarithmic and shows these.
    """
    if not panels:
        fail("none of these runs has what --x asks for")
    high = math.ceil(len(panels) / wide)
    canvas = Figure(figsize=(max(3.4, 1.75 * wide), 1.7 * high + 0.6), layout="constrained")
    grid = canvas.subplots(high, wide, squeeze=False, sharex=True, sharey="row")
    names = dict.fromkeys(label for _, _, curves in panels for label in curves)
    looks, lines = dict(zip(names, rcParams["axes.prop_cycle"](), strict=False)), {}
    for ax, (title, y_label, curves) in zip(grid.flat, panels, strict=False):
        ax.set_title(title, size=8)
        if ax in grid[:, 0]:
            ax.set_ylabel(y_label)
        for label, (x, values) in curves.items():
            mean, half = mean_interval(np.array(values))
            (lines[label],) = ax.plot(x, mean, markevery=max(1, len(x) // 6), **looks[label])
            band = {"color": lines[label].get_color(), "alpha": 0.15, "lw": 0}
            ax.fill_between(x, mean - half, mean + half, **band)
            if len(x) == 1:  # too narrow for a band
                ax.errorbar(x, mean, half, color=band["color"], elinewidth=0.8)
        if ticks:
            ax.set_xscale("log")
            ax.set_xticks(ticks, ticks)
            ax.minorticks_off()
        if min(ax.get_ylim()) < 0 < max(ax.get_ylim()):
            ax.axhline(0, color="0.5", lw=0.6)
    for ax in grid.flat[len(panels) :]:
        ax.set_axis_off()
    canvas.supxlabel(x_label, size=8)
    where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "frameon": False}
    canvas.legend([*lines.values()], [*lines], ncols=2, fontsize=7, **where)
    for suffix in (".png", ".pdf"):
        canvas.savefig(figure.with_suffix(suffix), dpi=300, bbox_inches="tight")


def panels_of_transfer(arms: dict[str, list[Run]]) -> tuple[list, int, str]:
    """For each task the cosine of its gradient with the desired task's, and what a step does."""
    kinds = {
        "cosine of gradients": lambda rows: rows["cosine"],
        "change of test loss": lambda rows: rows["query_loss_adapted"] - rows["query_loss"],
    }
    tables = {}
    for label, runs in arms.items():
        found = [table for run in runs if (table := read_table(run, "transfer.csv")) is not None]
        tables |= {label: found} if found else {}
    names = [*dict.fromkeys(task for found in tables.values() for t in found for task in t["task"])]
    panels = []
    for kind, value in kinds.items():
        for task in names:
            curves = {}
            for label, found in tables.items():
                rows = [table[table["task"] == task] for table in found]
                points = min(map(len, rows))
                y = [value(r)[:points] for r in rows]
                if points and (kind.startswith("cosine") or np.any(y)):  # joint does not adapt
                    curves[label] = rows[0]["total_step"][:points], y
            title = task.replace("_", " ") if len(panels) < len(names) else ""
            panels.append((title, kind, curves))
    return panels, max(1, len(names)), "steps"


def panels_of_shift(arms: dict[str, list[Run]]) -> tuple[list, int, str]:
    """For each family accuracy, its levels' mean, against the number of steps of adaptation."""
    panels: dict[str, dict] = {}
    for label, runs in arms.items():
        tables = [table for run in runs if (table := read_table(run, "shift.csv")) is not None]
        for family in dict.fromkeys(tables[0]["family"]) if tables else ():
            steps, y = np.unique(tables[0]["inner_steps"]), []
            for t in tables:
                of = [
                    t["accuracy"][(t["family"] == family) & (t["inner_steps"] == k)] for k in steps
                ]
                y.append([100 * part.mean() for part in of])
            panels.setdefault(family, {})[label] = steps, y
    named = [(family, "test accuracy (%)", curves) for family, curves in panels.items()]
    return named, 4, "steps of adaptation on each unlabelled test batch (transductive)"


def panels_of_labels(arms: dict[str, list[Run]]) -> tuple[list, int, str, tuple]:
    """Final accuracy against labels per class, of the seeds that all arms have at all budgets.

    An arm with one budget is left out where others have more.
    """
    budgets = {int(n): each for n, each in by_budget(arms).items() if n.isdigit()}
    names = dict.fromkeys(name for each in budgets.values() for name in each if name != SAME)
    of = {name: sorted(n for n in budgets if name in budgets[n]) for name in names}
    most = max(map(len, of.values()), default=0)
    shown = {name: x for name, x in of.items() if len(x) > 1 or most == 1}
    runs = {name: [budgets[n][name] for n in x] for name, x in shown.items()}
    seeds = [{run.seed for run in each} for them in runs.values() for each in them]
    paired = set.intersection(*seeds) if seeds else ()
    curves = {}
    for name, x in shown.items() if paired else ():
        ends = [[r.log["accuracy"][-1] for r in each if r.seed in paired] for each in runs[name]]
        curves[name] = x, 100 * np.array(ends).T
    panel = ("", "final test accuracy (%)", curves)
    return [panel] if curves else [], 1, "labels per class", tuple(sorted(budgets))


PANELS = {"labels": panels_of_labels, "transfer": panels_of_transfer, "shift": panels_of_shift}


# --- running ---
def run_protocol(args: argparse.Namespace) -> int:
    """Run a protocol seed by seed, skipping and continuing runs; returns how many failed."""
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if args.jobs > 1 else {})
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    (seeds, runs), children = PROTOCOLS[args.protocol], set()

    def stop(*_: object) -> None:  # Ctrl-C of a terminal reaches the arms by itself
        for child in children:
            child.terminate()
        raise KeyboardInterrupt

    def run(job: tuple[int, str]) -> bool:
        seed, name = job
        arm, *flags = runs[name].split()
        command = [sys.executable, Path(__file__).with_name(arm), "--resume", *flags, *args.extra]
        command += ["--out", args.folders[0], "--name", name, "--seed", str(seed)]
        child = subprocess.Popen(command, env=env, **quiet)
        children.add(child)
        _, said = child.communicate()
        children.discard(child)
        bar.update()
        if child.returncode:
            ended_with = (
                f"ended with code {child.returncode}: {['no message', *said.splitlines()][-1]}"
            )
            tqdm.write(f"compare.py: {name} seed {seed} {ended_with}", sys.stderr)
        return child.returncode != 0

    signal.signal(signal.SIGTERM, stop)

    jobs = [(seed, name) for seed in seeds[: args.seeds] for name in runs]
    with tqdm(total=len(jobs), unit="run") as bar, ThreadPoolExecutor(args.jobs) as pool:
        return sum(pool.map(run, jobs))  # Ctrl-C stops the running too, and map drops the others


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line; what stands after `--` is for the arms."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error, add = fail, parser.add_argument
    add("folders", nargs="*", type=Path, metavar="RUN_DIR", help="compare all runs below these")
    add("--x", choices=[*AXES, "all", *PANELS], default="total_step", help="axis; all six of them;"
        " labels per class; transfer between tasks; shift (default: %(default)s)")  # fmt: skip
    add("--figure", type=Path, help="PNG file (default: comparison.png in the first RUN_DIR)")
    add("--baseline", default=FINE_TUNED, help="an arm, or its directory (default: %(default)s)")
    add("--run", action="store_true", help="run a protocol first (default: %(default)s)")
    add("--protocol", choices=PROTOCOLS, default="quick", help="for --run (default: %(default)s)")
    add("--seeds", type=int, help="for --run: the first N of its seeds (default: all)")
    add("--jobs", type=int, default=1, help="for --run: runs at once (default: %(default)s)")
    add("--out", default="runs", help="for --run: where runs are kept (default: %(default)s)")
    args = parser.parse_args(argv[:split])
    args.extra = argv[split + 1 :]
    if args.jobs < 1 or (args.seeds is not None and args.seeds < 1):
        fail(f"--seeds {args.seeds} --jobs {args.jobs}: both are at least 1")
    if not args.run and (args.extra or not args.folders):
        fail("give RUN_DIR, or --run and then, after --, arguments of the arms")
    if args.run:  # a directory for each command, so that it compares its own runs alone
        name = "_".join([args.protocol, *args.extra]).replace("/", "_").replace("--", "")
        args.folders.insert(0, Path(args.out, name))
    args.figure = args.figure or args.folders[0] / "comparison.png"
    return args


def main(argv: list[str]) -> int:
    """Run the arms if asked to, read, group, print, draw. Returns the exit code."""
    args = parse_args(argv)
    try:
        failed = run_protocol(args) if args.run else 0
        arms = group_runs(read_runs(args.folders))
        text = report(arms, find_baseline(arms, args.baseline))
        text = "\n".join(filter(None, [text, verdict(by_budget(arms)), shift_verdict(arms)]))
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        args.figure.with_suffix(".md").write_text(text, encoding="utf-8")
        with rc_context(STYLE):
            if args.x in PANELS:
                draw_panels(args.figure, *PANELS[args.x](arms))
            else:
                draw(arms, list(AXES) if args.x == "all" else [args.x], args.figure)
        print(text)  # last: a closed pipe loses no file
        print(f"figure: {args.figure} and .pdf; table: {args.figure.with_suffix('.md')}")
    except OSError as error:
        fail(f"{error}; give a path that works")
    except KeyboardInterrupt:
        print("compare.py: stopped; the same command continues", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
