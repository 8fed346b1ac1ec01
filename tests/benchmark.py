"""What a meta-step costs, in time and memory; run by hand, it prints Markdown tables.

    python tests/benchmark.py [--threads 1] [--repetitions 5] [--part a b c d] [ARGUMENT ...]

a: the exact meta-step against other ways to the same gradient, compared before they are timed
b: its peak memory and time against K     c: where an arm's step goes     d: time against sizes

Further arguments go to maml_ssl.py (`--width 32`). Methods take turns in one process; a ratio is
the median over the rounds, in brackets its quartiles. TorchOpt and higher are optional.
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import gc
import io
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import linear_probe
import maml_ssl
import pretext
import pretrain_finetune

skipped = {}
try:
    import torchopt
except Exception as error:  # not installed, or broken
    skipped["TorchOpt"] = error
try:
    import higher
except Exception as error:
    skipped["higher"] = error

FURTHER: list[str] = []  # arguments that go on to the arms
pretext.draw_shapes = functools.cache(pretext.draw_shapes)  # the arms load their data many times
DEFAULTS = " ".join(pretext.DEFAULT_TASKS)


# --- the case: the network, tasks and batches of maml_ssl.py's first step ---
@functools.cache
def make_task(name: str):
    return pretext.TASKS[name](pretext.draw_shapes(2000, "target", 0)[0])


def make_case(arguments: str, dtype: torch.dtype = torch.float32) -> tuple:
    """-> (model, tasks, groups, args): what `outer_gradient` takes."""
    args = maml_ssl.parse_args([*arguments.split(), *FURTHER])
    data = maml_ssl.load_target(args)
    tasks = {name: make_task(name) for name in args.pretext}
    heads = {"target": functools.partial(maml_ssl.classifier, int(data.labels.max()) + 1)}
    model = maml_ssl.make_model(args, heads | {t: tasks[t].make_head for t in tasks}).to(dtype)
    query, groups = maml_ssl.labelled_batch(data, 0, args), []
    shares = zip(*(x.tensor_split(len(tasks)) for x in query), strict=True)
    for (name, task), (x, y, i) in zip(tasks.items(), shares, strict=True):
        drawn = {name: task}, data.images, (x, i), query[2], data.flip, 0, args
        drawn = maml_ssl.support_batches(*drawn)[name]
        drawn = [t.to(dtype) if t.is_floating_point() else t for t in drawn]
        groups.append(({name: drawn}, x.to(dtype), y))
    return model, tasks, groups, args


# --- the methods: each leaves its gradient in p.grad; all but the last two leave the same ---
def ours(model, tasks, groups, args) -> None:
    maml_ssl.outer_gradient(model, tasks, groups, args)


def shares(model, tasks, groups, args):
    """What every other method needs of each task, so that they differ in nothing else."""
    psi, total = maml_ssl.parameters(model, "heads.target"), sum(len(y) for _, _, y in groups)
    for batches, x, y in groups:
        (name,) = batches
        w = maml_ssl.parameters(model, "encoder", f"heads.{name}")
        loss = maml_ssl.pretext_loss(model, tasks, batches)
        yield name, batches, x, y, w, psi, loss, len(y) / total, args.pretext_weight / len(tasks)


def plain(model, tasks, groups, args) -> None:
    """Autograd through the unrolled inner loop."""
    for _, _, x, y, w, psi, loss, share, weight in shares(model, tasks, groups, args):
        values = []
        for _ in range(args.inner_steps):
            values.append(loss(w).mean())
            grads = torch.autograd.grad(values[-1], [*w.values()], create_graph=True)
            w = {n: p - args.inner_lr * g for (n, p), g in zip(w.items(), grads, strict=True)}
        query = maml_ssl.query_loss(model, x, y, {**w, **psi})
        (share * query + weight * values[0]).backward()


def nested(model, tasks, groups, args) -> None:
    """torch.func.grad of a function that calls torch.func.grad."""
    for _, _, x, y, w, psi, loss, share, weight in shares(model, tasks, groups, args):

        def outer(w, psi, x=x, y=y, loss=loss, share=share, weight=weight):
            values = []
            for _ in range(args.inner_steps):
                grads, value = torch.func.grad_and_value(lambda w: loss(w).mean())(w)
                values.append(value)
                w = {name: w[name] - args.inner_lr * grads[name] for name in w}
            query = maml_ssl.query_loss(model, x, y, {**w, **psi})
            return share * query + weight * values[0]

        both = [{name: p.detach() for name, p in part.items()} for part in (w, psi)]
        for part in torch.func.grad(outer, (0, 1))(*both):
            for name, g in part.items():
                p = model.get_parameter(name)
                p.grad = g if p.grad is None else p.grad + g


def with_torchopt(model, tasks, groups, args) -> None:
    for name, batches, x, y, _, _, _, share, weight in shares(model, tasks, groups, args):
        inputs, targets = batches[name]
        net = maml_ssl.Model(model.encoder, {name: model.heads[name]})
        start = torchopt.extract_state_dict(net)
        optimizer, values = torchopt.MetaSGD(net, lr=args.inner_lr), []
        for _ in range(args.inner_steps):
            values.append(tasks[name].loss(net(inputs, name), targets))
            optimizer.step(values[-1])
        query = F.cross_entropy(model.heads["target"](net.encoder(x)), y)
        (share * query + weight * values[0]).backward()
        torchopt.recover_state_dict(net, start)


def with_higher(model, tasks, groups, args) -> None:
    for name, batches, x, y, w, _, _, share, weight in shares(model, tasks, groups, args):
        inputs, targets = batches[name]
        net = maml_ssl.Model(model.encoder, {t: model.heads[t] for t in (name, "target")})
        optimizer, values = torch.optim.SGD([*w.values()], args.inner_lr), []
        with higher.innerloop_ctx(net, optimizer, copy_initial_weights=False) as (fast, inner):
            for _ in range(args.inner_steps):
                values.append(tasks[name].loss(fast(inputs, name), targets))
                inner.step(values[-1])
            (share * F.cross_entropy(fast(x), y) + weight * values[0]).backward()


def first_order(model, tasks, groups, args) -> None:
    changed = argparse.Namespace(**vars(args) | {"first_order": True})
    maml_ssl.outer_gradient(model, tasks, groups, changed)


def supervised(model, tasks, groups, args) -> None:
    images, labels = (torch.cat([group[i] for group in groups]) for i in (1, 2))
    F.cross_entropy(model(images), labels).backward()


EXACT = {"ours": ours, "plain autograd": plain, "nested torch.func.grad": nested}
EXACT |= {"TorchOpt": with_torchopt, "higher": with_higher}
OTHERS = {"first order": first_order, "supervised": supervised}


# --- measuring ---
def run_once(method, case: tuple) -> torch.Tensor:
    """-> the whole gradient as one vector; zero where there is none."""
    case[0].zero_grad()
    method(*case)
    both = [(p, p.grad) for p in case[0].parameters()]
    return torch.cat([(torch.zeros_like(p) if g is None else g).ravel() for p, g in both])


def interleave(methods: dict, repetitions: int) -> dict[str, list[float]]:
    """-> for each (method, case) by name the seconds of each round; one more round warms up."""
    seconds = {name: [] for name in methods}
    for turn in range(repetitions + 1):
        names = [*methods]
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            method, case = methods[name]
            case[0].zero_grad()
            synchronize(case)
            began = time.perf_counter()
            method(*case)
            synchronize(case)
            seconds[name].append(time.perf_counter() - began)
    return {name: times[1:] for name, times in seconds.items()}


def synchronize(case: tuple) -> None:
    if case[3].device != "cpu":
        torch.cuda.synchronize()


def ms(times: list[float]) -> str:
    return f"{1000 * statistics.median(times):.1f}"


def ratio(times: list[float], reference: list[float]) -> str:
    ratios = [a / b for a, b in zip(times, reference, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def flops(method, case: tuple) -> int:
    with FlopCounterMode(display=False) as counter:
        run_once(method, case)
    return counter.get_total_flops()


def table(title: str, *rows: tuple) -> None:
    """Prints rows as Markdown, the first as the header."""
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|---{'|--:' * (len(rows[0]) - 1)}|")
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows[1:]), flush=True)


# --- the parts ---
def part_a(repetitions: int) -> None:
    methods = {name: f for name, f in EXACT.items() if name not in skipped}
    for name, error in skipped.items():
        print(f"\nskipped: {name} ({type(error).__name__}: {error})")
    for tasks in ("rotation", DEFAULTS):
        for steps in (1, 5):
            sizes = f"--pretext {tasks} --inner-steps {steps}"
            errors = {}
            # float32 has no bound: flat image areas tie in max-pooling, rounding breaks the ties
            for dtype, bound in (torch.float64, 1e-10), (torch.float32, math.inf):
                few = "--batch-size 16" if dtype is torch.float64 else ""  # it is slow
                case = make_case(f"{sizes} {few}", dtype)
                right = run_once(ours, case)
                for name, method in methods.items():
                    off = (run_once(method, case) - right).norm() / right.norm()
                    assert off < bound, f"{name} differs from ours by {off:.1e} in {dtype}"
                    errors[name] = f"{off:.0e}"
            timed = {name: (f, case) for name, f in {**methods, **OTHERS}.items()}
            work = {name: flops(*each) for name, each in timed.items()}
            times = interleave(timed, repetitions)
            rows = []
            for name, t in times.items():
                ratios = [ratio(t, times[x]) for x in ("ours", "supervised")]
                by_flops = f"{work[name] / work['supervised']:.2f}"
                rows.append((name, ms(t), *ratios, by_flops, errors.get(name, "")))
            header = ("method", "ms", "/ ours", "/ supervised", "FLOPs / supervised", "difference")
            count = len(tasks.split())
            title = f"(a) Meta-step, T = {count}, K = {steps}; difference: |g - ours| / |ours|"
            table(f"{title} in float32, below 1e-10 in float64", header, *rows)


def part_b(repetitions: int) -> None:
    if not Path("/proc/self/clear_refs").exists():
        return print("\nskipped: (b), which needs Linux")
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed blocks go back to the system at once
    rows = []
    for steps in (1, 2, 5, 10):
        sizes = f"--pretext rotation --inner-steps {steps}"
        case = make_case(sizes)
        times = interleave({"ours": (ours, case), "plain": (plain, case)}, repetitions)
        megabytes = []
        for setting in (exact, {}):
            for name in ("ours", "plain autograd"):
                command = [sys.executable, __file__, "--child", name, sizes, *FURTHER]
                command += ["--threads", str(torch.get_num_threads())]
                done = subprocess.run(
                    command, env=os.environ | setting, stdout=subprocess.PIPE, text=True, check=True
                )
                megabytes.append(done.stdout.strip())
        time_ratio = ratio(times["ours"], times["plain"])
        rows.append((steps, *megabytes, *(ms(t) for t in times.values()), time_ratio))
    header = ["K", "ours, MB", "plain, MB", "ours, MB, glibc", "plain, MB, glibc"]
    title = "(b) Peak memory of one step above that before it, T = 1; glibc: with its default reuse"
    table(title, (*header, "ours, ms", "plain, ms", "ours / plain"), *rows)


def child(name: str, sizes: str) -> None:
    """Prints the peak memory of one step, in MB, above what the process held before it."""

    def status(field: str) -> float:  # ru_maxrss would begin with the parent's, from the fork
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    case = make_case(sizes)
    run_once(supervised, case)  # loads the libraries
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak, VmHWM, begins again
    case[0].zero_grad()
    EXACT[name](*case)
    print(f"{status('VmHWM') - before:.0f}")


PARTS = ("labelled batch", "pretext batches", "inner", "outer", "optimizer and rest")
PRETRAINED = "--pretrain supervised"
ARMS = {  # row: module, phase, arguments
    "MAML": (maml_ssl, "target", ""),
    "MAML, first order": (maml_ssl, "target", "--first-order"),
    "supervised: alpha = beta = 0": (maml_ssl, "target", "--inner-lr 0 --pretext-weight 0"),
    "supervised pretraining": (pretrain_finetune, "pretrain", PRETRAINED),
    "pretext pretraining": (pretrain_finetune, "pretrain", f"--pretrain {DEFAULTS}"),
    "fine-tuning": (pretrain_finetune, "target", PRETRAINED),
    "linear probe": (linear_probe, "target", PRETRAINED),
}


def time_arm(arm, phase: str, arguments: str, steps: int) -> tuple[list[Counter], float, float]:
    """Runs an arm's main; -> seconds of each step by part, FLOPs a step, seconds a log row."""
    seconds, inside, marks, writing = Counter(), [], [], []

    def timed(part, function):
        def call(*values, **named):
            if inside and inside[-1][0] != "outer":  # only the gradient is split further
                return function(*values, **named)
            began = time.perf_counter()
            inside.append([part, 0.0])
            result = function(*values, **named)
            spent = time.perf_counter() - began
            seconds[part] += spent - inside.pop()[1]
            if inside:
                inside[-1][1] += spent
            return result

        return call

    def train(run, now, count, model, step_gradient, *_, train=arm.train):
        def step_begins(step):
            if now == phase:
                marks.append(seconds + Counter(all=time.perf_counter()))
            return timed("outer", step_gradient)(step)

        def save(*values, save=run.save):
            began = time.perf_counter()
            save(*values)
            writing.append(time.perf_counter() - began)

        run.save = save
        return train(run, now, count, model, step_begins, lambda averaged: (0.0, None))

    calls = {"labelled_batch": PARTS[0], "augment": PARTS[1], "support_batches": PARTS[1]}
    places = [(arm, name, part) for name, part in {**calls, "adapt": "inner"}.items()]
    places += [(task, "make_batch", PARTS[1]) for task in pretext.TASKS.values()]
    phases, screen = 1 if arm is maml_ssl else 2, io.StringIO()
    with contextlib.ExitStack() as stack:
        for place, name, part in places:
            if function := getattr(place, name, None):
                stack.enter_context(mock.patch.object(place, name, timed(part, function)))
        stack.enter_context(mock.patch.object(arm, "train", train))
        out = stack.enter_context(tempfile.TemporaryDirectory())
        argv = f"--steps {steps * phases} --eval-every {steps} --out {out} --name run {arguments}"
        stack.enter_context(contextlib.redirect_stdout(screen))
        stack.enter_context(contextlib.redirect_stderr(screen))
        try:
            arm.main([*argv.split(), *FURTHER])
        except SystemExit as error:
            raise RuntimeError(screen.getvalue()) from error
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with open(f"{out}/run/seed0/metrics.csv") as file:
            work = {row["phase"]: float(row["flops"]) for row in csv.DictReader(file)}
    work = (work[phase] - (work["pretrain"] if phases == 2 and phase == "target" else 0)) / steps
    rows = [Counter({k: b[k] - a[k] for k in b}) for a, b in pairwise(marks[1:])]
    for row in rows:
        row[PARTS[4]] = row["all"] - sum(row[part] for part in PARTS[:4])
    return rows, work, statistics.median(writing)


