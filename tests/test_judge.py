"""results/judge.py: who is told apart, against simulation, tables and hand."""

from pathlib import Path

import numpy as np
import pytest
from test_compare import density_within

import compare
from results import judge

NEVER = np.inf


# --- two arms that are the same ---
def rising(rng, shape, rows):
    """Curves that still rise at the end; at 0.5 after 5 / 6 of the way or later."""
    ends = rng.normal(0.6, 0.03, (*shape, 1))
    return 0.1 + (ends - 0.1) * np.linspace(0, 1, rows)


def plateau(rng, shape, rows):
    """Curves that are near 0.6 from a fifth of the way on, with noise."""
    steps = np.linspace(0, 1, rows)
    curve = 0.1 + 0.5 * (1 - np.exp(-20 * steps))
    return curve + rng.normal(0, 0.01, (*shape, rows))


def uneven(rng, shape, rows):
    """Plateaus of each run's own height around 0.6, with noise."""
    heights = rng.normal(0, 0.03, (*shape, 1))
    return plateau(rng, shape, rows) + heights


def lucky(rng, shape, rows):
    """Half of the runs jump at a third of the way, the others never."""
    lands = rng.random((*shape, 1)) < 0.5
    where = np.linspace(0, 1, rows) + rng.normal(0, 0.01, (*shape, 1))
    return 0.1 + 0.5 * lands * (where > 0.3)


# A kind of curve, the target, and how many of 100 runs get there, about
KINDS = [
    (rising, 0.45, 100),
    (rising, 0.6, 50),
    (rising, 0.62, 25),
    (plateau, 0.5, 100),
    (plateau, 0.605, 97),
    (plateau, 0.617, 50),
    (uneven, 0.57, 95),
    (uneven, 0.62, 50),
    (uneven, 0.66, 15),
    (lucky, 0.5, 50),
]


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("rows", [6, 21])
@pytest.mark.parametrize(("kind", "goal", "share"), KINDS)
def test_an_arm_against_its_copy_is_undecided_in_95_of_100_draws(
    kind, goal, share, rows, seeds
):
    draws = 1000
    rng = np.random.default_rng(seeds)
    x = np.linspace(0, 1000, rows)
    curves = kind(rng, (draws, 2, seeds), rows).reshape(-1, rows)
    found = np.array([compare.first_time(x, curve, goal) for curve in curves])
    if rows == 21:
        assert np.isfinite(found).mean() == pytest.approx(share / 100, abs=0.1)

    ends, told_apart, logs = np.full(seeds, 1000), [], []
    for mine, others in found.reshape(draws, 2, seeds):
        verdict = judge.times(mine, others, ends)
        word = verdict.word.split(",")[0]
        told_apart.append(word in ("supported", "refuted"))
        cut = judge.restrict(mine, others, ends)
        logs.append(np.mean(np.log(cut.mine / cut.others)))
    assert np.mean(told_apart) <= 0.05 + 0.02
    error = np.std(logs) / np.sqrt(draws)
    assert abs(np.mean(logs)) <= max(3 * error, 1e-12)
    assert abs(np.mean(logs)) < 0.05


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_points_of_an_arm_and_its_copy_are_undecided_in_95_of_100_draws(seeds):
    values = np.random.default_rng(1).normal(0, 1, (2000, seeds))
    words = [judge.points(value).word for value in values]
    assert words.count("undecided") / 2000 == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("times", [[100, 300, 200], [100, NEVER, 200]])
def test_an_arm_against_itself_has_the_ratio_1_exactly(times):
    times, ends = np.array(times, float), np.full(3, 400.0)
    verdict = judge.times(times, times, ends)
    assert verdict.value == "1.00 (1.00 to 1.00)"
    assert verdict.word.split(",")[0] == "undecided"
    cut = judge.restrict(times, times, ends)
    assert (np.log(cut.mine / cut.others) == 0).all()


# --- times ---
def test_the_ratio_and_its_interval_are_those_computed_by_hand():
    # log ratios -0.9, -1.0 and -1.1: half width 4.30265 * 0.1 / sqrt(3) = 0.24842
    others = np.full(3, 100.0)
    mine = others * np.exp([-0.9, -1.0, -1.1])
    assert judge.times(mine, others, others) == ("0.37 (0.29 to 0.47)", "supported")
    value = "2.72 (2.12 to 3.48)"
    assert judge.times(others, mine, others) == (value, "refuted")
    mine = others * np.exp([-0.9, 0.1, -1.1])
    assert judge.times(mine, others, others).word == "undecided"


