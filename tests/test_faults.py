"""Runs that are stopped, killed, starved of disk space or fed damaged files: nothing is lost.

The oracle is the same run, undisturbed: its log (seconds aside) and every tensor of its checkpoint.
"""

import csv
import errno
import importlib
import itertools
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pretext

ROOT = Path(pretext.__file__).parent
SHORT = "--device cpu --width 4 --batch-size 8 --steps 6 --eval-every 2 --warmup-steps 3".split()
ARMS = {  # two phases of 3 steps with a row at 2 and at 3, or one of 6 with a row at 2, 4, 6
    "maml_ssl": ["--pretext", "rotation", "contrastive"],
    "pretrain_finetune": ["--schedule", "cosine"],
    "linear_probe": ["--pretrain", "rotation"],
}
ADAMW = torch.optim.AdamW.step
DRAW = pretext.draw_shapes


class Cut(BaseException):
    """The power goes: nothing in the program can catch this."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """100 drawn images and 50 to test; one thread; the handlers of signals as they were."""
    drawn = {}

    def draw(count, *which):
        if (count, which) not in drawn:
            drawn[count, which] = DRAW(count // 20, *which)
        return drawn[count, which]

    monkeypatch.setattr(pretext, "draw_shapes", draw)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def start(arm, out, *more):
    """The exit code of an arm, run in this process, in OUT/run/seed0."""
    module = importlib.import_module(arm)
    try:
        module.main([*SHORT, *ARMS[arm], "--out", str(out), "--name", "run", *map(str, more)])
    except SystemExit as error:
        return error.code
    return 0


def rows(out, without=("seconds",)):
    with open(out / "run/seed0/metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def checkpoint(out):
    """What the checkpoint holds, and, in place of the log's length, whether that is its length."""
    state = torch.load(out / "run/seed0/checkpoint.pt", weights_only=True)
    state["log_bytes"] -= (out / "run/seed0/metrics.csv").stat().st_size
    del state["counts"]["seconds"]
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(arm, more arguments) -> the directory of that run, made once."""
    made = {}

    def get(arm, *more):
        if (arm, more) not in made:
            out = tmp_path_factory.mktemp("undisturbed")
            assert start(arm, out, *more) == 0
            made[arm, more] = out
        return made[arm, more]

    return get


def assert_same_run(a, b):
    assert rows(a) == rows(b)
    assert same(checkpoint(a), checkpoint(b))


def one_line(capsys, *words):
    """The line on standard error, which holds the words; the progress bars are no part of it."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    lines = [line for line in errors.replace("\r", "\n").split("\n") if line.strip()]
    lines = [line for line in lines if not re.search(r"\d+%.*\d+/\d+ \[.*\]$", line)]
    assert len(lines) == 1, lines
    for word in words:
        assert str(word) in lines[0]
    return lines[0]


