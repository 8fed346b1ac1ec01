"""The meta-gradient against closed forms, finite differences and plain autograd; the controls."""

import argparse
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call

import maml_ssl
import pretext

# --- a quadratic: everything about it is known ---


def quadratic():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / 5  # symmetric: the Hessian of the inner loss
    b, c, w = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return matrix, b, c, w


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("second_order", [True, False])
def test_meta_gradient_of_a_quadratic_is_the_closed_form(steps, second_order):
    matrix, b, c, w = quadratic()
    lr, psi = 0.3, torch.tensor([2.0, -1.0], dtype=torch.float64)
    value, gradient, _ = maml_ssl.meta_gradient(
        lambda p: ((p["w"] - c) ** 2).sum() / 2 + p["psi"].pow(3).sum(),
        lambda p: p["w"] @ matrix @ p["w"] / 2 - b @ p["w"],
        {"w": w},
        {"psi": psi},
        lr,
        steps,
        second_order,
    )
    shrink = torch.eye(5, dtype=torch.float64) - lr * matrix  # w_{k+1} = shrink w_k + lr b
    w_last = w
    for _ in range(steps):
        w_last = shrink @ w_last + lr * b
    jacobian = torch.linalg.matrix_power(shrink, steps) if second_order else torch.eye(5).double()
    assert torch.allclose(gradient["w"], jacobian @ (w_last - c), atol=1e-12)
    assert torch.allclose(gradient["psi"], 3 * psi**2, atol=1e-12)
    assert torch.allclose(value, ((w_last - c) ** 2).sum() / 2 + psi.pow(3).sum(), atol=1e-12)


# --- a small network with smooth activations, the real pretext tasks, float64 ---


class SmoothEncoder(nn.Module):
    """[N, 3, 16, 16] -> [N, 4, 2, 2], with two derivatives everywhere."""

    channels = 4

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.Tanh(),
            nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        )  # fmt: skip

    def forward(self, images):
        return self.layers(images)


class Smooth(nn.Module):
    """Contrastive's head has a ReLU; this does as a smooth stand-in for a pretext task."""

    def make_head(self, channels):
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 6))

    def make_batch(self, images, indices, generator):
        return images, torch.randint(6, (len(images),), generator=generator)

    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets)


NAMES = ["rotation", "colorization", "masked_autoencoding"]


def settings(**changed):
    default = dict(inner_lr=0.4, inner_steps=1, first_order=False, pretext_weight=0.3)
    default |= dict(seed=0, device="cpu", support="disjoint", support_batch_size=4, batch_size=10)
    return argparse.Namespace(**{**default, **changed})


@pytest.fixture(scope="module")
def problem():
    """-> model, tasks, pool and the groups of one outer step: one task each, and all together."""
    torch.manual_seed(0)
    pool = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    tasks = {name: pretext.TASKS[name](pool) for name in NAMES} | {"smooth": Smooth()}
    encoder = SmoothEncoder()
    heads = {name: task.make_head(encoder.channels) for name, task in tasks.items()}
    heads["target"] = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    model = maml_ssl.Model(encoder, heads).double()
    index = torch.arange(10)  # 10 images over 4 tasks: shares of 3, 3, 2 and 2
    images, labels = pool[index].double() / 255, index % 3
    batches = maml_ssl.support_batches(
        tasks, pool, (images, index), index, flip=True, step=0, args=settings()
    )
    batches = {t: (x.double(), y) for t, (x, y) in batches.items()}
    shares = zip(batches.items(), images.tensor_split(4), labels.tensor_split(4), strict=True)
    each = [({t: batch}, x, y) for (t, batch), x, y in shares]
    return model, tasks, each, [(batches, images, labels)]


def outer_loss_by_hand(model, tasks, groups, args, w=None, through=True):
    """DESIGN's outer loss, by unrolling the inner loop in one graph: no code of maml_ssl."""
    start = dict(model.named_parameters()) if w is None else w
    total = sum(len(labels) for _, _, labels in groups)
    loss = 0.0
    for batches, images, labels in groups:
        current = dict(start)
        for k in range(args.inner_steps):
            each = [
                tasks[t].loss(functional_call(model, current, (x, t)), y)
                for t, (x, y) in batches.items()
            ]
            if k == 0:
                loss = loss + args.pretext_weight * sum(each) / len(tasks)
            inner = sum(each) / len(each)
            moved = [n for n in current if not n.startswith("heads.target")]
            grads = torch.autograd.grad(
                inner, [current[n] for n in moved], create_graph=True, allow_unused=True
            )
            for name, g in zip(moved, grads, strict=True):
                if g is not None:
                    step = g if through else g.detach()
                    current[name] = current[name] - args.inner_lr * step
        query = F.cross_entropy(functional_call(model, current, (images,)), labels)
        loss = loss + len(labels) / total * query
    return loss


