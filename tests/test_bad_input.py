"""Bad input: one line that names the value and the remedy, exit code 2, nothing written."""

import functools
import math
import random
import signal
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

draw_shapes = functools.cache(pretext.draw_shapes)
ARMS = [maml_ssl, pretrain_finetune, linear_probe]
PRETRAINING = [pretrain_finetune, linear_probe]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in a directory of its own, and the arms' signal handlers go after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretext, "draw_shapes", draw_shapes)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def snapshot():
    """Every path under the working directory, with what the file holds and when it was written."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes()) if path.is_file() else None
        for path in Path().rglob("*")
    }


@pytest.fixture
def refused(capsys):
    """A check that main ends with code 2 and one line with all the words, and writes nothing."""

    def check(arm, command, *words):
        before = snapshot()
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            arm.main(command if isinstance(command, list) else command.split())
        out, err = capsys.readouterr()
        assert (stop.value.code, out, len(err.splitlines())) == (2, "", 1), (out, err)
        for word in words:
            assert word in err, (word, err)
        assert snapshot() == before
        return err

    return check


def folder(root, splits=("train", "test"), classes=("a", "b"), count=2):
    for split in splits:
        for i, label in enumerate(classes):
            (root / split / label).mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (32, 32), (9 * i, 9 * k, 9)).save(
                    root / split / label / f"{k}.png"
                )
    return root


# --- names ---


@pytest.mark.parametrize("arm", ARMS)
def test_unknown_names_are_refused(refused, arm):
    for flag in "--dataset", "--source":
        for name in "cifar11", "no such/folder", "CIFAR10", "x" * 5000, "\N{CAT FACE}", "a\nb":
            refused(arm, [flag, name], flag, repr(name), "shapes", "cifar10", "folder")
    refused(arm, ["--dataset", ""], "--dataset ''", "shapes")
    for device in "gpu", "cuda:99", "cpux", "", "meta", "xpu", "hpu":
        if torch.cuda.device_count() < 100:
            refused(arm, ["--device", device], "--device", repr(device), "--device cpu")
    for flag in "--backbone", "--schedule", "--eval-on":
        refused(arm, f"{flag} nope", flag, "'nope'", "choose from")
    refused(arm, "--no-such-flag 1", "--no-such-flag", "--help")
    refused(arm, "stray", "stray", "--help")
    refused(arm, "--lr", "--lr", "expected one argument")


def test_unknown_or_ill_assorted_tasks_are_refused(refused):
    refused(maml_ssl, "--pretext rotatoin", "--pretext", "'rotatoin'", "'rotation'")
    refused(maml_ssl, "--pretext rotation rotation", "rotation rotation", "once")
    refused(maml_ssl, "--pretext", "--pretext")
    for arm in PRETRAINING:
        refused(arm, "--pretrain rotatoin", "--pretrain", "'rotatoin'", "'rotation'", "supervised")
        for several in (
            "none rotation", "rotation none", "supervised rotation", "rotation supervised",
            "supervised none", "none none", "supervised supervised", "rotation rotation",
            "rotation contrastive contrastive",
        ):  # fmt: skip
            refused(arm, f"--pretrain {several}", several, "each once")


# --- numbers ---

WHOLE = ["--steps", "--eval-every", "--batch-size", "--width", "--image-size", "--labels-per-class"]
MAY_BE_0 = ["--weight-decay", "--warmup-steps", "--ema", "--seed"]
NOT_NUMBERS = ["nan", "inf", "1e400", "", "ten", "1,5", "0x10", "1e9", "9" * 5000, "None", "²"]


def not_negative_flags(arm):
    own = ["--inner-lr", "--pretext-weight"] if arm is maml_ssl else ["--pretrain-steps"]
    return [*MAY_BE_0, *own]


@pytest.mark.parametrize("arm", ARMS)
def test_numbers_out_of_range_are_refused(refused, arm):
    own = ["--inner-steps", "--support-batch-size"] if arm is maml_ssl else []
    for flag in [*WHOLE, "--lr", *own, *not_negative_flags(arm)]:
        for value in ["-1", "-inf", "-1e-9", "-0.5", *NOT_NUMBERS]:
            shown = [repr(value)] if len(value) < 100 else []
            refused(arm, [f"{flag}={value}"], flag, " is no ", " from ", "below", *shown)
        refused(arm, [flag, "-1"], flag, "'-1'")
    for flag in [*WHOLE, "--lr", *own]:
        refused(arm, f"{flag} 0", flag, "'0'")
    for flag in [*WHOLE, *own, "--warmup-steps", "--seed"]:
        refused(arm, f"{flag} 1.5", flag, "'1.5'", "int")
    for value in "1", "1.5", "0.9999999999999999999":
        refused(arm, f"--ema {value}", "--ema", value, "below 1;")
    for size in "7", "12", "33":
        refused(arm, f"--image-size {size}", "--image-size", size, "8")


@pytest.mark.parametrize("arm", ARMS)
def test_zero_is_taken_where_it_means_something(arm):
    for flag in not_negative_flags(arm):
        args = arm.parse_args([flag, "0"])
        assert getattr(args, flag[2:].replace("-", "_")) == 0


def test_what_does_not_fit_together_is_refused(refused):
    refused(maml_ssl, "--first-order --pretext-weight 0", "--first-order", "--pretext-weight 0")
    refused(maml_ssl, "--batch-size 3", "--batch-size 3", "4")
    refused(maml_ssl, "--support-batch-size 1", "--support-batch-size", "'1'")
    refused(maml_ssl, "--labels-per-class 2", "20", "--batch-size", "96")
    refused(maml_ssl, "--image-size 40 --pretext relative_position", "40", "--image-size 64")
    for arm in PRETRAINING:
        refused(arm, "--pretrain-steps 301", "--pretrain-steps 301", "300", "--steps")
        refused(arm, "--steps 9 --pretrain-steps 10", "--pretrain-steps 10", "9")
        refused(arm, "--pretrain none --pretrain-steps 5", "--pretrain-steps 5", "take 0")
        refused(arm, "--image-size 40 --pretrain relative_position", "40", "--image-size 64")


@pytest.mark.parametrize("arm", ARMS)
def test_more_labels_than_there_are_are_refused(refused, arm, monkeypatch):
    shapes = pretext.draw_shapes(100)
    monkeypatch.setattr(pretext, "draw_shapes", lambda *_: shapes)
    refused(arm, "--labels-per-class 11", "--labels-per-class 11", "1 to 10", "class 0")
    refused(arm, "--labels-per-class 11 --eval-on val", "--labels-per-class 11", "2 to 10")
    refused(arm, "--labels-per-class 1 --eval-on val", "--labels-per-class 1", "2 to 10")


# --- folders ---


@pytest.mark.parametrize("arm", ARMS)
def test_folders_that_do_not_fit_are_refused(refused, arm, tmp_path):
    wrong = {
        "no-train": (folder(tmp_path / "no-train", ["test"]), "train"),
        "no-test": (folder(tmp_path / "no-test", ["train"]), "val"),
        "empty-class": (folder(tmp_path / "empty-class"), "emptyclass"),
        "odd-class": (folder(tmp_path / "odd-class"), "strange"),
        "no-class": (tmp_path / "no-class", "train"),
        "no-image": (folder(tmp_path / "no-image"), "text.png"),
        "of-text": (folder(tmp_path / "of-text"), "notes.txt"),
    }
    (tmp_path / "empty-class" / "train" / "emptyclass").mkdir()
    folder(tmp_path / "odd-class", ["test"], ["strange"])
    for split in "train", "test":
        (tmp_path / "no-class" / split).mkdir(parents=True)
    (tmp_path / "no-image" / "test" / "b" / "text.png").write_text("no image")
    (tmp_path / "of-text" / "train" / "b" / "notes.txt").write_text("no image")
    for name, (root, word) in wrong.items():
        refused(arm, ["--dataset", str(root), "--source", "shapes"], name, word)
        if arm is not maml_ssl:
            refused(arm, ["--source", name], name, word)
        else:
            refused(arm, ["--source", name, "--pretext-images", "both"], name, word)


def test_a_folder_needs_a_source_where_one_is_read(refused, tmp_path):
    root = str(folder(tmp_path / "f"))
    refused(maml_ssl, ["--dataset", root, "--pretext-images", "both"], root, "--source")
    for arm in PRETRAINING:
        refused(arm, ["--dataset", root], root, "--source")
        for images in "source", "both":
            command = ["--dataset", root, "--pretrain", "rotation", "--pretext-images", images]
            refused(arm, command, root, "--source")
        for fine in ["none"], ["rotation"]:
            assert arm.parse_args(["--dataset", root, "--pretrain", *fine]).source is None
    assert maml_ssl.parse_args(["--dataset", root]).source is None


# --- more than memory holds ---


@pytest.mark.parametrize("arm", ARMS)
def test_a_dataset_too_large_is_refused_before_it_is_loaded(refused, arm, tmp_path, monkeypatch):
    monkeypatch.setattr(arm, "decode", None)
    root = folder(tmp_path / "f", ["train", "test"], ["a", "b"])
    count = len([*root.rglob("*.png")])
    words = f"{count} images", f"{3e-9 * count * 8e7**2:.1f} GB", "memory has", "smaller size"
    command = ["--dataset", str(root), "--source", "shapes", "--image-size", "80000000"]
    refused(arm, command, str(root), *words)
    refused(arm, ["--image-size", "80000"], "shapes", "3000 images", "57600.0 GB")


def test_a_dataset_fits_up_to_the_last_byte(monkeypatch):
    args, read = maml_ssl.parse_args([]), Path.read_text
    table = "MemTotal:       9 kB\nMemAvailable:      30 kB\n"
    monkeypatch.setattr(
        Path, "read_text", lambda path: table if path == Path("/proc/meminfo") else read(path)
    )
    maml_ssl.check_memory("x", 10, args)  # 10 x 3 x 32 x 32 bytes = 30 KiB
    with pytest.raises(SystemExit):
        maml_ssl.check_memory("x", 11, args)


# --- where the log goes ---


@pytest.mark.parametrize("arm", ARMS)
def test_an_out_that_can_not_be_written_is_refused(refused, arm, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in "file", "file/below", "/proc/nowhere":
        refused(arm, ["--out", out], "--out", out, "director")


@pytest.mark.parametrize("arm", ARMS)
def test_a_directory_with_another_run_is_left_as_it_is(refused, arm):
    own = (
        ["--inner-lr", "0", "--pretext-weight", "0"] if arm is maml_ssl else ["--pretrain", "none"]
    )
    command = ["--name", "x", "--steps", "1", "--batch-size", "8", "--width", "4", *own]
    arm.main(command)
    for more in [], ["--resume"]:
        changed = [*command, *more, "--lr", "0.5"]
        refused(arm, changed, "--lr", "0.001", "0.5", "--name", "--overwrite")


# --- any arguments at all ---

WORDS = ["0", "-1", "1", "3", "8", "64", "1e30", "-1e30", "1e-30", "nan", "inf", "-inf", "-nan",
    "9" * 30, "-" + "9" * 30, "9" * 5000, "", " ", "-", "--", "0.5", "1e-3", ".", "..", "/", "\n",
    "shapes", "cifar10", "mnist", "rotation", "contrastive", "none", "supervised", "cuda", "cpu",
    "meta", "\N{CAT FACE}", "\udce4", "a b", "%s", "%(default)s", "{}", "x" * 300, "true", "0x1f",
    "1_0", "²", "--lr=1", "../..", "@file", "\0", "query", "joint", "both", "source", "val", "None",
]  # fmt: skip


def random_arguments(choose, actions):
    """Up to six flags, half of them with a value that would do."""
    words = []
    for action in choose.choices(actions, k=choose.randint(0, 6)):
        words.append(choose.choice(action.option_strings))
        fine = [*(action.choices or ())] or ["1", "4", "8", "0.5"]
        if action.dest in ("dataset", "source"):
            fine = [*maml_ssl.DATASETS, "."]
        elif action.dest == "device":
            fine = ["cpu"]
        count = choose.choice([0, 1, 1, 2, 3]) if action.nargs == "+" else int(action.nargs is None)
        if choose.random() < 0.1:
            count += choose.choice([-1, 1])
        pool = fine if choose.random() < 0.8 else WORDS
        values = [choose.choice(pool) for _ in range(count)]
        if len(values) == 1 and choose.random() < 0.3 and values != ["--"]:  # Python makes it []
            values = [f"{words.pop()}={values[0]}"]
        words += values
    return words


@pytest.mark.filterwarnings("ignore")  # torch's, of devices
@pytest.mark.parametrize("arm", ARMS)
def test_any_arguments_are_accepted_or_refused_in_one_line(arm, capsys, monkeypatch):
    parser = []
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(arm, "parse", lambda made, argv: parser.append(made) or 1 / 0)
        arm.parse_args([])
    actions = [action for action in parser[0]._actions if action.dest != "help"]
    assert len(actions) > 20
    choose, accepted, total = random.Random(arm.__name__), 0, 1200
    for _ in range(total):
        words = random_arguments(choose, actions)
        try:
            args = arm.parse_args(words)
        except SystemExit as stop:
            out, err = capsys.readouterr()
            assert (stop.code, out, len(err.splitlines())) == (2, "", 1), (words, out, err)
            continue
        accepted += 1
        assert capsys.readouterr() == ("", "")
        for key, value in vars(args).items():
            if isinstance(value, (int, float)):
                assert 0 <= value < 1e9 and math.isfinite(value), (words, key)
        assert min(args.steps, args.batch_size, args.width, args.eval_every, args.lr) > 0
        assert args.image_size % 8 == 0 and args.name
        if "--name" not in " ".join(words):
            assert "/" not in args.name
        if arm is not maml_ssl:
            assert args.pretrain_steps <= args.steps
    assert total / 10 < accepted < total * 9 / 10, accepted


def test_real_processes_end_with_the_line_and_the_code(tmp_path):
    here = Path(maml_ssl.__file__).parent
    commands = {
        "maml_ssl.py --steps 0": "--steps",
        "pretrain_finetune.py --dataset nowhere": "'nowhere'",
        "pretrain_finetune.py --pretrain none rotation": "none rotation",
        "linear_probe.py --labels-per-class 999": "999",
    }
    started = []
    for command in commands:
        script, *rest = command.split()
        if len(started) > 1:
            started[-2].wait()  # two at a time
        started.append(subprocess.Popen(
            [sys.executable, here / script, *rest], text=True, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
    for (command, word), process in zip(commands.items(), started, strict=True):
        out, err = process.communicate(timeout=100)
        assert (process.returncode, out) == (2, ""), (command, out, err)
        (line,) = err.splitlines()
        assert line.startswith(command.split()[0] + ": ") and word in line
    assert not [*tmp_path.iterdir()]