def stop_in_step(monkeypatch, which, number=signal.SIGTERM):
    """Send this process a signal in the `which`-th optimizer step from here on."""
    calls = itertools.count(1)

    def step(self, *args, **kwargs):
        if next(calls) == which:
            os.kill(os.getpid(), number)
        return ADAMW(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


# --- stopped, and resumed to the bit ---


@pytest.mark.parametrize("step", range(1, 7))
@pytest.mark.parametrize("arm", ARMS)
def test_a_run_stopped_in_any_step_resumes_exactly(
    arm, step, tmp_path, monkeypatch, undisturbed, capsys
):
    expected = undisturbed(arm)
    capsys.readouterr()
    number = (signal.SIGINT, signal.SIGTERM)[step % 2]
    stop_in_step(monkeypatch, step, number)
    assert start(arm, tmp_path) == 128 + number
    one_line(capsys, "stopped after", "--resume goes on")
    assert checkpoint(tmp_path)["counts"]["total_step"] == step  # the step was finished and saved
    assert start(arm, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, expected)


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_stopped_in_every_step_resumes_exactly(arm, tmp_path, monkeypatch, undisturbed):
    expected = undisturbed(arm)
    for _ in range(6):
        stop_in_step(monkeypatch, 1)
        assert start(arm, tmp_path, "--resume") == 143
    assert start(arm, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, expected)


def test_a_signal_outside_the_step_does_not_skip_the_checkpoint(tmp_path, monkeypatch):
    """While the progress bar is told the loss, or the row is written: then it waits for a step."""
    tqdm = importlib.import_module("linear_probe").tqdm
    for name, saved in ("set_postfix", 1), ("write", 3):
        once = iter([signal.SIGINT])
        with monkeypatch.context() as patch:
            patch.setattr(tqdm, name, lambda *_, o=once, **__: [os.kill(os.getpid(), n) for n in o])
            assert start("linear_probe", tmp_path, "--overwrite") == 130
        assert checkpoint(tmp_path)["counts"]["total_step"] == saved


def test_resume_comes_before_overwrite(tmp_path, monkeypatch, undisturbed):
    """`the same command with --resume` may hold --overwrite: it must not drop what was saved."""
    expected = undisturbed("linear_probe")
    stop_in_step(monkeypatch, 4)
    assert start("linear_probe", tmp_path, "--overwrite") == 143
    stop_in_step(monkeypatch, 1)
    assert start("linear_probe", tmp_path, "--overwrite", "--resume") == 143
    assert checkpoint(tmp_path)["counts"]["total_step"] == 5
    assert start("linear_probe", tmp_path, "--overwrite", "--resume") == 0
    assert_same_run(tmp_path, expected)


def test_an_unfinished_run_needs_resume_and_a_finished_one_is_left_alone(
    tmp_path, monkeypatch, capsys
):
    stop_in_step(monkeypatch, 4)
    assert start("maml_ssl", tmp_path) == 143
    capsys.readouterr()
    before = snapshot(tmp_path)
    assert start("maml_ssl", tmp_path) == 2
    one_line(capsys, tmp_path / "run/seed0", "--resume", "--overwrite")
    assert snapshot(tmp_path) == before
    assert start("maml_ssl", tmp_path, "--resume") == 0
    before = snapshot(tmp_path)
    assert start("maml_ssl", tmp_path, "--resume") == start("maml_ssl", tmp_path) == 0
    assert snapshot(tmp_path) == before
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ("--lr 0.002", "--lr 0.001, not 0.002"),
        ("--eval-every 3 --width 8", "--eval-every 2, not 3"),
        ("--steps 5", "--steps 6, not 5"),
        ("--pretext rotation", "--pretext ['rotation', 'contrastive'], not ['rotation']"),
        ("--steps 8 --schedule cosine", "--steps 6, not 8"),
        ("--steps 8 --inner-lr 0.1", "--inner-lr 0.01, not 0.1"),
    ],
)
def test_resuming_with_other_arguments_is_refused(change, first, tmp_path, monkeypatch, capsys):
    stop_in_step(monkeypatch, 4)
    assert start("maml_ssl", tmp_path) == 143
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert start("maml_ssl", tmp_path, "--resume", *change.split()) == 2
    one_line(capsys, first, "--name", "--overwrite")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_steps_may_grow_at_a_constant_rate(stop, tmp_path, monkeypatch, undisturbed):
    more = ("--pretrain-steps", "2", "--schedule", "constant")
    expected = undisturbed("pretrain_finetune", *more, "--steps", "8")
    with monkeypatch.context() as patch:
        stop_in_step(patch, stop)
        assert start("pretrain_finetune", tmp_path, *more) == 143
    assert start("pretrain_finetune", tmp_path, *more, "--steps", "8", "--resume") == 0
    assert_same_run(tmp_path, expected)
    config = json.loads((tmp_path / "run/seed0/config.json").read_text())
    assert config["arguments"]["steps"] == 8


# --- cut off at any moment, and the disk full at any moment ---


