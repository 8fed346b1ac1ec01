"""The pretext tasks against what their papers, published values and loops written out say."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import pretext

SCRIPT = Path(pretext.__file__)
# the outside truth for sRGB under D65: http://www.brucelindbloom.com, rounded to 1/100
PUBLISHED_LAB = {
    (1.0, 1.0, 1.0): (100.00, 0.00, 0.00),
    (0.0, 0.0, 0.0): (0.00, 0.00, 0.00),
    (1.0, 0.0, 0.0): (53.24, 80.09, 67.20),
    (0.0, 1.0, 0.0): (87.73, -86.18, 83.18),
    (0.0, 0.0, 1.0): (32.30, 79.19, -107.86),
    (1.0, 1.0, 0.0): (97.14, -21.55, 94.48),
    (0.0, 1.0, 1.0): (91.11, -48.09, -14.13),
    (1.0, 0.0, 1.0): (60.32, 98.23, -60.82),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def drawn():
    return pretext.draw_shapes(400, seed=5)[0]


@pytest.fixture(scope="module")
def tasks(drawn):
    return {name: make(drawn) for name, make in pretext.TASKS.items()}


def batch(task, images, seed=0):
    return task.make_batch(images, torch.arange(len(images)), generator(seed))


def encoder(width=8):
    """A smooth encoder with a total stride of 8, as both backbones have."""
    torch.manual_seed(0)
    sizes = ((3, width), (width, width), (width, width))
    return nn.Sequential(*(m for i, o in sizes for m in (nn.Conv2d(i, o, 3, 2, 1), nn.Tanh())))


# --- what holds for every task ---


@pytest.mark.parametrize("name", pretext.TASKS)
@pytest.mark.parametrize("side", [32, 64])
def test_inputs_are_images_and_outputs_fit_targets(tasks, drawn, name, side):
    images = nn.functional.interpolate(drawn[:6] / 255, side)
    inputs, targets = batch(tasks[name], images)
    patch = side // 4 if name == "relative_position" else side
    rows = 12 if name in ("relative_position", "contrastive") else 6
    assert inputs.shape == (rows, 3, patch, patch) and inputs.dtype == torch.float32
    assert inputs.min() >= 0 and inputs.max() <= 1
    features = encoder()(inputs)
    loss = tasks[name].loss(tasks[name].make_head(8)(features), targets)
    assert loss.shape == () and loss.isfinite() and loss > 0


@pytest.mark.parametrize("name", pretext.TASKS)
def test_same_generator_same_batch_and_global_state_untouched(tasks, drawn, name):
    images, state = drawn[:16] / 255, torch.get_rng_state()
    first, again, other = (batch(tasks[name], images, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    if name not in ("colorization", "random_labels"):  # those two have nothing random in a batch
        assert not torch.equal(first[0], other[0])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["rotation", "relative_position", "masked_autoencoding"])
def test_copies_of_one_image_get_parameters_of_their_own(tasks, drawn, name):
    inputs, _ = batch(tasks[name], drawn[:1].expand(32, 3, 32, 32) / 255)
    expected = 4 if name == "rotation" else 32
    assert len(inputs.reshape(32, -1).unique(dim=0)) == expected


@pytest.mark.parametrize("name", pretext.TASKS)
def test_memory_layout_and_type_of_the_images_do_not_matter(tasks, drawn, name):
    images = drawn[:4] / 255
    plain, turned = (
        batch(tasks[name], x) for x in (images, images.to(memory_format=torch.channels_last))
    )
    torch.testing.assert_close(plain, turned)
    assert batch(tasks[name], images.double())[0].dtype == torch.float64


@pytest.mark.parametrize("name", pretext.TASKS)
def test_make_batch_leaves_its_images_alone(tasks, drawn, name):
    images = drawn[:8] / 255
    batch(tasks[name], images)
    assert torch.equal(images, drawn[:8] / 255)


@pytest.mark.parametrize("name", pretext.TASKS)
def test_every_task_trains(tasks, drawn, name):
    inputs, targets = batch(tasks[name], drawn[:16] / 255)
    net = nn.Sequential(encoder(16), tasks[name].make_head(16))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        losses.append(tasks[name].loss(net(inputs), targets))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", pretext.TASKS)
def test_second_derivatives_equal_finite_differences(tasks, drawn, name):
    """Hessian times vector, in the parameters of encoder and head, in float64."""
    inputs, targets = batch(tasks[name], drawn[:4] / 255)
    net = nn.Sequential(encoder(4), tasks[name].make_head(4)).double()
    params = {key: value.detach() for key, value in net.named_parameters()}
    vector = {
        key: torch.randn(v.shape, generator=generator()).double() for key, v in params.items()
    }

    def gradient(step):
        moved = {k: (v + step * vector[k]).requires_grad_() for k, v in params.items()}
        outputs = torch.func.functional_call(net, moved, (inputs.double(),))
        loss = tasks[name].loss(outputs, targets)
        assert loss.dtype == torch.float64
        return moved, torch.autograd.grad(loss, moved.values(), create_graph=True)

    moved, first = gradient(0.0)
    along = sum((g * v).sum() for g, v in zip(first, vector.values(), strict=True))
    exact = torch.autograd.grad(along, moved.values(), allow_unused=True)
    step = 1e-6
    sides = zip(gradient(step)[1], gradient(-step)[1], exact, strict=True)
    for plus, minus, product in sides:
        product = torch.zeros_like(plus) if product is None else product
        torch.testing.assert_close((plus - minus) / (2 * step), product, rtol=1e-4, atol=1e-6)


# --- rotation ---


def test_four_quarter_turns_are_the_identity_and_labels_agree_with_rot90(tasks, drawn):
    images = drawn[:10] / 255
    inputs, turns = batch(tasks["rotation"], images)
    for image, shown, k in zip(images, inputs, turns, strict=True):
        assert torch.equal(shown, torch.rot90(image, int(k), (1, 2)))
        assert torch.equal(torch.rot90(shown, 4 - int(k), (1, 2)), image)


def test_turns_are_balanced_in_every_batch(tasks, drawn):
    for seed in range(3):
        turns = batch(tasks["rotation"], drawn[:32] / 255, seed)[1]
        assert turns.bincount().tolist() == [8, 8, 8, 8]


# --- colorization ---


@pytest.mark.parametrize("rgb, lab", PUBLISHED_LAB.items())
def test_lab_has_the_published_values(rgb, lab):
    result = pretext.rgb_to_lab(torch.tensor(rgb).view(3, 1, 1)).flatten()
    torch.testing.assert_close(result, torch.tensor(lab), rtol=0, atol=0.05)


def test_lab_and_back_is_the_identity(drawn):
    images = drawn[:20] / 255
    torch.testing.assert_close(
        pretext.lab_to_rgb(pretext.rgb_to_lab(images)), images, rtol=0, atol=1e-4
    )


def test_bins_are_a_grid_of_step_10_on_which_every_colour_has_its_own(tasks):
    bins = tasks["colorization"].bins
    assert 250 < len(bins) < 320 and (bins % 10 == 0).all()  # the paper's list has 313
    assert len(bins.unique(dim=0)) == len(bins) and bins.abs().max() <= 110
    colours = torch.rand(3, 2000, 1, generator=generator())
    ab = pretext.rgb_to_lab(colours)[1:, :, 0].T
    assert (ab[:, None] - bins).abs().amax(2).amin(1).max() <= 5  # half a step in a and in b
    corners = torch.cartesian_prod(*[torch.linspace(0, 1, 52)] * 3).T[..., None]
    reached = pretext.rgb_to_lab(corners)[1:, :, 0].T
    nearest = torch.stack([(reached - b).abs().amax(1).min() for b in bins])
    assert nearest.max() <= 5.5  # no bin that no colour comes near to


def test_rebalancing_weights_have_expectation_1_and_follow_the_formula(tasks):
    task = tasks["colorization"]
    assert task.prior.sum().item() == pytest.approx(1, abs=1e-5)
    assert (task.prior * task.weights).sum().item() == pytest.approx(1, abs=1e-5)
    inverse = 1 / (0.5 * task.prior + 0.5 / len(task.bins))  # equation 4, lambda = 1/2
    torch.testing.assert_close(task.weights / task.weights[0], inverse / inverse[0])


def test_prior_is_the_histogram_of_the_training_colours_smoothed():
    red = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    red[:, 0] = 255
    task = pretext.Colorization(red)  # ab = (80.1, 67.2): everything falls into the bin (80, 70)
    distance = (task.bins - torch.tensor([80.0, 70.0])).square().sum(1)
    torch.testing.assert_close(
        task.prior,
        torch.exp(-distance / 50) / torch.exp(-distance / 50).sum(),
        rtol=1e-3,
        atol=1e-6,
    )


def test_colour_targets_equal_a_naive_loop(tasks, drawn):
    task, images = tasks["colorization"], drawn[:2] / 255
    inputs, targets = batch(task, images)
    lab = pretext.rgb_to_lab(images)
    torch.testing.assert_close(inputs, lab[:, :1].repeat(1, 3, 1, 1) / 100)
    outputs = torch.randn(2, len(task.bins), 8, 8, generator=generator())
    total = 0.0
    for n, row, column in torch.cartesian_prod(*map(torch.arange, (2, 8, 8))).tolist():
        block = lab[n, 1:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        squares = (task.bins - block.mean((1, 2))).square().sum(1)
        order = squares.argsort()[:5]
        soft = torch.zeros(len(task.bins))
        soft[order] = torch.exp(-squares[order] / (2 * 5**2))
        soft /= soft.sum()
        weight = task.weights[soft.argmax()]
        torch.testing.assert_close(targets[n, 5:, row, column].sum(), weight, rtol=1e-3, atol=0)
        total -= (weight * soft * outputs[n, :, row, column].log_softmax(0)).sum().item()
    assert task.loss(outputs, targets).item() == pytest.approx(total / 128, rel=1e-4)


def test_soft_encoding_sums_to_1_over_five_distinct_bins_nearest_first(tasks, drawn):
    bins, shares = tasks["colorization"].encode(pretext.rgb_to_lab(drawn[:4] / 255))
    torch.testing.assert_close(shares.sum(1), torch.ones(4, 8, 8))
    assert (bins.sort(1).values.diff(dim=1) > 0).all() and (shares.diff(dim=1) <= 1e-6).all()


# --- relative position ---


def coordinates(count, side=32):
    """Images whose red is the row and whose green and blue are the column, both over 255."""
    rows = torch.arange(side).view(-1, 1).expand(side, side)
    return torch.stack((rows, rows.T, rows.T)).expand(count, 3, side, side) / 255


def test_labels_agree_with_where_the_patches_were_cut_out(tasks):
    count = 600
    red = coordinates(count)[:, :1].expand(-1, 3, -1, -1)  # all channels: rows, so none is lost
    green = coordinates(count)[:, 1:2].expand(-1, 3, -1, -1)
    corners = []
    for images in (red, green):  # the same seed: the same patches, once as rows, once as columns
        inputs, labels = batch(tasks["relative_position"], images)
        value = inputs.flatten(2).mean(2) * 255  # mean of the kept channel: corner + 3.5
        kept = inputs.flatten(2).std(2).argmax(1)
        corners.append((value[torch.arange(2 * count), kept] - 3.5).round().long().view(count, 2))
    top, left = corners  # [N, 2]: of the first and of the second patch
    first, second = torch.stack((top, left), 2).unbind(1)
    places = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]
    expected = torch.tensor(places)[labels]
    assert torch.equal(((second - first) / 11).round().long(), expected)
    for corner, centre in ((first, 12), (second - 11 * expected, 12)):
        offsets = (corner - centre).unique(dim=0)  # the jitter: each of 3 x 3, in every direction
        assert len(offsets) == 9 and offsets.abs().max() == 1
    assert labels.unique().tolist() == list(range(8))


def test_colour_dropping_leaves_one_channel_and_noise_about_mid_gray(tasks):
    images = torch.rand(200, 3, 32, 32, generator=generator())
    inputs, _ = batch(tasks["relative_position"], images)
    spread = inputs.std((2, 3))  # [400, 3]: 0.29 in the kept channel, a hundredth in the others
    kept = spread > 0.1
    assert (kept.sum(1) == 1).all() and (kept.sum(0) > 90).all()
    assert (inputs.mean((2, 3))[~kept] - 0.5).abs().max() < 0.01
    ratio = spread[~kept].view(400, 2).mean(1) / spread[kept]
    assert ratio.mean().item() == pytest.approx(0.01, rel=0.05)


def test_kept_channel_is_a_patch_of_the_image(tasks):
    images = torch.rand(8, 3, 32, 32, generator=generator())
    inputs, _ = batch(tasks["relative_position"], images)
    for row, patch in enumerate(inputs):
        k = patch.std((1, 2)).argmax()
        windows = images[row // 2, k].unfold(0, 8, 1).unfold(1, 8, 1)
        assert (windows == patch[k]).all(-1).all(-1).sum() == 1


def test_head_joins_the_two_patches_of_one_image(tasks):
    head = tasks["relative_position"].make_head(4)
    features = torch.randn(6, 4, 1, 1, generator=generator())
    before = head(features)
    features[3] += 1  # the second patch of image 1
    changed = (head(features) != before).any(1)
    assert changed.tolist() == [False, True, False]


# --- masked autoencoding ---


def patches_of(images, patch=4):
    """[N, C, H, H] -> [N, H/patch, H/patch, C, patch, patch]"""
    return images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)


def test_exactly_three_quarters_of_the_patches_are_masked_whole(tasks, drawn):
    _, targets = batch(tasks["masked_autoencoding"], drawn[:20] / 255)
    masked = patches_of(targets[:, 3:]).flatten(3)
    assert (masked.amin(3) == masked.amax(3)).all()
    assert (masked[..., 0].sum((1, 2)) == 48).all()


def test_no_masked_pixel_reaches_the_network_and_every_other_one_does(tasks, drawn):
    images = drawn[:8] / 255
    inputs, targets = batch(tasks["masked_autoencoding"], images)
    masked = (targets[:, 3:] > 0).expand_as(images)
    other = torch.where(masked, torch.rand(images.shape, generator=generator()), images)
    assert torch.equal(batch(tasks["masked_autoencoding"], other)[0], inputs)
    assert (inputs[masked] == 0.5).all() and torch.equal(inputs[~masked], images[~masked])


def test_masked_loss_equals_a_naive_loop_and_ignores_visible_pixels(tasks, drawn):
    images = drawn[:3] / 255
    _, targets = batch(tasks["masked_autoencoding"], images)
    outputs = torch.randn(images.shape, generator=generator())
    errors = []
    rows = zip(patches_of(images), patches_of(outputs), patches_of(targets[:, 3:]), strict=True)
    for image, output, mask in rows:
        for i, j in torch.cartesian_prod(torch.arange(8), torch.arange(8)).tolist():
            if mask[i, j].all():
                patch = image[i, j]
                normal = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                errors.append((output[i, j] - normal).square().mean().item())
    loss = tasks["masked_autoencoding"].loss(outputs, targets)
    assert len(errors) == 3 * 48 and loss.item() == pytest.approx(sum(errors) / 144, rel=1e-4)
    changed = torch.where(targets[:, 3:] > 0, outputs, 9.0)
    assert tasks["masked_autoencoding"].loss(changed, targets) == loss


# --- contrastive ---


def test_nt_xent_equals_a_loop_written_out():
    views = torch.randn(6, 4, generator=generator()).double()
    partners = [1, 0, 3, 2, 5, 4]

    def cosine(i, j):
        dot = sum(float(a * b) for a, b in zip(views[i], views[j], strict=True))
        return dot / math.sqrt(float((views[i] ** 2).sum()) * float((views[j] ** 2).sum()))

    total = 0.0
    for i, j in enumerate(partners):
        others = sum(math.exp(cosine(i, k) / 0.5) for k in range(6) if k != i)
        total -= math.log(math.exp(cosine(i, j) / 0.5) / others)
    loss = pretext.nt_xent(views, torch.tensor(partners))
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)
    assert pretext.Contrastive.loss(views, torch.tensor(partners)) == loss


def test_partners_show_the_same_image(tasks):
    shades = torch.tensor(
        [0.05, 0.9, 0.9, 0.05, 0.9]
    )  # further apart than any jitter can move them
    images = shades.view(5, 1, 1, 1).expand(5, 3, 32, 32)
    views, partners = batch(tasks["contrastive"], images)
    bright = views.mean((1, 2, 3)) > 0.3
    assert torch.equal(bright, (shades > 0.3).repeat_interleave(2))
    assert torch.equal(bright[partners], bright) and (partners != torch.arange(10)).all()
    assert torch.equal(partners[partners], torch.arange(10))


def test_views_of_identical_images_all_differ(tasks, drawn):
    views, _ = batch(tasks["contrastive"], drawn[:1].expand(16, 3, 32, 32) / 255)
    assert len(views.view(32, -1).unique(dim=0)) == 32


def crop_boxes(task, count=4000):
    """Width, height and middle of crops, read off coordinate images; the image is [0, 1]^2."""
    ramp = ((torch.arange(32) + 0.5) / 32).expand(32, 32)
    views = task.crop(torch.stack((ramp, ramp.T, ramp)).expand(count, 3, 32, 32), generator())
    inner = views[:, :2, 8:24, 8:24]  # no border effects at any crop size
    step = torch.stack((inner[:, 0].diff(dim=2).mean((1, 2)), inner[:, 1].diff(dim=1).mean((1, 2))))
    return 32 * step, inner.mean((2, 3)).T


def test_crops_keep_to_their_area_and_ratio_and_to_the_image(tasks):
    (width, height), middle = crop_boxes(tasks["contrastive"])
    flipped, width = width < 0, width.abs()
    area, ratio = width * height, width / height
    assert 0.079 < area.min() < 0.1 and 0.95 < area.max() < 1.001
    assert area.mean().item() == pytest.approx(0.53, abs=0.03)  # uniform in [0.08, 1], cut a bit
    assert 0.749 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.334
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.03)
    for size, centre in zip((width, height), middle, strict=True):
        assert (centre - size / 2).min() > -1e-3 and (centre + size / 2).max() < 1 + 1e-3
        assert (centre - size / 2).min() < 0.01 and (centre + size / 2).max() > 0.99


def test_gray_images_are_never_flipped(drawn):
    task = pretext.Contrastive(drawn[:, :1].expand(-1, 3, -1, -1))
    assert (crop_boxes(task, 500)[0] > 0).all()


def test_crop_has_no_dark_border(tasks):
    white = torch.ones(200, 3, 32, 32)
    assert tasks["contrastive"].crop(white, generator()).min() > 0.999


def test_jitter_changes_four_images_of_five_and_takes_colour_from_one_of_five(tasks):
    colour = torch.tensor([0.6, 0.45, 0.3]).view(1, 3, 1, 1).repeat(4000, 1, 4, 4)
    colour[::2] /= 4  # dark images among bright ones: contrast is about the mean of each
    views = tasks["contrastive"].jitter(colour, generator())
    gray = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-5
    same = (views - colour).abs().amax((1, 2, 3)) < 1e-5
    assert gray.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert same.float().mean().item() == pytest.approx(0.2 * 0.8, abs=0.02)
    luma = (views * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1).mean((1, 2))
    factor = luma / (
        torch.tensor([0.25, 1]).repeat(2000) * 0.47775
    )  # a flat image has no contrast to change: the brightness is left
    assert 0.6 < factor.min() < 0.61 and 1.39 < factor.max() < 1.4001


def test_jitter_turns_hue_by_up_to_a_tenth_of_the_circle_and_keeps_luma_and_contrast_apart(tasks):
    image = 0.5 + 0.1 * torch.rand(1, 3, 8, 8, generator=generator())
    views = tasks["contrastive"].jitter(image.expand(4000, 3, 8, 8), generator())

    def parts(x):  # luma, and chroma as a complex number in the plane of U and V
        r, g, b = x.double().unbind(1)
        y = 0.299 * r + 0.587 * g + 0.114 * b
        return y.flatten(1), torch.complex(0.492 * (b - y), 0.877 * (r - y)).flatten(1)

    (y, chroma), (y0, chroma0) = parts(views), parts(image)
    contrast = y.std(1) / y0.std(1) / (y.mean(1) / y0.mean(1))
    assert 0.6 < contrast.min() < 0.62 and 1.38 < contrast.max() < 1.401
    factor = (chroma * chroma0.conj()).sum(1) / (chroma0.abs() ** 2).sum(1)
    coloured = factor.abs() > 1e-3
    turn = factor[coloured].angle() / (2 * math.pi)
    assert -0.1001 < turn.min() < -0.098 and 0.098 < turn.max() < 0.1001
    saturation = (factor.abs() / (contrast * y.mean(1) / y0.mean(1)))[coloured]
    assert 0.599 < saturation.min() < 0.62 and 1.38 < saturation.max() < 1.401


# --- random labels ---


def test_labels_belong_to_dataset_indices_and_stay_when_images_are_appended(drawn):
    few, many = pretext.RandomLabels(drawn[:37]), pretext.RandomLabels(drawn)
    indices = torch.tensor([5, 36, 0, 5])
    inputs, labels = few.make_batch(drawn[indices] / 255, indices, generator(1))
    again = many.make_batch(drawn[indices] / 255, indices, generator(2))[1]
    assert torch.equal(labels, again) and labels[0] == labels[3]
    assert torch.equal(inputs, drawn[indices] / 255)
    assert torch.equal(few.labels, many.labels[:37])
    counts = pretext.RandomLabels(torch.zeros(10000, 3, 1, 1)).labels.bincount(minlength=10)
    assert len(counts) == 10 and (counts - 1000).abs().max() < 120


# --- errors ---


def test_gray_images_are_recognised(drawn):
    assert not pretext.is_gray(drawn)
    gray = drawn[:, :1].repeat(1, 3, 1, 1)
    assert pretext.is_gray(gray)
    gray[3, 2, 7, 7] += 1
    assert not pretext.is_gray(gray)


@pytest.mark.parametrize(
    "name, side, message",
    [
        ("colorization", 30, "8 divides, not 30: use --image-size 32"),
        ("masked_autoencoding", 28, "8 divides, not 28: use --image-size 32"),
        ("relative_position", 40, "32 divides, not 40: use --image-size 64"),
    ],
)
def test_sizes_that_cannot_work_are_refused_with_a_remedy(name, side, message):
    images = torch.randint(256, (2, 3, side, side), generator=generator()).byte()
    with pytest.raises(ValueError, match=f"{name} needs .*{message}"):
        pretext.TASKS[name](images)


def test_colorization_refuses_gray_images(drawn):
    with pytest.raises(ValueError, match=r"^colorization needs colour.*gray.*leave it out"):
        pretext.Colorization(drawn[:, :1].expand(-1, 3, -1, -1))


# --- the drawn dataset ---


@pytest.mark.parametrize("classes", ["target", "source"])
def test_shapes_are_the_same_every_time_balanced_and_quick(classes):
    state, start = torch.get_rng_state(), time.perf_counter()
    images, labels = pretext.draw_shapes(1000, classes, seed=1)
    assert time.perf_counter() - start < 3  # about 0.3 s; 5,000 images in less than 3 s
    assert images.shape == (1000, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist() == [100] * 10
    again = pretext.draw_shapes(1000, classes, seed=1)
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, pretext.draw_shapes(1000, classes, seed=2)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_light_falls_from_above_and_classes_lean_towards_a_colour():
    images, labels = pretext.draw_shapes(1000, seed=1)
    upper, lower = (half.float().mean() for half in images.chunk(2, dim=2))
    assert upper > 1.1 * lower
    middle = images[:, :, 12:20, 12:20].float().mean((2, 3))  # [1000, 3]
    means = torch.stack([middle[labels == k].mean(0) for k in range(10)])
    assert means.std(0).mean() > 18  # about 10 if the classes had the same colours
    assert not torch.equal(labels, pretext.draw_shapes(1000, "source", seed=1)[1])


def test_target_and_source_are_twenty_different_shapes():
    outlines = [shape.split() for text in pretext.SHAPES.values() for shape in text.split(",")]
    assert len(outlines) == 20
    assert len({o[0] for o in outlines}) == len({tuple(sorted(o[1:])) for o in outlines}) == 20


@pytest.mark.parametrize("classes", ["target", "source"])
def test_shapes_can_be_learnt_but_not_at_once(classes):
    """A small CNN, 200 steps: far above chance (10%), and well below 100%."""
    images, labels = pretext.draw_shapes(1000, classes, seed=0)
    unseen, truth = pretext.draw_shapes(400, classes, seed=1)
    torch.manual_seed(0)
    layers = [m for i, o in ((3, 16), (16, 32), (32, 64)) for m in block(i, o)]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(200):
        chosen = torch.randint(len(images), (64,), generator=generator(_))
        loss = nn.functional.cross_entropy(net(images[chosen] / 255), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (net(unseen / 255).argmax(1) == truth).float().mean()
    assert 0.25 < accuracy < 0.95


def block(channels, outputs):
    layers = (nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(4, outputs))
    return *layers, nn.ReLU(), nn.MaxPool2d(2)


# --- python pretext.py ---


def script(*arguments, cwd):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_script_draws_a_png_of_generated_images(tmp_path):
    result = script(cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    with Image.open(tmp_path / "pretext.png") as figure:
        assert figure.format == "PNG" and figure.width > 800


def test_figure_of_files_of_any_size_and_mode(tmp_path):
    Image.new("RGB", (50, 20), "red").save(tmp_path / "red.jpg")
    Image.new("L", (9, 9), 70).save(tmp_path / "gray.png")
    out = tmp_path / "new.png"
    pretext.main([str(tmp_path / "red.jpg"), str(tmp_path / "gray.png"), "--out", str(out)])
    assert out.stat().st_size > 1000
    pretext.main([str(tmp_path / "gray.png"), "--out", str(out)])  # colorization says why not


@pytest.mark.parametrize("name", ["missing.png", "text.png", "cut.png", "folder"])
def test_what_is_no_image_is_named_and_nothing_is_written(tmp_path, name, capsys):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder").mkdir()
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    before = sorted(tmp_path.iterdir())
    good, bad, out = (str(tmp_path / f) for f in ("whole.png", name, "out.png"))
    with pytest.raises(SystemExit) as stop:
        pretext.main([good, bad, "--out", out])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and name in message
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_that_cannot_be_written_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretext.main(["--out", str(tmp_path / "nowhere" / "out.png")])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "nowhere" in message
