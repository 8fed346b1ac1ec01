"""Stopped, killed, out of space, with damaged files: a run ends as if undisturbed."""

import contextlib
import csv
import functools
import importlib
import io
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import pretext

ROOT, KEPT = Path(pretext.__file__).parent, tempfile.TemporaryDirectory()
SHORT = "--device cpu --width 4 --batch-size 8 --steps 4 --eval-every 2"
SHORT = f"{SHORT} --image-size 16 --warmup-steps 3".split()
MAML, FINETUNE, PROBE = "maml_ssl", "pretrain_finetune", "linear_probe"
ARMS = {  # rows at 0, 2 and 4; or after 2 steps of pretraining, then at 0 and 2
    MAML: ["--pretext", "rotation"],
    FINETUNE: ["--dataset", "shapes", "--pretrain-steps", "2"],
    PROBE: ["--dataset", "shapes", "--pretrain", "rotation", "--pretrain-steps", "2"],
}
DRAW = functools.cache(pretext.draw_shapes)
DRAW_COLOURED = functools.cache(pretext.draw_coloured_shapes)


class Cut(BaseException):
    """The power goes: nothing in the program can catch this."""


class Bomb:
    def __reduce__(self):  # when unpickled
        return os.mkdir, ("exploded",)


def draw_few(patch, part, module=pretext):
    """Of drawn images only a part, for the time of a test."""
    few = {"draw_shapes": (DRAW, part), "draw_coloured_shapes": (DRAW_COLOURED, 25)}
    for name, (draw, less) in few.items():
        some = lambda n, *which, draw=draw, less=less: draw(n // less, *which)  # noqa: E731
        patch.setattr(module, name, some)


def folder(name, homes=("",), count=3, classes="ab"):
    """NAME/{train,test}/CLASS/HOME/*.png, so many of each, all different."""
    numbers = np.random.default_rng(0)
    for split in "train", "test":
        for kind in classes:
            for home in homes:
                (place := Path(name, split, kind, home)).mkdir(parents=True)
                for k in range(count):
                    pixels = numbers.integers(0, 256, (18, 16, 3), "uint8")
                    Image.fromarray(pixels).save(place / f"{k}.png")
    return str(name)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """A folder of its own, few drawn images, one thread."""
    monkeypatch.chdir(tmp_path)
    draw_few(monkeypatch, 20)
    torch.set_num_threads(1)


def words(arm, out, *more):
    return [*SHORT, *ARMS[arm], "--out", str(out), "--name", "x", *map(str, more)]


def launch(arm, *flags):
    """Runs an arm here as from the command line; -> exit code, lines of error."""
    error, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(error):
        patch.setattr(sys, "argv", [f"{arm}.py", *map(str, flags)])
        try:
            runpy.run_path(str(ROOT / f"{arm}.py"), run_name="__main__")
        except (SystemExit, Cut) as stop:
            code = -9 if isinstance(stop, Cut) else stop.code or 0
    return code, error.getvalue().splitlines()  # no bars of progress


def start(arm, out, *more):
    return launch(arm, *words(arm, out, *more))  # in OUT/x/seed0


def refused(expected, *command, run=start):
    """Asserts that an arm ends with code 2 and one line with these words; -> it."""
    code, said = run(*command)
    assert (code, len(said)) == (2, 1), (code, said)
    assert said[0].startswith(f"{command[0]}.py: "), said
    assert all(word in said[0] for word in expected), (said, expected)
    return said[0]


@functools.cache
def undisturbed(arm, *more):
    """-> the directory of that run, made once."""
    out = Path(tempfile.mkdtemp(dir=KEPT.name))
    assert start(arm, out, *more) == (0, [])
    return out


def rows(out, *without):
    log, left_out = (out / "x/seed0/metrics.csv").read_text(), {"seconds", *without}
    table = csv.DictReader(log.splitlines())
    return [{k: v for k, v in row.items() if k not in left_out} for row in table]


def checkpoint(out):
    return torch.load(out / "x/seed0/checkpoint.pt", weights_only=True)


def files(out):
    return {path: path.read_bytes() for path in out.glob("x/seed0/*")}


def assert_nothing_lost(out, arm, *more):
    """The run in `out` goes on when its command is given again, as if undisturbed."""
    assert start(arm, out, *more) == (0, [])
    whole = undisturbed(arm, *more)
    assert rows(out) == rows(whole) and len(rows(out)) >= 3
    parts = ("model", "averaged", "optimizer")
    ends = [[checkpoint(x)[part] for part in parts] for x in (out, whole)]
    torch.testing.assert_close(*ends, rtol=0, atol=0)
    tables = [[*x.glob("x/seed0/environments.csv")] for x in (out, whole)]
    assert len(tables[0]) == len(tables[1]) == (arm == MAML)
    for table, same in zip(*tables, strict=True):
        assert table.read_text() == same.read_text()


def fail(error):
    raise error


def fault_at(patch, which, act, kind=""):
    """Calls `act` at the which-th place: a file half written, or to be put in its
    place, or a step; or at the which-th of one kind."""
    places, write, replace = [], Path.write_bytes, os.replace
    step = torch.optim.AdamW.step

    def here(place):
        places.append(place)
        if place.startswith(kind) and which == sum(p.startswith(kind) for p in places):
            act()

    def torn(path, content):
        write(path, content[: len(content) // 2])
        here("write")
        write(path, content)

    patch.setattr(Path, "write_bytes", torn)
    patch.setattr(os, "replace", lambda *paths: (here("replace"), replace(*paths)))
    patch.setattr(torch.optim.AdamW, "step", lambda *args: (here("step"), step(*args)))
    return places


@pytest.mark.parametrize("error", [Cut(), OSError(28, "No space left on device")])
@pytest.mark.parametrize(("arm", "stride"), [(MAML, 7), (FINETUNE, 3), (PROBE, 5)])
def test_a_run_cut_off_anywhere_or_out_of_space_goes_on(arm, stride, error, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        places = fault_at(patch, 0, error)
        assert start(arm, tmp_path / "0") == (0, [])
    each = 4 if arm == MAML else 3  # files of a row: written, put in place; four steps
    assert len(places) == 3 * each * 2 + 4
    for which in range(1, len(places) + 1, stride):
        out = tmp_path / str(which)
        with pytest.MonkeyPatch.context() as patch:
            fault_at(patch, which, lambda: fail(error))
            code, said = start(arm, out)
        if isinstance(error, Cut):
            assert (code, said) == (-9, [])
        else:
            assert code == 2 and not [*out.rglob("*.new")]  # nothing half written
            where = "" if places[which - 1] == "step" else f"{out}/x/seed0: "
            assert len(said) == 1 and said[0].startswith(f"{arm}.py: {where}")
            assert said[0].endswith("No space left on device")
        assert_nothing_lost(out, arm)


def half(arm, out, *more):
    with pytest.MonkeyPatch.context() as patch:  # cut off before its last step
        fault_at(patch, 4, lambda: fail(Cut()), "step")
        assert start(arm, out, *more) == (-9, [])
    assert checkpoint(out)["total_step"] == 2


def test_a_finished_run_says_so_and_two_runs_do_not_mix(tmp_path, capsys):
    half(FINETUNE, tmp_path)
    assert_nothing_lost(tmp_path, FINETUNE)
    before = files(tmp_path)
    capsys.readouterr()
    assert start(FINETUNE, tmp_path) == (0, [])
    assert "finished" in capsys.readouterr().out and files(tmp_path) == before
    assert start(FINETUNE, tmp_path, "--overwrite", "--lr", 0.1) == (0, [])
    assert_nothing_lost(tmp_path, FINETUNE, "--lr", 0.1)
    with pytest.MonkeyPatch.context() as patch:  # in one's last step another ends it
        fault_at(patch, 4, lambda: start(FINETUNE, tmp_path / "b"), "step")
        refused(["another run writes there", "--name"], FINETUNE, tmp_path / "b")
    assert_nothing_lost(tmp_path / "b", FINETUNE)


def test_a_changed_flag_is_refused_by_its_name_and_changed_data_too(monkeypatch):
    before = files(out := undisturbed(MAML))
    flags = "lr .003,width 8,pretext contrastive,inner-lr 1,first-order,no-mirror"
    flags += ",labels-per-class 5,balance nash --inner-lr 3,meta-batch-size 1"
    for flag in flags.split(","):
        said = refused(["--name", "--overwrite"], MAML, out, *f"--{flag}".split())
        name = flag.split()[0].replace("no-", "").replace("-", "_")
        assert f"holds a run with {name} " in said

    def draw(*which, real=pretext.draw_coloured_shapes):
        images, *rest = real(*which)
        images = images.clone()
        images[0, :, 0, 0] ^= 128  # one pixel
        return images, *rest

    monkeypatch.setattr(pretext, "draw_coloured_shapes", draw)
    refused(["holds a run with data ", "--overwrite"], MAML, out)
    assert files(out) == before


def test_a_folder_is_what_it_holds_however_its_path_is_spelled(tmp_path, monkeypatch):
    home = folder(tmp_path / "F", ["north", "south"])
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("below").mkdir()
    flags = [*SHORT, "--environments", "--pretext", "rotation", "--eval-every", 1]
    spelled = [".", "F"], [".", "F/"], ["below", "../F"], [".", "~/F"]
    for place, path in spelled:
        monkeypatch.chdir(tmp_path / place)
        more = ("--dataset", path, "--out", "~/runs")
        with monkeypatch.context() as patch:  # one step each, and the last one ends
            fault_at(patch, 2, lambda: fail(Cut()), "step")
            assert launch(MAML, *flags, *more)[0] == (0 if "~" in path else -9)
    (log,) = tmp_path.glob("runs/*/seed0/metrics.csv")  # one run
    assert log.read_text().count("target") == 1 + 4
    picture = Path(home, "train/a/north/0.png")
    changed = np.asarray(Image.open(picture)) ^ 1
    Image.fromarray(changed).save(picture)
    refused(["holds a run with data "], MAML, *flags, *more, run=launch)


def test_steps_may_grow_but_not_those_of_pretraining(tmp_path):
    half(FINETUNE, tmp_path)
    assert_nothing_lost(tmp_path, FINETUNE, "--steps", 8)
    more = ("--pretrain-steps", 4)
    refused([" pretrain_steps 2, not 4"], FINETUNE, undisturbed(FINETUNE), *more)


def test_a_run_from_an_encoder_goes_on_wherever_that_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    before = undisturbed(FINETUNE) / "x/seed0/checkpoint.pt"
    Path("a.pt").write_bytes(before.read_bytes())
    half(MAML, tmp_path, "--encoder", "a.pt")
    Path("a.pt").rename("b.pt")
    assert_nothing_lost(tmp_path, MAML, "--encoder", "~/b.pt")
    other = undisturbed(PROBE) / "x/seed0/checkpoint.pt"
    for flags in [], ["--encoder", other]:
        refused(["holds a run with encoder_weights "], MAML, tmp_path, *flags)
    Path("b.pt").unlink()
    trained = importlib.import_module(MAML).load_trained("x/seed0/checkpoint.pt")
    for name, x in trained.model.state_dict().items():
        assert torch.equal(x, checkpoint(tmp_path)["averaged"][f"module.{name}"])


@pytest.mark.parametrize("arm", ARMS)
def test_an_encoder_that_does_not_fit_is_refused(arm):
    file = undisturbed(MAML) / "x/seed0/checkpoint.pt"
    said = [str(file), "has --backbone conv --width 4", "give the same"]
    for flags in ["--width", 8], ["--backbone", "resnet18"]:
        refused(said, arm, *SMALL, "--encoder", file, *flags, run=launch)
    Path("text.pt").write_text("no file")
    torch.save(checkpoint(undisturbed(MAML))["model"], "model.pt")
    torch.save({**checkpoint(undisturbed(MAML)), "optimizer": Bomb()}, "bomb.pt")
    before = {*Path().iterdir()}
    for bad in "text.pt", "model.pt", "bomb.pt":
        line = refused([bad, "checkpoint"], arm, *SMALL, "--encoder", bad, run=launch)
        assert "weights_only" not in line
    assert {*Path().iterdir()} == before


@pytest.mark.parametrize("arm", ARMS)
def test_eval_every_changes_no_row_but_for_the_mean_in_train_loss(arm, tmp_path):
    assert start(arm, tmp_path, "--eval-every", 1) == (0, [])
    expected = rows(undisturbed(arm), "train_loss")
    each = rows(tmp_path, "train_loss")
    assert [row for row in each if row in expected] == expected
    *_, a, b = (float(row["train_loss"] or 0) for row in rows(tmp_path))
    mean = float(rows(undisturbed(arm))[-1]["train_loss"])
    assert mean == pytest.approx((a + b) / 2, abs=1e-5)


@pytest.mark.parametrize("bad", ["bomb", "bomb inside", "model", "text", 0, 99, -99])
def test_what_is_no_checkpoint_is_refused_and_runs_nothing(bad, tmp_path):
    half(MAML, tmp_path)
    path, state = tmp_path / "x/seed0/checkpoint.pt", checkpoint(tmp_path)
    other = {"bomb": Bomb(), "model": state["model"]}
    other |= {"bomb inside": {**state, "optimizer": Bomb()}}
    if bad in other:
        torch.save(other[bad], path)
    else:
        path.write_bytes(b"no file" if bad == "text" else path.read_bytes()[:bad])
    if "bomb" in str(bad):
        torch.load(path, weights_only=False)
        Path("exploded").rmdir()  # the bomb is real
    before = files(tmp_path)
    line = refused([str(path), "damaged", "--overwrite"], MAML, tmp_path)
    assert "weights_only" not in line  # no advice to defuse the check
    assert files(tmp_path) == before and not Path("exploded").exists()


@pytest.mark.parametrize("kind", ["the loss is nan", "gradient's norm nan"])
@pytest.mark.parametrize("arm", ARMS)
def test_what_is_not_finite_is_not_applied(arm, kind, tmp_path):
    calls = []

    def spoiled(logits, *args, real=F.cross_entropy, **named):
        calls.append(logits.shape[1] in (2, 10))  # not of rotation
        zero = (logits - logits).sum()
        wrong = zero.abs().sqrt() if "norm" in kind else zero / 0  # sqrt'(0) = inf
        bad = sum(calls) > (2 if arm == MAML else 1)  # MAML: two environments a step
        return real(logits, *args, **named) + (wrong if bad else 0)

    with pytest.MonkeyPatch.context() as patch:
        places = fault_at(patch, 0, None)
        patch.setattr(F, "cross_entropy", spoiled)
        refused([" step 2: ", kind, "--lr"], arm, tmp_path)
    assert places[-1] == "step"
    assert places.count("step") == (3 if arm == PROBE else 1)
    assert_nothing_lost(tmp_path, arm)


DRIVER = """
import runpy, signal, sys, pretext
draw, coloured = pretext.draw_shapes, pretext.draw_coloured_shapes
pretext.draw_shapes = lambda n, *which: draw(n // 20, *which)
pretext.draw_coloured_shapes = lambda n, *which: coloured(n // 25, *which)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
KILLS = [pytest.param(a, signal.SIGKILL, 30, marks=pytest.mark.slow) for a in ARMS]
KILLS += [(PROBE, signal.SIGINT, 1), (FINETUNE, signal.SIGKILL, 1)]


@pytest.mark.parametrize(("arm", "number", "times"), KILLS)
def test_after_ctrl_c_or_kill_9_a_process_goes_on(arm, number, times, tmp_path):
    log, reached = tmp_path / "x/seed0/metrics.csv", []
    steps = 200 if times > 1 else 40
    many = ("--steps", steps, "--eval-every", 1)
    moments, script = random.Random(arm), str(ROOT / f"{arm}.py")
    call = [sys.executable, "-c", DRIVER, script, *words(arm, tmp_path, *many)]
    settings = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    settings |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}

    def count():
        return log.read_text().count("\n") if log.exists() else 0

    for _ in range(times):
        child = subprocess.Popen(call, **settings)
        until = count() + moments.uniform(1, 4)
        while count() < until and child.poll() is None:
            time.sleep(0.001)
        time.sleep(until % 1 / 20)  # at no particular moment of a step
        child.send_signal(number)
        error = child.communicate()[1]
        if number == signal.SIGINT:
            line = f"{arm}.py: stopped; the same command goes on from the last row"
            assert child.returncode == 130 and error.count("\n") == 1
            assert error.startswith(line)
        else:
            assert (child.returncode, error) == (-9, "")
        reached.append(checkpoint(tmp_path)["total_step"])
    assert reached == sorted(reached) and len({*reached}) > times / 2
    assert reached[-1] < steps
    assert_nothing_lost(tmp_path, arm, *many)


# --- bad input: one line that names the value or the remedy, code 2, nothing written
SMALL = "--steps 2 --width 4 --batch-size 8".split()
ANY = """
--dataset cifar11 : cifar11 : folder : coloured_shapes
--device meta : --device : 'meta' : 'cpu'
--lr -1 : learning rate : -1.0
--steps 0 : --steps : 1 up
--meta-batch-size 0 : --meta-batch-size : 1 up
--image-size 12 : --image-size : 8
--environments : --environments : folder
--encoder nowhere.pt : --encoder nowhere.pt : no such file
--dataset shapes --labels-per-class 11 : --labels-per-class 11 : 10
--dataset shapes --labels-per-class 1 --eval-on val : --labels-per-class : val
"""
OWN = {}
OWN[MAML] = """
--first-order --pretext-weight 0 : --first-order : --pretext-weight 0
--image-size 40 --pretext relative_position : relative_position : 40 : --image-size 32
--dataset shapes --image-size 8 --pretext masked_autoencoding : 8 : --image-size 16
--inner-steps -1 : --inner-steps
--inner-lr -1 : --inner-lr
--support-batch-size 0 : --support-batch-size
--pretext learned_loss --first-order --pretext-weight 0 : learned_loss : second order
--pretext learned_labels --inner-lr 0 --pretext-weight 0 : learned_labels : inner loop
--pretext rotation learned_labels : --pretext-weight : learned_labels : 0
--balance nash --inner per-task : --balance nash : --inner joint
--balance nash --inner-lr 0 : --balance nash
--pretext-images both : --pretext-images : environment
--dataset shapes --pretext-images both --source nowhere : nowhere : folder
--inner per-task --batch-size 7 : --batch-size 7 : 8
--dataset shapes --batch-size 3 : --batch-size 3 : 4
"""
OWN[FINETUNE] = OWN[PROBE] = """
--pretrain supervised rotation : supervised rotation
--pretrain rotatoin : --pretrain : 'rotatoin' : 'rotation' : 'supervised'
--pretrain learned_labels : learned_labels : outer loop
--pretrain rotation learned_loss : learned_loss : outer loop
--pretrain-steps 3 : --pretrain-steps 3 : 2
--source nowhere : nowhere : folder
"""


@pytest.mark.parametrize("arm", ARMS)
def test_bad_commands_are_refused_in_one_line_and_write_nothing(arm):
    for row in (ANY + OWN[arm]).strip().replace("\n\n", "\n").splitlines():
        flags, *said = row.split(" : ")
        refused(said, arm, *SMALL, *flags.split(), run=launch)
    assert not [*Path().iterdir()]


@pytest.mark.parametrize("arm", ARMS)
def test_folders_that_do_not_fit_are_refused(arm):
    Path(folder("no-train"), "train").rename("elsewhere")
    Path(folder("odd"), "train/b").rename("odd/train/strange")
    Path(folder("empty"), "train/nothing").mkdir()
    Path(folder("text"), "train/a/note.txt").write_text("no image")
    said = {"no-train": "train", "odd": "strange", "empty": "nothing"}
    said |= {"text": "note.txt", folder("none", count=0): "no image"}
    before = {*Path().rglob("*")}
    for name, word in said.items():
        data = ("--dataset", name, "--source", "shapes")
        refused([word], arm, *SMALL, *data, run=launch)
    assert {*Path().rglob("*")} == before


def test_what_a_run_needs_is_checked_before_its_first_evaluation():
    """Enough images for each inner loop and its support; a source, if it is used."""
    many = ["--dataset", folder("many", "123456"), "--environments"]
    many += [*SMALL, "--pretext", "rotation", "contrastive", "--inner", "per-task"]
    said = ["--batch-size 7", "4 environments", " 8"]
    refused(said, MAML, *many, "--batch-size", 7, run=launch)
    assert launch(MAML, *many, "--batch-size", 7, "--meta-batch-size", 3) == (0, [])
    few = [*SMALL, "--batch-size", "2", "--dataset", folder("few")]
    both = ["--pretext-images", "both"]
    for arm in FINETUNE, PROBE:
        for flags in [], ["--pretrain", "rotation", *both]:
            refused(["--source"], arm, *few, *flags, run=launch)
        for flags in ["--pretrain-steps", "0"], ["--pretrain", "rotation"]:
            assert launch(arm, *few, *flags) == (0, [])
    refused(["--source"], MAML, *few, *both, run=launch)
    assert launch(MAML, *few, "--pretext", "rotation") == (0, [])


@pytest.mark.parametrize("arm", ARMS)
def test_python_OO_ends_the_same(arm, tmp_path, monkeypatch):
    def stripped(name, names):  # no docstrings, no assertions
        path = ROOT / f"{name}.py"
        names |= {"__file__": str(path), "__doc__": None}
        exec(compile(path.read_text(), path, "exec", optimize=2), names)

    data = types.ModuleType("pretext")
    stripped("pretext", vars(data))
    draw_few(monkeypatch, 20, data)
    monkeypatch.setitem(sys.modules, "pretext", data)
    monkeypatch.setattr(sys, "argv", [arm, *words(arm, tmp_path)])
    stripped(arm, {"__name__": "__main__"})
    assert rows(tmp_path) == rows(undisturbed(arm))


def test_ranks_that_torchrun_did_not_give_do_no_harm(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    bad = {"0 of abc": "WORLD_SIZE", "5 of 2": "WORLD_SIZE", "-1 of 2": "RANK"}
    bad |= {"0.5 of ": "RANK", "0 of 2": "MASTER_ADDR"}
    fine = ["1 of unset", " of ", "3 of 1", "0 of 1"]
    for i, both in enumerate([*bad, *fine]):
        for name, value in zip(("RANK", "WORLD_SIZE"), both.split(" of "), strict=True):
            monkeypatch.setenv(name, value)
            if value == "unset":
                monkeypatch.delenv(name)
        if both in bad:
            refused([bad[both]], FINETUNE, tmp_path / str(i))
        else:
            assert start(FINETUNE, tmp_path / str(i)) == (0, [])
            assert rows(tmp_path / str(i)) == rows(undisturbed(FINETUNE))
    assert len([*Path().iterdir()]) == len(fine)


WORDS = "0 -1 64 1e30 -1e30 1e-30 nan inf -nan ² - -- 0.5 . .. / cifar10 none ~ ~x %s"
WORDS += " rotation supervised learned_loss meta \N{CAT FACE} {} 0x1f 1_0 --lr=1 @file"
WORDS = ["", "\n", "a b", *WORDS.split(), "9" * 30, "x" * 5000]


@pytest.mark.parametrize("arm", ARMS)
def test_a_thousand_random_commands_run_or_end_in_one_line(arm, capsys, monkeypatch):
    choose, module = random.Random(arm), importlib.import_module(arm)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [arm])
        patch.setattr(module, "parse", lambda parser, *_: sys.exit(parser))
        module.parse_args()
    actions = [a for a in stop.value.code._actions if a.dest != "help"]
    fine = {"device": ["cpu"]} | dict.fromkeys(("dataset", "source"), pretext.DATASETS)
    accepted = []
    for _ in range(1000):
        words, before = [], len(accepted)
        for action in choose.choices(actions, k=choose.randint(0, 6)):
            good = fine.get(action.dest, action.choices) or ("1", "8", "0.5")
            pool = [*good] if choose.random() < 0.9 else WORDS
            count = int(action.nargs != 0) + (choose.random() < 0.05)
            words += [action.option_strings[0], *choose.choices(pool, k=count)]
        monkeypatch.setattr(sys, "argv", [arm, *words])
        try:
            module.start(lambda: accepted.append(module.parse_args()))
        except SystemExit as stop:
            out, error = capsys.readouterr()
            found = (stop.code, out, len(error.splitlines()))
            assert found == (2, "", 1) and len(accepted) == before, (words, error)
            continue
        args = accepted[-1]
        assert min(args.steps, args.batch_size, args.width, args.image_size) > 0, words
        assert "--name" in words or ("/" not in args.name and 0 < len(args.name) <= 120)
        assert arm == MAML or 0 <= args.pretrain_steps <= args.steps, words
    assert 100 < len(accepted) < 900 and not "".join(capsys.readouterr())
