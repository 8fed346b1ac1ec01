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
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import linear_probe
import maml_ssl
import pretext
import pretrain_finetune

ROOT = Path(pretext.__file__).parent
ARMS = {m.__name__: m for m in (maml_ssl, pretrain_finetune, linear_probe)}
TINY = "--width 4 --batch-size 16 --warmup-steps 2".split()
DRAW, DRAW_COLOURED = pretext.draw_shapes, pretext.draw_coloured_shapes
COLUMNS = "phase step total_step images labels flops seconds train_loss".split()
COLUMNS += "accuracy accuracy_adapted pretext_loss pretext_loss_adapted".split()
README = (ROOT / "README.md").read_text()


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr(pretext, "draw_shapes", lambda n, *rest: DRAW(n // 10, *rest))
    monkeypatch.setattr(pretext, "draw_coloured_shapes", lambda n, *r: DRAW_COLOURED(n // 25, *r))


def call(function, arm, *flags):
    """What a function of an arm returns under these flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{arm}.py", *map(str, flags)])
        return getattr(ARMS[arm], function)()


def run(arm, out, *flags):
    """Runs an arm in this process; -> rows of its log, its checkpoint, its configuration."""
    call("main", arm, *TINY, "--out", out, "--name", "x", "--eval-every", 1, *flags)
    folder = Path(out, "x", "seed0")
    rows = [*csv.DictReader((folder / "metrics.csv").read_text().splitlines())]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    return rows, checkpoint, json.loads((folder / "config.json").read_text())


def history(arm, out, *flags):
    """-> for each row of a run (phase, step, weights, averaged weights), as they were then."""
    kept, save = [], ARMS[arm].Run.save

    def watched(self, row, **state):
        averaged = {k[7:]: x for k, x in state["averaged"].items() if k.startswith("module.")}
        kept.append(copy.deepcopy((*row[:2], state["model"], averaged)))
        save(self, row, **state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ARMS[arm].Run, "save", watched)
        run(arm, out, *flags)
    return kept


BLOCK = re.compile(r"^# --- ([^\n]*: [^\n]*) ---\n(.*?)(?=^# --- )", re.S | re.M)  # to the next


def test_blocks_are_the_same_in_every_file():
    blocks, shared = {}, {f"shared: {name}" for name in ("network", "training", "arguments")}
    for arm in ARMS:
        found = dict(BLOCK.findall((ROOT / f"{arm}.py").read_text()))
        pretraining = {"the pretraining arms: pretraining"} if arm != "maml_ssl" else set()
        assert {*found} == shared | pretraining
        for title, body in found.items():
            assert len(body) > 999 and body == blocks.setdefault(title, body), f"{arm}.py: {title}"


@pytest.mark.parametrize("dataset", ["shapes", "coloured_shapes"])
def test_inner_lr_zero_and_weight_zero_is_training_from_scratch_to_the_bit(tmp_path, dataset):
    flags = f"--dataset {dataset} --steps 4 --eval-every 2 --labels-per-class 9 --lr .001".split()
    maml, state, _ = run("maml_ssl", tmp_path, *flags, "--inner-lr", 0, "--pretext-weight", 0)
    scratch, twin, _ = run("pretrain_finetune", tmp_path / "b", *flags, "--pretrain-steps", "0")
    for row in maml + scratch:
        del row["seconds"]
    assert maml == scratch and [row["step"] for row in maml] == ["0", "2", "4"]
    assert all(torch.equal(x, twin["model"][name]) for name, x in state["model"].items())


def test_the_same_seed_is_the_same_start_in_every_arm_and_another_seed_another():
    before, models = torch.get_rng_state(), []
    for arm, module in ARMS.items():
        heads = dict.fromkeys(("source", "target")[arm == "maml_ssl" :], module.classifier(10))
        for seed in 0, 1:  # one head more shifts nothing
            args = call("parse_args", arm, *TINY, "--seed", seed)
            models.append(module.make_model(heads, args).state_dict())
    for name, first in models[0].items():
        assert all(torch.equal(first, m[name]) for m in models[2::2])
        assert first.ndim < 2 or not torch.equal(first, models[1][name])
    assert torch.equal(before, torch.get_rng_state())  # the global generator is left alone


@pytest.mark.parametrize(("backbone", "channels"), [("conv", 20), ("resnet18", 512)])
def test_backbones_have_stride_8_and_no_state_but_parameters(backbone, channels):
    encoder, found = maml_ssl.make_encoder(backbone, 5)
    assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, channels, 4, 4)
    assert found == channels and not [*encoder.buffers()]
    assert sum(isinstance(m, torch.nn.GroupNorm) for m in encoder.modules()) >= 6


@pytest.mark.parametrize("pretrain", ["supervised", "rotation"])
def test_the_probe_leaves_the_encoder_as_pretraining_left_it(tmp_path, pretrain):
    flags = ("--steps", 5, "--pretrain-steps", 3, "--pretrain", pretrain, "--lr", 0.1)
    rows = history("linear_probe", tmp_path, *flags)
    phases, pretrained = [row[:2] for row in rows], rows[2][3]  # the averaged weights
    assert phases == [("pretrain", i) for i in (1, 2, 3)] + [("target", i) for i in (0, 1, 2)]
    for _, step, weights, averaged in rows[3:]:
        for name, x in pretrained.items():
            kept = step == 0 or not name.startswith("heads.target")
            assert torch.equal(weights[name], x) == torch.equal(averaged[name], x) == kept, name


def test_fine_tuning_starts_from_the_average_with_all_else_afresh(tmp_path, monkeypatch):
    """Each step of it against AdamW and the running average, written by hand."""
    evaluated, module = [], pretrain_finetune

    def watched(model, params, images, real=module.predict):
        evaluated.append(copy.deepcopy(dict(model.named_parameters()) | params))
        return real(model, params, images)

    monkeypatch.setattr(module, "predict", watched)
    flags = "--steps 6 --pretrain-steps 2 --ema .6 --lr .1".split()
    rows = history("pretrain_finetune", tmp_path, *flags)
    heads = dict.fromkeys(("target", "source"), module.classifier(10))
    model = module.make_model(heads, call("parse_args", "pretrain_finetune", *TINY))
    start, w = model.state_dict(), rows[2][2]
    for name, x in w.items():  # pretraining leaves the head of the desired task as it was
        kept = name.startswith("heads.target")
        assert torch.equal(x, start[name] if kept else rows[1][3][name]), name
        assert torch.equal(rows[1][2][name], start[name]) == kept, name
    data = pretext.limit_labels(pretext.load("shapes", "", 32, "cpu"), None, "test", 0)
    m, v, average = (dict.fromkeys(w, 0.0) for _ in range(3))
    for t, (_, step, trained, averaged) in enumerate(rows[3:], 1):
        model.load_state_dict(w)
        images, labels, _ = pretext.labelled_batch(data, t - 1, 16, 0)
        loss = F.cross_entropy(model(images), labels)
        grads = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        rate = 0.1 * min(1, t / 2)  # warm-up
        for (name, x), g in zip(w.items(), grads, strict=True):
            if g is not None:  # the source's head is left alone
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g**2
                size = (v[name] / (1 - 0.999**t)).sqrt() + 1e-8
                moved = x * (1 - rate * 0.01) - rate * m[name] / (1 - 0.9**t) / size
                assert torch.allclose(trained[name], moved, rtol=1e-5, atol=1e-7), (step, name)
        w = trained
        average = {n: 0.6 * average[n] + 0.4 * x if t > 1 else x for n, x in w.items()}
        for name, x in average.items():
            assert torch.allclose(averaged[name], x, rtol=1e-5, atol=1e-7), (step, name)
            assert torch.equal(evaluated[t][name], averaged[name])  # that is what is evaluated


def test_self_supervised_pretraining_is_the_mean_loss_of_its_tasks(tmp_path):
    names = ("rotation", "contrastive")
    flags = "--steps 2 --pretrain-steps 1 --pretext-images source --pretrain".split()
    rows, *_ = run("pretrain_finetune", tmp_path, *flags, *names)
    pool = pretext.load("shapes", "", 32, "cpu", source=True).images
    tasks = {name: pretext.TASKS[name](pool) for name in names}
    heads = {name: task.make_head for name, task in tasks.items()}
    model = pretrain_finetune.make_model(heads, call("parse_args", "pretrain_finetune", *TINY))
    batches = pretext.batches(tasks, 0, "pretext", 0, pool, torch.ones(len(pool)) > 0, 16, True)
    losses = [tasks[t].loss(model(x, t), y).item() for t, (x, y) in batches.items()]
    assert float(rows[0]["train_loss"]) == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert [int(rows[0][k]) for k in ("images", "labels")] == [16 + 32, 0]


def test_the_log_has_the_agreed_columns_and_counts_what_was_used(tmp_path):
    flags = "--steps 3 --eval-every 2 --support-batch-size 6 --inner-steps 2".split()
    rows, _, config = run("maml_ssl", tmp_path, *flags)
    assert list(rows[0]) == COLUMNS
    for column, each in ("step", 1), ("total_step", 1), ("labels", 16), ("images", 16 + 2 * 5 * 6):
        # images: 6 for each of four tasks, of which contrastive shows two views; K = 2
        assert [int(row[column]) for row in rows] == [0, 2 * each, 3 * each], column
    assert [float(r["flops"]) / float(rows[1]["flops"]) for r in rows] == [0, 1, 1.5]
    assert 0 == float(rows[0]["seconds"]) < float(rows[1]["seconds"]) < float(rows[2]["seconds"])
    assert [r["train_loss"] == "" for r in rows] == [True, False, False]
    assert all(float(r["pretext_loss_adapted"]) < float(r["pretext_loss"]) for r in rows)
    told = {"arm": "maml_ssl", "inner_steps": 2, "torch": torch.__version__}
    assert config.items() >= told.items()


def test_flops_are_three_forward_passes_less_the_first_input_s_gradient(tmp_path):
    rows, *_ = run("pretrain_finetune", tmp_path, "--steps", 3, "--pretrain-steps", 1)
    layers, before = [], 3  # multiply-adds of one image, by hand
    for i, after in enumerate([4, 4, 8, 8, 16, 16]):
        layers.append(before * after * 9 * (32 >> i // 2) ** 2)
        before = after
    layers.append(16 * 16 * 10)  # the head, on a 4x4 map of 16 channels
    expected = 2 * 16 * (3 * sum(layers) - layers[0])  # 2 FLOPs each, 16 images
    assert [int(row["flops"]) for row in rows] == [expected * n for n in (1, 1, 2, 3)]
    assert [int(row["labels"]) for row in rows] == [16, 16, 32, 48]
    assert all(row[column] == "" for row in rows for column in COLUMNS[-3:])
    assert rows[0]["accuracy"] == rows[1]["train_loss"] == "" != rows[1]["accuracy"]


def test_default_names_keep_configurations_apart_and_hold_no_path():
    plain = {call("parse_args", arm).name for arm in ARMS}
    flags = "--lr .1,--pretext rotation,--inner joint,--labels-per-class 3,--inner-steps 2,--amp,"
    flags = f"{flags}--pretext rotation contrastive,--dataset x/y --source /x/z,--first-order"
    names = [call("parse_args", "maml_ssl", *f.split()).name for f in flags.split(",")]
    assert len({*names} | plain) == len(names) + 3
    long = flags.replace(",", " ").split()
    names.append(call("parse_args", "maml_ssl", *long, "--dataset", f"a/{'b' * 200}").name)
    assert all(len(name) <= 120 and "/" not in name for name in names)
    elsewhere = "--seed 3 --device cpu --out x --data-dir y --eval-every 7 --flat-memory".split()
    assert call("parse_args", "maml_ssl", *elsewhere, "--overwrite").name in plain


def test_each_dataset_has_its_own_defaults_and_what_is_given_stands():
    coloured = ("--dataset", "coloured_shapes", "--image-size", 32)
    args = call("parse_args", "maml_ssl", *coloured)
    assert (args.image_size, args.width, args.batch_size, args.steps) == (32, 8, 128, 1000)
    assert (args.inner, args.inner_lr, args.pretext_weight, args.lr) == ("joint", 3, 0.1, 0.002)
    assert args.name == "maml_ssl-coloured_shapes-image_size=32"
    other = call("parse_args", "linear_probe", *coloured[:2], "--pretrain-steps", 7)
    assert (other.image_size, other.width, other.lr, other.pretrain_steps) == (16, 8, 0.001, 7)
    plain = [call("parse_args", arm, "--dataset", "cifar10") for arm in ARMS]
    assert [args.steps for args in plain] == [2000] * 3
    assert [args.pretrain_steps for args in plain[1:]] == [500, 1500]  # those of the experiment


def test_amp_rounds_inside_the_network_alone(tmp_path):
    images, heads = torch.rand(20, 3, 32, 32), {"target": maml_ssl.classifier(5)}
    args = [call("parse_args", "maml_ssl", *TINY, *amp) for amp in ([], ["--amp"])]
    exact, rounded = (maml_ssl.make_model(heads, a)(images).detach() for a in args)
    assert exact.dtype == rounded.dtype == torch.float32
    assert 1e-4 < (exact - rounded).norm() / exact.norm() < 0.1  # bfloat16: 2^-9 = 2e-3 each
    _, state, config = run("maml_ssl", tmp_path, "--steps", 2, "--amp", "--pretext", "rotation")
    assert config["amp"] and {x.dtype for x in state["model"].values()} == {torch.float32}


def test_an_arm_and_pretext_copied_alone_into_an_empty_directory_run(tmp_path):
    for arm in ARMS:
        (folder := tmp_path / arm).mkdir()
        for file in (f"{arm}.py", "pretext.py"):
            shutil.copy(ROOT / file, folder)
        words = [sys.executable, f"{arm}.py", *TINY, "--steps", "2", "--eval-every", "2"]
        words += ["--pretext", "rotation"] if arm == "maml_ssl" else []
        environment = os.environ | {"PYTHONPATH": ""}
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.search(r"target +\d .* accuracy 0\.\d{4}", done.stdout.splitlines()[-1])
        assert len([*folder.glob("runs/*/seed0/metrics.csv")]) == 1


def test_readme_commands_run_with_small_sizes(tmp_path, monkeypatch):
    """In its order, in one directory: what compare.py reads are the runs of those above it."""
    fake = SimpleNamespace(data=torch.rand(60, 32, 32, 3).mul(255).byte(), targets=[*range(10)] * 6)
    for name, other in ("cifar10", "cifar100"), ("cifar100", "cifar10"):
        monkeypatch.setitem(pretext.DATASETS, name, (lambda *_, **__: fake, other))
    monkeypatch.chdir(tmp_path)
    scripts = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for script, flags in re.findall(r"\bpython (\w+\.py)([^#\n]*)", block):
            scripts.append(script)
            small = [*TINY, "--steps", "2"] if script[:-3] in ARMS else []
            monkeypatch.setattr(sys, "argv", [script, *flags.replace("500", "6").split(), *small])
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert {*scripts} == {path.name for path in ROOT.glob("*.py")}
    assert len([*tmp_path.glob("runs/*/seed0/metrics.csv")]) == len(scripts) - 2


def test_readme_s_pretext_task_works_as_it_stands_there(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(class .*?)```", README, re.S)
    assert len(example.strip().splitlines()) <= 20
    monkeypatch.setattr(pretext, "TASKS", dict(pretext.TASKS))
    exec(example, dict(vars(pretext)))
    rows, *_ = run("maml_ssl", tmp_path, "--steps", 1, "--pretext", "upside_down", "rotation")
    assert float(rows[1]["train_loss"]) > 0


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_readme_s_inner_loop_has_the_gradient_of_finite_differences(dropout):
    (snippet,) = [s for s in re.findall(r"```python\n(.*?)```", README, re.S) if "def adapt" in s]
    exec(snippet, names := {})
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)
    start, direction = torch.randn(2, 6, 5, generator=pretext.rng(0, ""), dtype=torch.float64)
    loss = lambda p: F.dropout(torch.tanh(x @ p["w"]), dropout).pow(2).mean()  # noqa: E731

    def outer(w):
        torch.manual_seed(0)  # of the dropout
        return names["adapt"](loss, {"w": w, "psi": w[0]}, 0.7, 3)["w"].sin().sum()

    outer(w := start.clone().requires_grad_()).backward()
    up, down = (outer((start + h * direction).requires_grad_()).item() for h in (1e-6, -1e-6))
    assert (w.grad * direction).sum().item() == pytest.approx((up - down) / 2e-6, rel=1e-6)
