"""The outer gradient against closed forms, finite differences and loops by hand."""

import copy
import mmap
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_faults import draw_few, folder
from torch.func import functional_call

import maml_ssl
import pretext


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- the inner loop ---
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_gradient_of_a_quadratic_is_the_closed_form(steps, first_order):
    """Inner: wAw / 2 - bw. Outer: |w - c|^2 / 2 + psi^3 + 0.7 times the loss before."""
    root, (b, c, w) = randn(5, 5), randn(3, 5, seed=1)
    a, eye = root @ root.T / 5, torch.eye(5, dtype=torch.float64)
    last, slope, shrink = w.clone(), a @ w - b, eye - 0.3 * a
    for _ in range(steps):
        last = shrink @ last + 0.3 * b
    jacobian = eye if first_order else torch.linalg.matrix_power(shrink, steps)

    def inner(weights):
        return weights["w"] @ a @ weights["w"] / 2 - b @ weights["w"]

    psi = torch.ones(2, dtype=torch.float64, requires_grad=True)
    weights = {"w": w.requires_grad_(), "psi": psi}
    adapted, before = maml_ssl.adapt(inner, weights, 0.3, steps, first_order)
    outer = (adapted["w"] - c).square().sum() / 2 + adapted["psi"].pow(3).sum()
    (outer + 0.7 * before).backward()
    assert torch.allclose(adapted["w"], last, atol=1e-12)
    assert torch.allclose(before, inner(weights), atol=1e-12)
    assert torch.allclose(w.grad, jacobian @ (last - c) + 0.7 * slope, atol=1e-12)
    assert torch.allclose(psi.grad, 3 * psi**2, atol=1e-12)  # no inner step moves it


def by_hand(loss, w, lr, steps, first_order=False, flat=False):
    """The inner loop in one graph: no code of maml_ssl."""
    before = None if steps else loss(w)
    for _ in range(steps):
        value = loss(w)
        before = value if before is None else before
        settings = {"create_graph": True, "allow_unused": True}
        grads = torch.autograd.grad(value, [*w.values()], **settings)
        for name, g in zip([*w], grads, strict=True):
            if g is not None:
                w = w | {name: w[name] - lr * (g.detach() if first_order else g)}
    return w, before


