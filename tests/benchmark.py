"""What a meta-step costs on a CPU, in time and memory; run by hand, it prints Markdown tables.

    python tests/benchmark.py [--threads 1] [--repetitions 5] [--part a b c] [ARGUMENT ...]

a: the exact meta-step against other ways to the same gradient, compared before they are timed
b: peak memory (Linux) and time against K, plain and with --flat-memory
c: where the time of a step goes

Further arguments go to maml_ssl.py (`--width 32`). Methods take turns in one process; a ratio is
the median over the rounds, in brackets its quartiles. Needs torchopt and higher (pip install).
"""

import argparse
import cProfile
import ctypes
import functools
import gc
import multiprocessing
import os
import pstats
import re
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import higher
import torch
import torch.nn.functional as F
import torchopt
from torch.func import functional_call, grad, grad_and_value

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maml_ssl
import pretext

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--repetitions", type=int, default=5)
parser.add_argument("--part", nargs="+", choices="abc", default="abc")
OPTIONS, FURTHER = parser.parse_known_args()  # here, so that the processes of part b have them
torch.set_num_threads(OPTIONS.threads)
OTHERS = {"first order": "--first-order", "joint training": "--inner-lr 0"}
OTHERS["supervised"] = "--inner-lr 0 --pretext-weight 0"
pretext.load = functools.cache(pretext.load)  # main loads its data many times


def make_case(arguments):
    """-> model, loops of main's first step (what outer_loss takes, its weights), `backward`."""
    argv = ["maml_ssl.py", *FURTHER, *arguments.split(), "--device=cpu", "--overwrite"]
    with mock.patch.object(maml_ssl, "train") as train, mock.patch.object(sys, "argv", argv):
        maml_ssl.main()
    *_, model, backward, _, args = train.call_args.args
    nothing = torch.zeros((), requires_grad=True), 0.0
    with mock.patch.object(maml_ssl, "outer_loss", return_value=nothing) as outer:
        backward(model, 0)
    calls = outer.call_args_list
    weight = args.pretext_weight / len(calls)
    loops = [(c.args[1:], c.kwargs, len(c.args[-1]) / args.batch_size, weight) for c in calls]
    return model, loops, backward


# --- the methods: each adds the gradient of a case to p.grad; the exact ones add the same ---
def ours(model, loops):
    for loop, inner, share, weight in loops:
        loss, before = maml_ssl.outer_loss(model, *loop, **inner)
        (share * loss + weight * before).backward()


def by_hand(model, w, loop, inner, share, weight, functional=False):
    (tasks, batches, x, y), values = loop, []
    loss = maml_ssl.pretext_loss(model, tasks, batches)
    for _ in range(inner["steps"]):
        if functional:
            grads, value = grad_and_value(loss)(w)
        else:
            flags, value = {"create_graph": True, "materialize_grads": True}, loss(w)
            grads = dict(zip(w, torch.autograd.grad(value, w.values(), **flags), strict=True))
        w = {name: w[name] - inner["lr"] * grads[name] for name in w}
        values.append(value)
    return share * F.cross_entropy(functional_call(model, w, (x,)), y) + weight * values[0]


def unrolled(model, loops):
    for loop in loops:
        by_hand(model, dict(model.named_parameters()), *loop).backward()


def nested(model, loops):
    w = {name: p.detach() for name, p in model.named_parameters()}
    for loop in loops:
        gradients = grad(functools.partial(by_hand, model, functional=True))(w, *loop)
        torch.autograd.backward([*model.parameters()], [*gradients.values()])  # adds to p.grad


def with_optimizer(net, optimizer, loop, inner, share, weight):
    """One backward through SGD that is differentiable and changes the weights of `net`."""
    (tasks, batches, images, labels), values = loop, []
    for _ in range(inner["steps"]):
        losses = [tasks[t].loss(net(x, t), y) for t, (x, y) in batches.items()]
        values.append(torch.stack(losses).mean())
        optimizer.step(values[-1])
    (share * F.cross_entropy(net(images), labels) + weight * values[0]).backward()


def with_torchopt(model, loops):
    for loop in loops:
        start = torchopt.extract_state_dict(model)
        with_optimizer(model, torchopt.MetaSGD(model, lr=loop[1]["lr"]), *loop)
        torchopt.recover_state_dict(model, start)


def with_higher(model, loops):
    for loop in loops:
        sgd = torch.optim.SGD(model.parameters(), loop[1]["lr"])
        with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (net, optimizer):
            with_optimizer(net, optimizer, *loop)


