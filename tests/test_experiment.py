"""results/experiment.py: verdicts, limits, and that all figures come from CSV files."""

import csv
import re
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from test_compare import write

import compare
import maml_ssl
import pretext
import pretrain_finetune
from results import experiment, folders, measure, readers, reading
from results.protocols import READER_TRIALS, SITES_TRIALS

RESULTS = experiment.RESULTS


def run(accuracies, seed=0, flops=1.0):
    """A run with these accuracies at steps 0, 100, ... and `flops` FLOPs a step."""
    log = np.zeros(len(accuracies), compare.FIELDS)
    log["step"] = log["total_step"] = 100 * np.arange(len(accuracies))
    log["flops"], log["accuracy"] = flops * log["step"], accuracies
    log["accuracy_adapted"] = np.nan
    return compare.Run("arm", "photos", seed, log, True, None)


# --- the verdicts ---
def answer(arms, question, targets=(20, 40)):
    """The cells of the line that answers a question, after it."""
    lines = experiment.verdicts(arms, targets).splitlines()
    (line,) = (line for line in lines if line.startswith(f"| {question} |"))
    return line.removeprefix(f"| {question} | ").removesuffix(" |").split(" | ")


def test_verdicts_pair_each_seed_with_its_own_baseline():
    ends = (0.5, 0.6, 0.7)  # far apart, and the arm half a point above its baseline
    arms = {"maml": [], "scratch": []}
    for seed, end in enumerate(ends):
        arms["maml"].append(run([0, end + 0.005 + seed / 1e5], seed))
        arms["scratch"].append(run([0, end], seed))
    found = answer(arms, "better than nothing | maml | scratch")
    assert found == ["0.50 ± 0.00", "supported", "yes"]
    for each in arms["maml"]:
        each.log["accuracy"] += 0.1
    found = answer(arms, "better than nothing | maml | scratch")
    assert found == ["10.50 ± 0.00", "supported", ""]  # better, not as good


def test_times_are_counted_in_what_a_question_names():
    maml = [run([0, 0.4, 0.5], seed, flops=4.0) for seed in range(2)]
    tuned = [run([0, 0.2, 0.4], seed) for seed in range(2)]
    arms = {"maml": maml, "fine-tuned": tuned}
    half = ["0.50 (0.50 to 0.50) supported"] * 2
    assert (
        answer(arms, "as worded: fewer steps | maml | fine-tuned | total_step") == half
    )
    dearer = ["2.00 (2.00 to 2.00) refuted"] * 2
    assert answer(arms, "fewer FLOPs | maml | fine-tuned | flops") == dearer
    found = answer(arms, "fewer FLOPs | maml | fine-tuned | flops", (40, 50))
    assert found[1] == "nobody"  # with the 200 FLOPs that the baseline has
    assert "total_step" not in experiment.verdicts(arms, ())


def test_times_are_those_of_the_adapted_accuracy_where_there_are_environments():
    adapts = run([0, 0.2, 0.3])
    adapts.log["accuracy_adapted"] = (0, 0.4, 0.5)
    assert experiment.first_times([adapts], "total_step", 20) == [100]
    adapts.dataset = "readers"
    assert experiment.first_times([adapts], "total_step", 20) == [50]


def test_how_far_the_inner_loop_lowers_its_pretext_loss():
    maml, joint = [run([0, 0.5], seed) for seed in range(2)], run([0, 0.5])
    for each, after in zip(maml, (1.5, 2.5), strict=True):  # 25 and -25%
        each.log["pretext_loss"] = (9, 2)
        each.log["pretext_loss_adapted"] = (9, after)
    joint.log["pretext_loss_adapted"] = np.nan
    table = experiment.lowered({"maml": maml, "joint": [joint]})
    assert table.splitlines()[2:] == ["| maml | 0.0 ± 317.7 |"]
    assert experiment.lowered({"joint": [joint]}) == ""