@pytest.mark.parametrize("steps", [0, 3, 4])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # a loss that draws at each call
def test_plain_and_flat_memory_equal_the_loop_by_hand(dropout, first_order, steps):
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)

    def through(adapt, flat=False):
        torch.manual_seed(3)
        v, w = randn(6, 5).requires_grad_(), randn(5, 2).requires_grad_()
        calls = []

        def loss(weights):
            calls.append(1)
            layer = F.dropout(torch.tanh(x @ weights["v"]), dropout)
            return (layer @ weights["w"]).square().mean()

        adapted, before = adapt(loss, {"v": v, "w": w}, 0.4, steps, first_order, flat)
        (sum(x.sin().sum() for x in adapted.values()) + before).backward()
        return v.grad, w.grad, len(calls)

    *expected, once = through(by_hand)
    for flat in False, True:
        *found, calls = through(maml_ssl.adapt, flat)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), flat
        assert once == max(1, steps) and (calls > once) == (flat and steps > 0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_flat_memory_keeps_no_graph_even_while_flops_are_counted():
    x, w = torch.rand(60000, 150), torch.rand(150, 150, requires_grad=True)

    def loss(weights):
        return torch.tanh(x @ weights["w"]).square().mean()  # 36 MB each, and more

    def held():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    def grown(steps, flat):  # in megabytes
        before = held()
        with maml_ssl.FlopCounter():
            _, value = maml_ssl.adapt(loss, {"w": w}, 0.1, steps, False, flat)
            return value.requires_grad and (held() - before) / 2**20

    assert grown(1, False) > 60 and grown(4, True) < 30


# --- Nash bargaining ---
def gram(gradients):
    return gradients @ gradients.T


def bargain(products):
    """G^T G a = 1 / a one coordinate after the other: each is a quadratic's root."""
    m = products.double()
    a = m.diagonal().rsqrt()
    for _ in range(10000):
        before = a.clone()
        for i in range(len(a)):
            b = m[i] @ a - m[i, i] * a[i]
            a[i] = 2 / (b + (b**2 + 4 * m[i, i]).sqrt())
        if torch.allclose(a, before, rtol=1e-14, atol=0):
            break
    return a


def nash(gradients):
    """What maml_ssl says of linear losses with these gradients, [T, D]."""
    weights = {"w": torch.zeros_like(gradients[0], requires_grad=True)}
    return maml_ssl.nash_weights(gradients @ weights["w"], weights)


def test_the_nash_weights_of_two_tasks_are_the_closed_form():
    for seed in range(20):  # a_t = 1 / (|g_t| sqrt(1 + cosine))
        g = randn(2, 3, seed=seed)
        lengths = g.norm(dim=1)
        cosine = g[0] @ g[1] / lengths.prod()
        expected = 1 / (lengths * (1 + cosine).sqrt())
        assert torch.allclose(nash(g), expected, rtol=1e-5)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_nash_weights_solve_the_bargaining_problem(count):
    for seed in range(20):
        g = randn(count, 12, seed=seed) * randn(count, 1, seed=99).exp()
        a = nash(g)
        assert (gram(g) @ a * a - 1).abs().max() < 1e-5
        assert torch.allclose(a, bargain(gram(g)), rtol=1e-5)
        assert torch.allclose(nash(g.float()).double(), a, rtol=1e-3)


def test_the_nash_direction_does_not_depend_on_a_loss_s_scale_where_the_mean_does():
    g = randn(4, 9)
    scaled = g * torch.tensor([1, 1e6, 1, 1e-6], dtype=torch.float64)[:, None]
    for rows in (g, scaled), (g.float(), scaled.float()):
        one, other = (nash(each) @ each for each in rows)
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)
        means = [each.mean(0) for each in rows]
        assert F.cosine_similarity(*means, dim=0) < 0.9


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_nash_weights_of_degenerate_gradients_are_finite_and_sensible(kind):
    g, h = randn(2, 8).to(kind)
    with_nothing = nash(torch.stack((g, 0 * g, h)))
    assert with_nothing[1] == 0  # as if the task were not there
    assert torch.allclose(with_nothing[::2], nash(torch.stack((g, h))), rtol=1e-4)
    assert nash(torch.zeros(3, 8, dtype=kind)).tolist() == [0, 0, 0]
    equal = nash(torch.stack((g, g)))
    assert torch.allclose(equal, (1 / g.norm() / 2**0.5).expand(2), rtol=1e-4)
    opposite = nash(torch.stack((g, -g)))  # there is no solution: a grows, G a is 0
    assert opposite.isfinite().all() and opposite.min() > 100 / g.norm()
    assert (opposite[0] - opposite[1]).abs() < 1e-2 * opposite[0]
    apart = torch.stack((1e6 * g, 1e-6 * g, -g + h))
    a = nash(apart)
    assert (a > 0).all() and torch.allclose(gram(apart) @ a * a, a / a, rtol=1e-2)


# --- the outer loss: a small smooth network, the real pretext tasks, float64 ---
def make_problem(*names):
    """-> model, tasks, the inner loops of a step: one for each task, or one for all."""
    torch.manual_seed(0)
    pool = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    tasks = pretext.make_tasks(names, pool, True)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.Tanh()]
    layers += [nn.Conv2d(4, 4, 3, 2, 1), nn.Tanh(), nn.AvgPool2d(2)]
    heads = {"target": nn.Sequential(nn.Flatten(), nn.Linear(16, 3))}
    heads |= {name: task.make_head(4) for name, task in tasks.items()}
    model = maml_ssl.Model(nn.Sequential(*layers), heads, amp=False).double()
    images, labels = torch.rand(10, 3, 16, 16).double(), torch.arange(10) % 3
    key = (0, "", 0)
    batches = pretext.make_batches(tasks, pool[:4].double() / 255, torch.arange(4), key)
    if "rotation" in names:  # a size of its own, as the patches of a task may have
        inputs, targets = batches["rotation"]
        batches["rotation"] = (inputs[..., :8, :8], targets)
    count = len(names)  # of three tasks: shares of 4, 3 and 3 images
    parts = zip(images.tensor_split(count), labels.tensor_split(count), strict=True)
    each = [({t: batches[t]}, x, y) for t, (x, y) in zip(names, parts, strict=True)]
    return model, tasks, {"per-task": each, "joint": [(batches, images, labels)]}


@pytest.fixture(scope="module")
def problem():
    return make_problem("rotation", "colorization", "masked_autoencoding")


