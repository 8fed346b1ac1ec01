"""Several processes under torchrun: weights and log of one process, on every rank."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretext

ROOT = Path(pretext.__file__).parent
COMMANDS = [  # of a joint loop there is one an environment: some processes have none
    "maml_ssl --dataset shapes --pretext rotation masked_autoencoding --inner-steps 2",
    "maml_ssl --pretext rotation --inner per-task --inner-lr 0.1",  # environments
    "maml_ssl --pretext rotation --meta-batch-size 1 --inner-lr 0.1 --inner-steps 2",
    "maml_ssl --dataset shapes --inner-lr 0 --pretext-weight 0",
    "pretrain_finetune --pretrain rotation contrastive masked_autoencoding",
    "linear_probe --dataset shapes --pretrain supervised",
]
# All commands in one start; each process keeps the weights that each phase ends with
DRIVER = """
import importlib, os, sys, torch, pretext
draw, coloured = pretext.draw_shapes, pretext.draw_coloured_shapes
pretext.draw_shapes = lambda n, *rest: draw(n // 10, *rest)
pretext.draw_coloured_shapes = lambda n, *rest: coloured(n // 25, *rest)
root, *commands = sys.argv[1:]
real = {}

def main():
    for i, command in enumerate(commands):
        sys.argv = [*command.split(), "--name", str(i), "--out", root]
        arm = importlib.import_module(sys.argv[0])
        train = real.setdefault(arm, arm.train)
        def watched(run, phase, steps, model, *rest):
            averaged = train(run, phase, steps, model, *rest)
            weights = [model.state_dict(), averaged.state_dict()]
            torch.save(weights, f"{root}/{i}{phase}{os.environ.get('RANK') or 0}")
            return averaged
        arm.train = watched
        arm.main()

sys.path.append(sys.path[0])
importlib.import_module("maml_ssl").start(main)
"""


def words(root):
    sizes = "--device cpu --width 4 --image-size 16 --steps 3 --batch-size 25"
    sizes = f" {sizes} --eval-every 3 "
    return [str(root), *(f"{c} ".replace(" ", sizes, 1) for c in COMMANDS)]


def start_one(root, patch):
    root.mkdir()
    for name in "draw_shapes", "draw_coloured_shapes":  # to be put back afterwards
        patch.setattr(pretext, name, getattr(pretext, name))
    for arm in map(importlib.import_module, {c.split()[0] for c in COMMANDS}):
        patch.setattr(arm, "train", arm.train)
    patch.setattr(sys, "argv", ["driver.py", *words(root)])
    exec(DRIVER, {})


def start_several(root, ranks):
    """-> what they said."""
    root.mkdir()
    (root / "driver.py").write_text(DRIVER)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    call += [f"--nproc-per-node={ranks}", str(root / "driver.py"), *words(root)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_several_processes_write_what_one_does(tmp_path, monkeypatch, capsys, ranks):
    one, several = tmp_path / "one", tmp_path / "several"
    start_one(one, monkeypatch)
    said, repeated = capsys.readouterr().out, start_several(several, ranks)
    weights = [path.name[:-1] for path in one.glob("*0") if path.is_file()]
    assert len(weights) == 4 + 2 * 2
    for name in weights:
        alone, first = torch.load(one / f"{name}0"), torch.load(several / f"{name}0")
        for rank in range(ranks):
            found = torch.load(several / f"{name}{rank}")
            for a, b, c in zip(alone, found, first, strict=True):
                for key, x in a.items():
                    assert torch.equal(b[key], c[key]), (name, rank, key)
                    close = 2e-3 * x.norm() + 1e-6
                    assert (x - b[key]).norm() <= close, (name, key)
    for i, command in enumerate(COMMANDS):
        logs = [root / str(i) / "seed0/metrics.csv" for root in (one, several)]
        tables = [csv.DictReader(log.read_text().splitlines()) for log in logs]
        for a, b in zip(*tables, strict=True):
            for column in ("phase", "step", "images", "labels", "flops"):
                assert a[column] == b[column], (command, column)
            for column in [*a][7:]:  # losses and accuracies
                x, y = (float(row[column] or -1) for row in (a, b))
                close = pytest.approx(y, rel=1e-3, abs=0.011)
                assert x == close, (command, column)
    for text in "accuracy", "are scored", "In all":  # the first speaks for all
        assert said.count(text) == repeated.count(text) > 0, text