def outer_gradient(model, tasks, groups, args):
    model.zero_grad()
    losses = maml_ssl.outer_gradient(model, tasks, groups, args)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, {name: g.clone() for name, g in grads.items()}


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("inner", ["per-task", "joint"])
def test_meta_gradient_equals_central_finite_differences(problem, inner, steps):
    model, tasks, each, joint = problem
    groups, args = (joint if inner == "joint" else each), settings(inner_steps=steps)
    _, gradient = outer_gradient(model, tasks, groups, args)
    generator = torch.Generator().manual_seed(steps)
    names = [*gradient, "all"]  # a random direction in each parameter tensor, and one in all
    for name in names:
        direction = {
            n: torch.randn(p.shape, generator=generator).double() * (name in (n, "all"))
            for n, p in model.named_parameters()
        }
        h, values = 2e-6, []
        for sign in (1, -1):
            w = {n: (p + sign * h * direction[n]).detach().requires_grad_()
                 for n, p in model.named_parameters()}  # fmt: skip
            values.append(outer_loss_by_hand(model, tasks, groups, args, w).item())
        numeric = (values[0] - values[1]) / (2 * h)
        exact = sum((gradient[n] * direction[n]).sum() for n in gradient).item()
        assert exact == pytest.approx(numeric, rel=2e-6, abs=2e-8), name


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("inner", ["per-task", "joint"])
def test_the_recursion_equals_autograd_through_the_unrolled_loop(
    problem, inner, first_order, steps
):
    model, tasks, each, joint = problem
    groups = joint if inner == "joint" else each
    args = settings(inner_steps=steps, first_order=first_order)
    _, gradient = outer_gradient(model, tasks, groups, args)
    model.zero_grad()
    outer_loss_by_hand(model, tasks, groups, args, through=not first_order).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(gradient[name], p.grad, rtol=1e-10, atol=1e-12), name


def test_first_order_is_the_query_gradient_at_the_adapted_weights(problem):
    model, tasks, each, _ = problem
    args = settings(inner_steps=2, first_order=True, pretext_weight=0.0, batch_size=3)
    _, gradient = outer_gradient(model, tasks, each[:1], args)
    batches, images, labels = each[0]
    w = maml_ssl.parameters(model, "encoder", "heads.rotation")
    loss = maml_ssl.pretext_loss(model, tasks, batches)
    adapted, _ = maml_ssl.adapt(loss, w, args.inner_lr, args.inner_steps)
    name, h, values = "encoder.layers.0.weight", 1e-5, []
    direction = torch.randn(adapted[name].shape, dtype=torch.float64)
    for sign in (1, -1):
        moved = adapted | {name: adapted[name] + sign * h * direction}
        with torch.no_grad():
            logits = functional_call(model, moved, (images,))
        values.append(F.cross_entropy(logits, labels).item())
    numeric = (values[0] - values[1]) / (2 * h)
    assert (gradient[name] * direction).sum().item() == pytest.approx(numeric, rel=1e-6)
    assert (
        gradient["heads.rotation.2.weight"] == 0
    ).all()  # trap 1: no gradient for a pretext head


def test_second_order_gives_pretext_heads_a_gradient_without_pretext_weight(problem):
    model, tasks, each, _ = problem
    _, gradient = outer_gradient(model, tasks, each, settings(pretext_weight=0.0))
    for name in ("rotation.2.weight", "colorization.0.weight"):
        assert gradient[f"heads.{name}"].abs().max() > 0


def test_inner_lr_zero_is_joint_training(problem):
    model, tasks, _, joint = problem
    (batches, images, labels), args = joint[0], settings(inner_lr=0.0)
    losses, gradient = outer_gradient(model, tasks, joint, args)
    model.zero_grad()
    each = {t: tasks[t].loss(model(x, t), y) for t, (x, y) in batches.items()}
    target = F.cross_entropy(model(images), labels)
    (target + args.pretext_weight * sum(each.values()) / len(each)).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(gradient[name], p.grad, rtol=1e-12, atol=1e-14), name
    assert losses["target"].item() == pytest.approx(target.item())
    assert losses["rotation"].item() == pytest.approx(each["rotation"].item())


def test_inner_lr_zero_is_joint_training_whatever_the_groups(problem):
    model, tasks, each, joint = problem
    gradients = [outer_gradient(model, tasks, g, settings(inner_lr=0.0))[1] for g in (each, joint)]
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-10, atol=1e-12), name


