"""The three arms as wholes: shared blocks, fair pairs, frozen probes, logs, copies, README."""

import csv
import difflib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import linear_probe
import maml_ssl
import pretext
import pretrain_finetune

ROOT = Path(__file__).parent.parent
ARMS = {m.__name__: m for m in (maml_ssl, pretrain_finetune, linear_probe)}
TINY = "--width 4 --batch-size 16 --warmup-steps 2".split()


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """A hundredth of the embedded dataset: drawing all of it takes longer than training does."""
    draw = pretext.draw_shapes
    monkeypatch.setattr(pretext, "draw_shapes", lambda n, *rest: draw(n // 10, *rest))


def run(arm, out, *flags):
    """Runs an arm in this process; -> rows of its log, its checkpoint, its configuration."""
    ARMS[arm].main([*TINY, "--out", str(out), "--name", "x", *map(str, flags)])
    return read(Path(out, "x", "seed0"))


def read(directory):
    with open(directory / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    checkpoint = torch.load(directory / "checkpoint.pt", weights_only=True)
    return rows, checkpoint, json.loads((directory / "config.json").read_text())


# --- shared blocks ---


def blocks(text):
    found = re.findall(
        r"^# --- (?!end )(.*): (.*) ---\n(.*?)^# --- end \1: \2 ---", text, re.S | re.M
    )
    return {(kind, name): body for kind, name, body in found}


def differences(texts):
    """Unified diffs of every marked block that is not the same in all files that have it."""
    diffs, files = [], list(texts)
    for first, second in ((files[0], f) for f in files[1:]):
        one, two = blocks(texts[first]), blocks(texts[second])
        for key in one.keys() & two.keys():
            lines = one[key].splitlines(), two[key].splitlines()
            if one[key] != two[key]:
                diffs += [*difflib.unified_diff(*lines, first, second, key[1], lineterm="")]
    return diffs


def texts():
    return {f"{arm}.py": (ROOT / f"{arm}.py").read_text() for arm in ARMS}


def test_shared_blocks_are_the_same_in_every_file_that_has_them():
    arms = texts()
    assert not (found := differences(arms)), "\n".join(found)
    last_two = {name: arms[name] for name in ("pretrain_finetune.py", "linear_probe.py")}
    assert not (found := differences(last_two)), "\n".join(found)
    shared = {k for k in blocks(arms["maml_ssl.py"]) if k[0] == "shared"}
    assert {name for _, name in shared} == {"arguments", "data", "backbone", "training"}
    assert all(shared <= blocks(text).keys() for text in arms.values())
    assert ("the pretraining arms", "pretraining") in blocks(arms["linear_probe.py"])


@pytest.mark.parametrize("name", ["arguments", "data", "backbone", "training"])
def test_one_byte_in_a_shared_block_is_noticed(name):
    arms = texts()
    body = blocks(arms["linear_probe.py"])["shared", name]
    changed = body.replace("e", "a", 1)
    arms["linear_probe.py"] = arms["linear_probe.py"].replace(body, changed)
    found = "\n".join(differences(arms))
    assert "maml_ssl.py" in found and "linear_probe.py" in found


def test_arms_import_nothing_of_the_project_but_pretext():
    modules = {p.stem for p in ROOT.glob("*.py")}
    for name, text in texts().items():
        imported = re.findall(r"^(?:from|import) (\w+)", text, re.M)
        assert modules & {*imported} == {"pretext"}, name


# --- fair pairs ---


def test_inner_lr_zero_and_weight_zero_writes_the_log_of_training_from_scratch(tmp_path):
    flags = "--steps 6 --eval-every 2 --labels-per-class 9".split()
    maml, state, _ = run("maml_ssl", tmp_path / "a", *flags, "--inner-lr", 0, "--pretext-weight", 0)
    scratch, twin, _ = run("pretrain_finetune", tmp_path / "b", *flags, "--pretrain", "none")
    for row in maml + scratch:
        del row["seconds"]
    assert maml == scratch and len(maml) == 3
    assert all(torch.equal(v, twin["model"][k]) for k, v in state["model"].items())


def test_same_seed_same_start_in_every_arm_and_other_seed_another():
    models = []
    for arm, module in ARMS.items():
        for seed in (0, 1):
            args = module.parse_args([*TINY, "--seed", str(seed)])
            heads = {"target": lambda c, m=module: m.classifier(10, c)}
            if arm != "maml_ssl":  # one head more shifts nothing
                heads["source"] = lambda c, m=module: m.classifier(10, c)
            models.append(module.make_model(args, heads).state_dict())
    for name in models[0]:
        first, other = models[0][name], models[1][name]
        assert all(torch.equal(first, m[name]) for m in models[2::2])
        assert all(torch.equal(other, m[name]) for m in models[3::2])
        if name.endswith("weight") and first.ndim > 1:
            assert not torch.equal(first, other)


def test_making_a_model_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    args = maml_ssl.parse_args(TINY)
    maml_ssl.make_model(args, {"target": lambda c: maml_ssl.classifier(10, c)})
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("backbone", "width", "channels"), [("conv", 5, 20), ("resnet18", 8, 512)])
def test_backbones_have_stride_8_and_no_state_but_parameters(backbone, width, channels):
    encoder = maml_ssl.Encoder(backbone, width)
    with torch.no_grad():
        assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, channels, 4, 4)
    assert encoder.channels == channels and not [*encoder.buffers()]
    kinds = [type(m).__name__ for m in encoder.modules()]
    assert "BatchNorm2d" not in kinds and kinds.count("GroupNorm") >= 6


# --- phases ---


@pytest.mark.parametrize("pretrain", ["supervised", "rotation"])
def test_the_probe_leaves_the_encoder_as_pretraining_left_it(tmp_path, pretrain):
    flags = ("--pretrain", pretrain, "--pretrain-steps", 4, "--eval-every", 100)
    _, pretrained, _ = run("linear_probe", tmp_path / "a", *flags, "--steps", 4)
    rows, probed, _ = run("linear_probe", tmp_path / "b", *flags, "--steps", 9)
    start = {k.removeprefix("module."): v for k, v in pretrained["average"].items()}
    kept = [k for k in probed["model"] if not k.startswith("heads.target")]
    assert any(k.startswith("encoder.") for k in kept)
    for name in kept:  # the averaged weights of the pretraining, and the source's head with them
        assert torch.equal(probed["model"][name], start[name]), name
        assert torch.equal(probed["average"][f"module.{name}"], start[name]), name
    moved = "heads.target.2.weight"
    assert not torch.equal(probed["model"][moved], start[moved])
    assert [(r["phase"], r["step"], r["total_step"]) for r in rows] == [
        ("pretrain", "4", "4"), ("target", "5", "9")]  # fmt: skip


def test_the_probe_notices_an_encoder_that_moved(tmp_path, monkeypatch):
    train = linear_probe.train

    def meddle(run, phase, steps, model, *rest):
        averaged = train(run, phase, steps, model, *rest)
        if phase == "target":
            next(model.encoder.parameters()).data[0] += 1e-6
        return averaged

    monkeypatch.setattr(linear_probe, "train", meddle)
    with pytest.raises(AssertionError, match="encoder"):
        run("linear_probe", tmp_path, "--steps", 4, "--pretrain-steps", 2)


def test_pretraining_moves_the_encoder_and_leaves_the_head_of_the_desired_task(tmp_path):
    flags = ("--steps", 4, "--pretrain-steps", 4, "--weight-decay", 0.5)
    _, state, _ = run("pretrain_finetune", tmp_path, *flags)
    args = pretrain_finetune.parse_args(TINY)
    heads = {"target": lambda c: pretrain_finetune.classifier(10, c)}
    fresh = pretrain_finetune.make_model(args, heads).state_dict()
    assert not torch.equal(
        state["model"]["encoder.layers.0.weight"], fresh["encoder.layers.0.weight"]
    )
    assert torch.equal(state["model"]["heads.target.2.weight"], fresh["heads.target.2.weight"])


def test_finetuning_starts_from_the_averaged_weights_with_everything_else_fresh(tmp_path):
    flags = ("--pretrain-steps", 4, "--eval-every", 100, "--weight-decay", 0)
    _, before, _ = run("pretrain_finetune", tmp_path / "a", *flags, "--steps", 4)
    _, after, _ = run("pretrain_finetune", tmp_path / "b", *flags, "--steps", 5)
    # The first AdamW step moves a weight by lr times the sign of its gradient; warm-up halves lr.
    for name in ("encoder.layers.0.weight", "encoder.layers.3.weight"):
        moved = (after["model"][name] - before["average"][f"module.{name}"]).abs()
        assert moved.max() < 5.1e-4 and moved.median() == pytest.approx(5e-4, rel=0.05)


# --- the log ---


def test_the_log_has_the_agreed_columns_and_counts_what_was_used(tmp_path):
    flags = "--steps 5 --eval-every 2 --support-batch-size 6 --inner-steps 2".split()
    rows, _, config = run("maml_ssl", tmp_path, *flags)
    assert list(rows[0]) == (
        "phase,step,total_step,images,labels,flops,seconds,train_loss,accuracy,accuracy_adapted"
    ).split(",")
    assert [int(r["step"]) for r in rows] == [2, 4, 5]
    # a step: 16 labelled images; 6 for each of four tasks, contrastive shows two views; K = 2
    assert [int(r["images"]) for r in rows] == [s * (16 + 2 * 5 * 6) for s in (2, 4, 5)]
    assert [int(r["labels"]) for r in rows] == [32, 64, 80]
    assert all(0 <= float(r[k]) <= 1 for r in rows for k in ("accuracy", "accuracy_adapted"))
    seconds = [float(r["seconds"]) for r in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert config["arm"] == "maml_ssl" and config["arguments"]["inner_steps"] == 2
    assert config["versions"]["torch"] == torch.__version__


def test_flops_of_a_supervised_step_are_three_forward_passes_less_the_first_input_gradient(
    tmp_path,
):
    rows, *_ = run("pretrain_finetune", tmp_path, "--pretrain", "none", "--steps", 3)
    layers, before = [], 3  # multiply-adds of one image, by hand
    for i, after in enumerate([4, 4, 8, 8, 16, 16]):
        layers.append(before * after * 9 * (32 >> i // 2) ** 2)
        before = after
    layers.append(16 * 16 * 10)  # the head, on a 4x4 map of 16 channels
    expected = 2 * 16 * (3 * sum(layers) - layers[0])  # 2 FLOPs each, 16 images
    assert int(rows[-1]["flops"]) == 3 * expected


def test_default_names_keep_configurations_apart():
    base = {arm: module.parse_args([]).name for arm, module in ARMS.items()}
    assert len({*base.values()}) == 3
    flags = {"--lr": "0.1", "--pretext": "rotation", "--inner": "joint", "--dataset": "cifar10",
             "--labels-per-class": "3", "--inner-steps": "2", "--source": "mnist"}  # fmt: skip
    names = [maml_ssl.parse_args([k, v]).name for k, v in flags.items()]
    names += [maml_ssl.parse_args(["--pretext", "rotation", "contrastive"]).name, base["maml_ssl"]]
    assert len({*names}) == len(names)
    elsewhere = ["--seed", "3", "--device", "cpu", "--out", "elsewhere", "--resume"]
    assert maml_ssl.parse_args(elsewhere).name == base["maml_ssl"]


def test_a_finished_run_is_not_run_again_and_another_configuration_is_refused(tmp_path, capsys):
    run("pretrain_finetune", tmp_path, "--steps", 2)
    log = tmp_path / "x" / "seed0" / "metrics.csv"
    before = log.read_bytes()
    with pytest.raises(SystemExit) as stop:
        run("pretrain_finetune", tmp_path, "--steps", 2)
    assert stop.value.code == 0 and "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run("pretrain_finetune", tmp_path, "--steps", 2, "--lr", 0.5)
    assert stop.value.code == 2 and "--lr" in capsys.readouterr().err
    assert log.read_bytes() == before
    rows, *_ = run("pretrain_finetune", tmp_path, "--steps", 2, "--lr", 0.5, "--overwrite")
    assert len(rows) == 2 and log.read_bytes() != before


def test_a_log_kept_without_its_checkpoint_is_finished_if_its_last_row_is_whole(tmp_path, capsys):
    """As in results/: the checkpoint is not kept. Of an unfinished one nothing is taken over."""
    flags = "--steps", 4, "--eval-every", 2, "--inner-lr", 0, "--pretext-weight", 0
    run("maml_ssl", tmp_path, *flags)
    directory = tmp_path / "x" / "seed0"
    log = directory / "metrics.csv"
    whole = log.read_text()
    for kept, again in (
        (whole, False),
        (whole[:-20], True),
        (whole[: whole.index("target,4")], True),
    ):
        log.write_text(kept)
        (directory / "checkpoint.pt").unlink(missing_ok=True)
        try:
            run("maml_ssl", tmp_path, *flags, "--resume")
        except SystemExit as stop:
            assert stop.code == 0 and "finished" in capsys.readouterr().out and not again
        assert (directory / "checkpoint.pt").exists() == again
        assert len(log.read_text().splitlines()) == 3


# --- as users meet them ---


def shell(command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_and_pretext_copied_alone_into_an_empty_directory_run(tmp_path, arm):
    for file in (f"{arm}.py", "pretext.py"):
        shutil.copy(ROOT / file, tmp_path)
    result = shell([sys.executable, f"{arm}.py", *TINY, "--steps", "2"], tmp_path)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1]
    assert re.search(r"\d\d?\.\d\d?%", result.stdout) and "metrics.csv" in last


def readme_commands(scripts=tuple(f"{arm}.py" for arm in ARMS)):
    """The commands of README's code blocks that start one of the scripts."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
    lines = [line.split("#")[0].split("&&")[-1].strip() for line in text.splitlines()]
    return [line for line in lines if line.startswith(tuple(f"python {s}" for s in scripts))]


def test_readme_shows_commands_of_every_script():
    for file in ROOT.glob("*.py"):
        assert readme_commands((file.name,)), file


# --- bfloat16 ---


@pytest.mark.parametrize(
    "arm, flags",
    [("maml_ssl", ["--pretext", "rotation", "contrastive"]), ("linear_probe", [])],
)
def test_amp_rounds_only_inside_the_network(tmp_path, monkeypatch, arm, flags):
    module, sums, outputs = ARMS[arm], [], set()
    forward, norm = module.Model.forward, torch.nn.utils.get_total_norm
    monkeypatch.setattr(module.Model, "forward", lambda *x: outputs.add(
        (out := forward(*x)).dtype) or out)  # fmt: skip
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: sums.append(
        torch.cat([g.flatten() for g in grads])) or norm(grads))  # fmt: skip
    for amp in [], ["--amp"]:
        _, checkpoint, _ = run(arm, tmp_path / str(amp), "--steps", 2, "--eval-every", 2,
                               "--pretrain-steps" if arm == "linear_probe" else "--inner-steps", 1,
                               *flags, *amp)  # fmt: skip
        assert {x.dtype for x in checkpoint["model"].values()} == {torch.float32}
    assert outputs == {torch.float32} and {g.dtype for g in sums} == {torch.float32}
    for exact, rounded in zip(sums[:1], sums[2:3], strict=True):  # at the same weights
        assert 1e-4 < (exact - rounded).norm() / exact.norm() < 0.4  # bfloat16: 2^-9 = 2e-3 each
        assert torch.cosine_similarity(exact, rounded, dim=0) > 0.95


def test_amp_adapts_in_float32(monkeypatch):
    seen, adapt = set(), maml_ssl.adapt

    def watched(loss, w, *rest, **named):
        end, path = adapt(loss, w, *rest, **named)
        seen.update(x.dtype for part in (w, end, path[0][2]) for x in part.values())
        seen.add(path[0][1].dtype)
        return end, path

    monkeypatch.setattr(maml_ssl, "adapt", watched)
    args = maml_ssl.parse_args([*TINY, "--amp", "--pretext", "rotation"])
    task = {"rotation": pretext.Rotation(None)}
    heads = {"target": lambda c: maml_ssl.classifier(3, c), "rotation": task["rotation"].make_head}
    model = maml_ssl.make_model(args, heads)
    images = torch.rand(8, 3, 32, 32)
    batch = task["rotation"].make_batch(images, torch.arange(8), torch.Generator())
    maml_ssl.outer_gradient(model, task, [({"rotation": batch}, images, torch.arange(8) % 3)], args)
    assert seen == {torch.float32}


# --- README ---


def test_readme_s_file_map_counts_the_lines():
    rows = re.findall(r"\| `(\w+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text())
    assert {name for name, _ in rows} == {file.name for file in ROOT.glob("*.py")}
    for name, count in rows:
        assert int(count) == len((ROOT / name).read_text().splitlines()), name


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands_run_with_small_sizes(command, tmp_path, image_folders):
    words = shlex.split(command)[1:]
    names = {"cifar10": image_folders / "a", "cifar100": image_folders / "b"}
    names |= {"FOLDER": image_folders / "a", "OTHER": image_folders / "b"}
    words = [str(names.get(word, word)) for word in words]
    if "--dataset" in words and "--source" not in words:
        words += ["--source", str(image_folders / "b")]
    small = [*TINY, "--steps", "4", "--eval-every", "2", "--out", tmp_path, "--data-dir", tmp_path]
    if "--labels-per-class" in words:
        small += ["--labels-per-class", "8"]
    if "--pretrain-steps" in words:
        small += ["--pretrain-steps", "2"]
    ARMS[Path(words[0]).stem].main([*words[1:], *map(str, small)])
    assert len([*tmp_path.glob("*/seed*/metrics.csv")]) == 1


def test_readme_commands_of_compare_and_pretext_run_with_small_sizes(tmp_path):
    """In the order of README: the runs of the first are what the next ones read."""
    small = {"--run": ["--out", "runs", "--seeds", "1", "--", *TINY, "--steps", "2"]}
    for command in readme_commands(("compare.py", "pretext.py")):
        if "results/" in command:
            continue  # tests/test_compare.py runs those
        script, *words = shlex.split(command)[1:]
        words = ["1" if before == "--seeds" else w
                 for before, w in zip([None, *words], words, strict=False)]  # fmt: skip
        words += small.get(words[0] if words else None, [])
        result = shell([sys.executable, str(ROOT / script), *words], tmp_path)
        assert result.returncode == 0, (command, result.stderr)
    assert (tmp_path / "pretext.png").exists() and len([*tmp_path.glob("runs/**/*.pdf")]) >= 1


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("folders"), torch.Generator().manual_seed(0)
    for folder in ("a", "b"):
        for split in ("train", "test"):
            for label in ("cat", "dog", "owl"):
                place = root / folder / split / label
                place.mkdir(parents=True)
                for i in range(12):
                    image = torch.randint(0, 256, (3, 32, 32), generator=generator)
                    pixels = image.permute(1, 2, 0).to(torch.uint8).numpy()
                    Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def test_readme_s_seventh_task_works_as_it_stands_there(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    example = re.search(r"```python\n(class .*?)```", text, re.S).group(1)
    assert len(example.strip().splitlines()) <= 20
    source = (ROOT / "pretext.py").read_text()
    body, entry = example.rsplit("\n\n", 1)  # the class, then its line of the dict
    source = source.replace(
        "TASKS: dict[str, type] = {\n", f"{body}\n\n\nTASKS = {{\n    {entry.strip()}\n"
    )
    (tmp_path / "pretext.py").write_text(source)
    shutil.copy(ROOT / "maml_ssl.py", tmp_path)
    name = re.match(r'"(\w+)"', entry.strip()).group(1)
    command = [sys.executable, "maml_ssl.py", *TINY, "--steps", "2", "--pretext", name, "rotation"]
    result = shell(command, tmp_path)
    assert result.returncode == 0, result.stderr