def test_times_are_cut_at_the_end_of_the_shorter_run_if_one_never_gets_there():
    mine, others = np.array([10.0, 20.0, 70.0]), np.array([40.0, NEVER, 50.0])
    cut = judge.restrict(mine, others, np.array([50, 80, 60]))
    assert cut.mine.tolist() == [10, 20, 50]
    assert cut.others.tolist() == [40, 50, 50]
    assert cut.note == "2 and 2 of 3"
    cut = judge.restrict(mine, mine, np.array([50, 80, 60]))
    assert cut.mine.tolist() == mine.tolist()  # all get there: no cut
    assert cut.note == ""


def test_what_never_gets_there_is_drawn_toward_1_and_nobody_has_no_verdict():
    ends = np.full(3, 100.0)
    mine, never = np.array([48.0, 50.0, 52.0]), np.full(3, NEVER)
    verdict = judge.times(mine, never, ends)
    assert verdict.value.startswith("0.50 ")
    assert verdict.word == "supported, 3 and 0 of 3"
    assert judge.times(never, mine, ends).word == "refuted, 0 and 3 of 3"
    assert judge.times(never, never, ends) == ("", "nobody")
    assert judge.times(never, 2 * ends, ends) == ("", "nobody")
    assert judge.times(np.zeros(3), mine, ends) == ("", "no ratio: a time is 0")


# --- points, equality, many questions ---
def test_points_are_judged_against_what_they_are_claimed_to_exceed():
    values = 76 + np.array([-0.1, 0.0, 0.1])
    assert judge.points(values, 75) == ("76.00 ± 0.25", "supported")
    assert judge.points(values, 77).word == "refuted"
    assert judge.points(values, 76.1).word == "undecided"
    assert judge.points(values[:1], 75).word == "undecided"  # no interval


def test_equal_takes_the_90_percent_interval():
    # 1, 2, 3: half width 2.9200 / sqrt(3) = 1.6859
    values = np.array([1.0, 2.0, 3.0])
    assert judge.equal(values - 2, 1.69) and not judge.equal(values - 2, 1.68)
    for sign in (1, -1):
        assert judge.equal(sign * (values - 1.7)) and judge.equal(values - 2)
        assert not judge.equal(sign * (values - 1.6))
    assert not judge.equal(values)  # its mean alone is on the margin


def test_the_t_values_hold_90_percent_of_student_s_distribution():
    for df, t in enumerate(judge.T90, start=1):
        assert density_within(t, df) == pytest.approx(0.90, abs=1e-5)


def test_arms_that_differ_by_the_margin_are_called_equal_in_5_of_100_draws():
    values = np.random.default_rng(2).normal(2, 0.5, (4000, 5))
    assert np.mean([judge.equal(value) for value in values]) < 0.05 + 0.01


@pytest.mark.parametrize(
    ("t", "df", "p"),
    [
        (2.776445, 4, 0.05),
        (12.7062, 1, 0.05),
        (2.91999, 2, 0.1),
        (4.60409, 4, 0.01),
        (63.6567, 1, 0.01),
        (0.0, 3, 1.0),
        (1.0, 1, 0.5),  # Cauchy's quartile
    ],
)
def test_p_values_are_those_of_the_tables(t, df, p):
    assert judge.student_p(t, df) == pytest.approx(p, rel=1e-4)
    assert judge.student_p(-t, df) == judge.student_p(t, df)


def test_the_p_value_and_the_interval_agree():
    values = np.array([0.2, 0.9, 1.4, 0.4, 1.1])
    mean, half = compare.mean_interval(values)
    assert judge.p_value(values, mean - half) == pytest.approx(0.05, abs=1e-5)
    assert judge.p_value(values - values) == 1
    assert judge.p_value(np.ones(3)) == 0


def test_holm_s_correction_is_the_one_computed_by_hand():
    # in order: 4 * .01, 3 * .02, 2 * .02 (not below the one before), 1 * .6
    assert judge.holm([0.02, 0.6, 0.01, 0.02]) == pytest.approx([0.06, 0.6, 0.04, 0.06])
    assert judge.holm([0.9, 0.8]) == [1, 1]
    assert judge.holm([]) == []


def test_targets_are_in_order_and_those_of_the_reference_in_the_csv_files():
    """60, 80 and 95% of the way from chance to the fine-tuned arm's mean end."""
    results = Path(judge.__file__).parent
    paths = [results / f"{name}.csv" for name in judge.TARGETS]
    groups = compare.group(compare.read(paths))
    if "few" in groups:  # fixed before its runs, on validation images
        groups["few"] = compare.group(compare.read([results / "gate.csv"]))["gate"]
    for name, arms in groups.items():
        reference = arms.get("fine-tuned") or arms["fine-tuned-25"]
        end = 100 * np.mean([run.log["accuracy"][-1] for run in reference])
        chance = 50 if name == "tinted" else 10
        ways = [round(chance + way * (end - chance)) for way in compare.WAY]
        assert judge.TARGETS[name] == tuple(ways)