# --- measuring ---
def differences(methods, arguments):
    """-> |g - ours| / |ours| of each method in float64; AssertionError unless below 1e-10."""
    torch.set_default_dtype(torch.float64)
    (model, loops, _), found = make_case(f"{arguments} --batch-size 16"), {}
    with mock.patch.object(torch.Tensor, "float", lambda x: x):  # Model's rounds to float32
        for name, method in methods.items():
            model.zero_grad()
            method(model, loops)
            found[name] = torch.cat([p.grad.ravel() for p in model.parameters()])
    torch.set_default_dtype(torch.float32)
    exact = found["ours"]
    off = {name: ((g - exact).norm() / exact.norm()).item() for name, g in found.items()}
    assert max(off.values()) < 1e-10, off
    return {name: f"{value:.0e}" for name, value in off.items()}


def interleave(timed):
    """{name: (method, case)} -> {name: ms of each round}; one more round warms up."""
    ms = {name: [] for name in timed}
    for turn in range(OPTIONS.repetitions + 1):
        for name in [*timed][:: (-1) ** turn]:  # there and back: nobody always follows the same
            method, (model, loops, _) = timed[name]
            began = time.perf_counter()
            method(model, loops)
            ms[name].append(1000 * (time.perf_counter() - began))
    return {name: times[1:] for name, times in ms.items()}


def ratio(times, reference):
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def table(title, *rows):
    """Prints rows as Markdown, the first as the header; a list is shown by its median."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|---{'|--:' * (len(rows[0]) - 1)}|")
    for row in rows[1:]:
        cells = [f"{statistics.median(x):.1f}" if isinstance(x, list) else str(x) for x in row]
        print(f"| {' | '.join(cells)} |", flush=True)


# --- the parts ---
def part_a():
    exact = {"ours": ours, "unrolled by hand": unrolled, "nested torch.func.grad": nested}
    exact |= {"TorchOpt": with_torchopt, "higher": with_higher}
    for sizes in [f"{t} --inner-steps {k}" for t in ("--pretext rotation", "") for k in (1, 5)]:
        off, case = differences(exact, sizes), make_case(sizes)
        timed = {name: (method, case) for name, method in exact.items()}
        timed |= {name: (ours, make_case(f"{sizes} {flags}")) for name, flags in OTHERS.items()}
        times, rows = interleave(timed), [("method", "ms", "/ ours", "difference in float64")]
        rows += [(n, t, ratio(t, times["ours"]), off.get(n, "")) for n, t in times.items()]
        table(f"(a) Meta-step, T = {len(case[1])}, K = {sizes.split()[-1]}", *rows)


def peak(arguments):
    """-> the peak memory of each of some steps, less that before it, in MB."""

    def status(field):  # ru_maxrss would begin with the parent's
        return int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    (*case, _), megabytes = make_case(arguments), []
    for _ in range(OPTIONS.repetitions + 1):  # the first loads libraries
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, begins again
        ours(*case)
        megabytes.append(status("VmHWM") - before)
    return megabytes[1:]


def part_b():
    ways = [f"--pretext rotation --inner-steps {k}" for k in (1, 2, 5, 10)]
    ways += [f"{way} --flat-memory" for way in ways]
    times = interleave({way: (ours, make_case(way)) for way in ways})
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # in new processes freed blocks go back at once
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = pool.map(peak, ways, chunksize=1)
    rows = [("arguments", "MB", "ms", "/ plain")]
    for way, megabytes in zip(ways, peaks, strict=True):
        plain = times[way.removesuffix(" --flat-memory")]
        rows.append((way, megabytes, times[way], ratio(times[way], plain)))
    table("(b) Peak memory of a step, less that before it, and its time; T = 1", *rows)


def part_c():
    places = ["maml_ssl.backward", "pretext.labelled_batch", "pretext.batches", "maml_ssl.adapt"]
    places += ["maml_ssl.outer_loss", "_tensor.backward", "adam.step"]
    rows = [("step", *places)]
    for name, flags in {"ours": "", "ours, K = 5": "--inner-steps 5", **OTHERS}.items():
        model, _, backward = make_case(flags)
        optimizer = torch.optim.AdamW(model.parameters())
        backward(model, 0)
        with cProfile.Profile() as profile:
            for step in range(OPTIONS.repetitions):
                backward(model, step)
                optimizer.step()
        found = pstats.Stats(profile).stats.items()
        seconds = {f"{Path(file).stem}.{function}": row[3] for (file, _, function), row in found}
        rows.append((name, *([1000 * seconds.get(p, 0) / OPTIONS.repetitions] for p in places)))
    table("(c) Where a step's time goes: ms in each function (outer_loss has adapt in it)", *rows)


if __name__ == "__main__":
    cpu = re.findall("model name.*: (.*)", Path("/proc/cpuinfo").read_text())[:1]
    print(*cpu, f"{OPTIONS.threads} of {os.cpu_count()} cores, torch {torch.__version__}", *FURTHER)
    for part in OPTIONS.part:
        {"a": part_a, "b": part_b, "c": part_c}[part]()
