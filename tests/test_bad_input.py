"""Bad input: one line that names the value or the remedy, exit code 2, nothing written."""

import functools
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import linear_probe
import maml_ssl
import pretext
import pretrain_finetune

ROOT, DRAW = Path(pretext.__file__).parent, functools.cache(pretext.draw_shapes)
ARMS = {arm.__name__: arm for arm in (maml_ssl, pretrain_finetune, linear_probe)}
SMALL = ["--steps", "2", "--width", "4", "--batch-size", "8"]
ANY = """
--dataset cifar11 : cifar11 : folder : coloured_shapes
--device meta : --device : 'meta' : 'cpu'
--lr -1 : learning rate : -1.0
--steps 0 : --steps : 1 up
--image-size 12 : --image-size : 8
--labels-per-class 11 : --labels-per-class 11 : 10
--labels-per-class 0 : --labels-per-class 0 : 10
--labels-per-class 1 --eval-on val : --labels-per-class 1 : val
"""
MAML = """
--first-order --pretext-weight 0 : --first-order : --pretext-weight 0
--image-size 40 --pretext relative_position : relative_position : 40 : --image-size 64
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


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """A check that an arm ends with code 2 and a line with these words; without words, that not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretext, "draw_shapes", lambda n, *which: DRAW(n // 20, *which))

    def check(words, arm, *flags):
        monkeypatch.setattr(sys, "argv", [f"{arm}.py", *SMALL, *flags])
        code = 0
        try:
            runpy.run_path(str(ROOT / f"{arm}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        error = capsys.readouterr().err
        said = [x for x in re.split(r"[\r\n]|\x1b\[A", error) if x.startswith(f"{arm}.py: ")]
        assert (code, len(said)) == ((2, 1) if words else (0, 0)), (flags, error)
        assert all(word in said[0] for word in words), (flags, said)

    return check


@pytest.mark.parametrize("arm", ARMS)
def test_bad_commands_are_refused_in_one_line_and_write_nothing(arm, refused):
    for row in ANY.splitlines()[1:] + (MAML if arm == "maml_ssl" else PRETRAINING).splitlines()[1:]:
        flags, *words = row.split(" : ")
        refused(words, arm, *flags.split())
    assert not [*Path().iterdir()]


def folder(name, count=3):
    for part in ("train/a", "train/b", "test/a", "test/b"):
        Path(name, part).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (40, 30), (9 * k, 80, 90)).save(f"{name}/{part}/{k}.png")
    return name


@pytest.mark.parametrize("arm", ARMS)
def test_folders_that_do_not_fit_are_refused(arm, refused):
    Path(folder("no-train"), "train").rename("elsewhere")
    Path(folder("odd"), "train/b").rename("odd/train/strange")
    Path(folder("empty"), "train/nothing").mkdir()
    Path(folder("text"), "train/a/note.txt").write_text("no image")
    words = {"no-train": "train", "odd": "strange", "empty": "nothing", "text": "note.txt"}
    words |= {folder("none", 0): "no valid file"}
    before = {*Path().rglob("*")}
    for name, word in words.items():
        refused([word], arm, "--dataset", name, "--source", "shapes")
    assert {*Path().rglob("*")} == before


def test_batches_that_leave_a_task_no_image_and_folders_without_a_needed_source(refused):
    for size in "3", "100":  # fewer than the tasks, all there are
        refused(["--batch-size"], "maml_ssl", "--batch-size", size)
    few = ["--batch-size", "2", "--dataset", folder("f")]
    for arm in "pretrain_finetune", "linear_probe":
        refused(["--source"], arm, *few)
        refused(["--source"], arm, *few, "--pretrain", "rotation", "--pretext-images", "both")
        refused([], arm, *few, "--pretrain-steps", "0")
        refused([], arm, *few, "--pretrain", "rotation")
    refused(["--source"], "maml_ssl", *few, "--pretext-images", "both")
    refused([], "maml_ssl", *few, "--pretext", "rotation")


WORDS = "0 -1 64 1e30 -1e30 1e-30 nan inf -nan ² - -- 0.5 . .. / cifar10 rotation none supervised"
WORDS += " meta \N{CAT FACE} %s {} 0x1f 1_0 --lr=1 @file " + "9" * 30 + " " + "x" * 5000


@pytest.mark.parametrize("arm", ARMS)
def test_a_thousand_random_commands_are_accepted_or_refused_in_one_line(arm, capsys, monkeypatch):
    choose, accepted = random.Random(arm), 0
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(ARMS[arm], "parse", lambda parser, **_: sys.exit(parser))
        ARMS[arm].parse_args()
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
            args = ARMS[arm].parse_args()
        except SystemExit as stop:
            out, error = capsys.readouterr()
            assert (stop.code, out, len(error.splitlines())) == (2, "", 1), (words, error)
            continue
        accepted += 1
        assert min(args.steps, args.batch_size, args.width, args.image_size) > 0, words
        assert "--name" in words or ("/" not in args.name and 0 < len(args.name) <= 120)
        assert arm == "maml_ssl" or 0 <= args.pretrain_steps <= args.steps, words
    assert 100 < accepted < 900 and not "".join(capsys.readouterr()), accepted
