"""The outer gradient against closed forms, finite differences and loops by hand; evaluation."""

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import maml_ssl
import pretext

DRAW, DRAW_COLOURED = pretext.draw_shapes, pretext.draw_coloured_shapes


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_gradient_of_a_quadratic_is_the_closed_form(steps, first_order):
    """Inner loss wAw / 2 - bw, outer loss |w - c|^2 / 2 + psi^3 + 0.7 times the loss before."""
    generator, eye = torch.Generator().manual_seed(0), torch.eye(5, dtype=torch.float64)
    root, (b, c, w) = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (5, 3))
    a, psi = root @ root.T / 5, torch.ones(2, dtype=torch.float64, requires_grad=True)
    inner = lambda p: p["w"] @ a @ p["w"] / 2 - b @ p["w"]  # noqa: E731
    last, slope, shrink = w.clone(), a @ w - b, eye - 0.3 * a
    for _ in range(steps):
        last = shrink @ last + 0.3 * b
    jacobian = eye if first_order else torch.linalg.matrix_power(shrink, steps)
    params = {"w": w.requires_grad_(), "psi": psi}
    adapted, before = maml_ssl.adapt(inner, params, 0.3, steps, first_order)
    outer = ((adapted["w"] - c) ** 2).sum() / 2 + adapted["psi"].pow(3).sum() + 0.7 * before
    outer.backward()
    assert torch.allclose(adapted["w"], last, atol=1e-12)
    assert torch.allclose(before, inner(params), atol=1e-12)
    assert torch.allclose(w.grad, jacobian @ (last - c) + 0.7 * slope, atol=1e-12)
    assert torch.allclose(psi.grad, 3 * psi**2, atol=1e-12)  # the inner loss does not know it


def by_hand(loss, w, lr, steps, first_order=False, flat_memory=False):
    """The inner loop in one graph: no code of maml_ssl."""
    before = None if steps else loss(w)
    for _ in range(steps):
        value = loss(w)
        before = value if before is None else before
        grads = torch.autograd.grad(value, [*w.values()], create_graph=True, allow_unused=True)
        for name, g in zip([*w], grads, strict=True):
            if g is not None:
                w = w | {name: w[name] - lr * (g.detach() if first_order else g)}
    return w, before


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # a loss that draws at random at each call
def test_plain_and_flat_memory_equal_the_loop_by_hand(dropout, first_order, steps):
    def through(adapt, flat=False):
        torch.manual_seed(3)
        v, w = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((6, 5), (5, 2)))
        x, calls = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6), []
        layer = lambda p: F.dropout(torch.tanh(x @ p["v"]), dropout)  # noqa: E731
        loss = lambda p: calls.append(1) or (layer(p) @ p["w"]).pow(2).mean()  # noqa: E731
        adapted, before = adapt(loss, {"v": v, "w": w}, 0.4, steps, first_order, flat)
        (sum(x.sin().sum() for x in adapted.values()) + before).backward()
        return v.grad, w.grad, len(calls)

    *expected, once = through(by_hand)
    for flat in False, True:
        *found, calls = through(maml_ssl.adapt, flat)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), flat
        assert calls > once if flat else calls == once == steps  # computed again, or kept


# --- the outer loss: a small smooth network, the real pretext tasks, float64 ---


class Smooth(maml_ssl.Model):
    def forward(self, images, task="target"):  # nothing is rounded to float32
        return self.heads[task](self.encoder(images))


@pytest.fixture(scope="module")
def problem():
    """-> model, tasks, the inner loops of one step: one for each task, and one for all."""
    torch.manual_seed(0)
    pool = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    names = ("rotation", "colorization", "masked_autoencoding")
    tasks = {name: pretext.TASKS[name](pool) for name in names}
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.GroupNorm(2, 4), nn.Tanh(),
                            nn.Conv2d(4, 4, 3, 2, 1), nn.Tanh(), nn.AvgPool2d(2))  # fmt: skip
    heads = {"target": nn.Sequential(nn.Flatten(), nn.Linear(16, 3))}
    model = Smooth(encoder, heads | {t: task.make_head(4) for t, task in tasks.items()}).double()
    images, labels = torch.rand(10, 3, 16, 16, dtype=torch.float64), torch.arange(10) % 3
    made = pretext.batches(tasks, 0, "", 0, pool[:4].double() / 255, torch.arange(4))
    batches = {t: (x.double(), y) for t, (x, y) in made.items()}
    parts = zip(batches.items(), images.tensor_split(3), labels.tensor_split(3), strict=True)
    each = [({t: batch}, x, y) for (t, batch), x, y in parts]  # shares of 4, 3 and 3 images
    return model, tasks, {"per-task": each, "joint": [(batches, images, labels)]}


