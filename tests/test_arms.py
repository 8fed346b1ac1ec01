"""The three arms as wholes: shared blocks, fair pairs, phases, logs, copies, README."""

import copy
import csv
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_faults import draw_few, folder
from torch import nn

import linear_probe
import maml_ssl
import pretext
import pretrain_finetune

ROOT = Path(pretext.__file__).parent
ARMS = {m.__name__: m for m in (maml_ssl, pretrain_finetune, linear_probe)}
TINY = "--width 4 --batch-size 16 --warmup-steps 2 --image-size 16".split()
SHAPES = ("--dataset", "shapes")
COLUMNS = "phase step total_step images labels flops seconds train_loss".split()
COLUMNS += "accuracy accuracy_adapted pretext_loss pretext_loss_adapted".split()
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    draw_few(monkeypatch, 10)


def call(function, arm, *flags):
    """What a function of an arm returns under these flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{arm}.py", *map(str, flags)])
        return getattr(ARMS[arm], function)()


def run(arm, out, *flags):
    """Runs an arm in this process; -> rows of its log, checkpoint, configuration."""
    words = ("--out", out, "--name", "x", "--eval-every", 1, *flags)
    call("main", arm, *TINY, *words)
    folder = Path(out, "x", "seed0")
    rows = [*csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return rows, checkpoint, json.loads((folder / "config.json").read_text())


def history(arm, out, *flags):
    """-> of each row (phase, step, weights, averaged weights), as they were then."""
    kept, save = [], ARMS[arm].Run.save

    def watched(self, row, found, **state):
        averaged = {k[7:]: x for k, x in state["averaged"].items() if "module." in k}
        kept.append(copy.deepcopy((*row[:2], state["model"], averaged)))
        save(self, row, found, **state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ARMS[arm].Run, "save", watched)
        run(arm, out, *flags)
    return kept


BLOCK = re.compile(r"^# --- ([^\n]*: [^\n]*) ---\n(.*?)(?=^# --- )", re.S | re.M)


def test_blocks_are_the_same_in_every_file():
    shared = {f"shared: {name}" for name in ("network", "training", "arguments")}
    pretraining, blocks = "the pretraining arms: pretraining", {}
    for arm in ARMS:
        found = dict(BLOCK.findall((ROOT / f"{arm}.py").read_text()))
        assert {*found} == shared | ({pretraining} if arm != "maml_ssl" else set())
        for title, body in found.items():
            assert len(body) > 999, title
            assert body == blocks.setdefault(title, body), f"{arm}.py: {title}"


@pytest.mark.parametrize("dataset", ["shapes", "coloured_shapes"])
def test_inner_lr_zero_and_weight_zero_is_training_from_scratch(tmp_path, dataset):
    """To the bit; to rounding where the loss is summed environment by environment."""
    flags = f"--dataset {dataset} --steps 4 --eval-every 2 --lr .001"
    flags = [*flags.split(), "--labels-per-class", 12]
    zero = ("--inner-lr", 0, "--pretext-weight", 0)
    maml, state, _ = run("maml_ssl", tmp_path, *flags, *zero)
    from_scratch = ("--pretrain-steps", 0)
    scratch, twin, _ = run("pretrain_finetune", tmp_path / "b", *flags, *from_scratch)
    close = {} if dataset == "shapes" else {"rel": 1e-5}
    for a, b in zip(maml, scratch, strict=True):
        for name in set(COLUMNS) - {"seconds", "flops", "images", "pretext_loss"}:
            same = a[name] == b[name]
            if close and name == "train_loss" and a[name]:
                same = float(a[name]) == pytest.approx(float(b[name]), **close)
            assert same, name
    assert [row["step"] for row in maml] == ["0", "2", "4"]
    assert {name.split(".")[0] for name in twin["model"]} == {"encoder", "heads"}
    for name, x in twin["model"].items():
        if close:
            assert torch.allclose(x, state["model"][name], rtol=1e-3, atol=1e-5), name
        else:
            assert torch.equal(x, state["model"][name]), name


def test_the_same_seed_is_the_same_start_in_every_arm_and_another_seed_another():
    before, models = torch.get_rng_state(), []
    for arm, module in ARMS.items():
        heads = {"source": 10, "target": 10}
        if arm == "maml_ssl":
            del heads["source"]  # one head more or less shifts nothing
        for seed in 0, 1:
            args = call("parse_args", arm, *TINY, "--seed", seed)
            models.append(module.make_model(args, heads, {}).state_dict())
    for name, first in models[0].items():
        assert all(torch.equal(first, m[name]) for m in models[2::2])
        assert first.ndim < 2 or not torch.equal(first, models[1][name])
    assert torch.equal(before, torch.get_rng_state())  # the global one is left alone


@pytest.mark.parametrize(("backbone", "channels"), [("conv", 20), ("resnet18", 512)])
def test_backbones_have_stride_8_and_no_state_but_parameters(backbone, channels):
    encoder, found = maml_ssl.make_encoder(backbone, 5)
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, channels, 4, 4)
    assert found == channels and not [*encoder.buffers()]
    assert sum(isinstance(m, nn.GroupNorm) for m in encoder.modules()) >= 6


def test_a_model_scales_pixels_once_and_mixes_no_images_whatever_their_sizes():
    x, y, z = (torch.rand(n, 3, side, side) for n, side in ((2, 16), (3, 16), (2, 8)))
    nothing = maml_ssl.Model(nn.Identity(), {"a": nn.Identity()}, amp=False)
    assert torch.allclose(nothing({"a": x})["a"], (x - 0.5) / 0.25)
    encoder, _ = maml_ssl.make_encoder("conv", 4)
    heads = {name: nn.AdaptiveAvgPool2d(1) for name in "abc"}
    model = maml_ssl.Model(encoder, heads, amp=False)
    for images in {"a": x, "b": y}, {"a": x, "b": y, "c": z}:
        together = model(images)
        assert [*together] == [*images]
        for name, part in images.items():
            alone = torch.cat([model({name: each[None]})[name] for each in part])
            assert torch.allclose(together[name], alone, atol=1e-6)


@pytest.mark.parametrize("pretrain", ["supervised", "rotation"])
def test_the_probe_leaves_the_encoder_as_pretraining_left_it(tmp_path, pretrain):
    flags = ("--steps", 5, "--pretrain-steps", 3, "--pretrain", pretrain, "--lr", 0.1)
    rows = history("linear_probe", tmp_path, *flags)
    expected = [("pretrain", i) for i in (1, 2, 3)]
    expected += [("target", i) for i in (0, 1, 2)]
    assert [row[:2] for row in rows] == expected
    pretrained = rows[2][3]  # the averaged weights
    for _, step, weights, averaged in rows[3:]:
        for name, x in pretrained.items():
            kept = step == 0 or not name.startswith("heads.target")
            same = torch.equal(weights[name], x), torch.equal(averaged[name], x)
            assert same == (kept, kept), name


def test_fine_tuning_starts_from_the_average_all_else_afresh(tmp_path, monkeypatch):
    """Each step of it against AdamW and the running average, written by hand."""
    evaluated, module = [], pretrain_finetune

    def watched(model, weights, images, real=module.predict):
        evaluated.append(copy.deepcopy(dict(model.named_parameters()) | weights))
        return real(model, weights, images)

    monkeypatch.setattr(module, "predict", watched)
    flags = "--steps 6 --pretrain-steps 2 --ema .6 --lr .1".split()
    rows = history("pretrain_finetune", tmp_path, *SHAPES, *flags)
    args = call("parse_args", "pretrain_finetune", *TINY, *SHAPES)
    model = module.make_model(args, {"target": 10, "source": 10}, {})
    start, w = copy.deepcopy(model.state_dict()), rows[2][2]
    for name, x in w.items():  # pretraining leaves the desired task's head as it was
        kept = name.startswith("heads.target")
        assert torch.equal(x, start[name] if kept else rows[1][3][name]), name
        assert torch.equal(rows[1][2][name], start[name]) == kept, name
    data = module.load_data(args)
    m, v, average = (dict.fromkeys(w, 0.0) for _ in range(3))
    for t, (_, step, trained, averaged) in enumerate(rows[3:], 1):
        model.load_state_dict(w)
        batch = pretext.labelled_batch(data, t - 1, 16, 4, 0)
        logits = model({"target": batch.images})["target"]
        loss = F.cross_entropy(logits, batch.labels)
        grads = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        rate = 0.1 * min(1, t / 2)  # warm-up
        for (name, x), g in zip(w.items(), grads, strict=True):
            if g is None:  # the source's head is left alone
                assert torch.equal(trained[name], x)
                continue
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            size = (v[name] / (1 - 0.999**t)).sqrt() + 1e-8
            moved = x * (1 - rate * 0.01) - rate * m[name] / (1 - 0.9**t) / size
            same = torch.allclose(trained[name], moved, rtol=1e-5, atol=1e-6)
            assert same, (step, name)
        w = trained
        average = {n: 0.6 * average[n] + 0.4 * x if t > 1 else x for n, x in w.items()}
        for name, x in average.items():
            assert torch.allclose(averaged[name], x, rtol=1e-5, atol=1e-7), (step, name)
            assert torch.equal(evaluated[t][name], averaged[name])  # what is evaluated


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_may_start_from_the_averaged_encoder_of_another(arm, tmp_path):
    """To the bit; the heads are those that it has without."""
    flags = "--steps 4 --pretrain-steps 2 --ema .6 --lr .1".split()
    *_, weights, averaged = history("pretrain_finetune", tmp_path, *SHAPES, *flags)[-1]
    file = tmp_path / "x/seed0/checkpoint.pt"
    kinds = [[]] if arm == "maml_ssl" else [["--pretrain-steps", n] for n in (0, 1)]
    for i, kind in enumerate(kinds):
        flags = (*SHAPES, "--steps", 2, "--lr", 0, *kind)  # 0: no step moves anything
        plain = history(arm, tmp_path / f"plain{i}", *flags)[0]
        first = history(arm, tmp_path / f"first{i}", *flags, "--encoder", file)[0]
        for name, fresh in plain[2].items():
            inside = name.startswith("encoder.")
            expected = averaged[name] if inside else fresh
            assert torch.equal(first[2][name], expected), name  # what is trained
            assert torch.equal(first[3][name], expected), name  # what is evaluated
            assert not (inside and torch.equal(expected, weights[name])), name


@pytest.mark.parametrize("arm", ["pretrain_finetune", "linear_probe"])
def test_a_run_of_pretraining_alone_keeps_the_averaged_encoder(arm, tmp_path):
    flags = "--steps 3 --pretrain-steps 3 --ema .6 --lr .1".split()
    *_, pretrained, last = history(arm, tmp_path, *SHAPES, *flags)
    assert [pretrained[:2], last[:2]] == [("pretrain", 3), ("target", 0)]
    assert all(torch.equal(x, pretrained[3][name]) for name, x in last[3].items())


def test_self_supervised_pretraining_is_the_mean_loss_of_its_tasks(tmp_path):
    names = ("rotation", "contrastive")
    flags = "--steps 2 --pretrain-steps 1 --pretext-images source --pretrain".split()
    rows, *_ = run("pretrain_finetune", tmp_path, *SHAPES, *flags, *names)
    pool = pretext.load("shapes", "", 16, "cpu", source=True).train
    tasks = {name: pretext.TASKS[name](pool.images) for name in names}
    args = call("parse_args", "pretrain_finetune", *TINY, *SHAPES)
    model, losses = pretrain_finetune.make_model(args, {}, tasks), []
    draw = (torch.ones(len(pool.labels)) > 0, 16, True, (0, "pretext", 0))
    for name, (x, y) in pretext.draw_batches(tasks, pool, *draw).items():
        losses.append(tasks[name].loss(model({name: x})[name], y).item())
    assert float(rows[0]["train_loss"]) == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert [int(rows[0][k]) for k in ("images", "labels")] == [16 + 32, 0]


def test_the_log_has_the_agreed_columns_and_counts_what_was_used(tmp_path):
    flags = "--steps 3 --eval-every 2 --support-batch-size 6 --inner-steps 2".split()
    rows, _, config = run("maml_ssl", tmp_path, *SHAPES, *flags)
    assert list(rows[0]) == COLUMNS
    counts = {"step": 1, "total_step": 1, "labels": 16, "images": 16 + 2 * 5 * 6}
    for column, each in counts.items():
        # 6 images for each of four tasks, of which contrastive shows two views; K = 2
        assert [int(row[column]) for row in rows] == [0, 2 * each, 3 * each], column
    flops, seconds = ([float(r[k]) for r in rows] for k in ("flops", "seconds"))
    assert [x / flops[1] for x in flops] == [0, 1, 1.5]
    assert 0 == seconds[0] < seconds[1] < seconds[2]
    assert [r["train_loss"] == "" for r in rows] == [True, False, False]
    for row in rows:
        assert float(row["pretext_loss_adapted"]) < float(row["pretext_loss"])
    told = {"arm": "maml_ssl", "inner_steps": 2, "mirror": True}
    told |= {"environment_names": ["all"]}
    told |= {"torch": torch.__version__}
    told |= {"classes": "triangle square pentagon star cross ring arrow".split()}
    told["classes"] += ["crescent", "house", "heart"]  # in the order of the outputs
    assert config.items() >= told.items()


def test_flops_are_three_forward_passes_less_the_first_input_s_gradient(tmp_path):
    flags = ("--steps", 3, "--pretrain-steps", 1)
    rows, *_ = run("pretrain_finetune", tmp_path, *SHAPES, *flags)
    layers, before = [], 3  # multiply-adds of one image, by hand
    for i, after in enumerate([4, 4, 8, 8, 16, 16]):
        layers.append(before * after * 9 * (16 >> i // 2) ** 2)
        before = after
    layers.append(16 * 16 * 10)  # the head, on a 4x4 map of 16 channels
    expected = 2 * 16 * (3 * sum(layers) - layers[0])  # 2 FLOPs each, 16 images
    assert [int(row["flops"]) for row in rows] == [expected * n for n in (1, 1, 2, 3)]
    assert [int(row["labels"]) for row in rows] == [16, 16, 32, 48]
    assert all(row[column] == "" for row in rows for column in COLUMNS[-3:])
    first, second = rows[:2]
    assert first["accuracy"] == second["train_loss"] == "" != second["accuracy"]


@pytest.mark.parametrize("arm", ARMS)
def test_dropout_in_the_encoder_is_active_in_training_alone(arm, monkeypatch, tmp_path):
    module, modes = ARMS[arm], []

    class Dropout(nn.Dropout):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    def make_encoder(*args, real=module.make_encoder):
        encoder, channels = real(*args)
        return nn.Sequential(encoder, Dropout(0.5)), channels

    def train(*args, real=module.train):
        *args, evaluate, settings = args

        def twice(model):
            count, found = len(modes), [evaluate(model), evaluate(model)]
            assert not any(modes[count:]) and len(modes) > count
            assert repr(found[0]) == repr(found[1])
            del modes[count:]
            return found[0]

        return real(*args, twice, settings)

    monkeypatch.setattr(module, "make_encoder", make_encoder)
    monkeypatch.setattr(module, "train", train)
    run(arm, tmp_path, "--steps", 3)
    assert all(modes) and len(modes) >= 3


@pytest.mark.parametrize("arm", ARMS)
def test_an_encoder_may_have_parameters_that_no_loss_reaches(
    arm, monkeypatch, tmp_path
):
    def make_encoder(*args, real=ARMS[arm].make_encoder):
        encoder, channels = real(*args)
        encoder.register_parameter("unused", nn.Parameter(torch.ones(2)))
        return encoder, channels

    monkeypatch.setattr(ARMS[arm], "make_encoder", make_encoder)
    rows, *_ = run(arm, tmp_path, "--steps", 2)
    assert 0 < float(rows[-1]["train_loss"] or 1) < 9


# --- environments ---
def test_many_environments_give_every_arm_the_same_batches(monkeypatch, tmp_path):
    """Seven, three a step, one without a class; labels for a part, tested on some."""
    cameras = [f"camera{i}" for i in range(7)]
    shutil.rmtree(Path(folder("photos", cameras, 4, "abc"), "train/b/camera3"))
    flags = "--dataset photos --environments --meta-batch-size 3 --eval-on val"
    flags = f"{flags} --labels-per-class 20".split()
    seen, real = {}, pretext.labelled_batch
    for arm in ARMS:
        own = ("--steps", 4, "--pretext", "rotation")
        if arm != "maml_ssl":
            own = ("--steps", 5, "--pretrain-steps", 1, "--pretrain", "rotation")
        seen[arm] = []

        def watched(*args, batches=seen[arm]):
            batches.append(real(*args))
            return batches[-1]

        monkeypatch.setattr(pretext, "labelled_batch", watched)
        rows, _, config = run(arm, tmp_path / arm, *flags, *own)
        assert config["environment_names"] == cameras
        assert config["classes"] == ["a", "b", "c"]
        assert len(rows) == 5 + (arm != "maml_ssl")
    for one, *others in zip(*seen.values(), strict=True):
        for other in others:
            assert all(map(torch.equal, one, other))
    homes = [{*batch.environments.tolist()} for batch in seen["maml_ssl"]]
    assert [len(each) for each in homes] == [3] * 4
    assert not homes[0] & homes[1] and not homes[2] & homes[3]  # an epoch: two steps
    assert homes[0] not in homes[2:]  # which is shuffled


@pytest.mark.parametrize("arm", ARMS)
def test_each_environment_has_a_line_at_the_end_and_in_a_file(arm, capsys, tmp_path):
    north, south = 'north, "old"', "south"
    folder("photos", [north, south])
    for place, count in ("a/west", 9), ("b/west", 7), ("b/lonely", 1):
        Path("photos/test", place).mkdir()
        for k in range(count):
            shutil.copy("photos/test/a/south/0.png", f"photos/test/{place}/{k}.png")
    flags = ("--dataset", "photos", "--environments", "--source", "shapes")
    rows, _, config = run(arm, tmp_path, "--steps", 4, *flags)
    assert config["environment_names"] == [north, south, "lonely", "west"]
    said = capsys.readouterr().out
    assert "12 images of 2 classes in 2 environments" in said
    assert "14 are scored in 3 (new: west)" in said
    with open("x/seed0/environments.csv", newline="") as file:
        header, *table = csv.reader(file)
    assert header == ["environment", "images", "accuracy", "accuracy_adapted"]
    names, images, *accuracies = zip(*table, strict=True)
    assert (names, images) == ((north, south, "west"), ("3", "3", "8"))
    columns = ["accuracy", "accuracy_adapted"][: 1 + (arm == "maml_ssl")]
    for column, each in zip(columns, accuracies, strict=False):  # that of all, in parts
        right = sum(float(a) * int(n) for a, n in zip(each, images, strict=True))
        assert right / 14 == pytest.approx(float(rows[-1][column]), abs=1e-4)
    if arm != "maml_ssl":
        assert accuracies[1] == ("", "", "")
    decisive = [float(x) for x in accuracies[len(columns) - 1]]
    worst = names[decisive.index(min(decisive))]
    assert f"The worst is {worst}." in said


# --- the command line ---
def test_default_names_keep_configurations_apart_and_hold_no_path(tmp_path):
    plain = {call("parse_args", arm).name for arm in ARMS}
    long = folder(f"a/{'b' * 200}")
    for name in "one", "two":
        (file := tmp_path / name / "seed0/checkpoint.pt").parent.mkdir(parents=True)
        file.touch()
    flags = "--lr .1,--pretext rotation,--inner per-task,--labels-per-class 3,--amp,"
    flags += "--inner-steps 2,--pretext rotation contrastive,--first-order,--mirror,"
    flags += f"--no-mirror,--balance nash,--dataset {tmp_path}/{long},--steps 7,"
    flags += f"--encoder {file},--encoder one/seed0/checkpoint.pt"
    names = [call("parse_args", "maml_ssl", *f.split()).name for f in flags.split(",")]
    assert len({*names} | plain) == len(names) + 3
    every = flags.replace("--balance nash,", "").replace(",", " ").split()
    names.append(call("parse_args", "maml_ssl", *every).name)
    assert all(len(name) <= 120 and "/" not in name for name in names)
    elsewhere = "--seed 3 --device cpu --out x --data-dir y --eval-every 7"
    elsewhere = [*elsewhere.split(), "--flat-memory", "--overwrite"]
    assert call("parse_args", "maml_ssl", *elsewhere).name in plain


def test_each_dataset_has_its_own_defaults_and_what_is_given_stands():
    args = call("parse_args", "maml_ssl", "--image-size", 32)
    assert (args.dataset, args.image_size, args.width) == ("coloured_shapes", 32, 8)
    assert (args.batch_size, args.steps, args.lr) == (128, 600, 0.002)
    assert (args.inner, args.inner_lr, args.pretext_weight) == ("joint", 3, 0.1)
    assert args.name == "maml_ssl-coloured_shapes-image_size=32"
    args = call("parse_args", "maml_ssl", "--balance", "nash")
    assert (args.inner_lr, args.pretext_weight) == (0.3, 0.1)
    args = call("parse_args", "maml_ssl", "--balance", "nash", "--inner-lr", 3)
    assert args.inner_lr == 3 and "inner_lr=3" in args.name
    other = call("parse_args", "linear_probe", "--pretrain-steps", 7)
    assert (other.image_size, other.width, other.lr) == (16, 8, 0.001)
    assert other.pretrain_steps == 7
    plain = [call("parse_args", arm, "--dataset", "cifar10") for arm in ARMS]
    assert [args.steps for args in plain] == [2000] * 3
    assert [args.pretrain_steps for args in plain[1:]] == [500, 1500]  # as measured
    photos = ("--dataset", folder("photos", "xy"))
    for flags, joint in ((), False), (("--environments",), True):
        args = call("parse_args", "maml_ssl", *photos, *flags)
        own = (args.inner, args.inner_lr, args.pretext_weight, args.image_size)
        assert own == (("joint", 3, 0.1, 32) if joint else ("per-task", 0.01, 0.3, 32))


def test_amp_rounds_inside_the_network_alone(tmp_path):
    images, outputs = {"target": torch.rand(20, 3, 16, 16)}, []
    for amp in [], ["--amp"]:
        args = call("parse_args", "maml_ssl", *TINY, *amp)
        model = maml_ssl.make_model(args, {"target": 5}, {})
        outputs.append(model(images)["target"].detach())
    exact, rounded = outputs
    assert exact.dtype == rounded.dtype == torch.float32
    error = (exact - rounded).norm() / exact.norm()
    assert 1e-4 < error < 0.1  # bfloat16: 2^-9 = 2e-3 each
    flags = ("--steps", 2, "--amp", "--pretext", "rotation")
    _, state, config = run("maml_ssl", tmp_path, *flags)
    assert config["amp"]
    assert {x.dtype for x in state["model"].values()} == {torch.float32}


ALONE = """
import os, runpy, sys
arms, *words = sys.argv[1:]
for arm in arms.split():
    os.chdir(f"{sys.path[0]}/../{arm}")
    sys.path[0] = os.getcwd()
    sys.modules.pop("pretext", None)
    import pretext
    few = lambda n, *which, draw=pretext.draw_shapes: draw(n // 10, *which)
    sys.argv, pretext.draw_shapes = [f"{arm}.py", *words], few
    runpy.run_path(f"{arm}.py", run_name="__main__")
"""


def test_an_arm_and_pretext_copied_alone_run_even_where_stderr_is_closed(tmp_path):
    """Each in a directory of its own, one after the other."""
    for arm in ARMS:
        (place := tmp_path / arm).mkdir()
        for file in (f"{arm}.py", "pretext.py"):
            shutil.copy(ROOT / file, place)
    (tmp_path / "start").mkdir()
    (tmp_path / "start/alone.py").write_text(ALONE)
    call = [sys.executable, "start/alone.py", " ".join(ARMS), *TINY, *SHAPES]
    call = ["sh", "-c", 'exec "$@" 2>&-', "sh", *call, "--steps", "2"]
    environment = os.environ | {"PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    settings = {"cwd": tmp_path, "env": environment, "capture_output": True}
    done = subprocess.run(call, **settings, text=True)
    assert done.returncode == 0 and done.stdout.count("In all: ") == 3, done.stdout
    for arm in ARMS:
        (log,) = tmp_path.glob(f"{arm}/runs/*/seed0/metrics.csv")
        assert re.search(r"\ntarget,[12],2,.*\n$", log.read_text())


# --- README ---
class Fake(list):
    classes = "0123456789"


def test_readme_commands_run_with_small_sizes(tmp_path, monkeypatch):
    """In its order: what compare.py reads are the runs of those above it."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), "uint8")
    fake = Fake((Image.fromarray(x), i % 10) for i, x in enumerate(pixels))
    for name, (kind, other) in pretext.DATASETS.items():
        if kind:
            make = lambda *_, **__: fake  # noqa: E731
            monkeypatch.setitem(pretext.DATASETS, name, (make, other))
    for path in {*re.findall(r"--(?:dataset|source) ([^`\s]+)", README)}:
        if path not in pretext.DATASETS:
            folder(path, ["north", "south"])
    scripts = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for script, flags in re.findall(r"\bpython (\w+\.py)([^#\n]*)", block):
            scripts.append(script)
            small = [*TINY, "--steps", "2"] if script[:-3] in ARMS else []
            words = flags.replace("500", "6").split()
            monkeypatch.setattr(sys, "argv", [script, *words, *small])
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert {*scripts} == {path.name for path in ROOT.glob("*.py")}
    runs = [*tmp_path.glob("runs/*/seed0/metrics.csv")]
    assert len(runs) == len([x for x in scripts if x[:-3] in ARMS])
    table = re.findall(r"`(\w+)\.py( [^`\n]+)`", README)  # named in texts and tables
    assert len([call("parse_args", arm, *more.split()) for arm, more in table]) > 2


def test_readme_s_pretext_task_works_as_it_stands_there(tmp_path, monkeypatch):
    (example,) = [x for x in PYTHON if x.startswith("class ")]
    assert len(example.strip().splitlines()) <= 20
    monkeypatch.setattr(pretext, "TASKS", dict(pretext.TASKS))
    exec(example, dict(vars(pretext)))
    flags = ("--steps", 1, "--pretext", "upside_down", "rotation")
    rows, *_ = run("maml_ssl", tmp_path, *flags)
    assert float(rows[1]["train_loss"]) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_readme_s_inner_loop_has_the_gradient_of_finite_differences(dropout):
    (snippet,) = [x for x in PYTHON if "def adapt" in x]
    exec(snippet, names := {})
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    random = {"generator": pretext.rng(0, ""), "dtype": torch.float64}
    start, direction = torch.randn(2, 6, 5, **random)
    others = {"frozen": torch.ones(5), "count": torch.arange(3)}  # nothing may move

    def loss(weights):
        layer = torch.tanh(x @ weights["w"] * weights["frozen"])
        return F.dropout(layer, dropout).square().mean()

    def outer(w):
        torch.manual_seed(0)  # of the dropout
        weights = {"w": w, "psi": w[0], **others}
        adapted = names["adapt"](loss, weights, 0.7, 3)
        assert all(adapted[name] is x for name, x in others.items())
        return adapted["w"].sin().sum()

    outer(w := start.clone().requires_grad_()).backward()
    ends = [(start + h * direction).requires_grad_() for h in (1e-6, -1e-6)]
    up, down = (outer(end).item() for end in ends)
    exact = (w.grad * direction).sum().item()
    assert exact == pytest.approx((up - down) / 2e-6, rel=1e-6)


def test_readme_s_way_to_use_what_was_trained_names_the_classes(tmp_path, capsys):
    """Green and red pictures of two cameras, and unlabelled ones of a third."""
    (snippet,) = [x for x in PYTHON if "load_trained" in x]
    assert len(snippet.strip().splitlines()) <= 15
    (file,) = re.findall(r'"([^"]*checkpoint\.pt)"', snippet)
    (place,) = re.findall(r'Path\("([^"]*)"\)', snippet)
    numbers = np.random.default_rng(0)

    def picture(path, colour, dark):
        pixels = numbers.integers(0, 60, (20, 24, 3), "uint8")
        pixels[..., ["red", "green"].index(colour)] += 180
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels // dark).save(path)

    for split in "train", "test":
        for colour in "red", "green":
            for camera in 1, 2:
                for k in range(8):
                    path = Path("photos", split, colour, str(camera), f"{k}.jpg")
                    picture(path, colour, camera)
    colours = [["red", "green"][k % 3 == 0] for k in range(7)]
    for k, colour in enumerate(colours):
        picture(Path(place, f"{k}.jpg"), colour, 3)
    flags = "--dataset photos --environments --pretext rotation --inner-lr .1"
    flags = f"{flags} --support-batch-size 8 --steps 30 --lr .01 --ema .5"
    run("maml_ssl", tmp_path, *flags.split(), "--eval-every", 30)
    Path(file).parent.mkdir(parents=True)
    shutil.copy("x/seed0/checkpoint.pt", file)
    shutil.rmtree("photos")
    capsys.readouterr()
    exec(snippet, {})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 7
    for k, colour in enumerate(colours):
        (line,) = [x for x in said if f"{k}.jpg" in x]
        assert colour in line and ["green", "red"][colour == "green"] not in line
