"""Statistics of the verdicts: times to a target, points, equality, many questions.

Numbers alone: of one seed each, always paired by seed.
"""

from typing import NamedTuple

import numpy as np

import compare

# Accuracies (%), the same for all pairs of a protocol: 60, 80 and 95% of the way from
# chance to the mean final accuracy of one reference, the arm fine-tuned (or
# fine-tuned-25), in whole percent. For `few` that is its validation accuracy (protocol
# gate); for the others they were fixed after the runs. Where rows are far apart
# (steps-10000: 1,000 steps) a low target may lie before the second.
TARGETS = {
    "few": (25, 31, 34),
    "photos": (39, 49, 57),
    "labels-100": (33, 41, 46),
    "labels-5000": (41, 51, 59),
    "steps-10000": (43, 55, 63),
    "tinted": (58, 60, 62),
}
HOW = """\
How to read the tables. A time is where a run first has the accuracy, linear between
its evaluations, pretraining included in total_step and flops. Ratios are the arm's
time over the other's: geometric mean over seeds (95% t interval); below 1 the arm is
faster. "3 and 5 of 5": so many seeds of the arm, and of the other, got there within
the shorter of the two runs. Then no time counts more than the end of the shorter run,
which draws the ratio toward 1. "nobody": no seed of either got there in it. As good:
the 90% interval of the points lies within ±2."""
# Student's t, two-sided at 90%, for 2 to 10 seeds; for more, a bit too wide
T90 = (6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331)


class Verdict(NamedTuple):
    """What is found, and supported, refuted or undecided."""

    value: str
    word: str


def word(values: np.ndarray) -> str:
    """The verdict on the claim that values [seeds] are above 0: by the t interval."""
    mean, half = compare.mean_interval(values)
    if mean - half > 0:
        return "supported"
    return "refuted" if mean + half < 0 else "undecided"


def points(values: np.ndarray, null: float = 0.0) -> Verdict:
    """The verdict at 95% on the claim that values [seeds] are above `null`."""
    mean, half = compare.mean_interval(values)
    return Verdict(f"{mean:.2f} ± {half:.2f}", word(np.array(values) - null))


class Times(NamedTuple):
    """Of two arms, paired by seed, [seeds]; none later than what both could use."""

    mine: np.ndarray
    others: np.ndarray
    note: str  # how many got there, if not all


def restrict(mine: np.ndarray, others: np.ndarray, ends: np.ndarray) -> Times:
    """Times as they are if all runs got there, else cut at the end of the shorter run.

    mine, others: infinity where a run never got there. ends: [seeds], where the
    shorter run of each pair ends.
    """
    if np.isfinite([mine, others]).all():
        return Times(mine, others, "")
    end = np.min(ends)  # one for all
    there = [np.sum(arm <= end) for arm in (mine, others)]
    note = f"{there[0]} and {there[1]} of {len(mine)}"
    if not any(there):
        note = "nobody"
    return Times(np.minimum(mine, end), np.minimum(others, end), note)


def times(mine: np.ndarray, others: np.ndarray, ends: np.ndarray) -> Verdict:
    """The verdict at 95% on the claim that the arm is there sooner than the other.

    It is the 95% t interval of log(mine / others) over seeds, of times restricted as
    in `restrict`; if no seed of either arm got there, there is no verdict. So two
    copies of one arm are told apart in about 5 of 100 draws or fewer: for them the
    log ratio is symmetric about 0, and exactly 0 where neither got there.
    """
    mine, others, note = restrict(mine, others, ends)
    value = compare.ratio(mine, others)
    if note == "nobody" or not value:
        return Verdict("", note or "no ratio: a time is 0")
    decided = word(np.log(others / mine))
    return Verdict(value, f"{decided}, {note}" if note else decided)


def equal(values: np.ndarray, margin: float = 2.0) -> bool:
    """Whether differences [seeds] show two arms as good as each other.

    Two one-sided t tests at 5%: the 90% interval lies within -margin to margin.
    """
    n = len(values)
    half = T90[min(n, 10) - 2] * np.std(values, ddof=1) / np.sqrt(n)
    return bool(abs(np.mean(values)) + half < margin)


def student_p(t: float, df: int) -> float:
    """The two-sided p value of Student's t.

    With t = sqrt(df) tan(angle) the density is cos(angle)^(df - 1) up to a factor: no
    tail is infinite. The sum is the midpoint rule.
    """
    middles = (np.arange(100_000) + 0.5) / 100_000

    def beyond(angle: float) -> float:
        width = np.pi / 2 - angle
        return width * np.mean(np.cos(angle + width * middles) ** (df - 1))

    return beyond(np.arctan(abs(t) / np.sqrt(df))) / beyond(0.0)


def p_value(values: np.ndarray, null: float = 0.0) -> float:
    """The two-sided p value of the paired t test that the mean of values is `null`."""
    away = np.mean(values) - null
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    if error == 0:  # an arm against itself: all values are the same
        return 1.0 if away == 0 else 0.0
    return student_p(away / error, len(values) - 1)


def holm(p_values: list[float]) -> list[float]:
    """The p values corrected for their number (Holm, 1979), in the same order."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values)):
        highest = max(highest, (len(p_values) - rank) * p_values[i])
        corrected[i] = min(highest, 1.0)
    return corrected