def test_no_pretext_work_and_no_inner_lr_is_supervised_training():
    """Several AdamW steps: the parameters are equal to the bit."""
    torch.manual_seed(0)
    model = maml_ssl.Model(
        SmoothEncoder(), {"target": nn.Sequential(nn.Flatten(), nn.Linear(16, 3))}
    )
    twin, args = copy.deepcopy(model), settings(inner_lr=0.0, pretext_weight=0.0, batch_size=6)
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, twin)]
    for step in range(5):
        images, labels = torch.rand(6, 3, 16, 16), torch.arange(6) % 3
        for optimizer in optimizers:
            optimizer.zero_grad()
        maml_ssl.outer_gradient(model, {}, [({}, images, labels)], args)
        F.cross_entropy(twin(images), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q), step


def test_a_batch_given_twice_adds_up_as_backward_does(problem):
    model, tasks, each, _ = problem
    _, once = outer_gradient(model, tasks, each, settings())
    maml_ssl.outer_gradient(model, tasks, each, settings())
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, 2 * once[name], rtol=1e-12)


# --- the batches ---


class Spy(Smooth):
    """A pretext task that keeps what it was shown."""

    def make_batch(self, images, indices, generator):
        self.seen = images, indices
        return images, torch.zeros(len(images), dtype=torch.int64)


def test_support_batches_hold_no_image_of_the_query_and_are_each_task_s_own():
    pool = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 16, 16)
    taken, args = torch.arange(0, 40, 2)[:12], settings(support_batch_size=20)
    tasks = {"rotation": Spy(), "contrastive": Spy()}
    drawn = []
    for step in range(3):
        maml_ssl.support_batches(tasks, pool, (None, None), taken, True, step, args)
        for spy in tasks.values():
            images, index = spy.seen
            assert len({*index.tolist()}) == 20 and not {*index.tolist()} & {*taken.tolist()}
            shown = (images.amax((1, 2, 3)) * 255).round().long()  # zeros may be shifted in
            assert torch.equal(shown, index)  # the images are those that the indices name
            drawn.append(tuple(index.tolist()))
    assert len({*drawn}) == 6  # no two tasks, no two steps alike


def test_support_query_adapts_to_the_very_images_of_the_share():
    images, index, spy = torch.rand(5, 3, 16, 16), torch.tensor([3, 1, 4, 15, 9]), Spy()
    args = settings(support="query")
    maml_ssl.support_batches({"rotation": spy}, None, (images, index), index, True, 0, args)
    assert spy.seen[0] is images and spy.seen[1] is index


# --- evaluation after adapting ---


def test_predict_adapted_is_the_mean_over_tasks_of_predictions_after_plain_sgd(problem):
    model, tasks, *_ = problem
    model = copy.deepcopy(model).float()
    tasks, args = {t: tasks[t] for t in ("rotation", "smooth")}, settings(inner_steps=2)
    images = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8)
    support = images[:6], torch.arange(6)
    groups = [{t: task} for t, task in tasks.items()]
    before = copy.deepcopy(model.state_dict())
    found = maml_ssl.predict_adapted(model, groups, support, images, args)
    expected = 0
    for name, task in tasks.items():
        twin = copy.deepcopy(model)
        draw = maml_ssl.rng(0, f"evaluation {name}")
        x, y = task.make_batch(support[0] / 255, support[1], draw)
        sgd = torch.optim.SGD([*twin.encoder.parameters(), *twin.heads[name].parameters()], 0.4)
        for _ in range(2):
            sgd.zero_grad()
            task.loss(twin(x, name), y).backward()
            sgd.step()
        expected = expected + twin(images / 255).softmax(1).detach() / 2
    assert torch.allclose(found, expected, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # left as it was


def test_transductive_evaluation_adapts_to_each_batch_alone(problem):
    model, tasks, *_ = problem
    model, groups = copy.deepcopy(model).float(), [{"smooth": tasks["smooth"]}]
    images, args = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8), settings(batch_size=4)
    whole = maml_ssl.predict_adapted(model, groups, None, images, args)
    for part, rows in zip(images.split(4), whole.split(4), strict=True):
        alone = maml_ssl.predict_adapted(model, groups, None, part, args)
        assert torch.allclose(alone, rows, atol=1e-6)
    support = images[:4], torch.arange(4)
    assert not torch.allclose(
        maml_ssl.predict_adapted(model, groups, support, images, args)[4:], whole[4:], atol=1e-6
    )
