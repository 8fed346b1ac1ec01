"""The pretext tasks against their papers, published values and loops written out."""

import math
import runpy
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import pretext

# sRGB under D65: http://www.brucelindbloom.com, rounded to 1/100
PUBLISHED_LAB = {
    (1, 1, 1): (100.00, 0.00, 0.00), (1, 0, 0): (53.24, 80.09, 67.20),
    (0, 1, 0): (87.73, -86.18, 83.18), (0, 0, 1): (32.30, 79.19, -107.86),
    (1, 1, 0): (97.14, -21.55, 94.48), (0, 0, 0): (0.00, 0.00, 0.00),
}  # fmt: skip
PATCHES = ("relative_position", "contrastive")  # two inputs for each image


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


def encoder(width):
    """A smooth encoder with a total stride of 8, as both backbones have."""
    torch.manual_seed(0)
    layers = []
    for channels in (3, width, width):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.Tanh()]
    return nn.Sequential(*layers)


# --- what holds for every task ---
@pytest.mark.parametrize("name", pretext.TASKS)
@pytest.mark.parametrize("side", [32, 64])
def test_inputs_are_images_and_outputs_fit_targets(tasks, drawn, name, side):
    images, state = F.interpolate(drawn[:6] / 255, side), torch.get_rng_state()
    inputs, targets = batch(tasks[name], images)
    again = batch(tasks[name], images)  # the same seed
    assert all(map(torch.equal, again, (inputs, targets)))
    assert torch.equal(torch.get_rng_state(), state)
    patch = side // 4 if name == "relative_position" else side
    assert inputs.shape == (12 if name in PATCHES else 6, 3, patch, patch)
    assert inputs.min() >= 0 and inputs.max() <= 1 and inputs.dtype == torch.float32
    loss = tasks[name].loss(tasks[name].make_head(8)(encoder(8)(inputs)), targets)
    assert loss.shape == () and loss.isfinite() and loss > 0


@pytest.mark.parametrize("name", pretext.TASKS)
def test_first_and_second_derivatives_equal_finite_differences(tasks, drawn, name):
    """Of the loss through the head, in float64, along a random direction."""
    inputs, targets = batch(tasks[name], drawn[:4] / 255)
    features = encoder(4)(inputs).double().detach().requires_grad_()
    head = tasks[name].make_head(4).double()

    def loss(features):
        return tasks[name].loss(head(features), targets)

    assert torch.autograd.gradcheck(loss, features, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, features, fast_mode=True)


# --- what a pretext task may see: no shortcut through how support images are made ---
def support(name, images, steps, count):
    """Inputs and targets of `steps` support batches, made as the arms make them."""
    tasks = pretext.make_tasks([name], images, True)
    nothing = torch.zeros(len(images), dtype=torch.long)
    split, made = pretext.Split(images, nothing, nothing), []
    for step in range(steps):
        key = (0, "pretext", step)
        drawn = pretext.draw_batches(tasks, split, nothing == 0, count, True, key)
        made.append(drawn[name])
    return tuple(map(torch.cat, zip(*made, strict=True)))


def guessed_places():
    """How often least squares on pixels finds the place, on unseen pairs of noise."""
    noise = torch.randint(256, (2000, 3, 32, 32), generator=generator()).byte()
    inputs, places = support("relative_position", noise, 16, 500)
    # both patches, and a constant
    pixels = F.pad(inputs.view(8000, -1) - 0.5, (0, 1), value=1.0)
    answers = F.one_hot(places[:6000], 8).float()
    weights = torch.linalg.lstsq(pixels[:6000], answers).solution
    guesses = (pixels[6000:] @ weights).argmax(1)
    return (guesses == places[6000:]).float().mean().item()


def agreement_of_views():
    """How alike two views of one image are, in standard errors: 0 by chance."""
    copies = pretext.draw_shapes(1, seed=1)[0].expand(1000, -1, -1, -1)
    views, _ = support("contrastive", copies, 2, 1000)
    views = (views - views.mean(0)).flatten(1)
    products = (views[::2] * views[1::2]).sum(1)
    return (products.mean() / products.std() * math.sqrt(len(products))).item()


def new_dark_pixels(name):
    """The share of places that are darker than any pixel of the images."""
    bright = torch.randint(128, 256, (60, 3, 32, 32), generator=generator()).byte()
    inputs, _ = support(name, bright, 1, 60)
    return (inputs.amin(1) < 0.45).float().mean().item()


