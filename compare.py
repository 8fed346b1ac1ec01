"""Compare runs, `python compare.py runs`: accuracy against steps as a figure, and a short table."""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import cycler, figure, rc_context

HEADER = "phase,step,total_step,images,labels,flops,seconds,train_loss,accuracy,accuracy_adapted"
HEADER += ",pretext_loss,pretext_loss_adapted"
FIELDS = [(column, float) for column in HEADER.split(",")[1:]]
AXES = {"total_step": "training steps", "step": "steps on the desired task", "flops": "FLOPs"}
AXES |= {"seconds": "training time (s)", "images": "images seen", "labels": "labelled images seen"}
UPWARDS = {"accuracy": "accuracy (%)", "accuracy_adapted": "accuracy, adapted (%)"}
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #000000 #E69F00 #56B4E9".split() * 3  # Okabe and Ito's
STYLE = {"font.size": 8, "lines.linewidth": 1.2, "lines.markersize": 3.5, "axes.ymargin": 0.12}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "pdf.fonttype": 42}
STYLE["axes.prop_cycle"] = cycler(color=COLOURS, marker=[*"osD^vPX" * 3], ls=["-", "--", "-."] * 7)


@dataclass
class Run:
    """One seed of one arm; logs are [evaluations] of FIELDS, NaN where a cell is empty."""

    label: str
    dataset: str
    seed: int
    pretraining: np.ndarray
    log: np.ndarray  # on the desired task
    finished: bool
    folder: Path


def read_file(path: Path) -> list[Run]:
    """The run of a metrics.csv, or the runs, all finished, of a CSV file with `run` and `seed`."""
    header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    dataset, steps, wanted = path.stem, 0, f"run,seed,{HEADER}"
    if path.name == "metrics.csv":
        told = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
        dataset, steps, wanted = Path(told["dataset"]).resolve().name, told["steps"], HEADER
        label = f"-{path.absolute().parts[-3]}-".replace(f"-{dataset}-", "-").strip("-") or dataset
        lines = [f"{label},{told['seed']},{line}" for line in lines]
        dataset += "" if told["eval_on"] == "test" else f"-{told['eval_on']}"
    if header != wanted:
        raise ValueError(f"its columns are {header!r}, not {wanted!r}")
    rows: dict[tuple, list] = {}
    for line in lines:
        label, seed, _, *cells = line.rsplit(",", len(FIELDS) + 2)
        rows.setdefault((label, int(seed)), []).append(tuple(float(x or "nan") for x in cells))
    runs = []
    for (label, seed), each in rows.items():
        log = np.array(each, FIELDS)
        before, finished = np.isnan(log["accuracy"]), log["total_step"][-1] >= steps
        runs.append(Run(label, dataset, seed, log[before], log[~before], finished, path.parent))
    return [run for run in runs if len(run.log)]  # the others still pretrain


def read(paths: list[Path]) -> list[Run]:
    """Every run with an accuracy below `paths`, folders or CSV files. ValueError names the file."""
    runs = []
    for path in map(Path, paths):
        for file in sorted(path.rglob("metrics.csv")) if path.is_dir() else [path]:
            try:
                runs += read_file(file)
            except (OSError, ValueError, KeyError, TypeError) as error:
                what = f"config.json has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"{file}: {what}; run that arm again or leave it out") from error
    if not runs:
        raise ValueError(f"no run with an accuracy below {', '.join(map(str, paths))}; run an arm")
    return runs


def group(runs: list[Run]) -> dict[str, dict[str, list[Run]]]:
    """-> {dataset: {label: its runs, by seed}}, without unfinished ones beside finished ones."""
    finished = {(run.dataset, run.label) for run in runs if run.finished}
    groups: dict[str, dict] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if not run.finished and (run.dataset, run.label) in finished:
            print(f"compare.py: left out, for it is unfinished: {run.folder}", file=sys.stderr)
            continue
        seeds = groups.setdefault(run.dataset, {}).setdefault(run.label, [])
        if seeds and seeds[-1].seed == run.seed:
            raise ValueError(f"{seeds[-1].folder} and {run.folder} are one run; give one of them")
        seeds.append(run)
    return groups


