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


# --- adapt, on losses about which everything is known ---


def quadratic():
    """-> A and b of the inner loss wAw / 2 - bw, c of the outer one |w - c|^2 / 2, and w_0."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    return root @ root.T / 5, *torch.randn(3, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_the_gradient_of_a_quadratic_is_the_closed_form(steps, first_order):
    a, b, c, start = quadratic()
    w, psi = start.clone().requires_grad_(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    inner = lambda p: p["w"] @ a @ p["w"] / 2 - b @ p["w"]  # noqa: E731
    adapted, before = maml_ssl.adapt(inner, {"w": w, "psi": psi}, 0.3, steps, first_order)
    outer = ((adapted["w"] - c) ** 2).sum() / 2 + adapted["psi"].pow(3).sum() + 0.7 * before
    outer.backward()
    eye, last = torch.eye(5, dtype=torch.float64), start
    shrink = eye - 0.3 * a
    for _ in range(steps):
        last = shrink @ last + 0.3 * b
    jacobian = eye if first_order else torch.linalg.matrix_power(shrink, steps)
    assert torch.allclose(adapted["w"], last, atol=1e-12)
    assert torch.allclose(w.grad, jacobian @ (last - c) + 0.7 * (a @ start - b), atol=1e-12)
    assert torch.allclose(psi.grad, 3 * psi**2, atol=1e-12)  # the inner loss does not know it
    assert before.item() == pytest.approx(inner({"w": start}).item(), abs=1e-12)


def noisy(p, x=torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)):
    """A loss that draws at random at each call, as dropout does."""
    return (F.dropout(torch.tanh(x @ p["v"]), 0.5) @ p["w"]).pow(2).mean()


def through(loss, steps, first_order, flat_memory, adapt):
    """The gradients of v.sin + w.sin at the adapted weights + the loss before; the calls of it."""
    torch.manual_seed(3)
    v, w = torch.randn(6, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    params, calls = {"v": v.requires_grad_(), "w": w.requires_grad_()}, []
    watched = lambda p: calls.append(1) or loss(p)  # noqa: E731
    torch.manual_seed(4)  # of the dropout
    adapted, before = adapt(watched, params, 0.4, steps, first_order, flat_memory)
    (sum(x.sin().sum() for x in adapted.values()) + before).backward()
    return [p.grad for p in params.values()], len(calls)


def by_hand(loss, params, lr, steps, first_order, _):
    for k in range(steps):
        value = loss(params)
        before = value if k == 0 else before
        v, w = torch.autograd.grad(value, [params["v"], params["w"]], create_graph=True)
        v, w = (v.detach(), w.detach()) if first_order else (v, w)
        params = {"v": params["v"] - lr * v, "w": params["w"] - lr * w}
    return params, before


@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("loss", [noisy, lambda p: (p["v"].tanh() @ p["w"]).pow(2).mean()])
def test_plain_and_flat_memory_equal_the_loop_by_hand_even_if_the_loss_draws(
    loss, first_order, steps
):
    expected, once = through(loss, steps, first_order, False, by_hand)
    for flat in False, True:
        found, calls = through(loss, steps, first_order, flat, maml_ssl.adapt)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), flat
        assert calls > once if flat else calls == once == steps  # computed again, or kept


# --- the outer loss: a small smooth network, the real pretext tasks, float64 ---

TASKS = ("rotation", "colorization", "masked_autoencoding")


class Smooth(nn.Module):
    """As maml_ssl's Model, with two derivatives everywhere and nothing rounded to float32."""

    def __init__(self, heads):
        super().__init__()
        stem = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.Tanh()
        rest = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Tanh(), nn.AvgPool2d(2)
        self.encoder, self.heads = nn.Sequential(*stem, *rest), nn.ModuleDict(heads)

    def forward(self, images, task="target"):
        return self.heads[task](self.encoder(images))


@pytest.fixture(scope="module")
def problem():
    """-> model, tasks, the inner loops of one step: one for each task, and one for all."""
    torch.manual_seed(0)
    pool = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    tasks = {name: pretext.TASKS[name](pool) for name in TASKS}
    heads = {name: task.make_head(4) for name, task in tasks.items()}
    heads["target"] = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model, index = Smooth(heads).double(), torch.arange(4)
    images, labels = torch.rand(10, 3, 16, 16, dtype=torch.float64), torch.arange(10) % 3
    made = pretext.batches(tasks, 0, "pretext", 0, pool[:4].double() / 255, index)
    batches = {t: (x.double(), y) for t, (x, y) in made.items()}
    parts = zip(batches.items(), images.tensor_split(3), labels.tensor_split(3), strict=True)
    each = [({t: batch}, x, y) for (t, batch), x, y in parts]  # shares of 4, 3 and 3 images
    return model, tasks, {"per-task": each, "joint": [(batches, images, labels)]}


