"""results/experiment.py: verdicts, ceilings, and that its figures come from the CSV files."""

import shutil

import numpy as np
import pytest
from PIL import Image
from test_compare import write

import compare
import pretext
from results import experiment

RESULTS = experiment.RESULTS


def run(accuracies, seed=0, flops=1.0):
    """A run with these accuracies at steps 0, 100, 200, ... and `flops` FLOPs a step."""
    log = np.zeros(len(accuracies), compare.FIELDS)
    log["step"] = log["total_step"] = 100 * np.arange(len(accuracies))
    log["flops"], log["accuracy"] = flops * log["step"], accuracies
    log["accuracy_adapted"] = np.nan
    return compare.Run("arm", "photos", seed, log[:0], log, True, None)


def test_each_count_is_the_one_that_its_question_names():
    slow, fast = run([0.1, 0.2, 0.4]), run([0.1, 0.4, 0.5], flops=4.0)
    assert experiment.measure(fast, slow, "total_step") == (0.5, False)  # 100 steps of 200
    assert experiment.measure(fast, slow, "flops") == (2.0, False)  # 400 FLOPs of 200
    assert experiment.measure(slow, fast, "total_step") == (1.0, True)  # never: its whole budget
    points, _ = experiment.measure(fast, slow, "end")
    assert points == pytest.approx(10)
    points, _ = experiment.measure(fast, slow, "equal FLOPs")  # 200 FLOPs: fast is at step 50
    assert points == pytest.approx(25 - 40)


def test_verdicts_pair_each_seed_with_its_own_baseline():
    ends = (0.5, 0.6, 0.7)  # far apart, the arm always half a point above its own baseline
    arms = {"maml": [run([0, end + 0.005 + i / 1e5], i) for i, end in enumerate(ends)]}
    arms["scratch"] = [run([0, end], i) for i, end in enumerate(ends)]
    lines = experiment.verdicts(arms).splitlines()
    (line,) = (x for x in lines if "better than nothing | maml | scratch | end" in x)
    assert "0.50 ± 0.00" in line and "supported" in line


def test_how_far_the_inner_loop_lowers_its_pretext_loss():
    arms = {"maml": [run([0, 0.5], i) for i in range(2)], "joint": [run([0, 0.5])]}
    for i, each in enumerate(arms["maml"]):
        each.log["pretext_loss"], each.log["pretext_loss_adapted"] = (9, 2), (9, 1.5 + i)
    arms["joint"][0].log["pretext_loss_adapted"] = np.nan
    assert experiment.lowered(arms).splitlines()[2:] == ["| maml | 0.0 ± 317.7 |"]  # 25 and -25
    assert experiment.lowered({"joint": arms["joint"]}) == ""


def test_censored_seeds_never_support_and_refute_from_five_on():
    judge, spread, none = experiment.judge, 0.4 + np.arange(5) / 100, np.zeros(5, bool)
    assert judge(spread, none, 1.0, less=True)[1] == "supported"
    assert judge(spread, np.arange(5) == 2, 1.0, less=True)[1] == "undecided"
    assert judge(spread, ~none, 1.0, less=True)[1] == "refuted"
    assert judge(spread[:4], ~none[:4], 1.0, less=True)[1] == "undecided"
    assert judge(spread + 1, none, 1.0, less=True)[1] == "refuted"
    assert judge(spread, none, 0.0, less=False)[1] == "supported"


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_two_arms_that_are_the_same_are_undecided_in_95_of_100_draws(seeds):
    """In steps half of the seeds are censored, all of them in 1 of 2^seeds draws."""
    rng, words = np.random.default_rng(1), {"end": [], "total_step": []}
    for ends in rng.normal(0.6, 0.01, (1000, 2, seeds)):  # curves that still rise
        pairs = [[run(np.linspace(0.1, end, 11)) for end in both] for both in ends.T]
        for count, null, less in ("end", 0.0, False), ("total_step", 1.0, True):
            values = zip(*(experiment.measure(a, b, count) for a, b in pairs), strict=True)
            words[count].append(experiment.judge(*map(np.array, values), null, less)[1])
    assert words["end"].count("undecided") / 1000 == pytest.approx(0.95, abs=0.02)
    assert words["total_step"].count("undecided") / 1000 > 0.93


@pytest.mark.parametrize("photographs", [False, True])
def test_the_folder_of_other_environments_has_their_shares(tmp_path, monkeypatch, photographs):
    for split in "train", "test":
        for kind in "bird cat deer dog frog horse airplane automobile ship truck".split():
            (place := tmp_path / "data/cifar10" / split / kind).mkdir(parents=True)
            for i in range(70):
                Image.new("RGB", (32, 32), (200, 90, 140)).save(place / f"{i}.png")
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    draw = experiment.draw_tinted if photographs else pretext.draw_coloured_shapes
    few = lambda count, *rest: draw(count // 25, *rest)  # noqa: E731
    experiment.write_environments(tmp_path / "f", few, (1.0, 0.0, 0.5))
    data = pretext.load(str(tmp_path / "f"), str(tmp_path / "decoded"), 32, "cpu")
    assert data.environments.bincount().tolist() == [200, 200]
    assert data.test_environments.bincount().tolist() == [50, 50, 50]
    middle = data.images[:, :, 12:20, 12:20].float().mean((2, 3))
    green = (middle[:, 1] > middle[:, 0]).long()  # colour agrees with the label, or never does
    for environment, share in ((0, 1.0), (1, 0.0)):
        found = (green == data.labels)[data.environments == environment].float().mean()
        assert found == pytest.approx(share, abs=0 if photographs else 0.35)


def test_gather_takes_the_rows_of_finished_runs_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    whole = write(tmp_path / "runs/where", "whole", [0.1, 0.5], seed=3)
    write(tmp_path / "runs/where", "broken_off", [0.1], steps=99)
    experiment.gather("where", tmp_path / "runs")
    header, *rows = whole.read_text().splitlines()
    written = (tmp_path / "where.csv").read_text().splitlines()
    assert written == [f"run,seed,{header}", *(f"whole,3,{row}" for row in rows)]
    assert "broken_off/seed0 is not finished" in capsys.readouterr().out


def test_one_command_draws_every_figure_and_table_from_the_csv_files(tmp_path, monkeypatch, capsys):
    for path in RESULTS.glob("*.csv"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["experiment.py", "report"])
    experiment.main()
    for name in ("steps", "flops", "paid_once", "outer_step"):
        assert Image.open(tmp_path / f"{name}.png").width > 1500
    assert capsys.readouterr().out == (RESULTS / "report.md").read_text()
