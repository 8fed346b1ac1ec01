"""Several processes under torchrun: the same model as one process, on every rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# An arm whose every process keeps the weights and gradients that a phase ends with; HURT: the
# second process gets Ctrl-C in its third step of the desired task, the first one does not.
SPY = """
import importlib, os, signal, sys, torch
import pretext
arm, draw, keep = importlib.import_module(sys.argv[1]), pretext.draw_shapes, sys.argv[2]
pretext.draw_shapes = lambda n, *rest: draw(n // 10, *rest)
train = arm.train
def spy(run, phase, steps, model, step_gradient, *rest):
    def watched(step):
        if HURT and phase == "target" and arm.RANK == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step_gradient(step)
    averaged = train(run, phase, steps, model, watched, *rest)
    end = [(n, p.detach(), p.grad) for n, p in model.named_parameters() if p.requires_grad]
    torch.save(end, f"{keep}/{phase}{arm.RANK}.pt")
    return averaged
arm.train = spy
arm.main(sys.argv[3:])
if arm.RANKS > 1:
    arm.distributed.destroy_process_group()
"""
PHASES = {"maml_ssl": ["target"]}  # the others have both
COMMANDS = [
    "maml_ssl --pretext rotation contrastive masked_autoencoding --inner-steps 2 --batch-size 17",
    "maml_ssl --inner-lr 0",
    "maml_ssl --inner-lr 0 --pretext-weight 0 --batch-size 17",
    "pretrain_finetune --pretrain-steps 2 --batch-size 17",
    "pretrain_finetune --pretrain-steps 3 --pretrain rotation contrastive masked_autoencoding",
    "linear_probe --pretrain-steps 2",
]


def start(command, root, ranks, hurt=False, steps=5):
    """Runs an arm in one or, under torchrun, in more processes; -> what it said and left."""
    keep = root / f"of{ranks}"
    keep.mkdir(exist_ok=True)
    (root / "spy.py").write_text(SPY.replace("HURT", str(hurt)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    arm, *flags = command.split()
    words = [arm, keep, "--width", 4, "--batch-size", 16, "--warmup-steps", 2, "--steps", steps]
    words += ["--eval-every", 2, "--out", root, "--name", f"of{ranks}", "--device", "cpu", *flags]
    call = [sys.executable, *(torchrun if ranks > 1 else []), root / "spy.py", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, call)], env=environment, capture_output=True, text=True)


def rows(root, ranks):
    lines = (root / f"of{ranks}" / "seed0" / "metrics.csv").read_text().splitlines()
    return [line.split(",") for line in lines]


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_learn_what_one_learns(tmp_path, command):
    for ranks in 1, 2:
        result = start(command, tmp_path, ranks)
        assert result.returncode == 0, result.stderr
    assert result.stdout.count("log:") == 1  # the first process speaks for all
    for phase in PHASES.get(command.split()[0], ["pretrain", "target"]):
        paths = ("of1", f"{phase}0.pt"), ("of2", f"{phase}0.pt"), ("of2", f"{phase}1.pt")
        alone, first, second = (torch.load(tmp_path.joinpath(*path)) for path in paths)
        for (name, *wanted), (_, *found), (_, *other) in zip(alone, first, second, strict=True):
            for a, b, c in zip(wanted, found, other, strict=True):  # weights, then their gradient
                assert torch.equal(b, c), f"{name} differs between the processes"
                assert (a - b).norm() <= 2e-3 * a.norm() + 1e-6, name
    one, two = rows(tmp_path, 1), rows(tmp_path, 2)
    for a, b in zip(one, two, strict=True):
        assert a[:6] == b[:6]  # phase, steps, images, labels and FLOPs of all processes together


def test_ctrl_c_at_one_process_stops_all_after_the_same_step_and_resume_goes_on(tmp_path):
    command = "maml_ssl --pretext rotation contrastive"
    start(command, tmp_path, 2, steps=8)
    whole = rows(tmp_path, 2)
    log = tmp_path / "of2" / "seed0" / "metrics.csv"
    log.parent.rename(tmp_path / "of2" / "seed1")
    stopped = start(command, tmp_path, 2, hurt=True, steps=8)
    assert stopped.returncode != 0 and "stopped after target step 3" in stopped.stderr
    assert torch.load(log.parent / "checkpoint.pt", weights_only=True)["step"] == 3
    resumed = start(f"{command} --resume", tmp_path, 2, steps=8)
    assert resumed.returncode == 0, resumed.stderr
    seconds = whole[0].index("seconds")
    for row in (before := rows(tmp_path, 2)) + whole:
        row[seconds] = ""
    assert before == whole


@pytest.mark.parametrize(
    "command",
    ["maml_ssl --inner joint", "linear_probe --pretrain rotation", "maml_ssl --batch-size 1"],
)
def test_a_process_without_work_is_refused_in_one_line(tmp_path, command):
    result = start(command, tmp_path, 2)
    assert result.returncode != 0
    assert "2 processes" in result.stderr and "log:" not in result.stdout
