"""Stopped, killed, out of disk space, with damaged files: it ends as if undisturbed; bad input."""

import contextlib
import csv
import functools
import importlib
import io
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pretext

ROOT, KEPT = Path(pretext.__file__).parent, tempfile.TemporaryDirectory()
SHORT = "--device cpu --width 4 --batch-size 8 --steps 4 --eval-every 2 --warmup-steps 3".split()
FINETUNE, MANY = "pretrain_finetune", ("--steps", 200, "--eval-every", 1)
ARMS = {  # rows at 0, 2 and 4; of the others after 2 steps of pretraining, then at 0 and 2
    "maml_ssl": ["--pretext", "rotation"],
    FINETUNE: ["--pretrain-steps", "2"],
    "linear_probe": ["--pretrain", "rotation", "--pretrain-steps", "2"],
}
DRAW = functools.cache(pretext.draw_shapes)
Cut = type("Cut", (BaseException,), {})  # the power goes: nothing in the program can catch this
Bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("exploded",))})  # when unpickled


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A folder of its own, 100 drawn images and 50 to test, one thread."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretext, "draw_shapes", lambda n, *which: DRAW(n // 20, *which))
    torch.set_num_threads(1)


def words(arm, out, *more):
    return [*SHORT, *ARMS[arm], "--out", str(out), "--name", "x", *map(str, more)]


def launch(arm, *flags):
    """Runs an arm here as from the command line; -> exit code, lines of error."""
    error, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", [f"{arm}.py", *flags])
        try:
            runpy.run_path(str(ROOT / f"{arm}.py"), run_name="__main__")
        except (SystemExit, Cut) as stop:
            code = -9 if isinstance(stop, Cut) else stop.code or 0
    return code, re.findall(rf"{arm}\.py: [^\r\n]*", error.getvalue())  # no bars of progress


def start(arm, out, *more):
    return launch(arm, *words(arm, out, *more))  # in OUT/x/seed0


def refused(expected, *command, run=start):
    """Asserts that an arm ends with code 2 and one line with these words; -> the line."""
    code, said = run(*command)
    assert (code, len(said)) == (2, 1) and all(word in said[0] for word in expected), (code, said)
    return said[0]


@functools.cache
def undisturbed(arm, *more):
    """-> the directory of that run, made once."""
    out = Path(tempfile.mkdtemp(dir=KEPT.name))
    assert start(arm, out, *more) == (0, [])
    return out


