"""What a meta-step costs on a CPU; run by hand, it prints Markdown tables.

    python tests/benchmark.py [--threads 1] [--repetitions 5] [--part a b c] [...]

a: the exact meta-step against other ways to the same gradient. In float64 all are
   compared before they are timed.
b: K against the peak memory of a whole run, evaluation included, and against the time
   of its second step, with and without --flat-memory. Each run is a fresh process.
c: where the time of a step goes.

Further arguments go to maml_ssl.py, behind its dataset shapes (`--width 32`). Methods
take turns in one process. A ratio is the median over the rounds; its quartiles stand
in brackets. Needs torchopt and higher (pip install).
"""

import argparse
import contextlib
import cProfile
import csv
import functools
import io
import os
import pstats
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import higher
import torch
import torch.nn.functional as F
import torchopt
from torch.func import functional_call, grad, grad_and_value

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maml_ssl
import pretext

pretext.load = functools.cache(pretext.load)  # main loads its data many times


class Loop(NamedTuple):
    """An inner loop of one step: all that `outer_loss` takes but the model."""

    tasks: dict
    batches: dict
    images: torch.Tensor
    labels: torch.Tensor
    inner: dict  # its settings
    share: float  # of the cross-entropy in the outer loss
    weight: float  # of L(w_0) there


class Case(NamedTuple):
    model: torch.nn.Module
    loops: list[Loop]  # of main's first step
    backward: Callable  # main's own: the step as a run takes it