def unrolled(model, tasks, loops, beta, lr, steps, first_order=False, start=None):
    """The outer loss of the method in one graph, by hand: no code of maml_ssl."""
    total, count = 0.0, sum(len(labels) for *_, labels in loops)
    for batches, images, labels in loops:
        w = start or dict(model.named_parameters())
        for k in range(max(1, steps)):
            each = [tasks[t].loss(functional_call(model, w, (x, t)), y)
                    for t, (x, y) in batches.items()]  # fmt: skip
            if k == 0:
                total = total + beta / len(loops) * sum(each) / len(each)
            moved = [n for n in w if not n.startswith("heads.target") and steps]
            gradient = moved and torch.autograd.grad(
                sum(each) / len(each), [w[n] for n in moved], create_graph=True, allow_unused=True)  # fmt: skip
            for name, g in zip(moved, gradient, strict=True):
                if g is not None:
                    w = w | {name: w[name] - lr * (g.detach() if first_order else g)}
        query = F.cross_entropy(functional_call(model, w, (images,)), labels)
        total = total + len(labels) / count * query
    return total


def gradient(model, loss):
    """-> {name: gradient of the loss}, zeros where there is none."""
    model.zero_grad()
    loss.backward()
    grads = [p.grad for p in model.parameters()]
    pairs = zip(model.named_parameters(), grads, strict=True)
    return {n: torch.zeros_like(p) if g is None else g.clone() for (n, p), g in pairs}


def ours(model, tasks, loops, beta, **inner):
    """-> {name: gradient}, of the parts that maml_ssl gives, put together as DESIGN does."""
    total, count = 0.0, sum(len(labels) for *_, labels in loops)
    for batches, images, labels in loops:
        loss, before = maml_ssl.outer_loss(model, tasks, batches, images, labels, **inner)
        total = total + len(labels) / count * loss + beta / len(loops) * before
    return gradient(model, total)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("inner", ["per-task", "joint"])
def test_the_gradient_equals_central_finite_differences(problem, inner, steps):
    model, tasks, loops = problem
    found = ours(model, tasks, loops[inner], 0.3, lr=0.4, steps=steps)
    generator, h = torch.Generator().manual_seed(steps), 2e-6
    for name in [*found, "all"]:  # a random direction in each tensor, and one in all
        direction = {n: torch.randn(g.shape, generator=generator).double() * (name in (n, "all"))
                     for n, g in found.items()}  # fmt: skip
        values = []
        for sign in (1, -1):
            w = {n: (p + sign * h * direction[n]).detach().requires_grad_()
                 for n, p in model.named_parameters()}  # fmt: skip
            values.append(unrolled(model, tasks, loops[inner], 0.3, 0.4, steps, start=w).item())
        exact = sum((g * direction[n]).sum() for n, g in found.items()).item()
        assert exact == pytest.approx((values[0] - values[1]) / 2 / h, rel=2e-6, abs=2e-8), name


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("inner", ["per-task", "joint"])
def test_the_gradient_equals_that_of_the_unrolled_loop(problem, inner, first_order, steps):
    model, tasks, loops = problem
    found = ours(model, tasks, loops[inner], 0.3, lr=0.4, steps=steps, first_order=first_order)
    loss = unrolled(model, tasks, loops[inner], 0.3, 0.4, steps, first_order)
    for name, expected in gradient(model, loss).items():
        assert torch.allclose(found[name], expected, rtol=1e-10, atol=1e-12), name


def test_first_order_is_the_query_gradient_at_the_adapted_weights(problem):
    model, tasks, loops = problem
    batches, images, labels = loops["per-task"][0]
    found = ours(model, tasks, loops["per-task"][:1], 0, lr=0.4, steps=2, first_order=True)
    twin = copy.deepcopy(model)
    sgd = torch.optim.SGD(twin.parameters(), 0.4)
    for _ in range(2):
        sgd.zero_grad()
        tasks["rotation"].loss(twin(batches["rotation"][0], "rotation"), batches["rotation"][1]).backward()
        sgd.step()
    for name, expected in gradient(twin, F.cross_entropy(twin(images), labels)).items():
        assert torch.allclose(found[name], expected, rtol=1e-10, atol=1e-12), name
    assert not found["heads.rotation.2.weight"].any()  # trap 1: it would never learn
    second = ours(model, tasks, loops["per-task"], 0, lr=0.4, steps=1)
    assert all(g.any() for name, g in second.items())  # of pretext heads too, with beta = 0


# --- main: the step and the evaluation that it hands to `train` ---


