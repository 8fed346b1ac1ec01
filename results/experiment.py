"""Our experiment: what is run, what is asked of it, how that is judged, and its figures.

    python results/experiment.py run environments --jobs 2   # trains; goes on where it stopped
    python results/experiment.py gather environments         # its logs -> results/environments.csv
    python results/experiment.py report                      # figures, tables, verdicts of the CSVs

`run` keeps logs and checkpoints below runs/PROTOCOL/. What is asked (QUESTIONS) and what is tried
(TRIALS) was written down before the runs. CIFAR-10 and the source, 100 classes of Tiny ImageNet,
are folders of images in data/.
"""

import argparse
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import compare  # noqa: E402
import maml_ssl  # noqa: E402
import pretext  # noqa: E402

# --- what is run: {protocol: (seeds, {run: command})} ---
PRETEXT = "rotation colorization masked_autoencoding contrastive"
CIFAR = "--dataset data/cifar10 --source data/tiny-imagenet-32 --labels-per-class 500 --steps 2000"
ARMS = {
    "maml": "maml_ssl.py",
    "joint": "maml_ssl.py --inner-lr 0 --lr .001 --pretext-weight .03",
    "scratch": "pretrain_finetune.py --pretrain none",
    "fine-tuned": "pretrain_finetune.py --pretrain-steps 1000",
    "probed": "linear_probe.py --pretrain-steps 1500",
}
CONTROLS = {
    "no-inner-loop": "maml_ssl.py --inner-lr 0",
    "first-order": "maml_ssl.py --first-order",
    "random-labels": "maml_ssl.py --pretext random_labels",
    "self-supervised": f"pretrain_finetune.py --pretrain-steps 500 --pretrain {PRETEXT}",
    "maml-both": "maml_ssl.py --pretext-images both",
    "joint-both": "maml_ssl.py --inner-lr 0 --lr .001 --pretext-weight .03 --pretext-images both",
}
SHAPES = "--dataset coloured_shapes"


def grid(**flags: str) -> list[str]:
    """Settings to try: the i-th value of each flag together."""
    rows = zip(*(values.split() for values in flags.values()), strict=True)
    names = [f"--{name.replace('_', '-')}" for name in flags]
    return [" ".join(f"{n} {v}" for n, v in zip(names, row, strict=True)) for row in rows]


INNER = grid(
    lr=".001 .001 .001 .001 .002 .002 .002 .002",
    inner_lr="1 1 3 3 1 1 3 3",
    pretext_weight=".1 .3 .1 .3 .1 .3 .1 .3",
)
PRETRAINING = grid(
    lr=".001 .001 .001 .002 .002 .002 .0005 .004",
    pretrain_steps="250 500 750 250 500 750 500 500",
)
# Eight settings for each arm with several environments. Chosen is, with seed 100, the best mean
# accuracy over the training environments' validation images after the last step, adapted where
# the arm adapts; of equal ones the first. The new environment has no say.
TRIALS = {
    "maml": ("maml_ssl.py", INNER),
    "colorization": ("maml_ssl.py --pretext colorization", INNER),
    "first-order": ("maml_ssl.py --first-order", INNER),
    "random-labels": ("maml_ssl.py --pretext random_labels", INNER),
    "joint": (
        "maml_ssl.py --inner-lr 0",
        grid(
            lr=".0005 .0005 .001 .001 .002 .002 .004 .004",
            pretext_weight=".1 .3 .1 .3 .1 .3 .1 .3",
        ),
    ),
    "scratch": (
        "pretrain_finetune.py --pretrain none",
        grid(lr=".0003 .0005 .001 .0015 .002 .003 .004 .006"),
    ),
    "fine-tuned": ("pretrain_finetune.py", PRETRAINING),
    "probed": ("linear_probe.py", PRETRAINING),
}
CHOSEN: dict[str, str] = {}
PROTOCOLS = {
    "cpu": (range(5), {name: f"{arm} {CIFAR}" for name, arm in ARMS.items()}),
    "controls": (range(5), {name: f"{arm} {CIFAR}" for name, arm in CONTROLS.items()}),
    "tune": (range(100, 101), {
        f"{name}-{i}": f"{arm} {SHAPES} --eval-on val {flags}"
        for name, (arm, trials) in TRIALS.items() for i, flags in enumerate(trials)
    }),
}  # fmt: skip


# --- running ---
def run_protocol(name: str, out: str, jobs: int, only: list[str]) -> int:
    """Runs each command for each seed, one thread a run; -> how many failed."""
    seeds, commands = PROTOCOLS[name]
    todo = [(seed, run) for seed in seeds for run in only or commands]
    bar = tqdm(total=len(todo), unit="run")

    def start(job: tuple[int, str]) -> bool:
        seed, run = job
        command = [sys.executable, *commands[run].split(), "--seed", str(seed)]
        command += ["--out", f"{out}/{name}", "--name", run]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=one_thread, capture_output=True, text=True)
        bar.update()
        if done.returncode:
            bar.write(f"{run} seed {seed}: {(done.stderr.splitlines() or ['no message'])[-1]}")
        return done.returncode != 0

    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(start, todo))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("run", "gather", "report"))
    parser.add_argument("protocol", nargs="?", choices=PROTOCOLS, default="environments")
    parser.add_argument("--out", default="runs", help="where runs are kept (runs)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parser.add_argument("--only", nargs="+", default=[], help="these runs of the protocol")
    args = parser.parse_args()
    if args.what == "run":
        sys.exit(run_protocol(args.protocol, args.out, args.jobs, args.only) > 0)


if __name__ == "__main__":
    main()