def part_c(repetitions: int) -> None:
    runs = {name: [] for name in ARMS}
    for _ in range(2):
        for name in ARMS:
            runs[name].append(time_arm(*ARMS[name], repetitions + 2))
    every = maml_ssl.parse_args(FURTHER).eval_every
    steps = {name: [row for rows, *_ in runs[name] for row in rows] for name in ARMS}
    reference = "supervised: alpha = beta = 0"
    rows = []
    for name in ARMS:
        whole = [step["all"] for step in steps[name]]
        surround = [1 - (step["inner"] + step["outer"]) / step["all"] for step in steps[name]]
        logging = statistics.median(seconds for *_, seconds in runs[name]) / every
        rows.append((name, ms(whole), *(ms([s[part] for s in steps[name]]) for part in PARTS)))
        rows[-1] += (ms([logging]), f"{statistics.median(surround):.0%}")
        rows[-1] += (ratio(whole, [step["all"] for step in steps[reference]]),)
        rows[-1] += (f"{runs[name][0][1] / runs[reference][0][1]:.2f}",)
    header = ("step of", "ms", *PARTS, "log", "not gradient", "/ supervised", "by FLOPs")
    table(f"(c) A training step, in ms; log: one row, spread over {every} steps", header, *rows)


def part_d(repetitions: int) -> None:
    all_tasks, rows = f"--pretext {DEFAULTS}", []
    sizes = [f"--pretext {' '.join(pretext.DEFAULT_TASKS[:t])}" for t in (1, 2, 3)] + [all_tasks]
    sizes += [f"{all_tasks} --inner-steps 2"]  # (a) has K = 5
    sizes += [f"{all_tasks} --batch-size {b}" for b in (32, 128)]  # support: half of it
    sizes += [f"{all_tasks} --width {w}" for w in (8, 32)]
    for size in sizes:
        case = make_case(size)
        times = interleave({n: (f, case) for n, f in {"o": ours, **OTHERS}.items()}, repetitions)
        exact, first, plainly = times.values()
        args = case[3]
        setting = (len(args.pretext), args.inner_steps, args.batch_size, args.width)
        rows.append((*setting, ms(plainly), ms(first), ms(exact), ratio(exact, plainly)))
    header = ("T", "K", "batch", "width", "supervised, ms", "first order, ms", "meta-step, ms")
    table("(d) The meta-step against sizes", (*header, "meta-step / supervised"), *rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--part", nargs="+", choices="abcd", default="abcd")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options, FURTHER[:] = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    if options.child:
        return child(*options.child)
    began, cpu = time.perf_counter(), platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    kind = torch.backends.cpu.get_cpu_capability()
    print(f"{cpu} ({kind}), {options.threads} of {os.cpu_count()} cores, torch {torch.__version__}")
    if FURTHER:
        print(f"with {' '.join(FURTHER)}")
    for part in options.part:
        {"a": part_a, "b": part_b, "c": part_c, "d": part_d}[part](options.repetitions)
    print(f"\n{options.repetitions} repetitions, {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