@pytest.mark.parametrize("measure, chance, noise", [
    (guessed_places, 1 / 8, 0.026),  # 3.5 standard deviations
    (agreement_of_views, 0, 3.5),
    (partial(new_dark_pixels, "colorization"), 0, 0),
    (partial(new_dark_pixels, "masked_autoencoding"), 0, 0),
])  # fmt: skip
def test_support_images_give_nothing_away(measure, chance, noise, monkeypatch):
    assert abs(measure() - chance) <= noise
    mirror, shift = pretext.mirror, pretext.shift  # black borders would be seen:
    shifted = lambda x, rng, flip: mirror(shift(x, rng), rng, flip)  # noqa: E731
    monkeypatch.setattr(pretext, "mirror", shifted)
    assert measure() > chance + max(0.02, 2 * noise)


@pytest.mark.parametrize("flip", [True, False])
def test_support_images_are_mirrored_each_by_itself_and_nothing_else(drawn, flip):
    found = pretext.mirror(drawn, generator(), flip)
    as_they_are = (found == drawn / 255).all(dim=(1, 2, 3))
    mirrored = (found == drawn.flip(3) / 255).all(dim=(1, 2, 3))
    assert (as_they_are ^ mirrored).all()
    assert 150 < mirrored.sum() < 250 if flip else not mirrored.any()


def test_four_quarter_turns_are_the_identity_and_batches_are_balanced(tasks, drawn):
    images = drawn[:32] / 255
    inputs, turns = batch(tasks["rotation"], images)
    assert turns.bincount().tolist() == [8, 8, 8, 8]
    for image, shown, k in zip(images, inputs, turns.tolist(), strict=True):
        for _ in range(4 - k):  # anticlockwise: columns become rows, the last one first
            shown = shown.transpose(1, 2).flip(1)
        assert torch.equal(shown, image)


# --- colorization ---
@pytest.mark.parametrize("rgb, lab", PUBLISHED_LAB.items())
def test_lab_has_the_published_values(rgb, lab):
    result = pretext.rgb_to_lab(torch.tensor(rgb).view(3, 1, 1).float()).flatten()
    torch.testing.assert_close(result, torch.tensor(lab), rtol=0, atol=0.05)


def test_bins_are_a_grid_of_step_10_on_which_every_colour_has_its_own(tasks):
    bins = tasks["colorization"].bins
    assert 250 < len(bins.unique(dim=0)) == len(bins) < 320  # the paper's list has 313
    assert (bins % 10 == 0).all() and bins.abs().max() <= 110
    colours = torch.rand(3, 2000, 1, generator=generator())
    ab = pretext.rgb_to_lab(colours)[1:, :, 0].T
    distance = (ab[:, None] - bins).abs().amax(2)
    assert distance.amin(1).max() <= 5  # half a step in a and in b


def test_prior_is_the_smoothed_histogram_and_rebalancing_follows_equation_4():
    red = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    red[:, 0] = 255
    task = pretext.Colorization(red)  # ab = (80.1, 67.2): all is in the bin (80, 70)
    squares = (task.bins - torch.tensor([80.0, 70.0])).square().sum(1)
    smooth = torch.exp(-squares / (2 * 5**2))
    torch.testing.assert_close(task.prior, smooth / smooth.sum(), rtol=1e-3, atol=1e-6)
    inverse = 1 / (0.5 * task.prior + 0.5 / len(task.bins))  # lambda = 1/2
    torch.testing.assert_close(task.weights / task.weights[0], inverse / inverse[0])
    assert (task.prior * task.weights).sum().item() == pytest.approx(1, abs=1e-5)