def inner_loss(model, tasks, batches, balance="mean"):
    """Task after task, each through the network by itself."""

    def loss(w):
        losses = []
        for t, (x, y) in batches.items():
            losses.append(tasks[t].loss(functional_call(model, w, ({t: x},))[t], y))
        if balance == "mean":
            return sum(losses) / len(losses)
        settings = {"retain_graph": True, "materialize_grads": True}
        rows = [torch.autograd.grad(x, [*w.values()], **settings) for x in losses]
        rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        pairs = zip(bargain(gram(rows)).tolist(), losses, strict=True)
        return sum(a * x for a, x in pairs)

    return loss


def unrolled(
    model, tasks, batches, images, labels, balance, lr, steps, first_order=False,
    start=None,
):  # fmt: skip
    """As maml_ssl.outer_loss, with none of its code: one graph, by hand."""
    start = start or dict(model.named_parameters())
    loss = inner_loss(model, tasks, batches, balance)
    w, before = by_hand(loss, start, lr, steps, first_order)
    logits = functional_call(model, w, ({"target": images},))["target"]
    return F.cross_entropy(logits, labels), before


def step_loss(outer_loss, model, tasks, loops, beta, balance="mean", **inner):
    """Of a step: loops weigh by their share of the query, and alike in beta."""
    total, count = 0.0, sum(len(labels) for *_, labels in loops)
    for loop in loops:
        query, before = outer_loss(model, tasks, *loop, balance, **inner)
        share = len(loop[2]) / count
        total = total + share * query + beta / len(loops) * before
    return total


def gradient(model, loss):
    """-> {name: gradient of the loss}, zeros where there is none."""
    grads = torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, grads, strict=True))


def difference(model, move, *problem, h=3e-7, **inner):
    """The slope of step_loss in a direction {name: tensor}, by central differences."""
    values = []
    for sign in 1, -1:
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        for name, x in move.items():
            weights[name] += sign * h * x
        start = {name: w.requires_grad_() for name, w in weights.items()}
        values.append(step_loss(unrolled, model, *problem, **inner, start=start).item())
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("inner", ["per-task", "joint"])
def test_the_gradient_equals_central_finite_differences(problem, inner, steps):
    model, tasks, loops = problem
    problem, settings = (tasks, loops[inner], 0.3), {"lr": 0.4, "steps": steps}
    loss = step_loss(maml_ssl.outer_loss, model, *problem, **settings)
    found = gradient(model, loss)
    random = {name: randn(*g.shape, seed=steps) for name, g in found.items()}
    for names in [*([name] for name in found), [*found]]:  # in each tensor, and in all
        move = {name: random[name] for name in names}
        exact = sum((found[name] * x).sum() for name, x in move.items()).item()
        slope = difference(model, move, *problem, **settings)
        assert exact == pytest.approx(slope, rel=1e-5, abs=1e-7), names


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("task", pretext.LEARNED)
def test_the_outer_loss_teaches_a_learned_task_what_finite_differences_say(task, steps):
    """The part of its head that asks: it learns by the second order alone."""
    model, tasks, loops = make_problem(task)
    problem = (tasks, loops["joint"], 0)
    asks = slice(10, 20) if task == "learned_labels" else slice(None)
    for lr, k in (0.4, steps), (0.0, steps), (0.4, 0):
        settings = {"lr": lr, "steps": k}
        loss = step_loss(maml_ssl.outer_loss, model, *problem, **settings)
        found = gradient(model, loss)
        *_, weight, bias = (name for name in found if f".{task}." in name)
        for name in weight, bias:
            if lr * k == 0:
                assert found[name].eq(0).all()
                continue
            move = torch.zeros_like(found[name])
            move[asks] = randn(*move[asks].shape, seed=steps)
            exact = (found[name] * move).sum().item()
            slope = difference(model, {name: move}, *problem, **settings)
            assert abs(exact) > 1e-4
            assert exact == pytest.approx(slope, rel=1e-5), name


# --- main ---
@pytest.fixture
def main(monkeypatch, tmp_path):
    """main(*flags) -> what `maml_ssl.main` hands to `train`, which trains nothing."""
    draw_few(monkeypatch, 10)
    kept, names = [], ("run", "phase", "steps", "model", "backward", "evaluate", "args")
    monkeypatch.setattr(maml_ssl, "train", lambda *values: kept.append(values))

    def call(*flags):
        words = ["--width", 4, "--image-size", 16, "--batch-size", 18, "--seed", 3]
        words += ["--out", tmp_path, *flags]
        monkeypatch.setattr(sys, "argv", ["maml_ssl.py", *map(str, words)])
        maml_ssl.main()
        m = SimpleNamespace(**dict(zip(names, kept.pop(), strict=True)))
        m.data = m.run.data
        m.tasks = pretext.make_tasks(m.args.pretext, m.data.train.images, True)
        return m

    return call


