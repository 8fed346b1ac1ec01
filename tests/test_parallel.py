"""Several processes under torchrun: the weights and the log of one process, on every rank."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pretext

ROOT = Path(pretext.__file__).parent
COMMANDS = [  # the second has one inner loop: all processes but the first have nothing to do
    "maml_ssl --pretext rotation contrastive masked_autoencoding --inner-steps 2",
    "maml_ssl --pretext rotation contrastive --inner joint",
    "maml_ssl --dataset coloured_shapes --pretext rotation --inner-lr 0.1",  # environments
    "maml_ssl --inner-lr 0 --pretext-weight 0",
    "pretrain_finetune --pretrain rotation contrastive masked_autoencoding",
    "linear_probe --pretrain supervised",
]
# All commands in one start; each process keeps the weights that each phase ends with
DRIVER = """
import importlib, sys, torch, torch.distributed as dist, pretext
draw, coloured, (root, *commands) = pretext.draw_shapes, pretext.draw_coloured_shapes, sys.argv[1:]
pretext.draw_shapes = lambda n, *rest: draw(n // 10, *rest)
pretext.draw_coloured_shapes = lambda n, *rest: coloured(n // 25, *rest)
for i, command in enumerate(commands):
    sys.argv = [*command.split(), "--name", str(i), "--out", root]
    arm = importlib.import_module(sys.argv[0])
    if arm.RANKS > 1 and not dist.is_initialized():
        dist.init_process_group()
    def train(run, phase, steps, model, *rest, real=getattr(arm, "real", arm.train)):
        averaged, arm.real = real(run, phase, steps, model, *rest), real
        torch.save([model.state_dict(), averaged.state_dict()], f"{root}/{i}{phase}{arm.RANK}")
        return averaged
    arm.train = train
    arm.main()
"""


def start(root, ranks):
    """Runs all commands in one or, under torchrun, in more processes; -> what they said."""
    root.mkdir()
    (root / "driver.py").write_text(DRIVER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    sizes = "--device cpu --width 4 --image-size 16 --steps 3 --batch-size 25 --eval-every 3"
    words = [str(root), *(c.replace(" ", f" {sizes} ", 1) for c in COMMANDS)]
    call = [sys.executable, *(torchrun if ranks > 1 else []), str(root / "driver.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_several_processes_learn_and_write_what_one_does(tmp_path, ranks):
    one, several = tmp_path / "one", tmp_path / "several"
    said, repeated = start(one, 1), start(several, ranks)
    weights = [path.name[:-1] for path in one.glob("*0") if path.is_file()]
    assert len(weights) == 4 + 2 * 2
    for name in weights:
        alone, first = torch.load(one / f"{name}0"), torch.load(several / f"{name}0")
        for rank in range(ranks):
            found = torch.load(several / f"{name}{rank}")
            for a, b, c in zip(alone, found, first, strict=True):
                for key, x in a.items():
                    assert torch.equal(b[key], c[key]), (name, rank, key)
                    assert (x - b[key]).norm() <= 2e-3 * x.norm() + 1e-6, (name, key)
    for i, command in enumerate(COMMANDS):
        logs = [(root / str(i) / "seed0/metrics.csv").read_text() for root in (one, several)]
        for a, b in zip(*(csv.DictReader(log.splitlines()) for log in logs), strict=True):
            for column in ("phase", "step", "images", "labels", "flops"):
                assert a[column] == b[column], (command, column)
            for column in [*a][7:]:  # losses and accuracies
                values = [float(row[column] or -1) for row in (a, b)]
                assert values[0] == pytest.approx(values[1], rel=1e-3, abs=0.011), (command, column)
    assert said.count("accuracy") == repeated.count("accuracy")  # the first speaks for all