# --- what is shown to a reader ---
def test_each_support_is_what_its_name_says():
    images = torch.randint(0, 256, (90, 3, 8, 8), dtype=torch.uint8)
    homes = torch.arange(90) % 3
    split = pretext.Split(images, torch.zeros(90).long(), homes)
    aside = torch.arange(90) < 60  # 20 of each environment
    data = pretext.Data(None, None, [], [], unlabelled=split, aside=aside)

    def seen(environment, support):
        return measure.seen(data, environment, support, 0)

    for environment, differs_most in enumerate((1, 2, 1)):
        own = seen(environment, "own")
        assert own.environment == environment
        assert own.chosen.equal(aside & (homes == environment))
        assert own.split.images.equal(images)
        other = seen(environment, "other")
        assert other.chosen.equal(aside & (homes == differs_most))
        few = seen(environment, "own-8")
        assert few.chosen.sum() == 8 and (own.chosen | ~few.chosen).all()
        assert seen(environment, "own-32").chosen.equal(own.chosen)  # all there are
        shuffled = seen(environment, "shuffled")
        assert shuffled.chosen.equal(own.chosen)
        assert shuffled.split.images[1::2].equal(images[1::2])
        assert shuffled.split.images[::2, 0].equal(images[::2, 1])
        assert shuffled.split.images[::2, 1].equal(images[::2, 0])
        assert (seen(environment, "constant").split.images == 128).all()


# --- folders of environments ---
SHARES = (1.0, 0.0, 0.5)