def groups_by_hand(m):
    return [[t] for t in m.tasks] if m.args.inner == "per-task" else [[*m.tasks]]


def loops_by_hand(m, step):
    """-> batches, images, labels: an environment's images, shared out among tasks."""
    train, loops, groups = m.data.train, [], groups_by_hand(m)
    images, labels, index, homes = pretext.labelled_batch(
        m.data, step, 18, m.args.meta_batch_size, 3
    )
    assert torch.equal(train.environments[index], homes)
    for home in sorted({*homes.tolist()}):
        rows = torch.tensor([i for i in range(18) if homes[i] == home])
        for group, share in zip(groups, rows.tensor_split(len(groups)), strict=True):
            tasks = {name: m.tasks[name] for name in group}
            key = (3, f"pretext{home or ''}", step)
            if m.args.support == "query":
                support = (images[share], index[share], key)
                batches = pretext.make_batches(tasks, *support)
            else:  # others of the environment, none of the query
                mask = torch.tensor([e == home for e in train.environments.tolist()])
                mask[index] = False
                draw = (mask, m.args.support_batch_size, True, key)
                batches = pretext.draw_batches(tasks, train, *draw)
            loops.append((batches, images[share], labels[share]))
    return loops


TWO = "--pretext rotation masked_autoencoding --support-batch-size 99".split()
STEPS = """
--dataset shapes --inner per-task --inner-steps 2 : 2
--dataset shapes --inner joint : 1
--dataset shapes --inner per-task --support query : 2
--dataset shapes --inner joint --inner-lr 0 : 1
--inner per-task --inner-steps 2 : 4
--inner joint : 2
--inner joint --meta-batch-size 1 : 1
--inner per-task --support query : 4
--inner joint --first-order --flat-memory : 2
--inner joint --inner-lr 0 : 2
--inner joint --balance nash --inner-steps 2 --flat-memory : 2
--inner joint --pretext learned_labels learned_loss --pretext-weight 0 : 2
"""


@pytest.mark.parametrize("row", STEPS.strip().splitlines())
def test_a_step_of_main_adds_the_gradient_of_the_outer_loss(main, row):
    flags, _, count = row.partition(" : ")
    m = main(*TWO, "--pretext-weight", 0.3, "--inner-lr", 0.1, *flags.split())
    loops, args, beta = loops_by_hand(m, 5), m.args, m.args.pretext_weight
    assert len(loops) == int(count)
    settings = {"lr": args.inner_lr, "steps": args.inner_steps}
    settings |= {"balance": args.balance, "first_order": args.first_order}
    problem = (unrolled, m.model, m.tasks, loops)
    expected = gradient(m.model, step_loss(*problem, beta, **settings))
    query = step_loss(*problem, 0, **settings).item()
    shown = sum(len(x) for batches, *_ in loops for x, _ in batches.values())
    m.model.zero_grad()
    used = m.backward(m.model, 5)
    assert used.loss == pytest.approx(query, rel=1e-5)
    assert (used.images, used.labels) == (18 + max(1, args.inner_steps) * shown, 18)
    for name, p in m.model.named_parameters():
        found, size = torch.zeros_like(p) if p.grad is None else p.grad, p.numel()
        close = 1e-4 * expected[name].norm() + 1e-7 * size**0.5
        assert (found - expected[name]).norm() <= close, name