def t_critical(df: int, level: float = 0.95) -> float:
    """The t with P(|T| <= t) = level, for Student's T with df >= 1 degrees of freedom."""
    angle = np.linspace(0, np.pi / 2, 10_001)  # t = sqrt(df) tan(angle)
    density = np.cos(angle) ** (df - 1)  # of the angle, up to a factor
    inside = np.append(0, np.cumsum(density[1:] + density[:-1]))  # trapezoids
    return float(np.sqrt(df) * np.tan(np.interp(level, inside / inside[-1], angle)))


def mean_interval(values: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Mean and half width of the t interval over axis 0 (seeds); the half of one seed is NaN."""
    mean, n = np.mean(values, axis=0), len(values)
    if n == 1:
        return mean, np.full_like(mean, np.nan)
    return mean, t_critical(n - 1, level) * np.std(values, axis=0, ddof=1) / np.sqrt(n)


def first_for_good(x: np.ndarray, accuracy: np.ndarray, goal: float) -> float:
    """The first x from which accuracy is never below `goal` again, linear between; NaN: none."""
    if accuracy[-1] < goal:
        return np.nan
    below = np.flatnonzero(accuracy < goal)
    if not len(below):
        return x[0]
    return np.interp(goal, accuracy[below[-1] :][:2], x[below[-1] :][:2])


def reach(run: Run, base: Run) -> list[float]:
    """[steps from which on `run` is never below what `base`, of its seed, ended with; these over
    all steps of `base`; FLOPs until there over its FLOPs]; NaN: never."""
    steps = first_for_good(run.log["total_step"], run.log["accuracy"], base.log["accuracy"][-1])
    flops = np.interp(steps, run.log["total_step"], run.log["flops"])
    return [steps, steps / base.log["total_step"][-1], flops / base.log["flops"][-1]]


def cell(values: np.ndarray, form: str) -> str:
    """'mean ± half width' of values [seeds], each written in `form`; '' where one is missing."""
    if not len(values) or not np.all(np.isfinite(values)):
        return ""
    mean, half = mean_interval(values)
    return f"{mean:{form}}" + (f" ± {half:{form}}" if len(values) > 1 else "")


def table(arms: dict[str, list[Run]], baseline: str | None) -> str:
    """A Markdown table; ratios are to all the steps and FLOPs of `baseline`, a label or None."""
    bases = {run.seed: run for run in arms.get(baseline, [])}
    head = "arm|seeds|final accuracy (%)|adapted (%)|steps to the baseline's final accuracy"
    rows = [f"{head}|ratio of steps|ratio of FLOPs".split("|"), ["---"] * 7]
    for label, runs in arms.items():
        finals = [cell([100 * run.log[y][-1] for run in runs], ".1f") for y in UPWARDS]
        found = [reach(run, bases[run.seed]) for run in runs if run.seed in bases]
        steps, *ratios = np.array(found).reshape(-1, 3).T
        cells = [cell(steps, ".0f"), *(cell(ratio, ".2f") for ratio in ratios)]
        if np.isnan(steps).any():
            cells = [f"{np.isfinite(steps).sum()} of {len(steps)} seeds", "", ""]
        rows.append([label, str(len(runs)), *finals, *cells])
    columns = [column for column in zip(*rows, strict=True) if any(column[2:])]
    aligned = [[text.ljust(max(map(len, column))) for text in column] for column in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*aligned, strict=True))


def draw(ax, arms: dict[str, list[Run]], column: str, y="accuracy", colours=None) -> list[tuple]:
    """Draw mean y, with its 95% t interval, against `column`; returns what label_ends takes."""
    ends, across = [], ax.get_xaxis_transform()  # across: y from 0 (bottom) to 1
    for label, runs in arms.items():
        steps = [run.log["total_step"] for run in runs]  # t: of any seed, where all have a curve
        t = np.unique(np.clip(np.concatenate(steps), max(map(min, steps)), min(map(max, steps))))
        x = np.mean([np.interp(t, r.log["total_step"], r.log[column]) for r in runs], axis=0)
        mean, half = mean_interval([np.interp(t, r.log["total_step"], r.log[y]) for r in runs])
        mean, half = 100 * mean, 100 * half  # percent
        (line,) = ax.plot(x, mean, color=(colours or {}).get(label), markevery=len(x) // 12 + 1)
        colour = line.get_color()
        ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        if np.isfinite(x[-1] + mean[-1]):
            ends.append((mean[-1], x[-1], re.sub(r"-(?=\w+=)", "\n", label), colour))  # flags
        until = np.mean([run.pretraining[column].max(initial=0) for run in runs])
        if until > 0 and column != "step":  # pretraining has steps of its own
            floor = 0.02 + 0.05 * len(ax.texts)  # above those of the arms before
            ax.hlines(floor, 0, until, colour, ":", transform=across)
            ax.text(until, floor, " pretraining", size=6, va="center", transform=across)
    ax.set(xlabel=AXES[column], ylabel=UPWARDS[y])
    ax.locator_params(axis="x", nbins=5)
    return ends


def label_ends(ax, ends: list[tuple]) -> None:
    """Write each (y, x, label, colour) right of `ax`, near the height y, from the top down."""
    ax.figure.draw_without_rendering()  # settles where ax is
    bottom, free = ax.get_window_extent().y0, np.inf  # in points: what is free, below it,
    rest = sum(9.4 * (1 + label.count("\n")) for _, _, label, _ in ends)  # and is still needed
    for y, x, label, colour in sorted(ends, reverse=True):
        half = 4.7 * (1 + label.count("\n"))
        rest -= 2 * half
        wanted = (ax.transData.transform((x, y))[1] - bottom) * 72 / ax.figure.dpi
        place = min(max(wanted, rest + half), free - half)
        free = place - half
        link = {"arrowstyle": "-", "color": colour, "lw": 0.5, "relpos": (0, 0.5)}
        look = {"color": colour, "size": 7, "va": "center", "arrowprops": link}
        ax.annotate(label, (x, y), (1.04, place), "data", ("axes fraction", "axes points"), **look)


def main(argv: list[str] | None = None) -> None:
    """Draw and print a figure and a table for each dataset; exits with 2 at a user's error."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda error: parser.exit(2, f"compare.py: {error}\n")
    parser.add_argument("paths", nargs="+", type=Path, help="folders of runs, or CSV files")
    parser.add_argument("--baseline", metavar="ARM", help="default: the one fine-tuned arm")
    parser.add_argument("--x", choices=AXES, default="total_step", help="default: %(default)s")
    parser.add_argument("--y", choices=UPWARDS, default="accuracy", help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="folder for the files; default: the first path")
    args = parser.parse_args(argv)
    out = args.out or (args.paths[0] if args.paths[0].is_dir() else args.paths[0].parent)
    try:
        groups = group(read(args.paths))
        labels = sorted({label for arms in groups.values() for label in arms})
        if args.baseline and args.baseline not in labels:
            raise ValueError(f"--baseline {args.baseline}: the arms are {', '.join(labels)}")
        out.mkdir(parents=True, exist_ok=True)
        for dataset, arms in groups.items():
            default = "fine-tuned|pretrain_finetune(?!.*pretrain_steps=0)"  # and pretrained
            tuned = [label for label in arms if re.match(default, label)]
            baseline = args.baseline or (tuned[0] if len(tuned) == 1 else None)
            note = baseline or "none, so no steps to reach it; --baseline ARM names one"
            text = f"{dataset}, baseline: {note}\n\n{table(arms, baseline)}\n"
            (out / f"{dataset}.md").write_text(text, encoding="utf-8")
            with rc_context(STYLE):
                height = 2.5 + "".join(arms).count("=") / 8  # flags: a line each, beside the curve
                canvas = figure.Figure((4.2, height), layout="constrained")
                ax = canvas.subplots(subplot_kw={"title": dataset})
                label_ends(ax, draw(ax, arms, args.x, args.y))
                canvas.savefig(out / f"{dataset}.png", dpi=300)
                canvas.savefig(out / f"{dataset}.pdf")
            print(text)
    except (OSError, ValueError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