def test_colour_targets_and_loss_equal_a_naive_loop(tasks, drawn):
    task, images = tasks["colorization"], drawn[:2] / 255
    inputs, targets = batch(task, images)
    lab = pretext.rgb_to_lab(images)
    torch.testing.assert_close(inputs, lab[:, :1].repeat(1, 3, 1, 1) / 100)
    outputs = torch.randn(2, len(task.bins), 8, 8, generator=generator())
    total = 0.0
    for n, row, column in torch.cartesian_prod(*map(torch.arange, (2, 8, 8))).tolist():
        block = lab[n, 1:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        squares = (task.bins - block.mean((1, 2))).square().sum(1)
        nearest = squares.argsort()[:5]
        soft = torch.zeros(len(task.bins))
        soft[nearest] = torch.exp(-squares[nearest] / (2 * 5**2))
        soft /= soft.sum()
        log_p = outputs[n, :, row, column].log_softmax(0)
        total -= (task.weights[nearest[0]] * soft * log_p).sum().item()
    assert task.loss(outputs, targets).item() == pytest.approx(total / 128, rel=1e-4)


# --- relative position ---
def test_labels_agree_with_where_the_patches_were_cut_out(tasks):
    """Read off images whose channels are the row, then the column, of each pixel."""
    count, corners = 600, []
    rows = torch.arange(32.0).view(32, 1).expand(32, 32) / 255
    for ramp in (rows, rows.T):  # the same seed: the same patches
        ramps = ramp.expand(count, 3, 32, 32)
        inputs, labels = batch(tasks["relative_position"], ramps)
        kept = inputs.flatten(2).std(2).argmax(1)
        first_pixel = inputs[torch.arange(2 * count), kept, 0, 0]
        corners.append((first_pixel * 255).round().long())
    # [N, row and column] each
    first, second = torch.stack(corners, 1).view(count, 2, 2).unbind(1)
    places = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]
    expected = torch.tensor(places)[labels]
    assert labels.unique().tolist() == list(range(8))
    for offset in (first - 12, second - 11 * expected - 12):  # sides of 8, gaps of 3
        jitter = offset.unique(dim=0)
        assert len(jitter) == 9 and jitter.abs().max() == 1


def test_kept_channel_is_a_patch_of_the_image_the_others_noise_about_mid_gray(tasks):
    images = torch.rand(200, 3, 32, 32, generator=generator())
    inputs, _ = batch(tasks["relative_position"], images)
    spread = inputs.std((2, 3))  # [400, 3]: 0.29 where kept, else a hundredth of that
    kept = spread > 0.1
    assert (kept.sum(1) == 1).all() and (kept.sum(0) > 90).all()
    assert (inputs.mean((2, 3))[~kept] - 0.5).abs().max() < 0.01
    ratio = spread[~kept].view(400, 2) / spread[kept][:, None]
    assert ratio.mean().item() == pytest.approx(0.01, rel=0.05)
    for row, k in enumerate(kept.int().argmax(1).tolist()):
        windows = images[row // 2, k].unfold(0, 8, 1).unfold(1, 8, 1)
        assert (windows == inputs[row, k]).all(-1).all(-1).sum() == 1


def test_head_joins_the_two_patches_of_one_image(tasks):
    head = tasks["relative_position"].make_head(4)
    features = torch.randn(6, 4, 1, 1, generator=generator())
    before = head(features)
    features[3] += 1  # the second patch of image 1
    assert (head(features) != before).any(1).tolist() == [False, True, False]


# --- masked autoencoding ---
def patches_of(images):
    """[N, C, 32, 32] -> [N, 8, 8, C, 4, 4]"""
    return images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)


def test_three_quarters_of_the_patches_are_masked_and_not_shown(tasks, drawn):
    task, images = tasks["masked_autoencoding"], drawn[:20] / 255
    inputs, targets = batch(task, images)
    mask = patches_of(targets[:, 3:]).flatten(3)
    assert (mask.amin(3) == mask.amax(3)).all()
    assert (mask[..., 0].sum((1, 2)) == 48).all()
    assert len(mask[..., 0].flatten(1).unique(dim=0)) == len(images)  # each has its own
    masked = (targets[:, 3:] > 0).expand_as(images)
    other = torch.where(masked, torch.rand(images.shape, generator=generator()), images)
    assert torch.equal(batch(task, other)[0], inputs)
    assert (inputs[masked] == 0.5).all()
    assert torch.equal(inputs[~masked], images[~masked])


def test_masked_loss_equals_a_naive_loop_and_ignores_visible_pixels(tasks, drawn):
    task, images = tasks["masked_autoencoding"], drawn[:3] / 255
    _, targets = batch(task, images)
    outputs = torch.randn(images.shape, generator=generator())
    shown = (patches_of(x) for x in (images, outputs, targets[:, 3:]))
    errors = []
    for patch, output, mask in zip(*(x.flatten(0, 2) for x in shown), strict=True):
        if mask.all():
            normal = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            errors.append((output - normal).square().mean().item())
    loss = task.loss(outputs, targets)
    assert len(errors) == 3 * 48
    assert loss.item() == pytest.approx(sum(errors) / 144, rel=1e-4)
    assert task.loss(torch.where(targets[:, 3:] > 0, outputs, 9.0), targets) == loss