def mean_loss(model, tasks, batches):
    def loss(w):
        each = [(tasks[t], functional_call(model, w, (x, t)), y) for t, (x, y) in batches.items()]
        return sum(task.loss(outputs, y) for task, outputs, y in each) / len(each)

    return loss


def unrolled(model, tasks, batches, images, labels, lr, steps, first_order=False, start=None):
    """As maml_ssl.outer_loss, with none of its code: one graph, by hand."""
    start = start or dict(model.named_parameters())
    w, before = by_hand(mean_loss(model, tasks, batches), start, lr, steps, first_order)
    return F.cross_entropy(functional_call(model, w, (images,)), labels), before


def step_loss(outer_loss, model, tasks, loops, beta, **inner):
    """Of one step: inner loops weigh by their share of the query, and alike in beta."""
    total, count = 0.0, sum(len(labels) for *_, labels in loops)
    for batches, images, labels in loops:
        query, before = outer_loss(model, tasks, batches, images, labels, **inner)
        total = total + len(labels) / count * query + beta / len(loops) * before
    return total


def gradient(model, loss):
    """-> {name: gradient of the loss}, zeros where there is none."""
    grads = torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), grads, strict=True)}


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("inner", ["per-task", "joint"])
def test_the_gradient_equals_central_finite_differences(problem, inner, steps):
    model, tasks, loops = problem
    problem, inner = (model, tasks, loops[inner], 0.3), {"lr": 0.4, "steps": steps}
    found = gradient(model, step_loss(maml_ssl.outer_loss, *problem, **inner))
    generator = torch.Generator().manual_seed(steps)
    for name in [*found, "all"]:  # a random direction in each tensor, and one in all
        random = {n: torch.randn(g.shape, generator=generator).double() for n, g in found.items()}
        moves = {n: x if name in (n, "all") else 0 * x for n, x in random.items()}
        exact, values = sum((g * moves[n]).sum() for n, g in found.items()).item(), []
        for h in 3e-7, -3e-7:
            w = {n: (p + h * moves[n]).detach() for n, p in model.named_parameters()}
            w = {n: p.requires_grad_() for n, p in w.items()}
            values.append(step_loss(unrolled, *problem, **inner, start=w).item())
        assert exact == pytest.approx((values[0] - values[1]) / 6e-7, rel=1e-5, abs=1e-7), name


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main(*flags) -> what `maml_ssl.main` gave to `train`, with `data`; nothing is trained."""
    monkeypatch.setattr(pretext, "draw_shapes", lambda n, *rest: DRAW(n // 10, *rest))
    monkeypatch.setattr(pretext, "draw_coloured_shapes", lambda n, *r: DRAW_COLOURED(n // 25, *r))
    kept, names = [], ("run", "phase", "steps", "model", "backward", "evaluate", "args")
    monkeypatch.setattr(maml_ssl, "train", lambda *values: kept.append(values))

    def call(*flags):
        words = ["--width", "4", "--batch-size", "18", "--out", str(tmp_path), "--seed", "3"]
        monkeypatch.setattr(sys, "argv", ["maml_ssl.py", *words, *map(str, flags)])
        maml_ssl.main()
        m = SimpleNamespace(**dict(zip(names, kept.pop(), strict=True)))
        data = pretext.load(m.args.dataset, "", m.args.image_size, "cpu")
        m.data = pretext.limit_labels(data, None, "test", 3)
        m.tasks = {t: pretext.TASKS[t](m.data.images) for t in m.args.pretext}
        return m

    return call


def loops_by_hand(m, step):
    """-> batches, images, labels of each: an environment's images, shared out among the tasks."""
    images, labels, index = pretext.labelled_batch(m.data, step, 18, 3)
    tasks = [[t] for t in m.tasks] if m.args.inner == "per-task" else [[*m.tasks]]
    loops = []
    for environment in range(int(m.data.environments.max()) + 1):
        rows = [i for i in range(18) if m.data.environments[index[i]] == environment]
        for group, share in zip(tasks, torch.tensor(rows).tensor_split(len(tasks)), strict=True):
            support = images[share], index[share]
            if m.args.support == "disjoint":  # others of the environment, none of the query
                mask = (m.data.environments == environment).index_fill(0, index, False)
                support = m.data.images, mask, m.args.support_batch_size, m.data.flip
            chosen, purpose = {t: m.tasks[t] for t in group}, f"pretext{environment or ''}"
            batches = pretext.batches(chosen, 3, purpose, step, *support)
            loops.append((batches, images[share], labels[share]))
    return loops