def rows(out, *without):
    table = csv.DictReader((out / "x/seed0/metrics.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in ("seconds", *without)} for row in table]


def checkpoint(out):
    return torch.load(out / "x/seed0/checkpoint.pt", weights_only=True)


def files(out):
    return {path: path.read_bytes() for path in out.glob("x/seed0/*")}


def assert_nothing_lost(out, arm, *more):
    """The run in `out` goes on when its command is given again, and ends as the undisturbed one."""
    assert start(arm, out, *more) == (0, [])
    whole = undisturbed(arm, *more)
    assert rows(out) == rows(whole) and len(rows(out)) >= 3
    ends = [[checkpoint(x)[k] for k in ("model", "averaged", "optimizer")] for x in (out, whole)]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def fail(error):
    raise error


def fault_at(patch, which, act):
    """Calls `act` at the `which`-th place: a file half written, not yet in place, a step."""
    places, write, replace, step = [], Path.write_bytes, os.replace, torch.optim.AdamW.step

    def here(place):
        places.append(place)
        return act() if len(places) == which else None

    def torn(path, content):
        write(path, content[: len(content) // 2])
        here("write")
        write(path, content)

    patch.setattr(Path, "write_bytes", torn)
    patch.setattr(os, "replace", lambda *paths: (here("replace"), replace(*paths)))
    patch.setattr(torch.optim.AdamW, "step", lambda *args: (here("step"), step(*args)))
    return places


@pytest.mark.parametrize("error", [Cut(), OSError(28, "No space left on device")])
@pytest.mark.parametrize(("arm", "stride"), [("maml_ssl", 5), (FINETUNE, 1), ("linear_probe", 4)])
def test_a_run_cut_off_anywhere_or_out_of_space_goes_on(arm, stride, error, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        places = fault_at(patch, 0, error)
        assert start(arm, tmp_path / "0") == (0, [])
    assert len(places) == 3 * 3 * 2 + 4  # of each row's three files two, and four steps
    expected = (-9, []) if isinstance(error, Cut) else (2, [f"{arm}.py: {error}"])
    for which in range(1, len(places) + 1, stride):
        out = tmp_path / str(which)
        with pytest.MonkeyPatch.context() as patch:
            fault_at(patch, which, lambda: fail(error))
            assert start(arm, out) == expected
        assert_nothing_lost(out, arm)


def half(arm, out, *more):
    with pytest.MonkeyPatch.context() as patch:  # cut off before its last step
        fault_at(patch, 16, lambda: fail(Cut()))
        assert start(arm, out, *more) == (-9, [])
    assert checkpoint(out)["total_step"] == 2


def test_a_finished_run_says_so_overwrite_starts_again_and_two_runs_do_not_mix(tmp_path, capsys):
    half(FINETUNE, tmp_path)
    assert_nothing_lost(tmp_path, FINETUNE)
    before = files(tmp_path)
    capsys.readouterr()
    assert start(FINETUNE, tmp_path) == (0, [])
    assert "finished" in capsys.readouterr().out and files(tmp_path) == before
    assert start(FINETUNE, tmp_path, "--overwrite", "--lr", 0.1) == (0, [])
    assert_nothing_lost(tmp_path, FINETUNE, "--lr", 0.1)
    with pytest.MonkeyPatch.context() as patch:  # while one is in its last step, another ends it
        fault_at(patch, 16, lambda: start(FINETUNE, tmp_path / "b"))
        refused(["another run has written there", "--name"], FINETUNE, tmp_path / "b")
    assert_nothing_lost(tmp_path / "b", FINETUNE)


def test_a_changed_flag_is_refused_by_its_name_and_changed_data_too(monkeypatch):
    before = files(out := undisturbed("maml_ssl"))
    flags = "lr .003,width 8,pretext contrastive,inner-lr 1,first-order,labels-per-class 5"
    for flag in flags.split(","):
        said = refused(["--name", "--overwrite"], "maml_ssl", out, *f"--{flag}".split())
        assert f"holds a run with {flag.split()[0].replace('-', '_')} " in said
    images, labels = (x.clone() for x in DRAW(100))
    images[0, 0, 0, 0] ^= 1  # one bit of one pixel
    monkeypatch.setattr(pretext, "draw_shapes", lambda *_: (images, labels))
    refused(["holds a run with data ", "--overwrite"], "maml_ssl", out)
    assert files(out) == before


def test_steps_may_grow_but_not_those_of_pretraining(tmp_path):
    half(FINETUNE, tmp_path)
    assert_nothing_lost(tmp_path, FINETUNE, "--steps", 8)
    refused([" pretrain_steps 2, not 4"], FINETUNE, undisturbed(FINETUNE), "--pretrain-steps", 4)


@pytest.mark.parametrize("arm", ARMS)
def test_eval_every_changes_no_row_but_for_the_mean_in_train_loss(arm, tmp_path):
    assert start(arm, tmp_path, "--eval-every", 1) == (0, [])
    expected, each = rows(undisturbed(arm), "train_loss"), rows(tmp_path, "train_loss")
    assert [row for row in each if row in expected] == expected
    *_, a, b = (float(row["train_loss"] or 0) for row in rows(tmp_path))
    assert float(rows(undisturbed(arm))[-1]["train_loss"]) == pytest.approx((a + b) / 2, abs=1e-5)


@pytest.mark.parametrize("bad", ["bomb", "bomb inside", "model", "text", 0, 99, -99])
def test_what_is_no_checkpoint_is_refused_and_runs_nothing(bad, tmp_path):
    half("maml_ssl", tmp_path)
    path, state = tmp_path / "x/seed0/checkpoint.pt", checkpoint(tmp_path)
    other = {"bomb": Bomb(), "bomb inside": {**state, "optimizer": Bomb()}, "model": state["model"]}
    if bad in other:
        torch.save(other[bad], path)
    else:
        path.write_bytes(b"no checkpoint" if bad == "text" else path.read_bytes()[:bad])
    if "bomb" in str(bad):
        torch.load(path, weights_only=False)
        Path("exploded").rmdir()  # the bomb is real
    before = files(tmp_path)
    line = refused([str(path), "damaged", "--overwrite"], "maml_ssl", tmp_path)
    assert "weights_only" not in line  # no advice to defuse the check
    assert files(tmp_path) == before and not Path("exploded").exists()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("arm", ARMS)
def test_what_is_not_finite_is_not_applied(arm, kind, tmp_path):
    calls = []

    def spoiled(logits, *args, real=F.cross_entropy, **named):
        calls.append(logits.shape[1] == 10)  # not of rotation
        zero = (logits - logits).sum()
        wrong = zero.abs().sqrt() if kind == "gradient" else zero / 0  # sqrt'(0) = inf
        return real(logits, *args, **named) + (wrong if sum(calls) > 1 else 0)

    with pytest.MonkeyPatch.context() as patch:
        places = fault_at(patch, 0, None)
        patch.setattr(F, "cross_entropy", spoiled)
        refused([" step 2: ", kind, "nan", "--lr"], arm, tmp_path)
    assert places[-1] == "step" and places.count("step") == (3 if arm == "linear_probe" else 1)
    assert_nothing_lost(tmp_path, arm)


DRIVER = """
import runpy, signal, sys, pretext
pretext.draw_shapes = lambda n, *which, draw=pretext.draw_shapes: draw(n // 20, *which)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
KILLS = [pytest.param(arm, signal.SIGKILL, 30, marks=pytest.mark.slow) for arm in ARMS]
KILLS += [("linear_probe", signal.SIGINT, 1), (FINETUNE, signal.SIGKILL, 1)]


@pytest.mark.parametrize(("arm", "number", "times"), KILLS)
def test_after_ctrl_c_or_kill_9_of_a_real_process_it_goes_on(arm, number, times, tmp_path):
    log, moments, reached = tmp_path / "x/seed0/metrics.csv", random.Random(arm), []
    call = [sys.executable, "-c", DRIVER, str(ROOT / f"{arm}.py"), *words(arm, tmp_path, *MANY)]
    settings = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    settings |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    count = lambda: log.read_text().count("\n") if log.exists() else 0  # noqa: E731
    for _ in range(times):
        child, until = subprocess.Popen(call, **settings), count() + moments.uniform(1, 4)
        while count() < until and child.poll() is None:
            time.sleep(0.001)
        time.sleep(until % 1 / 20)  # at no particular moment of a step
        child.send_signal(number)
        error = child.communicate()[1]
        said = [error.count(x) for x in ("stopped; the same command goes on", "Traceback")]
        assert [child.returncode, *said] == ([130, 1, 0] if number == signal.SIGINT else [-9, 0, 0])
        reached.append(checkpoint(tmp_path)["total_step"])
    assert reached == sorted(reached) and len({*reached}) > times / 2 and reached[-1] < 200
    assert_nothing_lost(tmp_path, arm, *MANY)


# --- bad input: one line that names the value or the remedy, exit code 2, nothing written ---
SMALL = "--steps 2 --width 4 --batch-size 8".split()
ANY = """
--dataset cifar11 : cifar11 : folder : coloured_shapes
--device meta : --device : 'meta' : 'cpu'
--lr -1 : learning rate : -1.0
--steps 0 : --steps : 1 up
--image-size 12 : --image-size : 8
--labels-per-class 11 : --labels-per-class 11 : 10
--labels-per-class 1 --eval-on val : --labels-per-class 1 : val
"""
MAML = """
--first-order --pretext-weight 0 : --first-order : --pretext-weight 0
--image-size 40 --pretext relative_position : relative_position : 40 : --image-size 32
--inner-steps -1 : --inner-steps
--inner-lr -1 : --inner-lr
--support-batch-size 0 : --support-batch-size
"""
PRETRAINING = """
--pretrain supervised rotation : supervised rotation
--pretrain rotatoin : --pretrain : 'rotatoin' : 'rotation' : 'supervised'
--pretrain-steps 3 : --pretrain-steps 3 : 2
--source nowhere : nowhere : folder
"""


@pytest.mark.parametrize("arm", ARMS)
def test_bad_commands_are_refused_in_one_line_and_write_nothing(arm):
    for row in ANY.splitlines()[1:] + (MAML if arm == "maml_ssl" else PRETRAINING).splitlines()[1:]:
        flags, *said = row.split(" : ")
        refused(said, arm, *SMALL, *flags.split(), run=launch)
    assert not [*Path().iterdir()]


def folder(name, count=3):
    for part in ("train/a", "train/b", "test/a", "test/b"):
        Path(name, part).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (40, 30), (9 * k, 80, 90)).save(f"{name}/{part}/{k}.png")
    return name


@pytest.mark.parametrize("arm", ARMS)
def test_folders_that_do_not_fit_are_refused(arm):
    Path(folder("no-train"), "train").rename("elsewhere")
    Path(folder("odd"), "train/b").rename("odd/train/strange")
    Path(folder("empty"), "train/nothing").mkdir()
    Path(folder("text"), "train/a/note.txt").write_text("no image")
    said = {"no-train": "train", "odd": "strange", "empty": "nothing", "text": "note.txt"}
    said |= {folder("none", 0): "no valid file"}
    before = {*Path().rglob("*")}
    for name, word in said.items():
        refused([word], arm, *SMALL, "--dataset", name, "--source", "shapes", run=launch)
    assert {*Path().rglob("*")} == before


def test_batches_that_leave_a_task_no_image_and_folders_without_a_needed_source():
    for size in "3", "100":  # fewer than the tasks, all there are
        refused(["--batch-size"], "maml_ssl", *SMALL, "--batch-size", size, run=launch)
    few = [*SMALL, "--batch-size", "2", "--dataset", folder("f")]
    both = ["--pretext-images", "both"]
    for arm in FINETUNE, "linear_probe":
        for flags in [], ["--pretrain", "rotation", *both]:
            refused(["--source"], arm, *few, *flags, run=launch)
        for flags in ["--pretrain-steps", "0"], ["--pretrain", "rotation"]:
            assert launch(arm, *few, *flags) == (0, [])
    refused(["--source"], "maml_ssl", *few, *both, run=launch)
    assert launch("maml_ssl", *few, "--pretext", "rotation") == (0, [])


WORDS = "0 -1 64 1e30 -1e30 1e-30 nan inf -nan ² - -- 0.5 . .. / cifar10 rotation none supervised"
WORDS += " meta \N{CAT FACE} %s {} 0x1f 1_0 --lr=1 @file " + "9" * 30 + " " + "x" * 5000


@pytest.mark.parametrize("arm", ARMS)
def test_a_thousand_random_commands_are_accepted_or_refused_in_one_line(arm, capsys, monkeypatch):
    choose, accepted, module = random.Random(arm), 0, importlib.import_module(arm)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(module, "parse", lambda parser, **_: sys.exit(parser))
        module.parse_args()
    actions = [action for action in stop.value.code._actions if action.dest != "help"]
    for _ in range(1000):
        words = []
        for action in choose.choices(actions, k=choose.randint(0, 6)):
            fine = ["cpu"] if action.dest == "device" else [*(action.choices or ("1", "8", "0.5"))]
            count = int(action.nargs != 0) + (choose.random() < 0.05)
            pool = fine if choose.random() < 0.9 else ["", "\n", "a b", *WORDS.split()]
            words += [action.option_strings[0], *choose.choices(pool, k=count)]
        monkeypatch.setattr(sys, "argv", [arm, *words])
        try:
            args = module.parse_args()
        except SystemExit as stop:
            out, error = capsys.readouterr()
            assert (stop.code, out, len(error.splitlines())) == (2, "", 1), (words, error)
            continue
        accepted += 1
        assert min(args.steps, args.batch_size, args.width, args.image_size) > 0, words
        assert "--name" in words or ("/" not in args.name and 0 < len(args.name) <= 120)
        assert arm == "maml_ssl" or 0 <= args.pretrain_steps <= args.steps, words
    assert 100 < accepted < 900 and not "".join(capsys.readouterr()), accepted