def write_few(folder, draw, part):
    """A folder of environments with fewer images than in the experiment."""

    def few(count, shares, split):
        return draw(count // part, shares, split)

    folders.write_environments(folder, few, SHARES)


def load(folder, data_dir, side=32):
    return pretext.load(str(folder), str(data_dir), side, "cpu", environments=True)


@pytest.mark.parametrize("draw", ["draw_coloured_shapes", "draw_tinted"])
def test_the_folder_of_other_environments_has_their_shares(tmp_path, monkeypatch, draw):
    kinds = "bird cat deer dog frog horse airplane automobile ship truck".split()
    for place in (f"{split}/{kind}" for split in ("train", "test") for kind in kinds):
        folder = tmp_path / "data/cifar10" / place
        folder.mkdir(parents=True)
        for i in range(35):
            Image.new("RGB", (32, 32), (200, 90, 140)).save(folder / f"{i}.png")
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    module = folders if draw == "draw_tinted" else pretext
    write_few(tmp_path / "f", getattr(module, draw), 50)
    train, test, classes, *_ = load(tmp_path / "f", tmp_path / "decoded")
    assert classes == ["class0", "class1"]
    assert train.environments.bincount().tolist() == [100, 100]
    assert test.environments.bincount().tolist() == [25, 25, 25]
    middle = train.images[:, :, 12:20, 12:20].float().mean((2, 3))
    green = (middle[:, 1] > middle[:, 0]).long()
    for environment, share in enumerate(SHARES[:2]):  # agrees always, or never
        agrees = (green == train.labels)[train.environments == environment]
        tolerance = 0 if draw == "draw_tinted" else 0.35
        assert agrees.float().mean() == pytest.approx(share, abs=tolerance)


def test_validation_images_of_few_labels_are_no_training_images(tmp_path, monkeypatch):
    for split, count in (("train", 50), ("test", 10)):
        for kind in ("bird", "cat"):
            folder = tmp_path / "data/cifar10" / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                colour = (i, count, 100 * (kind == "cat"))
                Image.new("RGB", (32, 32), colour).save(folder / f"{i:02}.png")
    monkeypatch.setattr(folders, "ROOT", tmp_path)
    folders.prepare_few()
    folders.prepare_few()  # what is there stays

    def names(folder):
        return {path.relative_to(folder) for path in folder.rglob("*.png")}

    photos = tmp_path / "data/cifar10"
    test, val = tmp_path / "data/cifar10-few", tmp_path / "data/cifar10-few-val"
    assert names(test / "train") == names(photos / "train")
    assert len(names(test / "test")) == 4 and names(test / "test") <= names(
        photos / "test"
    )
    held, kept = names(val / "test"), names(val / "train")
    assert len(held) == 4 and not held & kept
    assert held | kept == names(photos / "train")
    for folder in test, val:  # they can be read
        data = pretext.load(str(folder), str(tmp_path), 8, "cpu")
        assert len(data.test.labels) == 4 and data.classes == ["bird", "cat"]


def test_a_run_gets_the_sites_of_its_own_seed(monkeypatch):
    made, run = [], []
    monkeypatch.setattr(
        folders, "prepare_sites", lambda concentration, seeds: made.extend(seeds)
    )
    monkeypatch.setattr(
        experiment, "run_one", lambda command: bool(run.append(command))
    )
    experiment.run_protocol("sites-1.0", "x", 1, ["scratch"], [13])  # no protocol's
    assert made == [13] and len(run) == 1
    assert run[0][run[0].index("--dataset") + 1] == "data/sites-1.0-13"
    assert run[0][-6:] == "--seed 13 --out x/sites-1.0 --name scratch".split()


# --- the CSV files ---
def tried(protocol, arm, chosen):
    """The logs of an arm's trials and the accuracies that count, by their places."""
    runs = compare.group(compare.read([RESULTS / f"{protocol}.csv"]))[protocol]
    y = "accuracy_adapted" if chosen.command.startswith("maml_ssl") else "accuracy"
    for i in range(len(chosen.settings)):
        for run in runs.get(f"{arm}-{i}", []):
            yield i, run.log, run.log[y]


@pytest.mark.parametrize("arm", SITES_TRIALS)
def test_what_is_run_at_sites_is_the_best_of_its_trials(arm):
    chosen, found = SITES_TRIALS[arm], []
    for i, log, accuracy in tried("tune-sites", arm, chosen):
        found.append((accuracy[np.flatnonzero(log["total_step"] >= 1000)[0]], i))
    assert len(found) >= 3 and max(found)[1] == chosen.best


@pytest.mark.parametrize("arm", sorted(READER_TRIALS))
def test_what_is_run_on_shapes_is_the_best_of_its_trials(arm):
    chosen, found = READER_TRIALS[arm], []
    for i, _, accuracy in tried("tune-readers", arm, chosen):
        found.append((accuracy[-3:].mean(), -i))  # of equal ones the first
    assert len(found) >= 2 and -max(found)[1] == chosen.best


def gather(name, tmp_path, only=(), seeds=()):
    """The lines of results/NAME.csv in tmp_path, gathered from tmp_path/runs."""
    experiment.gather(name, tmp_path / "runs", only, seeds)
    return (tmp_path / f"{name}.csv").read_text().splitlines()


def test_gather_takes_the_rows_of_finished_runs_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    whole = write(tmp_path / "runs/where", "whole", [0.1, 0.5], seed=3)
    write(tmp_path / "runs/where", "broken_off", [0.1], steps=99)
    written = gather("where", tmp_path)
    header, *rows = whole.read_text().splitlines()
    assert written == [f"run,seed,{header}", *(f"whole,3,{row}" for row in rows)]
    assert "broken_off/seed0 is not finished" in capsys.readouterr().out


def test_gather_takes_some_runs_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    for run in ("maml", "joint"):
        for seed in (1, 10):
            write(tmp_path / "runs/where", run, [0.1, 0.5], seed)
    lines = gather("where", tmp_path, ["maml"], [10])[1:]
    assert {tuple(line.split(",")[:2]) for line in lines} == {("maml", "10")}


def test_gather_keeps_the_rows_of_runs_that_are_no_longer_there(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    for seed in (0, 1, 10):
        write(tmp_path / "runs/where", "maml", [0.1, 0.5], seed)
    write(tmp_path / "runs/where", "again", [0.1, 0.2, 0.3])
    before = gather("where", tmp_path)

    shutil.rmtree(tmp_path / "runs")
    assert gather("where", tmp_path) == before  # nothing is there, nothing is lost

    write(tmp_path / "runs/where", "maml", [0.7, 0.8], seed=10)
    write(tmp_path / "runs/where", "new", [0.1])
    after = gather("where", tmp_path)
    told = [line.split(",") for line in after[1:]]
    seeds = [("again", "0"), ("maml", "0"), ("maml", "1"), ("maml", "10"), ("new", "0")]
    assert list(dict.fromkeys((run, seed) for run, seed, *_ in told)) == seeds
    assert [line for line in before if not line.startswith("maml,10,")] == [
        line for line in after if not line.startswith(("maml,10,", "new,"))
    ]
    column = after[0].split(",").index("accuracy")
    found = [row[column] for row in told if row[:2] == ["maml", "10"]]
    assert found == ["0.7", "0.8"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.csv")), ids=lambda p: p.stem)
def test_gathering_nothing_leaves_each_file_of_results_as_it_is(tmp_path, path):
    shutil.copy(path, copy := tmp_path / path.name)
    header = path.read_text().partition("\n")[0]
    experiment.merge(copy, header, {})
    assert copy.read_bytes() == path.read_bytes()
    if not path.stem.endswith(("_support", "_ways")):
        assert header == f"run,seed,{compare.HEADER}"


def train(arm, monkeypatch, root, place, flags):
    """Trains an arm for two steps on the folder of environments in `root`."""
    run, seed = place.parts[-2], place.name.removeprefix("seed")
    command = f"{arm.__name__}.py --dataset {root}/f --environments --data-dir {root}"
    command += " --image-size 16 --width 4 --batch-size 16 --steps 2 --device cpu"
    command += f" --out {place.parents[1]} --name {run} --seed {seed} {flags}"
    monkeypatch.setattr("sys.argv", command.split())
    arm.main()


def test_what_is_measured_after_training_is_what_the_run_itself_measured(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "product", lambda *_: [(0.1, 1), (3.0, 2)])
    write_few(tmp_path / "f", pretext.draw_coloured_shapes, 100)
    runs = tmp_path / "runs"
    maml, joint, scratch, context = (
        runs / "readers" / name / "seed0"
        for name in ("maml", "joint", "scratch", "context")
    )
    few = "--support-batch-size 4 --pretext colorization rotation"
    train(maml_ssl, monkeypatch, tmp_path, maml, few)
    train(maml_ssl, monkeypatch, tmp_path, joint, f"{few} --inner-lr 0")
    train(pretrain_finetune, monkeypatch, tmp_path, scratch, "--pretrain-steps 0")
    train(readers, monkeypatch, tmp_path, context, "--support-batch-size 4")
    shutil.copytree(joint, runs / "tune/joint-6/seed100")
    gather("readers", tmp_path)

    with (tmp_path / "readers_support.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    measured = {(row[0], row[2]): [float(cell) for cell in row[5:]] for row in rows}
    rates = {(row[0], row[2]): (float(row[3]), int(row[4])) for row in rows}
    supports = ["own", *measure.FEWER, *measure.BREAKS]
    assert [*measured] == [
        *product(["context"], supports),
        *product(["joint", "maml"], ["none", *supports]),
        ("scratch", "none"),
    ]
    assert rates["maml", "own"] == (3.0, 1) and rates["scratch", "none"] == (0, 0)
    assert rates["joint", "own"] in [(0.1, 1), (3.0, 2)]
    for folder in maml, joint, scratch, context:
        with (folder / "environments.csv").open() as file:
            own = {row["environment"]: row for row in csv.DictReader(file)}
        homes = [f"environment{i}" for i in range(3)]
        for support, column in ("none", "accuracy"), ("own", "accuracy_adapted"):
            if folder == context:  # it reads whatever it is shown, without adapting
                support = "own"
            found = measured.get((folder.parent.name, support))
            if own[homes[0]][column]:  # only MAML adapts at its own evaluation
                told = [float(own[home][column]) for home in homes]
                assert found == pytest.approx(told, abs=1e-4)


def test_one_command_draws_every_figure_and_table_from_the_csv_files(
    tmp_path, monkeypatch, capsys
):
    for path in RESULTS.glob("*.csv"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["experiment.py", "report"])
    experiment.main()
    for name in ("steps", "flops", "outer_step", "ladder"):
        assert Image.open(tmp_path / f"{name}.png").width > 1500
    written = (RESULTS / "report.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == written


INTERVAL = re.compile(r"(\d+\.?\d*) (±) (\d+\.?\d*)|(\d+\.\d+) \((\d.*?) to (\d.*?)\)")


def intervals(path):
    """All 'mean ± half' and 'ratio (low to high)' of a file, as it rounds them."""
    text = " ".join(path.read_text(encoding="utf-8").split())
    return [tuple(filter(None, found)) for found in INTERVAL.findall(text)]


@pytest.mark.parametrize("path", [RESULTS / "README.md", RESULTS.parent / "README.md"])
def test_the_intervals_of_both_readmes_are_in_the_report(path):
    known = set(intervals(RESULTS / "report.md"))
    for mean, sign, half in [each for each in known if "±" in each]:
        known.add((f"{float(mean):.1f}", sign, f"{float(half):.1f}"))  # .2f in tables
    found = intervals(path)
    assert len(found) > 10
    assert [interval for interval in found if interval not in known] == []


def test_a_longer_run_is_read_where_validation_is_first_highest():
    trial = run([0, 0.5, 0.7, 0.7, 0.6])  # at steps 0, 100, ...
    runs = [run([0, 0.1, end, 0.3, 0.4], seed, 2.0) for seed, end in enumerate((1, 0))]
    row = reading.long_row("scratch-long", trial, runs, 1600.0)
    middle, half = compare.mean_interval(np.array([100.0, 0.0]))
    there = f"{middle:.1f} ± {half:.1f}"
    assert row == ["scratch-long", "200", there, "40.0 ± 0.0 (400)", "0.50"]


def test_the_limits_as_drawn_are_as_expected_over_many_seeds():
    found = experiment.limits_as_drawn(range(200))
    means = [float(text.split()[0]) for _, text in found]
    limits = experiment.CEILING, experiment.KNOWING
    assert means == pytest.approx(limits, abs=0.25)  # standard error: 0.05
