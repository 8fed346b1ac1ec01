"""Images, labels and environments: folders, downloads, label budgets, batches, support."""

import os
import pickle
import sys
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import linear_probe
import maml_ssl
import pretext
import pretrain_finetune

Attack = type("Attack", (), {"__reduce__": lambda self: (os.mkdir, ("attacked",))})
DRAW, COLOURED = pretext.draw_shapes, pretext.draw_coloured_shapes
PLAIN = "train/a/1.png train/b/2.png test/a/3.png test/b/4.png"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in a folder of its own, with few drawn images and without network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretext, "draw_shapes", lambda n, *rest: DRAW(n // 10, *rest))
    monkeypatch.setattr(pretext, "draw_coloured_shapes", lambda n, *rest: COLOURED(n // 40, *rest))
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=URLError("offline")))


def picture(number):
    """32 x 32 pixels of sixteen colours at random: what a palette holds without loss."""
    rng = np.random.default_rng(number)
    colours = rng.integers(256, size=(16, 3)).astype(np.uint8)
    return Image.fromarray(colours[rng.integers(16, size=(32, 32))])


def pixels(*images):
    """Of pictures, or of those that numbers give: uint8 [N, 3, H, W]."""
    images = [picture(x) if isinstance(x, int) else x for x in images]
    arrays = np.stack([np.array(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def folder(root, places=PLAIN):
    """A folder with these files, as pictures that their numbers give."""
    for place in places.split():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        picture(int((root / place).stem)).save(root / place)
    return root


def load(root):
    return pretext.load(str(root), "data", 32, "cpu")


@pytest.mark.parametrize("name, mode, options", [
    ("9.png", "RGB", {}), ("9.png", "P", {}), ("9.png", "RGBA", {}), ("9.gif", "P", {}),
    ("9.bmp", "RGB", {}), ("9.ppm", "RGB", {}), ("9.tif", "RGB", {}), ("9.tiff", "CMYK", {}),
    ("9.webp", "RGB", {"lossless": True}), ("größer als 猫.png", "RGB", {}),
    ("no ending", "RGB", {"format": "PNG"}), ("9.png", "L", {}), ("9.png", "1", {}),
])  # fmt: skip
def test_a_file_of_any_mode_has_the_pixels_of_its_picture(tmp_path, name, mode, options):
    image = picture(9).quantize(16) if mode == "P" else picture(9).convert(mode)
    image.save(folder(tmp_path / "of any kind") / "train/b" / name, **options)
    assert torch.equal(load(tmp_path / "of any kind").images, pixels(1, 2, image))


def test_the_central_square_is_taken_upright():
    for size, corner in ((64, 32), (16, 0)), ((32, 64), (0, 16)):
        wide = Image.new("RGB", size, "white")
        wide.paste(picture(9), corner)
        wide.save("wide.png")
        assert torch.equal(pretext.decode("wide.png", 32), pixels(9)[0])
    stored, exif = Image.linear_gradient("L").resize((32, 32)), Image.Exif()  # black is above
    exif[274] = 6  # to be turned by 90 degrees, clockwise: then black is on the right
    stored.save("turned.jpg", exif=exif)
    difference = pretext.decode("turned.jpg", 32).int() - pixels(stored)[0].rot90(-1, (1, 2)).int()
    assert difference.abs().max() < 8


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.gif", "float32.tif", "uint16.png"])
def test_a_file_that_is_no_image_of_eight_bits_is_refused_by_name(tmp_path, name):
    file, deep = folder(tmp_path / "f") / "train/b" / name, "cut" not in name
    (Image.fromarray(np.ones((32, 32), name[:-4])) if deep else picture(9)).save(file)
    file.write_bytes(file.read_bytes()[: None if deep else 300])
    with pytest.raises(ValueError, match=f"{name} is no image .* remove or convert it"):
        load(tmp_path / "f")


def test_hidden_files_are_passed_over_and_val_stands_in_for_test(tmp_path):
    root = folder(tmp_path / ".hidden/f")
    (root / "train/b/.DS_Store").write_bytes(b"\0")
    assert torch.equal(load(root).images, pixels(1, 2)) and not load(root).environments.any()
    (root / "test").rename(root / "val")
    assert torch.equal(load(root).test_images, pixels(3, 4))


def test_folders_below_the_classes_are_environments_training_s_first(tmp_path):
    files = "train/a/y/1.png train/a/x/2.png train/b/x/3.png test/a/y/4.png test/b/w/5.png"
    root = folder(tmp_path / "f", files)
    for _ in range(2):  # decoded, and from the copy
        data = load(root)
        assert torch.equal(data.images, pixels(2, 1, 3)) and data.labels.tolist() == [0, 0, 1]
        assert data.environments.tolist() == [0, 1, 0]  # x, y
        assert data.test_environments.tolist() == [1, 2]  # y, w


def test_files_are_decoded_once_until_one_changes_or_the_copy_is_damaged(tmp_path, monkeypatch):
    root, decoded, decode = folder(tmp_path / "f", f"{PLAIN} train/b/5.bmp"), [], pretext.decode
    monkeypatch.setattr(pretext, "decode", lambda *args: decoded.append(args) or decode(*args))
    for _ in range(2):
        assert torch.equal(load(root).images, pixels(1, 2, 5)) and len(decoded) == 5
    (copy,) = (tmp_path / "data").iterdir()
    torch.save(Attack(), "attack")
    for count, damage in (10, copy.read_bytes()[:999]), (15, (tmp_path / "attack").read_bytes()):
        copy.write_bytes(damage)
        for _ in range(2):
            assert torch.equal(load(root).images, pixels(1, 2, 5)) and len(decoded) == count
    assert not (tmp_path / "attacked").exists()
    picture(6).save(root / "train/b/5.bmp")  # of the same size
    assert torch.equal(load(root).images, pixels(1, 2, 6))


def test_cifar_has_the_colours_of_its_files_and_a_damaged_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    planes = np.random.default_rng(0).integers(256, size=(20, 3072)).astype(np.uint8)  # R, G, B
    content = {"data": planes, "labels": [i % 10 for i in range(20)], "label_names": ["x"]}
    (files := tmp_path / "data/cifar-10-batches-py").mkdir(parents=True)
    for name in *(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta":
        (files / name).write_bytes(pickle.dumps(content))
    data = pretext.load("cifar10", "data", 32, "cpu")
    assert torch.equal(data.test_images, torch.from_numpy(planes).view(20, 3, 32, 32))
    assert data.labels.tolist() == content["labels"] * 5 and data.flip
    (files / "test_batch").write_bytes(b"half of it")
    with pytest.raises(ValueError, match=r"^cifar10 is not in data .* remove what is damaged"):
        pretext.load("cifar10", "data", 32, "cpu")


def test_digits_are_gray_and_never_mirrored_and_no_network_is_said_with_the_ways_round_it(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)^mnist .*shapes and a folder need no network"):
        pretext.load("mnist", "data", 28, "cpu")
    (tmp_path / "data/MNIST/raw").mkdir(parents=True, exist_ok=True)
    digits = np.random.default_rng(0).integers(256, size=(24, 28, 28)).astype(np.uint8)
    for kind, array in ("images-idx3", digits), ("labels-idx1", digits[:, 0, 0] % 10):
        header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
        for part in "train", "t10k":
            file = tmp_path / "data/MNIST/raw" / f"{part}-{kind}-ubyte"
            file.write_bytes(header + array.tobytes())
    data = pretext.load("mnist", "data", 28, "cpu")
    assert torch.equal(data.images, torch.from_numpy(digits)[:, None].expand(-1, 3, -1, -1))
    assert data.test_labels.tolist() == (digits[:, 0, 0] % 10).tolist() and not data.flip


def numbered(environments, test_environments=(0, 0)):
    """Images whose every pixel is their number (the test's go on counting), of three classes."""
    home = torch.tensor([*environments, *test_environments])
    images = torch.arange(len(home)).byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    parts = (images, torch.arange(len(home)) % 3, home)
    train, test = zip(*(x.tensor_split([len(environments)]) for x in parts), strict=True)
    return pretext.Data(*train, *test, flip=True)


def numbers(images):
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("environments", [1, 2])
@pytest.mark.parametrize("eval_on, held", [("test", 0), ("val", 4)])
def test_a_label_budget_holds_exactly_and_in_equal_parts(environments, eval_on, held):
    data = numbered([i // 3 % environments for i in range(120)])  # 40 of each class
    found = pretext.limit_labels(data, 20, eval_on, 0)
    kept, scored = numbers(found.images), numbers(found.test_images)
    assert len({*kept}) == len(kept) == 3 * (20 - held)
    assert found.labels.tolist() == [i % 3 for i in kept]
    assert found.environments.tolist() == [i // 3 % environments for i in kept]
    kinds = (found.labels * environments + found.environments).bincount()
    assert kinds.tolist() == [(20 - held) // environments] * 3 * environments
    if held:  # with two environments half of it is not scored, but adapted to
        assert len({*scored}) == 3 * held // environments and max(scored) < 120
        assert not {*kept} & {*scored} and found.test_labels.tolist() == [i % 3 for i in scored]
    assert {*kept} != {*numbers(pretext.limit_labels(data, 20, eval_on, 1).images)}
    assert {*range(120)} == {*numbers(pretext.limit_labels(data, None, "test", 0).images)}


def test_the_checksum_changes_with_one_pixel_label_or_environment():
    sums = {pretext.checksum(numbered([0] * 9))}
    for part in range(6):
        data = numbered([0] * 9)
        data[part].view(-1)[0] += 1
        sums.add(pretext.checksum(data))
    assert len(sums) == 7


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_shifts_and_mirrors_each_image_by_itself_into_black(flip):
    image, places = torch.randint(1, 256, (3, 16, 16)).byte(), {}
    padded = torch.zeros(3, 20, 20, dtype=torch.uint8)
    padded[:, 2:18, 2:18] = image
    for dy, dx in np.ndindex(5, 5):
        moved = padded[:, dy : dy + 16, dx : dx + 16]
        places[moved.numpy().tobytes()] = dy, dx, False
        places[moved.flip(2).numpy().tobytes()] = dy, dx, True
    generator = torch.Generator().manual_seed(0)
    shifted = pretext.shift(image.expand(600, -1, -1, -1), generator)
    out = pretext.mirror(shifted, generator, flip)
    found = [places[x.numpy().tobytes()] for x in (out * 255).round().byte()]  # KeyError: none
    assert len({*found}) == (50 if flip else 25)
    assert 220 < sum(place[2] for place in found) < 380 or not flip


@pytest.mark.parametrize("size", [3, 5, 25])
@pytest.mark.parametrize("environments", [[0] * 10, [0, 1, 1, 0, 1, 0, 1, 0, 0]])
def test_batches_are_equal_parts_of_shuffled_epochs_of_each_environment(environments, size):
    data, taken = numbered(environments), []
    for step in range(30):
        _, labels, index = pretext.labelled_batch(data, step, size, 0)
        assert len(index) == size and torch.equal(labels, data.labels[index])
        parts = data.environments[index].bincount(minlength=max(environments) + 1)
        assert parts.max() - parts.min() <= 1
        taken += index.tolist()
    for environment in {*environments}:
        members = [i for i, e in enumerate(environments) if e == environment]
        order, n = [i for i in taken if i in members], len(members)
        epochs = [order[i : i + n] for i in range(0, len(order) - n, n)]
        assert all(sorted(epoch) == members for epoch in epochs) and epochs[0] != epochs[1]


def test_with_one_environment_draws_are_those_before_there_were_several():
    *_, index = pretext.labelled_batch(data := numbered([0] * 60), 7, 8, 0)
    assert index.tolist() == [10, 44, 49, 9, 48, 58, 33, 19]
    found = pretext.limit_labels(data, 10, "val", 0)
    assert numbers(found.test_images) == [15, 3, 10, 55, 59, 53]
    assert numbers(found.images[:8]) == [27, 12, 33, 39, 57, 0, 9, 21]


@pytest.mark.parametrize("dataset", ["shapes", "coloured_shapes"])
def test_arms_see_the_same_batches(monkeypatch, dataset):
    batch = pretext.labelled_batch
    monkeypatch.setattr(pretext, "labelled_batch", seen := Mock(wraps=batch))
    flags = f"--dataset {dataset} --width 4 --batch-size 8 --labels-per-class 10 --eval-on val"
    for arm in maml_ssl, pretrain_finetune, linear_probe:
        own = "--steps 2 --pretext rotation" if arm is maml_ssl else "--steps 4 --pretrain-steps 2"
        monkeypatch.setattr(sys, "argv", [arm.__name__, *flags.split(), *own.split()])
        arm.main()
    calls = [call.args for call in seen.mock_calls]
    queries = [batch(*args) for args in calls if args[4:] in ((), ("query",))]
    assert len(queries) == 6 and not torch.equal(queries[0][0], queries[1][0])
    for i, query in enumerate(queries):
        assert all(torch.equal(x, y) for x, y in zip(query, queries[i % 2], strict=True))


@pytest.mark.parametrize("test", [[0] * 9 + [1] * 8 + [2] * 7, [1] * 9 + [2] * 8, [0] * 9])
@pytest.mark.parametrize("train", [[0, 1] * 9, [0] * 18])
def test_evaluation_adapts_to_images_of_the_scored_environment_that_none_scores(train, test):
    data, home = pretext.limit_labels(numbered(train, test), None, "test", 0), [*train, *test]
    scored, done = numbers(data.test_images), []
    for part, images, mask, *_ in pretext.adaptations(data, False, 4):
        aside = numbers(images[pretext.draw(mask, len(mask), pretext.rng(0, ""))])
        assert aside and not {*aside} & {*scored}
        assert len({home[i] for i in aside} | {home[scored[k]] for k in part}) == 1
        done += part.tolist()
    assert sorted(done) == [*range(len(scored))]


def test_several_environments_have_no_use_for_a_source_s_images():
    one, two = numbered([0] * 6), numbered([0, 1] * 3)
    images, home = pretext.pool([one, two])
    assert torch.equal(images, torch.cat((one.images, two.images))) and not home.any()
    with pytest.raises(ValueError, match="source's images belong to no environment"):
        pretext.pool([two, one])


def test_shape_colour_and_label_agree_in_the_shares_written_and_three_are_tested_equally():
    data = pretext.load("coloured_shapes", "", 16, "cpu")
    assert data.test_environments.bincount().tolist() == [1256 // 40] * 3
    agreement = (0.8, 0.1, 0.9)
    shape, colour, label = pretext.coloured_labels(10_000, agreement, 0)
    for e, share in enumerate(agreement):
        wrong, agrees = label[e] != shape[e], colour[e] == label[e]
        assert shape[e].mean() == 0.5  # below: within 4 standard deviations
        assert wrong.mean() == pytest.approx(0.25, abs=4 * 0.0044)
        assert agrees.mean() == pytest.approx(share, abs=4 * 0.004)
        assert (wrong & agrees).mean() == pytest.approx(0.25 * share, abs=4 * 0.004)  # independent
    one_image = 2 * shape + colour  # what a rule can see; the best answers each cell's majority
    for cells, most in (one_image, 0.75), (one_image + 4 * np.arange(3)[:, None], 0.867):
        best = sum(np.bincount(label[cells == cell]).max() for cell in np.unique(cells))
        assert best / label.size == pytest.approx(most, abs=0.01)


def test_pictures_have_the_colours_shapes_and_labels_that_they_say():
    shape, colour, label = (x.flatten() for x in pretext.coloured_labels(100, (0.8, 0.1), 3))
    images, labels, environments = COLOURED(100, (0.8, 0.1), 3)
    assert labels.tolist() == label.tolist() and environments.tolist() == [0] * 100 + [1] * 100
    red = (images[:, 0].int() - images[:, 1].int()).double()
    assert red[colour == 0].mean() > 10 and red[colour == 1].mean() < -10
    stars = []  # a star, not a ring, covers the middle of all that has its colour
    for difference, sign in zip(red, 1 - 2 * colour, strict=True):
        covered = sign * difference > 80
        y, x = (k.double().mean().round().long() for k in covered.nonzero(as_tuple=True))
        stars.append(covered[y, x].item())
    assert (np.array(stars) == (shape == 0)).mean() > 0.8