def make_case(arguments: str) -> Case:
    """What main makes of these arguments, before it trains."""
    argv = ["maml_ssl.py", "--dataset", "shapes", *FURTHER, *arguments.split()]
    with (
        mock.patch.object(sys, "argv", [*argv, "--device", "cpu"]),
        mock.patch.object(maml_ssl, "Run"),
        mock.patch.object(maml_ssl, "train") as train,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        maml_ssl.main()
    *_, model, backward, _, args = train.call_args.args
    nothing = (torch.zeros((), requires_grad=True), torch.zeros(()))
    with mock.patch.object(maml_ssl, "outer_loss", return_value=nothing) as outer:
        backward(model, 0)
    loops = []
    for call in outer.call_args_list:
        _, tasks, batches, images, labels = call.args
        share = len(labels) / args.batch_size
        weight = args.pretext_weight / outer.call_count
        inner = call.kwargs
        loops.append(Loop(tasks, batches, images, labels, inner, share, weight))
    return Case(model, loops, backward)


# --- the methods: each adds a gradient to p.grad; all but the last add the same ---
def ours(model, loops):
    for loop in loops:
        loss, before = maml_ssl.outer_loss(model, *loop[:4], **loop.inner)
        (loop.share * loss + loop.weight * before).backward()


def inner_loss(model, loop):
    """L, a function of the weights."""
    fixed = {"model": model, "tasks": loop.tasks, "batches": loop.batches}
    return functools.partial(maml_ssl.pretext_loss, **fixed)


def by_hand(w, model, loop, functional=False):
    """The outer loss of one loop, unrolled."""
    loss, values = inner_loss(model, loop), []
    flags = {"create_graph": True, "materialize_grads": True}
    for _ in range(loop.inner["steps"]):
        if functional:
            gradients, value = grad_and_value(loss)(w)
        else:
            value = loss(w)
            gradients = torch.autograd.grad(value, w.values(), **flags)
            gradients = dict(zip(w, gradients, strict=True))
        w = {name: w[name] - loop.inner["lr"] * gradients[name] for name in w}
        values.append(value)
    logits = functional_call(model, w, ({"target": loop.images},))["target"]
    entropy = F.cross_entropy(logits, loop.labels)
    return loop.share * entropy + loop.weight * values[0]


def unrolled(model, loops):
    for loop in loops:
        by_hand(dict(model.named_parameters()), model, loop).backward()


def nested(model, loops):
    w = {name: p.detach() for name, p in model.named_parameters()}
    for loop in loops:
        gradients = grad(by_hand)(w, model, loop, functional=True)
        torch.autograd.backward([*model.parameters()], [*gradients.values()])  # adds


def with_optimizer(net, optimizer, loop):
    """One backward through SGD, which is differentiable and changes `net`."""
    inputs = {name: x for name, (x, _) in loop.batches.items()}
    values = []
    for _ in range(loop.inner["steps"]):
        outputs, losses = net(inputs), []
        for name, (_, targets) in loop.batches.items():
            losses.append(loop.tasks[name].loss(outputs[name], targets))
        values.append(torch.stack(losses).mean())
        optimizer.step(values[-1])
    entropy = F.cross_entropy(net({"target": loop.images})["target"], loop.labels)
    (loop.share * entropy + loop.weight * values[0]).backward()


def with_torchopt(model, loops):
    for loop in loops:
        start = torchopt.extract_state_dict(model)
        optimizer = torchopt.MetaSGD(model, lr=loop.inner["lr"])
        with_optimizer(model, optimizer, loop)
        torchopt.recover_state_dict(model, start)


def with_higher(model, loops):
    for loop in loops:
        sgd = torch.optim.SGD(model.parameters(), loop.inner["lr"])
        copies = higher.innerloop_ctx(model, sgd, copy_initial_weights=False)
        with copies as (net, optimizer):
            with_optimizer(net, optimizer, loop)


def supervised(model, loops):
    """From scratch: the labels alone."""
    for loop in loops:
        logits = model({"target": loop.images})["target"]
        F.cross_entropy(logits, loop.labels).backward()


EXACT = {
    "ours": ours,
    "unrolled by hand": unrolled,
    "nested torch.func.grad": nested,
    "TorchOpt": with_torchopt,
    "higher": with_higher,
}
OTHERS = {  # what else is timed: a method, and flags
    "first order": (ours, "--first-order"),
    "joint training": (ours, "--inner-lr 0"),
    "from scratch": (supervised, "--inner-lr 0"),
}


# --- measuring ---
def differences(arguments):
    """|g - ours| / |ours| of each exact method in float64; must be below 1e-10."""
    torch.set_default_dtype(torch.float64)
    model, loops, _ = make_case(f"{arguments} --batch-size 16")
    found = {}
    for name, method in EXACT.items():
        model.zero_grad()
        method(model, loops)
        found[name] = torch.cat([p.grad.ravel() for p in model.parameters()])
        assert found[name].dtype == torch.float64
    torch.set_default_dtype(torch.float32)
    exact = found["ours"]
    off = {
        name: ((g - exact).norm() / exact.norm()).item() for name, g in found.items()
    }
    assert exact.norm() > 0 and max(off.values()) < 1e-10, off
    return off


def interleave(timed):
    """{name: (method, case)} -> {name: ms of each round}; one more round warms up."""
    ms = {name: [] for name in timed}
    for turn in range(OPTIONS.repetitions + 1):
        order = [*timed]
        if turn % 2:  # there and back: nobody always follows the same one
            order.reverse()
        for name in order:
            method, case = timed[name]
            began = time.perf_counter()
            method(case.model, case.loops)
            ms[name].append(1000 * (time.perf_counter() - began))
    return {name: times[1:] for name, times in ms.items()}


def ratio(values, reference):
    ratios = [a / b for a, b in zip(values, reference, strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def table(title, head, rows):
    """Prints Markdown; a list is shown by its median."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|---{'|--:' * (len(head) - 1)}|")
    for row in rows:
        cells = []
        for cell in row:
            is_list = isinstance(cell, list)
            cells.append(f"{statistics.median(cell):.1f}" if is_list else str(cell))
        print(f"| {' | '.join(cells)} |", flush=True)


# --- a: other ways to the same gradient ---
def part_a():
    for pretext_tasks in ("--pretext rotation", ""):
        for steps in (1, 5):
            flags = f"{pretext_tasks} --inner-steps {steps}"
            off, case = differences(flags), make_case(flags)
            timed = {name: (method, case) for name, method in EXACT.items()}
            for name, (method, more) in OTHERS.items():
                timed[name] = (method, make_case(f"{flags} {more}"))
            rows = []
            times = interleave(timed)
            for name, ms in times.items():
                difference = f"{off[name]:.0e}" if name in off else ""
                rows.append((name, ms, ratio(ms, times["ours"]), difference))
            title = f"(a) Meta-step, loops: {len(case.loops)}, K = {steps}"
            table(title, ("method", "ms", "/ ours", "difference in float64"), rows)


# --- b: the memory of a whole run ---
LARGE = "--batch-size 256 --support-batch-size 256 --width 32"
# The peak of a process begins with that of its parent: so the parent is a small one
PARENT = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


class Measured(NamedTuple):
    megabytes: float  # at the peak of the process
    seconds: float  # of the second step; the first counts FLOPs, too


def measure_run(flags: str) -> Measured:
    """Runs maml_ssl.py for two steps, with three evaluations."""
    with tempfile.TemporaryDirectory() as out:
        arm = [sys.executable, maml_ssl.__file__, "--dataset", "shapes"]
        arm += [*LARGE.split(), *FURTHER, "--pretext", "rotation", "--steps", "2"]
        arm += [*flags.split(), "--device", "cpu", "--out", out, "--name", "run"]
        threads = os.environ | {"OMP_NUM_THREADS": str(OPTIONS.threads)}
        how = {"env": threads, "check": True, "capture_output": True, "text": True}
        done = subprocess.run([sys.executable, "-c", PARENT, *arm], **how)
        with Path(out, "run", "seed0", "metrics.csv").open() as file:
            *_, first, second = (float(row["seconds"]) for row in csv.DictReader(file))
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss
    return Measured(int(done.stdout) / unit, second - first)


def part_b():
    ways = [f"--inner-steps {k}" for k in (1, 2, 5, 10)]
    ways += [f"{way} --flat-memory" for way in ways]
    megabytes = {way: [] for way in ways}
    seconds = {way: [] for way in ways}
    for _ in range(OPTIONS.repetitions):
        for way in ways:
            found = measure_run(way)
            megabytes[way].append(found.megabytes)
            seconds[way].append(found.seconds)
    rows = []
    for way in ways:
        plain = way.removesuffix(" --flat-memory")
        one = way.replace(plain, "--inner-steps 1")
        more = ratio(megabytes[way], megabytes[one])
        slower = ratio(seconds[way], seconds[plain])
        rows.append((way, megabytes[way], more, seconds[way], slower))
    title = f"(b) Peak memory of a whole run with `{LARGE} --pretext rotation`"
    head = ("arguments", "MB", "/ K = 1", "s a step", "/ plain")
    table(title, head, rows)


# --- c: where the time goes ---
def part_c():
    places = ("maml_ssl.backward", "pretext.labelled_batch", "pretext.draw_batches")
    places += ("maml_ssl.adapt", "maml_ssl.outer_loss", "_tensor.backward", "adam.step")
    ways = {"ours": "", "ours, K = 5": "--inner-steps 5"}
    ways |= {"first order": "--first-order", "joint training": "--inner-lr 0"}
    rows = []
    for name, flags in ways.items():
        model, _, backward = make_case(flags)
        optimizer = torch.optim.AdamW(model.parameters())
        backward(model, 0)
        with cProfile.Profile() as profile:
            for step in range(OPTIONS.repetitions):
                backward(model, step)
                optimizer.step()
        ms = {}
        for (file, _, function), found in pstats.Stats(profile).stats.items():
            _, _, _, cumulative, _ = found
            place = f"{Path(file).stem}.{function}"
            ms[place] = 1000 * cumulative / OPTIONS.repetitions
        rows.append((name, *([ms.get(place, 0.0)] for place in places)))
    title = "(c) Where a step's time goes: ms in each function, and in what it calls"
    table(title, ("step", *places), rows)


if __name__ == "__main__":
    title = __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(description=title, allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--part", nargs="+", choices="abc", default="abc")
    OPTIONS, FURTHER = parser.parse_known_args()
    torch.set_num_threads(OPTIONS.threads)
    cpu = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[:1]
    cores = f"{OPTIONS.threads} of {os.cpu_count()} cores"
    print(*cpu, cores, f"torch {torch.__version__}", *FURTHER)
    for part in OPTIONS.part:
        {"a": part_a, "b": part_b, "c": part_c}[part]()