# --- contrastive ---
def test_nt_xent_equals_a_loop_written_out():
    views = torch.randn(6, 4, generator=generator()).double()
    partners = [1, 0, 3, 2, 5, 4]

    def cosine(i, j):
        return torch.cosine_similarity(views[i], views[j], dim=0).item()

    total = 0.0
    for i, j in enumerate(partners):
        others = sum(math.exp(cosine(i, k) / 0.5) for k in range(6) if k != i)
        total -= math.log(math.exp(cosine(i, j) / 0.5) / others)
    loss = pretext.Contrastive(views).loss(views, torch.tensor(partners))
    assert loss.item() == pytest.approx(total / 6, rel=1e-12)


def test_partners_show_the_same_image(tasks):
    shades = torch.tensor([0.05, 0.9, 0.9, 0.05, 0.9])  # jitter moves them by less
    images = shades.view(5, 1, 1, 1).expand(5, 3, 32, 32)
    views, partners = batch(tasks["contrastive"], images)
    bright = views.mean((1, 2, 3)) > 0.3
    assert torch.equal(bright, (shades > 0.3).repeat_interleave(2))
    assert partners.tolist() == [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]


def crop_boxes(task, count):
    """Width, height and middle of crops of coordinate images, which are [0, 1]^2."""
    ramp = ((torch.arange(32) + 0.5) / 32).expand(32, 32)
    ramps = torch.stack((ramp, ramp.T, ramp)).expand(count, 3, 32, 32)
    inner = task.crop(ramps, generator())[:, :2, 8:24, 8:24]  # without border effects
    across = inner[:, 0].diff(dim=2).mean((1, 2))
    down = inner[:, 1].diff(dim=1).mean((1, 2))
    return 32 * torch.stack((across, down)), inner.mean((2, 3)).T


def test_crops_keep_to_their_area_and_ratio_and_to_the_image(tasks, drawn):
    (width, height), middle = crop_boxes(tasks["contrastive"], 4000)
    flipped, width = width < 0, width.abs()
    area, ratio = width * height, width / height
    assert 0.079 < area.min() < 0.1 and 0.95 < area.max() < 1.001
    # uniform in [0.08, 1], cut a bit
    assert area.mean().item() == pytest.approx(0.53, abs=0.03)
    assert 0.749 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.334
    assert flipped.float().mean().item() == pytest.approx(0.5, abs=0.03)
    for size, centre in zip((width, height), middle, strict=True):
        assert -1e-3 < (centre - size / 2).min() < 0.01
        assert 0.99 < (centre + size / 2).max() < 1 + 1e-3
    white = tasks["contrastive"].crop(torch.ones(200, 3, 32, 32), generator())
    assert white.min() > 0.999
    assert (crop_boxes(pretext.Contrastive(drawn, False), 500)[0] > 0).all()


def test_jitter_strengths_and_shares_are_those_of_the_paper(tasks):
    """Brightness, contrast, saturation 0.6 to 1.4, hue up to a tenth of the circle."""
    image = 0.5 + 0.1 * torch.rand(1, 3, 8, 8, generator=generator())
    images = torch.cat((image, image / 4)).repeat(4000, 1, 1, 1)  # bright and dark
    views = tasks["contrastive"].jitter(images, generator())

    def parts(x):  # luma, and chroma as a complex number in the plane of U and V
        r, g, b = x.double().unbind(1)
        y = 0.299 * r + 0.587 * g + 0.114 * b
        chroma = torch.complex(0.492 * (b - y), 0.877 * (r - y))
        return y.flatten(1), chroma.flatten(1)

    (y, chroma), (y0, chroma0) = parts(views), parts(images)
    brightness = y.mean(1) / y0.mean(1)
    contrast = y.std(1) / y0.std(1) / brightness
    factor = (chroma * chroma0.conj()).sum(1) / (chroma0.abs() ** 2).sum(1)
    coloured = factor.abs() > 1e-3
    saturation = (factor.abs() / contrast / brightness)[coloured]
    for strength in (brightness, contrast, saturation):
        assert 0.599 < strength.min() < 0.62 and 1.38 < strength.max() < 1.401
    turn = factor[coloured].angle() / (2 * math.pi)
    assert -0.1001 < turn.min() < -0.098 and 0.098 < turn.max() < 0.1001
    unchanged = (views - images).abs().amax((1, 2, 3)) < 1e-5
    for share, expected in ((coloured, 0.8), (unchanged, 0.2 * 0.8)):
        assert share.float().mean().item() == pytest.approx(expected, abs=0.02)