@pytest.fixture
def main(monkeypatch, tmp_path):
    """main(*flags) -> what `maml_ssl.main` gave to `train`, with `data`; nothing is trained."""
    monkeypatch.setattr(pretext, "draw_shapes", lambda n, *rest: DRAW(n // 10, *rest))
    monkeypatch.setattr(pretext, "draw_coloured_shapes", lambda n, *r: DRAW_COLOURED(n // 25, *r))
    kept = {}

    def train(run, phase, steps, model, backward, evaluate, args):
        kept.update(model=model, backward=backward, evaluate=evaluate, args=args)

    monkeypatch.setattr(maml_ssl, "train", train)

    def call(*flags):
        words = ["--width", "4", "--batch-size", "18", "--out", str(tmp_path), "--seed", "3"]
        monkeypatch.setattr(sys, "argv", ["maml_ssl.py", *words, *map(str, flags)])
        maml_ssl.main()
        args = kept["args"]
        data = pretext.load(args.dataset, "data", args.image_size, "cpu")
        data = pretext.limit_labels(data, None, "test", 3)
        tasks = {t: pretext.TASKS[t](data.images) for t in args.pretext}
        return SimpleNamespace(**kept, data=data, tasks=tasks)

    return call


def loops_by_hand(m, step):
    """What DESIGN says of a step: each environment's images are shared out among the tasks."""
    images, labels, index = pretext.labelled_batch(m.data, step, 18, 3)
    tasks = [[t] for t in m.tasks] if m.args.inner == "per-task" else [[*m.tasks]]
    loops = []
    for environment in range(int(m.data.environments.max()) + 1):
        rows = [i for i in range(18) if m.data.environments[index[i]] == environment]
        for group, share in zip(tasks, torch.tensor(rows).tensor_split(len(tasks)), strict=True):
            support = images[share], index[share]
            if m.args.support == "disjoint":
                mask = m.data.environments == environment
                mask[index] = False  # no image of the query
                support = m.data.images, mask, m.args.support_batch_size, m.data.flip
            chosen = {t: m.tasks[t] for t in group}
            batches = pretext.batches(chosen, 3, "pretext", step, *support)
            loops.append((batches, images[share], labels[share]))
    return loops


TWO = ("--pretext", "rotation", "masked_autoencoding", "--inner-lr", 0.1, "--support-batch-size", 6)


@pytest.mark.parametrize("dataset", ["shapes", "coloured_shapes"])
@pytest.mark.parametrize("flags", ["--inner per-task --inner-steps 2", "--inner joint",
    "--inner per-task --support query", "--inner joint --first-order --flat-memory"])  # fmt: skip
def test_a_step_of_main_adds_the_gradient_of_the_outer_loss(main, dataset, flags):
    m = main("--dataset", dataset, *TWO, *flags.split())
    loops, args = loops_by_hand(m, 5), m.args
    assert len(loops) == (1 + ("per-task" in flags)) * (1 + (dataset != "shapes"))
    loss = unrolled(m.model, m.tasks, loops, 0.3, 0.1, args.inner_steps, args.first_order)
    expected = gradient(m.model, loss)
    bare = unrolled(m.model, m.tasks, loops, 0, 0.1, args.inner_steps).item()
    m.model.zero_grad()
    value, seen, labelled = m.backward(5)
    assert value == pytest.approx(bare, rel=1e-5) and labelled == 18
    shown = sum(len(x) for batches, *_ in loops for x, _ in batches.values())
    assert seen == 18 + args.inner_steps * shown
    for name, p in m.model.named_parameters():
        assert (p.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-7, name


def test_inner_lr_zero_is_joint_training(main):
    m = main(*TWO, "--inner-lr", 0, "--pretext-weight", 0.5)
    m.args.inner = "joint"  # the same, whatever the groups
    ((batches, images, labels),) = loops_by_hand(m, 0)
    each = [m.tasks[t].loss(m.model(x, t), y) for t, (x, y) in batches.items()]
    expected = gradient(m.model, F.cross_entropy(m.model(images), labels) + 0.5 * sum(each) / 2)
    m.model.zero_grad()
    m.backward(0)
    for name, p in m.model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-5, atol=1e-8), name


def test_inner_lr_zero_and_weight_zero_is_supervised_training_to_the_bit(main):
    m = main("--inner-lr", 0, "--pretext-weight", 0)
    twin = copy.deepcopy(m.model)
    optimizers = [torch.optim.AdamW(x.parameters(), 1e-2) for x in (m.model, twin)]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert m.backward(step)[1:] == (18, 18)  # no pretext work is done
        images, labels, _ = pretext.labelled_batch(m.data, step, 18, 3)
        F.cross_entropy(twin(images), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
        assert all(map(torch.equal, m.model.parameters(), twin.parameters())), step


def adapted_by_hand(m, model, group, batches):
    """-> a copy of the model after K plain SGD steps on the mean loss; the loss before and after"""
    twin, losses = copy.deepcopy(model), []
    sgd = torch.optim.SGD(twin.parameters(), m.args.inner_lr)
    for _ in range(m.args.inner_steps + 1):
        sgd.zero_grad()
        loss = sum(m.tasks[t].loss(twin(batches[t][0], t), batches[t][1]) for t in group)
        losses.append(loss / len(group))
        if len(losses) <= m.args.inner_steps:
            losses[-1].backward()
            sgd.step()
    return twin, losses[0].item(), losses[-1].item()


@pytest.mark.parametrize("inner", ["per-task", "joint"])
@pytest.mark.parametrize("support", ["disjoint", "query"])
def test_evaluation_is_the_mean_of_predictions_after_sgd(main, monkeypatch, inner, support):
    """On the set-aside training images; with --support query on each test batch, alone."""
    m = main(*TWO, "--inner", inner, "--support", support, "--inner-steps", 2, "--inner-lr", 0.5)
    monkeypatch.setattr(maml_ssl, "accuracy", lambda probabilities, labels: probabilities)
    torch.manual_seed(1)
    other = copy.deepcopy(m.model)  # the average of the weights, which main has to look at
    for p in other.parameters():
        p.data += 0.1 * torch.randn_like(p)
    plain, adapted, before, after = m.evaluate(other)
    (pool, mask), test = m.data.unlabelled[0], m.data.test_images
    assert pool.equal(m.data.images) and mask.sum() == min(256, len(pool))
    jobs = [(test, pool, mask, len(mask), m.data.flip)]
    if support == "query":
        jobs = [(x, x / 255, torch.arange(len(x))) for x in test.split(18)]
    groups, losses, votes = [TASKS[::2]] if inner == "joint" else [["rotation"], [TASKS[2]]], [], []
    for images, *job in jobs:
        batches = pretext.batches(m.tasks, 3, "evaluation", 0, *job)
        twins = [adapted_by_hand(m, other, group, batches) for group in groups]
        losses += [twin[1:] for twin in twins]
        votes.append(sum(twin(images / 255).softmax(1) for twin, *_ in twins) / len(groups))
    assert torch.allclose(plain, other(test / 255).softmax(1), atol=1e-6)
    assert torch.allclose(adapted / adapted.sum(1, keepdim=True), torch.cat(votes), atol=1e-5)
    assert (plain - torch.cat(votes)).abs().max() > 0.01  # adapting does something
    assert (before, after) == pytest.approx(torch.tensor(losses).mean(0).tolist(), rel=1e-4)


# --- environments: a case made by hand, in which only the support tells the label ---


class Signed(nn.Module):
    """Predicts `bright` or `dark`, whichever the sign of its one weight s says; s = 0 at first."""

    def __init__(self):
        super().__init__()
        self.s = nn.Parameter(torch.zeros(1))

    def forward(self, images, task="target"):
        red = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
        bright = images[:, 1].mean((1, 2)) - 0.5
        return self.s * (torch.stack((-bright, bright), 1) if task == "target" else red)


def test_each_environment_is_adapted_to_by_its_own_images(main, monkeypatch):
    """Label: bright in the red environment, dark in the blue one. Another's support is wrong."""
    shown = torch.arange(40) % 2, torch.arange(40) // 20  # bright?, environment
    images = torch.full((40, 3, 8, 8), 100, dtype=torch.uint8)
    images[:, 1] += (60 * shown[0] - 10)[:, None, None].byte() + 20
    images[torch.arange(40), 2 * shown[1]] = 200
    split = images, shown[0] ^ shown[1], shown[1]
    data = pretext.limit_labels(pretext.Data(*split, *split, flip=True), None, "test", 0)
    tint = SimpleNamespace(loss=lambda outputs, targets: -outputs.mean(), make_head=None,
                           make_batch=lambda images, indices, generator: (images, None))  # fmt: skip
    monkeypatch.setattr(pretext, "limit_labels", lambda *_: data)
    monkeypatch.setitem(pretext.TASKS, "rotation", lambda pool: tint)
    monkeypatch.setattr(maml_ssl, "make_model", lambda *_: Signed())
    m = main("--pretext", "rotation", "--inner-lr", 1)
    assert len(data.test_labels) == 20  # half of each environment is set aside
    assert m.evaluate(m.model)[1] in (0.0, 1.0)
    right = m.evaluate(m.model)[1]
    swapped = data._replace(unlabelled=data.unlabelled[::-1])
    monkeypatch.setattr(pretext, "limit_labels", lambda *_: swapped)
    m = main("--pretext", "rotation", "--inner-lr", 1)
    assert {right, m.evaluate(m.model)[1]} == {0.0, 1.0}