TWO = "--pretext rotation masked_autoencoding --support-batch-size 99 --pretext-weight .3".split()


@pytest.mark.parametrize("dataset", ["shapes", "coloured_shapes"])
@pytest.mark.parametrize("flags", ["--inner per-task --inner-steps 2", "--inner joint",
    "--inner per-task --support query", "--inner joint --first-order --flat-memory",
    "--inner joint --inner-lr 0"])  # fmt: skip
def test_a_step_of_main_adds_the_gradient_of_the_outer_loss(main, dataset, flags):
    m = main("--dataset", dataset, *TWO, "--inner-lr", 0.1, *flags.split())
    loops, args = loops_by_hand(m, 5), m.args
    assert len(loops) == (1 + ("per-task" in flags)) * (1 + (dataset != "shapes"))
    step, inner = (unrolled, m.model, m.tasks, loops), {"lr": 0.1, "steps": args.inner_steps}
    loss = step_loss(*step, 0.3, **inner, first_order=args.first_order)
    expected = gradient(m.model, loss)  # --inner-lr 0: of CE + beta mean_t L_t, joint training
    query = step_loss(*step, 0, **inner).item()
    shown = sum(len(x) for batches, *_ in loops for x, _ in batches.values())
    m.model.zero_grad()
    value, *counts = m.backward(m.model, 5)
    assert value == pytest.approx(query, rel=1e-5)
    assert counts == [18 + max(1, args.inner_steps) * shown, 18]  # images, labels
    for name, p in m.model.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


@pytest.mark.parametrize("dataset", ["shapes", "coloured_shapes"])
@pytest.mark.parametrize("inner", ["per-task", "joint"])
@pytest.mark.parametrize("support", ["disjoint", "query"])
def test_evaluation_averages_predictions_after_sgd(main, monkeypatch, dataset, inner, support):
    """On the set-aside images of its environment; with --support query on each batch, alone."""
    flags = ("--dataset", dataset, "--inner", inner, "--support", support)
    m = main(*TWO, *flags, "--inner-steps", 2, "--inner-lr", 0.5)
    monkeypatch.setattr(maml_ssl, "accuracy", lambda probabilities, labels: probabilities)
    other = copy.deepcopy(m.model)  # the average of the weights, which main has to look at
    for p in other.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    plain, adapted, before, after = m.evaluate(other)
    test, home = m.data.test_images, m.data.test_environments
    jobs = [(test[home == e], *own, len(own[1]), True) for e, own in enumerate(m.data.unlabelled)]
    if support == "query":
        parts = [x for e in home.unique() for x in test[home == e].split(18)]
        jobs = [(x, x / 255, torch.arange(len(x))) for x in parts]
    groups = [[t] for t in m.tasks] if inner == "per-task" else [[*m.tasks]]
    params, losses, votes = dict(other.named_parameters()), [], []
    for images, *job in jobs:
        batches = pretext.batches(m.tasks, 3, "evaluation", 0, *job)
        votes.append(0)
        for group in groups:
            loss = mean_loss(other, m.tasks, {t: batches[t] for t in group})
            w, first = by_hand(loss, params, 0.5, 2)
            losses.append([first.item(), loss(w).item()])
            votes[-1] += functional_call(other, w, (images / 255,)).softmax(1) / len(groups)
    assert torch.allclose(plain, other(test / 255).softmax(1), atol=1e-6)
    votes, adapted = torch.cat(votes), adapted / adapted.sum(1, keepdim=True)
    assert (adapted - votes).norm() < 0.01 * (plain - votes).norm() > 1e-3
    assert (before, after) == pytest.approx(torch.tensor(losses).mean(0).tolist(), rel=1e-4)