def test_labels_belong_to_dataset_indices_and_stay_when_images_are_appended(drawn):
    few, many = pretext.RandomLabels(drawn[:37]), pretext.RandomLabels(drawn)
    indices = torch.tensor([5, 36, 0, 5])
    labels = few.make_batch(drawn[indices] / 255, indices, generator(1))[1]
    again = many.make_batch(drawn[indices] / 255, indices, generator(2))[1]
    assert torch.equal(labels, again) and labels[0] == labels[3]
    for i, label in zip(indices, labels, strict=True):
        alone = few.make_batch(drawn[i : i + 1] / 255, i.view(1), generator(3))
        assert alone[1].tolist() == [label]
    assert many.labels.unique().tolist() == list(range(10))


# --- the learned tasks, which ask nothing ---
def test_learned_labels_are_the_cross_entropy_of_soft_labels_and_answers(tasks):
    outputs = torch.randn(5, 20, generator=generator()).double()
    total = 0.0
    for answers, labels in zip(outputs[:, :10], outputs[:, 10:], strict=True):
        wanted = [math.exp(x) for x in labels.tolist()]
        said = [math.exp(x) for x in answers.tolist()]
        for w, s in zip(wanted, said, strict=True):
            total -= w / sum(wanted) * math.log(s / sum(said))
    loss = tasks["learned_labels"].loss(outputs, None).item()
    assert loss == pytest.approx(total / 5, rel=1e-12)


def test_learned_loss_is_the_mean_square_of_what_the_head_says(tasks):
    outputs = torch.tensor([[3.0], [-1.0], [2.0]])
    assert tasks["learned_loss"].loss(outputs, None).item() == pytest.approx(14 / 3)


@pytest.mark.parametrize("name", pretext.LEARNED)
def test_what_they_teach_comes_from_the_head_alone(tasks, drawn, name):
    """Not from the images' places or a draw: the head's gradient moves the encoder."""
    images = drawn[:4] / 255
    inputs, _ = tasks[name].make_batch(images, torch.arange(4), generator(0))
    again, _ = tasks[name].make_batch(images, torch.arange(4, 8), generator(1))
    assert torch.equal(inputs, images) and torch.equal(again, images)
    head = tasks[name].make_head(4)
    outputs = head(torch.randn(4, 4, 2, 2, generator=generator()))
    gradients = torch.autograd.grad(tasks[name].loss(outputs, None), head.parameters())
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


# --- making them ---
@pytest.mark.parametrize("name, side, message", [
    ("relative_position", 24, "use --image-size 32"),
    ("colorization", 32, "colour, and all images are gray"),
    ("masked_autoencoding", 8, "use --image-size 16"),  # patches of one pixel
])  # fmt: skip
def test_a_task_that_cannot_use_the_images_is_refused(name, side, message, capsys):
    images = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"^{name} needs .*{message}"):
        pretext.make_tasks(["rotation", name], images, True)
    made = pretext.make_tasks(None, images, True, [name, "rotation"])
    assert [*made] == ["rotation"]
    assert capsys.readouterr().out.startswith(f"Without {name}: {name} needs ")


def test_by_default_gray_images_have_the_tasks_that_can_use_them(drawn, capsys):
    assert (*pretext.make_tasks(None, drawn, True),) == pretext.DEFAULT_TASKS
    gray = drawn[:, :1].expand(-1, 3, -1, -1)
    made = pretext.make_tasks(None, gray, False)
    assert [*made] == ["rotation", "masked_autoencoding", "contrastive"]
    assert capsys.readouterr().out.count("\n") == 1 and made["contrastive"].flip == 0