def fault_at(monkeypatch, arm, which, error):
    """Raise at the `which`-th place where a run can break: in steps, evaluations, every write.

    Returns the names of the places passed. A torn write has written half when it breaks.
    """
    module, places = importlib.import_module(arm), []
    real_open, real_save = open, torch.save

    def break_here(name):
        places.append(name)
        if len(places) == which:
            raise error

    def wrap(owner, name, label):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            break_here(f"before {label}")
            value = real(*args, **kwargs)
            break_here(f"after {label}")
            return value

        monkeypatch.setattr(owner, name, wrapped)

    class Torn:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            break_here("half a write")
            self.file.write(text[len(text) // 2 :])

    def torn_save(state, file):
        real_save(state, tmp := f"{file.name}.whole")
        content = Path(tmp).read_bytes()
        os.unlink(tmp)
        file.write(content)  # its own halves are a place

    monkeypatch.setattr(module, "open", lambda *a: Torn(real_open(*a)), raising=False)
    monkeypatch.setattr(torch, "save", torn_save)
    for owner, name in (os, "fsync"), (os, "replace"), (os, "truncate"):
        wrap(owner, name, name)
    wrap(Path, "unlink", "unlink")
    real_text = Path.write_text

    def torn_text(path, text):
        real_text(path, text[: len(text) // 2])
        break_here("half a text")
        real_text(path, text)

    monkeypatch.setattr(Path, "write_text", torn_text)
    if isinstance(error, Cut):
        wrap(torch.optim.AdamW, "step", "step")
        wrap(module, "accuracy", "evaluation")
    return places


def count_places(arm, out, error, *more):
    with pytest.MonkeyPatch.context() as patch:
        places = fault_at(patch, arm, 0, error)
        assert start(arm, out, *more) == 0
    return len(places)


@pytest.mark.parametrize("arm", ["maml_ssl", "pretrain_finetune"])
def test_a_run_cut_off_anywhere_resumes_exactly(arm, tmp_path, undisturbed, capsys):
    expected = undisturbed(arm)
    places = count_places(arm, tmp_path / "count", Cut())
    assert places > 40
    stride = 1 if arm == "pretrain_finetune" else 12
    for which in range(1, places + 1, stride):
        out = tmp_path / str(which)
        with pytest.MonkeyPatch.context() as patch:
            passed = fault_at(patch, arm, which, Cut())
            with pytest.raises(Cut):
                start(arm, out)
        assert start(arm, out, "--resume") == 0, (which, passed[-1])
        assert_same_run(out, expected)
    capsys.readouterr()


def test_a_resume_cut_off_anywhere_resumes_exactly(tmp_path, monkeypatch, undisturbed, capsys):
    """The log holds a row that the checkpoint does not know when the resume begins."""
    arm, expected = "linear_probe", undisturbed("linear_probe")

    def broken_off(out):
        with pytest.MonkeyPatch.context() as patch:
            saved = fault_at(patch, arm, 0, Cut())
            real = torch.save

            def save(state, file):
                if state["counts"]["total_step"] == 5:
                    raise Cut
                real(state, file)

            patch.setattr(torch, "save", save)
            with pytest.raises(Cut):
                start(arm, out)
            assert saved
        assert len(rows(out)) == 3
        assert checkpoint(out)["log_bytes"] < 0  # as of the row before

    broken_off(tmp_path / "count")
    for which in range(1, count_places(arm, tmp_path / "count", Cut(), "--resume") + 1):
        out = tmp_path / str(which)
        broken_off(out)
        with pytest.MonkeyPatch.context() as patch:
            fault_at(patch, arm, which, Cut())
            with pytest.raises(Cut):
                start(arm, out, "--resume")
        assert start(arm, out, "--resume") == 0
        assert_same_run(out, expected)
    capsys.readouterr()


def test_a_disk_full_anywhere_is_one_line_and_loses_nothing(tmp_path, undisturbed, capsys):
    arm, full = "linear_probe", OSError(errno.ENOSPC, "No space left on device")
    expected = undisturbed(arm)
    codes = []
    for which in range(1, count_places(arm, tmp_path / "count", full) + 1):
        out = tmp_path / str(which)
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            fault_at(patch, arm, which, full)
            codes.append(start(arm, out))
        one_line(capsys, out, "No space left on device")
        last = out / "run/seed0/checkpoint.pt"
        if last.exists():
            torch.load(last, weights_only=True)
        assert start(arm, out, "--resume") == 0, which
        assert_same_run(out, expected)
    starting = codes.count(2)
    assert codes == [2] * starting + [1] * (len(codes) - starting)
    assert 0 < starting < 15 < len(codes)
    capsys.readouterr()


def test_a_limit_on_the_size_of_files_is_one_line_and_loses_nothing(
    tmp_path, monkeypatch, undisturbed, capsys
):
    """The kernel's own refusal, inside torch.save; the checkpoint is some 170 kB."""
    arm, expected = "pretrain_finetune", undisturbed("pretrain_finetune")
    stop_in_step(monkeypatch, 1)
    assert start(arm, tmp_path) == 143
    last = (tmp_path / "run/seed0/checkpoint.pt").read_bytes()
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        code = start(arm, tmp_path, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    one_line(capsys, tmp_path / "run/seed0", "can't be written", "make room", "--resume")
    assert (tmp_path / "run/seed0/checkpoint.pt").read_bytes() == last
    assert start(arm, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, expected)


def test_a_directory_that_vanishes_is_one_line(tmp_path, monkeypatch, capsys):
    module, out = importlib.import_module("linear_probe"), tmp_path / "out"
    real = module.labelled_batch

    def labelled_batch(data, step, *rest):
        if out.is_dir():
            out.rename(tmp_path / "moved")
            out.write_text("a file in its place")
        return real(data, step, *rest)

    monkeypatch.setattr(module, "labelled_batch", labelled_batch)
    assert start("linear_probe", out, "--pretrain", "supervised") == 1
    one_line(capsys, out, "can't be written")


@pytest.mark.parametrize("kind", ["file", "under a file", "long name", "file as directory"])
def test_an_out_that_cannot_be_written_is_refused_at_the_start(kind, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    out, more = tmp_path / "file", ()
    if kind == "under a file":
        out /= "deeper"
    elif kind == "long name":
        out, more = tmp_path, ("--name", "n" * 300)
    elif kind == "file as directory":
        out = tmp_path / "out"
        (out / "run").mkdir(parents=True)
        (out / "run/seed0").write_text("mine")
    assert start("linear_probe", out, *more) == 2
    one_line(capsys, "--out", out)
    assert (tmp_path / "file").read_text() == "mine"


# --- damaged and hostile files ---


def snapshot(out):
    return {p.name: p.read_bytes() for p in (out / "run/seed0").iterdir()}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The files of a run of each arm, stopped after step 4, by name."""
    made = {}

    def get(arm):
        if arm not in made:
            out = tmp_path_factory.mktemp("stopped")
            with pytest.MonkeyPatch.context() as patch:
                stop_in_step(patch, 4)
                assert start(arm, out) == 143
            made[arm] = snapshot(out)
        return made[arm]

    return get


def put(out, files):
    directory = out / "run/seed0"
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


class Bomb:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("inside", ["whole", "optimizer", "pickle"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_checkpoint_that_would_run_code_is_refused_and_does_not(
    arm, inside, tmp_path, stopped, capsys
):
    directory, exploded = put(tmp_path, stopped(arm)), tmp_path / "exploded"
    path = directory / "checkpoint.pt"
    if inside == "pickle":
        path.write_bytes(pickle.dumps(Bomb(exploded)))
    elif inside == "whole":
        torch.save(Bomb(exploded), path)
    else:
        state = torch.load(path, weights_only=True)
        torch.save(state | {"optimizer": Bomb(exploded)}, path)
    if inside == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    exploded.rmdir()  # the bomb is real
    before = snapshot(tmp_path)
    capsys.readouterr()
    for more in ("--resume",), ():
        assert start(arm, tmp_path, *more) == 2
        assert "weights_only" not in one_line(capsys, path, "--overwrite")  # no advice to defuse us
    assert not exploded.exists()
    assert snapshot(tmp_path) == before


def assert_refused(out, arm, file, capsys):
    before = snapshot(out)
    capsys.readouterr()
    assert start(arm, out, "--resume") == 2
    one_line(capsys, out / "run/seed0" / file, "--overwrite")
    assert {k: v for k, v in snapshot(out).items() if k != "config.json"} == {
        k: v for k, v in before.items() if k != "config.json"
    }


@pytest.mark.parametrize("kept", [0, 1, 100, 0.1, 0.5, 0.9, 0.999, -1])
def test_a_truncated_checkpoint_is_refused(kept, tmp_path, stopped, capsys):
    files = stopped("maml_ssl")
    whole = files["checkpoint.pt"]
    cut = whole[: int(kept * len(whole)) if isinstance(kept, float) else kept]
    put(tmp_path, files | {"checkpoint.pt": cut})
    assert_refused(tmp_path, "maml_ssl", "checkpoint.pt", capsys)


PARTS = ("model", "average", "optimizer", "phase", "step", "counts", "log_bytes")


@pytest.mark.parametrize("what", ["list", "tensor", "text", "weights", *PARTS])
def test_another_torch_file_is_no_checkpoint(what, tmp_path, stopped, capsys):
    path = put(tmp_path, stopped("pretrain_finetune")) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    assert sorted(state) == sorted(PARTS)
    others = {"list": [1, 2], "tensor": torch.ones(3), "weights": state["model"]}
    if what == "text":
        path.write_text("not a checkpoint\n" * 100)
    else:
        others |= {part: {k: v for k, v in state.items() if k != part} for part in PARTS}
        torch.save(others[what], path)
    assert_refused(tmp_path, "pretrain_finetune", "checkpoint.pt", capsys)


@pytest.mark.parametrize("part", ["model", "average", "optimizer", "step", "counts"])
@pytest.mark.parametrize("arm", ["maml_ssl", "linear_probe"])
def test_a_checkpoint_that_does_not_fit_is_refused(arm, part, tmp_path, stopped, capsys):
    path = put(tmp_path, stopped(arm)) / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    if part == "optimizer":
        state[part]["param_groups"][0]["params"].pop()
    elif part == "step":
        state[part] = "four"
    elif part == "counts":
        del state[part]["losses"]
    else:
        name = next(k for k in state[part] if k.endswith("encoder.layers.0.weight"))
        state[part][name] = torch.zeros(2, 2)
    torch.save(state, path)
    assert_refused(tmp_path, arm, "checkpoint.pt", capsys)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"arguments": 3}', b"\xff\xfe\x00", b"null", None]
)
@pytest.mark.parametrize("resume", [["--resume"], []])
def test_a_damaged_config_is_refused(content, resume, tmp_path, stopped, capsys):
    directory = put(tmp_path, stopped("linear_probe"))
    if content is None:  # gone, but the checkpoint is there: no reason to drop it
        (directory / "config.json").unlink()
    else:
        (directory / "config.json").write_bytes(content)
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert start("linear_probe", tmp_path, *resume) == 2
    one_line(capsys, directory / "config.json", "--overwrite")
    assert snapshot(tmp_path) == before
    assert start("linear_probe", tmp_path, "--overwrite") == 0  # the remedy helps


@pytest.mark.parametrize("kept", [None, 0, -1])
def test_a_log_that_lacks_rows_of_the_checkpoint_is_refused(kept, tmp_path, stopped, capsys):
    directory = put(tmp_path, stopped("linear_probe"))
    log = directory / "metrics.csv"
    if kept is None:
        log.unlink()
    else:
        log.write_bytes(log.read_bytes()[:kept])
    assert_refused(tmp_path, "linear_probe", "metrics.csv", capsys)


@pytest.mark.parametrize("arm", ARMS)
def test_overwrite_drops_all_that_was_there(arm, tmp_path, stopped, undisturbed):
    expected = undisturbed(arm)
    put(tmp_path, stopped(arm))
    assert start(arm, tmp_path, "--overwrite") == 0
    assert_same_run(tmp_path, expected)


def test_overwrite_leaves_no_older_checkpoint_to_resume_from(tmp_path, monkeypatch, stopped):
    directory = put(tmp_path, stopped("linear_probe"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(Cut))
        with pytest.raises(Cut):
            start("linear_probe", tmp_path, "--overwrite")
    assert not (directory / "checkpoint.pt").exists()


# --- numbers ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_pretext_loss_that_is_not_finite_stops_before_it_is_applied(
    value, tmp_path, monkeypatch, capsys
):
    """In the 4th step; the message names each task whose loss it is."""
    task, steps = type(pretext.TASKS["rotation"](DRAW(100)[0])), itertools.count(1)
    real, applied = task.make_batch, []

    def make_batch(self, images, *rest):
        inputs, targets = real(self, images, *rest)
        return inputs * (value if next(steps) == 6 else 1), targets  # two of them are evaluation

    def step(self, *args, **kwargs):
        applied.append(1)
        return ADAMW(self, *args, **kwargs)

    monkeypatch.setattr(task, "make_batch", make_batch)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert start("maml_ssl", tmp_path) == 1
    line = one_line(capsys, "target step 4", "rotation", "last checkpoint: ", "--lr")
    assert "contrastive" not in line
    assert len(applied) == 3
    assert checkpoint(tmp_path)["counts"]["total_step"] == 2
    assert checkpoint(tmp_path)["log_bytes"] == 0


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("phase", ["pretrain", "target"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_loss_or_gradient_that_is_not_finite_is_not_applied(arm, phase, kind, tmp_path, capsys):
    module = importlib.import_module(arm)
    args = module.parse_args([*SHORT, *ARMS[arm], "--out", str(tmp_path), "--name", "run"])
    model = torch.nn.Linear(2, 1)
    run, seen = module.Run(args, model), []

    def step_gradient(step):
        bad = step == 4
        model.weight.grad, model.bias.grad = torch.ones(1, 2), torch.ones(1)
        if bad and kind == "gradient":
            model.weight.grad[0, 1] = float("nan")
        seen.append([p.detach().clone() for p in model.parameters()])
        loss = torch.tensor(float("inf") if bad and kind == "loss" else 1.0)
        return {phase: torch.tensor(2.0), "a task": loss}, 8, 8

    with pytest.raises(SystemExit) as stop:
        module.train(run, phase, 6, model, step_gradient)
    assert stop.value.code == 1
    named = "a task inf" if kind == "loss" else "gradient nan"
    one_line(capsys, f"{phase} step 5", named, str(tmp_path), "checkpoint.pt")
    assert all(map(torch.equal, model.parameters(), seen[-1]))  # as before the step
    assert not torch.equal(seen[-1][0], seen[-2][0])  # which the steps before were not
    state = checkpoint(tmp_path)
    assert state["step"] == 4 and same(state["model"]["weight"], seen[4][0])


# --- reproducibility ---


@pytest.mark.parametrize("arm", ARMS)
def test_the_same_command_twice_is_the_same_run(arm, tmp_path, undisturbed):
    expected = undisturbed(arm)
    torch.manual_seed(1234)  # the global generator has no say
    assert start(arm, tmp_path) == 0
    assert_same_run(tmp_path, expected)
    assert start(arm, tmp_path / "other", "--seed", "1") == 0
    other = tmp_path / "other/run/seed1"
    assert (other / "metrics.csv").exists()
    other.rename(other.with_name("seed0"))
    assert rows(tmp_path / "other") != rows(expected)


@pytest.mark.parametrize("arm", ARMS)
def test_eval_every_does_not_change_the_rows_that_both_have(arm, tmp_path, undisturbed):
    """train_loss aside: it is the mean since the row before, by definition."""
    expected = rows(undisturbed(arm), ("seconds", "train_loss"))
    for every in 1, 3, 100:
        out = tmp_path / str(every)
        assert start(arm, out, "--eval-every", every) == 0
        mine = {(r["phase"], r["step"]): r for r in rows(out, ("seconds", "train_loss"))}
        both = [row for row in expected if (row["phase"], row["step"]) in mine]
        assert [mine[row["phase"], row["step"]] for row in both] == both
        assert len(both) >= (1 if arm == "maml_ssl" else 2)
        a, b = checkpoint(out), checkpoint(undisturbed(arm))
        assert all(same(a[part], b[part]) for part in ("model", "average", "optimizer"))


def test_train_loss_is_the_mean_since_the_row_before(tmp_path, undisturbed):
    arm = "maml_ssl"
    assert start(arm, tmp_path, "--eval-every", "1") == 0
    each = [float(row["train_loss"]) for row in rows(tmp_path)]
    pairs = [float(row["train_loss"]) for row in rows(undisturbed(arm))]
    assert pairs == pytest.approx(
        [(a + b) / 2 for a, b in zip(each[::2], each[1::2], strict=True)], abs=1.1e-5
    )


# --- real processes, real signals ---

DRIVER = """
import os, sys, time, pretext
draw = pretext.draw_shapes
pretext.draw_shapes = lambda n, *which: draw(n // 20, *which)
import {arm} as arm
{extra}
arm.main()
"""
SLOW_EVALUATION = """
def slow(*_):
    open(sys.argv[sys.argv.index("--out") + 1] + "/evaluating", "w").close()
    time.sleep(60)
arm.accuracy = slow
"""
SLOW_DATA = """
def slow(*_):
    open(sys.argv[sys.argv.index("--out") + 1] + "/loading", "w").close()
    time.sleep(60)
pretext.draw_shapes = slow
"""
SLOW_STEP = """
def slow(*rest, real=arm.labelled_batch):
    open(sys.argv[sys.argv.index("--out") + 1] + "/stepping", "w").close()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
    return real(*rest)
arm.labelled_batch = slow
"""


def process(arm, out, *more, extra=""):
    code = DRIVER.format(arm=arm, extra=extra)
    command = [sys.executable, "-c", code, *SHORT, *ARMS[arm], "--out", out, "--name", "run", *more]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(child, happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.001)
        if child.poll() is not None:
            return False
    return True


def kill_all_over(arm, out, moments, *more):
    """Kill the run at each moment, then let it end; -> the steps reached, torn writes seen.

    A moment: inside a checkpoint's write, or after so many rows and, by its fraction, milliseconds.
    """
    directory, reached, torn = out / "run/seed0", [], 0
    config, beside = directory / "config.json", directory / "checkpoint.pt.new"
    log = directory / "metrics.csv"
    for moment in moments:
        beside.unlink(missing_ok=True)
        before = config.exists() and config.stat().st_ino
        child = process(arm, out, "--resume", *more)
        if moment == "checkpoint":
            alive = wait_for(child, beside.exists)
        else:  # once the run has begun, which renames a new config.json, and so many rows are new
            base = reached[-1] if reached else 0
            begun = lambda: config.exists() and config.stat().st_ino != before  # noqa: B023, E731
            grown = lambda: log.read_text().count("\n") - 1 >= base + int(moment)  # noqa: B023, E731
            alive = wait_for(child, begun) and wait_for(child, grown)
            time.sleep(moment % 1 / 20)
        assert alive, child.communicate()
        child.kill()
        child.communicate()
        torn += beside.exists()
        path = directory / "checkpoint.pt"
        state = torch.load(path, weights_only=True) if path.exists() else {"counts": {}}
        reached.append(state["counts"].get("total_step", 0))
        assert reached == sorted(reached)
        for row in rows(out) if path.exists() else []:
            assert None not in row
    child = process(arm, out, "--resume", *more)
    error = child.communicate(timeout=300)[1]  # reads on: a full pipe would stop the child
    assert child.returncode == 0, error
    return reached, torn


def test_three_kills_lose_nothing(tmp_path, undisturbed):
    arm, more = "pretrain_finetune", ("--steps", "60", "--eval-every", "1")
    expected = undisturbed(arm, *more)
    reached, torn = kill_all_over(arm, tmp_path, [0, "checkpoint", 2.5], *more)
    print("steps reached:", reached, "killed inside the checkpoint write:", torn)
    assert torn
    assert_same_run(tmp_path, expected)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_thirty_kills_lose_nothing(arm, tmp_path, undisturbed):
    more = ("--steps", "160", "--eval-every", "1")
    expected, draw = undisturbed(arm, *more), random.Random(arm)
    moments = ["checkpoint" if i % 3 == 1 else draw.uniform(0, 4) for i in range(29)]
    reached, torn = kill_all_over(arm, tmp_path, [0, *moments], *more)
    print(arm, "steps reached:", reached, "killed inside the checkpoint write:", torn)
    assert torn >= 5 and len({*reached}) > 10
    assert_same_run(tmp_path, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_step_and_the_run(number, tmp_path, undisturbed):
    arm, expected = "pretrain_finetune", undisturbed("pretrain_finetune")
    child = process(arm, tmp_path, extra=SLOW_STEP)
    assert wait_for(child, (tmp_path / "stepping").exists)
    child.send_signal(number)
    error = child.communicate(timeout=20)[1]
    assert child.returncode == 128 + number
    assert "stopped after pretrain step 1; the same command with --resume goes on" in error
    assert "Traceback" not in error
    assert start(arm, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, expected)


def test_a_second_signal_ends_at_once(tmp_path, undisturbed):
    """In a long evaluation, for which the first one waits."""
    arm, expected = "pretrain_finetune", undisturbed("pretrain_finetune")
    child = process(arm, tmp_path, extra=SLOW_EVALUATION)
    assert wait_for(child, (tmp_path / "evaluating").exists)  # step 2 of the second phase
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(2) == -signal.SIGTERM  # for a shell 143
    assert "Traceback" not in child.communicate()[1]
    assert checkpoint(tmp_path)["counts"]["total_step"] == 3
    assert start(arm, tmp_path, "--resume") == 0
    assert_same_run(tmp_path, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_run_begins_ends_at_once(number, tmp_path):
    child = process("maml_ssl", tmp_path, extra=SLOW_DATA)
    assert wait_for(child, (tmp_path / "loading").exists)
    child.send_signal(number)
    error = child.communicate(timeout=60)[1]
    assert child.returncode in (-number, 128 + number)
    if number == signal.SIGTERM:
        assert "Traceback" not in error