@pytest.mark.parametrize("dataset", ["shapes", "coloured_shapes"])
@pytest.mark.parametrize("inner", ["per-task", "joint"])
@pytest.mark.parametrize("support", ["disjoint", "query"])
def test_evaluation_is_the_mean_prediction_after_sgd(
    main, monkeypatch, dataset, inner, support
):
    """On images of its environment set aside; for --support query on each batch."""
    flags = ("--dataset", dataset, "--inner", inner, "--support", support)
    m = main(*TWO, *flags, "--inner-steps", 2, "--inner-lr", 0.2)
    said, real = [], maml_ssl.predict_adapted

    def heard(*args):
        said.append(real(*args))
        return said[-1]

    monkeypatch.setattr(maml_ssl, "predict_adapted", heard)
    other = copy.deepcopy(m.model)  # the average of the weights: main has to look at it
    for p in other.parameters():
        p.data += 0.1 * randn(*p.shape, seed=1).float()
    found = m.evaluate(other)
    data, key, jobs = m.data, (3, "evaluation", 0), []
    for home in data.test.environments.unique():
        scored = (data.test.environments == home).nonzero().squeeze(1)
        if support == "disjoint":
            mine = data.aside & (data.unlabelled.environments == home)
            draw = (mine, 256, True, key)
            batches = pretext.draw_batches(m.tasks, data.unlabelled, *draw)
            jobs.append((scored, batches))
            continue
        for part in scored.split(18):
            images = data.test.images[part] / 255
            places = torch.arange(len(part))
            jobs.append((part, pretext.make_batches(m.tasks, images, places, key)))
    start, losses, groups = dict(other.named_parameters()), [], groups_by_hand(m)
    votes = torch.zeros(len(data.test.labels), len(data.classes))
    for scored, batches in jobs:
        images = data.test.images[scored] / 255
        for group in groups:
            loss = inner_loss(other, m.tasks, {t: batches[t] for t in group})
            w, before = by_hand(loss, start, 0.2, 2)
            losses.append([before.item(), loss(w).item()])
            logits = functional_call(other, w, ({"target": images},))["target"]
            votes[scored] += logits.softmax(1).detach() / len(groups)
    plain = other({"target": data.test.images / 255})["target"].softmax(1)
    assert found.correct.equal(plain.argmax(1) == data.test.labels)
    assert len(said) == len(jobs)
    for (scored, _), each in zip(jobs, said, strict=True):
        assert (each.probabilities - votes[scored]).norm() < 1e-3
        right = each.probabilities.argmax(1) == data.test.labels[scored]
        assert found.correct_adapted[scored].equal(right)
    assert (votes - plain).norm() > 0.1  # an inner loop that does something
    measured = (found.pretext_loss, found.pretext_loss_adapted)
    expected = torch.tensor(losses).mean(0).tolist()
    assert measured == pytest.approx(expected, rel=1e-4)


# --- a trained model ---
@pytest.mark.parametrize("inner", ["per-task", "joint"])
def test_a_new_environment_needs_the_checkpoint_alone(inner, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    source = folder("photos", ["north", "south"], count=5)
    flags = f"--dataset {source} --environments --inner {inner} --inner-steps 2"
    flags += " --inner-lr .3 --width 4 --image-size 16 --batch-size 12 --steps 2"
    flags += " --pretext rotation colorization --no-mirror --name x --seed 4 --ema .5"
    monkeypatch.setattr(sys, "argv", ["maml_ssl.py", *flags.split()])
    maml_ssl.main()
    data = pretext.load(source, "data", 16, "cpu", environments=True, mirror=False)
    tasks = pretext.make_tasks(["rotation", "colorization"], data.train.images, False)
    for path in source, "data":
        shutil.rmtree(path)
    averaged = torch.load("runs/x/seed4/checkpoint.pt")["averaged"]
    new = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    new[:, 2] //= 3  # another camera
    trained = maml_ssl.load_trained("runs/x/seed4/checkpoint.pt")
    found = maml_ssl.predict_new(trained, new)
    assert trained.args.classes == ["a", "b"]
    assert found.equal(maml_ssl.predict_new(trained, new))  # the same every time
    model = maml_ssl.make_model(trained.args, {"target": 2}, tasks)
    model.load_state_dict({k[7:]: x for k, x in averaged.items() if "module" in k})
    every, votes = torch.ones(9, dtype=torch.bool), 0
    split = pretext.Split(new, every, every)
    draw = (every, 256, False, (4, "evaluation", 0))
    batches = pretext.draw_batches(tasks, split, *draw)
    groups = [[*tasks]] if inner == "joint" else [[name] for name in tasks]
    for group in groups:
        loss = inner_loss(model, tasks, {t: batches[t] for t in group})
        w, _ = by_hand(loss, dict(model.named_parameters()), 0.3, 2)
        logits = functional_call(model, w, ({"target": new / 255},))["target"]
        votes = votes + logits.softmax(1) / len(groups)
    assert (found - votes).abs().max() < 1e-5
    plain = model({"target": new / 255})["target"].softmax(1)
    assert (votes - plain).abs().max() > 1e-3