def test_restored_tasks_make_the_same_batches_and_losses(tasks, drawn, tmp_path):
    torch.save({name: vars(task) for name, task in tasks.items()}, tmp_path / "saved")
    saved = torch.load(tmp_path / "saved", weights_only=True)
    restored = pretext.restore_tasks(saved)
    assert [*restored] == [*pretext.TASKS]
    images, places = drawn[50:58] / 255, torch.arange(50, 58)
    made = pretext.make_batches(tasks, images, places, (1, "pretext", 2))
    again = pretext.make_batches(restored, images, places, (1, "pretext", 2))
    for name, task in restored.items():
        assert all(map(torch.equal, made[name], again[name]))
        inputs, targets = made[name]
        torch.manual_seed(0)
        outputs = tasks[name].make_head(8)(encoder(8)(inputs))
        torch.manual_seed(0)
        same = task.make_head(8)(encoder(8)(inputs))
        losses = tasks[name].loss(outputs, targets), task.loss(same, targets)
        assert torch.equal(*losses)


def test_each_task_draws_for_itself_whoever_else_is_there(tasks, drawn):
    nothing = torch.zeros(len(drawn), dtype=torch.long)
    split, key = pretext.Split(drawn, nothing, nothing), (3, "pretext", 5)
    pair = {name: tasks[name] for name in ("rotation", "random_labels")}
    both = pretext.draw_batches(pair, split, nothing == 0, 8, True, key)
    alone = {"random_labels": tasks["random_labels"]}
    one = pretext.draw_batches(alone, split, nothing == 0, 8, True, key)
    assert all(map(torch.equal, both["random_labels"], one["random_labels"]))
    sums = [x.sum((1, 2, 3)).sort().values for x, _ in both.values()]
    assert not torch.allclose(*sums)


def test_shapes_are_twenty_the_same_every_time_and_balanced():
    outlines = [line.split() for lines in pretext.SHAPES.values() for line in lines]
    assert len({tuple(sorted(corners)) for _, *corners in outlines}) == 20
    assert len({name for name, *_ in outlines}) == len(outlines) == 20
    for classes in pretext.SHAPES:
        images, labels = pretext.draw_shapes(100, classes, seed=1)
        assert labels.bincount().tolist() == [10] * 10
        assert torch.equal(images, pretext.draw_shapes(100, classes, seed=1)[0])
        assert not torch.equal(images, pretext.draw_shapes(100, classes, seed=2)[0])


# --- the script ---
def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["pretext.py", *words])
    runpy.run_path(pretext.__file__, run_name="__main__")


def test_script_draws_files_and_names_a_bad_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (50, 20), "red").save("red.jpg")
    (tmp_path / "text.png").write_text("no image")
    run(monkeypatch, "red.jpg")
    assert capsys.readouterr().out == "wrote pretext.png\n"
    assert Image.open("pretext.png").width > 500
    for word, why in ("text.png", "none of BMP"), ("gone.png", "No such file"):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, "red.jpg", word, "--out", "b.png")
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1
        assert message.startswith(f"pretext.py: {word}: ") and why in message


def test_script_draws_gray_pictures_without_colorization(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").save("gray.png")
    run(monkeypatch, "gray.png")
    left_out, wrote = capsys.readouterr().out.splitlines()
    assert (
        left_out.startswith("Without colorization: ") and wrote == "wrote pretext.png"
    )


def test_the_figure_has_each_task_s_question_and_answers(drawn, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    text, told = Axes.text, []

    def spy(axis, x, y, words, **how):
        told.append(str(words))
        return text(axis, x, y, words, **how)

    monkeypatch.setattr(Axes, "text", spy)
    pretext.draw_figure(drawn[:3], tmp_path / "a.png")
    words = [" ".join(line.split()) for line in told]
    for question in (
        "rotation By which of the four quarter turns is the image rotated?",
        "learned labels Nothing: the outer loop decides.",
        "learned loss Nothing: the outer loop decides.",
    ):
        assert words.count(question) == 1
    answers = [word for word in words if " " not in word]
    assert len(answers) == 3 * 3  # of the three tasks with a class for each image
    assert sum(word.endswith("°") for word in answers) == 3
    assert sum(word.isdigit() for word in answers) == 3


def test_script_runs_without_docstrings(tmp_path, monkeypatch, capsys):
    """As python -OO has it."""
    monkeypatch.setattr(sys, "argv", ["pretext.py", "--out", str(tmp_path / "a.png")])
    with open(pretext.__file__) as file:
        code = compile(file.read(), pretext.__file__, "exec", optimize=2)
    exec(code, names := {"__name__": "__main__"})
    assert names["Rotation"].__doc__ is None
    assert capsys.readouterr().out.startswith("wrote ")
