"""Images and labels: folders of any files, downloads, label budgets, augmentation, batches."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import random
import signal
import struct
import tarfile
import threading
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import EpsImagePlugin, Image

import linear_probe
import maml_ssl
import pretext
import pretrain_finetune

draw_shapes = functools.cache(pretext.draw_shapes)
ARMS = [maml_ssl, pretrain_finetune, linear_probe]
TINY = ["--steps", "2", "--eval-every", "2", "--batch-size", "8", "--width", "4"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test works in a directory of its own, and the arms' signal handlers go after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretext, "draw_shapes", draw_shapes)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def arguments(arm, *argv):
    """The arguments of an arm, in which the source is never read."""
    return arm.parse_args(
        [*map(str, argv), *([] if "--source" in argv else ["--source", "shapes"])]
    )


def refused(capsys, function, *words):
    """Whether `function` ends with exit code 2 and one line on stderr that says all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], (word, lines[0])


# --- a folder ---


def picture(seed=0, side=32):
    """Sixteen colours at random: what a palette holds without loss."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(256, size=(16, 3)).astype(np.uint8)[
        rng.integers(16, size=(side, side))])  # fmt: skip


def folder(root, **files):
    """A folder tree of two classes, a and b; `files`: further training images of class b."""
    for i, (split, label) in enumerate([(s, c) for s in ("train", "test") for c in "ab"]):
        (root / split / label).mkdir(parents=True)
        picture(i).save(root / split / label / f"{i}.png")
    for name, image in files.items():
        image.save(root / "train" / "b" / name)
    return root


def load(root, *argv):
    return maml_ssl.load(str(root), arguments(maml_ssl, "--dataset", root, *argv))


def channels_first(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def loaded(root, name, image, **options):
    """What the loader makes of one training image: [3, 32, 32]."""
    image.save(folder(root) / "train" / "b" / name, **options)
    data = load(root)
    assert data.labels.tolist() == [0, 1, 1]
    return data.images[1 if name < "1.png" else 2]


@pytest.mark.parametrize("name, mode, options", [
    ("0.png", "RGB", {}), ("0.png", "P", {}), ("0.png", "RGBA", {}), ("0.gif", "P", {}),
    ("0.gif", "P", {"save_all": True, "append_images": [picture(9), picture(8)]}),
    ("0.bmp", "RGB", {}), ("0.ppm", "RGB", {}), ("0.tif", "RGB", {}), ("0.tiff", "CMYK", {}),
    ("0.webp", "RGB", {"lossless": True}), ("ein Bild, größer als 猫 \N{CAT FACE}.png", "RGB", {}),
    ("no ending", "RGB", {"format": "PNG"}),
])  # fmt: skip
def test_a_file_of_any_mode_has_the_pixels_of_its_picture(tmp_path, name, mode, options):
    image = picture(5)
    converted = image.quantize(16) if mode == "P" else image.convert(mode)
    pixels = loaded(tmp_path / "of any kind", name, converted, **options)
    assert torch.equal(pixels, channels_first(image))


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_images_get_three_equal_channels(tmp_path, mode):
    image = picture(5).convert(mode)
    expected = torch.from_numpy(np.array(image.convert("L")))
    assert torch.equal(loaded(tmp_path / "f", "0.png", image), expected.expand(3, -1, -1))


def test_cmyk_jpeg_is_near_its_picture(tmp_path):
    image = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
    pixels = loaded(tmp_path / "f", "0.jpg", image.convert("CMYK"), quality=95)
    assert (pixels.int() - channels_first(image).int()).abs().max() < 12


@pytest.mark.parametrize("name", ["0.png", "0.tif", "0.pgm"])
def test_sixteen_bits_of_gray_are_scaled_not_clipped(tmp_path, name):
    gray = np.random.default_rng(0).integers(256, size=(32, 32)).astype(np.uint8)
    deep = gray.astype(np.uint16) * 257  # 255 -> 65535
    if name == "0.pgm":
        (folder(tmp_path / "f") / "train/b/0.pgm").write_bytes(
            b"P5 32 32 65535\n" + deep.astype(">u2").tobytes()
        )
        pixels = load(tmp_path / "f").images[1]
    else:
        pixels = loaded(tmp_path / "f", name, Image.fromarray(deep))
    assert torch.equal(pixels, torch.from_numpy(gray).expand(3, -1, -1))


def test_the_central_square_is_taken_and_scaled(tmp_path):
    slope = np.arange(64)[:, None] * 2 + np.arange(64) + 10  # linear: its scaled version is known
    for name, axis in ("0wide.png", 1), ("0tall.png", 0):
        sides = np.full((64, 64), 255)
        pixels = np.concatenate([sides, slope, sides], axis).astype(np.uint8)
        got = loaded(tmp_path / name, name, Image.fromarray(pixels)).int()
        means = torch.from_numpy(slope.reshape(32, 2, 32, 2).mean((1, 3)))
        assert (got - means)[:, 2:-2, 2:-2].abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2000, 3)])
def test_extreme_shapes_load(tmp_path, size):
    pixels = loaded(tmp_path / "f", "0.png", Image.new("RGB", size, (10, 200, 30)))
    assert torch.equal(pixels, torch.tensor([10, 200, 30], dtype=torch.uint8)[:, None, None]
                       .expand(3, 32, 32))  # fmt: skip


def bomb():
    """A PNG of 100 bytes that says it has 30,000 x 30,000 pixels."""

    def chunk(kind, data):
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(kind):
    file = io.BytesIO()
    picture(3).save(file, kind)
    return file.getvalue()


def floating_point():
    file = io.BytesIO()
    Image.fromarray(np.ones((32, 32), np.float32)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize("name, content", [
    ("truncated.png", encoded("PNG")[:-200]), ("truncated.jpg", encoded("JPEG")[:300]),
    ("truncated.gif", encoded("GIF")[:200]), ("zero byte.png", b""), ("bomb.png", bomb()),
    ("notes.txt", b"not an image"), ("text.jpg", b"not an image"), ("float.tif", floating_point()),
    ("größe.png", b"\x89PNG\r\n\x1a\n"), ("script.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"
     b"%%BoundingBox: 0 0 9 9\n%%EndComments\n"),  # Pillow would start Ghostscript
])  # fmt: skip
def test_a_file_that_is_no_image_is_refused_by_name(tmp_path, capsys, name, content):
    (folder(tmp_path / "f") / "train" / "b" / name).write_bytes(content)
    refused(capsys, lambda: load(tmp_path / "f"), name, "read as an image", "remove it")
    assert not (tmp_path / "data").exists()


def test_no_file_starts_ghostscript(tmp_path, monkeypatch):
    Image.new("RGB", (9, 9)).save(tmp_path / "script.png", "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: Image.new("RGB", (9, 9)).im)
    with pytest.raises(SystemExit):
        maml_ssl.decode(str(tmp_path / "script.png"), 32)


def test_a_link_to_nowhere_is_refused_by_name(tmp_path, capsys):
    (folder(tmp_path / "f") / "train/b/lost.png").symlink_to("nowhere")
    refused(capsys, lambda: load(tmp_path / "f"), "lost.png")


@pytest.mark.filterwarnings("ignore")
def test_any_damage_ends_in_an_image_or_in_the_file_s_name(tmp_path, capsys):
    choose, outcomes = random.Random(0), []
    for i in range(300):
        content = bytearray(encoded(choose.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])))
        for _ in range(choose.randint(1, 20)):
            content[choose.randrange(len(content) // choose.choice([1, 10]))] = choose.randrange(
                256
            )
        (tmp_path / f"{i}.png").write_bytes(content[: choose.choice([None, -1, -50, 60])])
        try:
            image = maml_ssl.decode(str(tmp_path / f"{i}.png"), 32)
            outcomes.append((image.shape, image.dtype) == ((3, 32, 32), torch.uint8))
        except SystemExit as stop:
            outcomes.append(None)
            assert stop.code == 2 and f"{i}.png" in capsys.readouterr().err
    assert False not in outcomes and {True, None} <= {*outcomes}


def test_hidden_files_are_passed_over(tmp_path):
    (folder(tmp_path / ".hidden" / "f") / "train" / "b" / ".DS_Store").write_bytes(b"\0")
    assert len(load(tmp_path / ".hidden" / "f").images) == 2


def test_val_stands_in_for_test(tmp_path):
    root = folder(tmp_path / "f")
    expected = load(root)
    (root / "test").rename(root / "val")
    for x, y in zip(load(root), expected, strict=True):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))


# --- the decoded copy ---


@pytest.fixture
def decoded_files(monkeypatch):
    """The names of the files that were decoded."""
    names, decode = [], maml_ssl.decode
    monkeypatch.setattr(maml_ssl, "decode", lambda path, side: (
        names.append(os.path.basename(path)) or decode(path, side)))  # fmt: skip
    return names


def test_the_second_time_nothing_is_decoded(tmp_path, decoded_files):
    first = load(folder(tmp_path / "f"))
    assert len(decoded_files) == 4
    second = load(tmp_path / "f")
    assert len(decoded_files) == 4
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.test_labels, second.test_labels)


@pytest.mark.parametrize(
    "change", ["replaced", "same size", "added", "removed", "renamed", "class"]
)
def test_the_copy_follows_the_folder(tmp_path, change):
    root = folder(tmp_path / "f", **{"2.bmp": picture(7), "3.bmp": picture(8)})
    load(root)
    file, expected = root / "train/b/3.bmp", picture(8)
    if change == "replaced":
        expected = picture(9).convert("L").convert("RGB")
        file.write_bytes(b"")
        expected.save(file)
    elif change == "same size":
        expected, size = picture(9), file.stat().st_size
        expected.save(file)
        assert file.stat().st_size == size
    elif change == "added":
        expected = picture(9)
        expected.save(root / "train/b/4.bmp")
    elif change == "removed":
        expected = picture(7)
        file.unlink()
    elif change == "renamed":
        expected = picture(7)
        file.rename(root / "train/b/0.bmp")
    elif change == "class":
        expected = picture(7)
        file.rename(root / "train/a/9.bmp")
    data = load(root)
    assert torch.equal(data.images[-1], channels_first(expected))
    assert data.labels.bincount().tolist() == {"added": [1, 4], "removed": [1, 2], "class": [2, 2]
                                               }.get(change, [1, 3])  # fmt: skip


class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "no dict", "attack", "a directory"])
def test_a_damaged_copy_is_made_again(tmp_path, decoded_files, damage):
    expected = load(folder(tmp_path / "f"))
    (copy,) = (tmp_path / "data").iterdir()
    content = copy.read_bytes()
    if damage == "no dict":
        torch.save([1, 2], copy)
    elif damage == "attack":
        torch.save(Attack(), copy)
    elif damage == "a directory":
        copy.unlink()
        copy.mkdir()
    else:
        wrong = {"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\x80\x02" * 999}
        copy.write_bytes(wrong[damage])
    assert torch.equal(load(tmp_path / "f").images, expected.images)
    assert len(decoded_files) == 8
    assert not (tmp_path / "attacked").exists()
    load(tmp_path / "f")
    assert len(decoded_files) == (12 if damage == "a directory" else 8)


def test_folders_of_one_name_and_sizes_of_one_folder_keep_apart(tmp_path, decoded_files):
    roots = [folder(tmp_path / x / y / "photos") for x in "pq" for y in "rs"]
    for i, root in enumerate(roots):
        picture(40 + i).save(root / "train/a/0.png")
    for _ in range(2):
        for i, root in enumerate(roots):
            assert torch.equal(load(root).images[0], channels_first(picture(40 + i)))
    for side in 16, 32:
        expected = maml_ssl.decode(str(roots[0] / "train/a/0.png"), side)
        assert torch.equal(load(roots[0], "--image-size", side).images[0], expected)
    decoded_files.clear()  # two of one name in one run, as dataset and as source, are common
    for _ in range(2):
        load(roots[0]), load(roots[1])
    assert len(decoded_files) <= 8


def test_where_no_copy_can_be_written_none_is_needed(tmp_path):
    (tmp_path / "file").write_text("")
    assert len(load(folder(tmp_path / "f"), "--data-dir", tmp_path / "file").images) == 2
    assert (tmp_path / "file").read_text() == ""


# --- the label budget ---


def rows(images):
    return [image.numpy().tobytes() for image in images]


@pytest.mark.parametrize("eval_on", ["test", "val"])
def test_a_label_budget_holds_exactly_and_alike_in_every_arm(eval_on):
    argv = ["--labels-per-class", "20", "--eval-on", eval_on]
    everything = maml_ssl.load("shapes", arguments(maml_ssl))
    label_of = dict(zip(rows(everything.images), everything.labels.tolist(), strict=True))
    one, two, three = (arm.load_target(arguments(arm, *argv)) for arm in ARMS)
    held = 4 if eval_on == "val" else 0  # a fifth
    assert one.labels.bincount().tolist() == [20 - held] * 10
    assert [label_of[row] for row in rows(one.images)] == one.labels.tolist()
    if held:
        assert one.test_labels.bincount().tolist() == [held] * 10
        assert [label_of[row] for row in rows(one.test_images)] == one.test_labels.tolist()
        assert not {*rows(one.images)} & {*rows(one.test_images)}
    else:
        assert torch.equal(one.test_images, everything.test_images)
    for other in two, three:
        assert all(torch.equal(x, y) for x, y in zip(one[:4], other[:4], strict=True))
    seed_1 = maml_ssl.load_target(arguments(maml_ssl, *argv, "--seed", "1"))
    shared = {*rows(one.images)} & {*rows(seed_1.images)}
    assert len(shared) < 60  # 16 of 160 by chance


def test_without_a_budget_every_label_is_used_once():
    data = maml_ssl.load_target(arguments(maml_ssl))
    assert {*rows(data.images)} == {*rows(maml_ssl.load("shapes", arguments(maml_ssl)).images)}
    val = maml_ssl.load_target(arguments(maml_ssl, "--eval-on", "val"))
    assert (len(val.images), len(val.test_images)) == (1600, 400)
    assert not {*rows(val.images)} & {*rows(val.test_images)}
    assert not {*rows(data.test_images)} & {*rows(val.test_images)}


# --- augmentation and batches ---


def naive_augmentations(image):
    """{(dy, dx, mirrored): image} for one [3, H, W], by loops; what moves in is black."""
    _, h, w = image.shape
    found = {}
    for dy in range(-(h // 8), h // 8 + 1):
        for dx in range(-(w // 8), w // 8 + 1):
            moved = torch.zeros_like(image)
            for y in range(h):
                for x in range(w):
                    if 0 <= y + dy < h and 0 <= x + dx < w:
                        moved[:, y, x] = image[:, y + dy, x + dx]
            found[dy, dx, False] = moved
            found[dy, dx, True] = moved.flip(2)
    return found


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_shifts_and_mirrors_each_image_by_itself(flip):
    image = torch.randint(1, 256, (3, 16, 16), dtype=torch.uint8)
    table = {x.numpy().tobytes(): key for key, x in naive_augmentations(image).items()}
    assert len(table) == 50
    batch = image.expand(600, -1, -1, -1)
    out = maml_ssl.augment(batch, torch.Generator().manual_seed(0), flip)
    assert out.dtype == torch.float32 and out.is_contiguous()
    keys = [table[row] for row in rows((out * 255).round().to(torch.uint8))]  # KeyError: none
    assert torch.equal(out, (out * 255).round() / 255)
    assert {(dy, dx) for dy, dx, _ in keys} == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    mirrored = sum(key[2] for key in keys)
    assert 220 < mirrored < 380 if flip else mirrored == 0
    again = maml_ssl.augment(batch, torch.Generator().manual_seed(0), flip)
    assert torch.equal(out, again)


def made_up(n, flip=True):
    images = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8)
    return maml_ssl.Data(images, torch.arange(n) % 3, images, torch.arange(n) % 3, flip)


@pytest.mark.parametrize("n, batch", [(10, 5), (10, 4), (10, 10), (10, 25), (7, 3), (1, 2)])
def test_every_image_comes_once_in_each_epoch(n, batch):
    data, args = made_up(n), arguments(maml_ssl, "--batch-size", max(batch, 4))
    args.batch_size = batch
    taken = []
    for step in range(3 * n):
        images, labels, index = maml_ssl.labelled_batch(data, step, args)
        assert len(images) == len(labels) == len(index) == batch
        assert torch.equal(labels, data.labels[index])
        taken += index.tolist()
    epochs = [taken[i : i + n] for i in range(0, len(taken) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 5:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("argv", [[], ["--labels-per-class", "20", "--eval-on", "val"]])
def test_every_arm_sees_the_same_labelled_batches_at_the_same_step(argv, monkeypatch):
    seen = {}
    for arm in ARMS:

        def recorded(data, step, args, purpose="query", arm=arm, original=arm.labelled_batch):
            batch = original(data, step, args, purpose)
            if purpose == "query":
                seen.setdefault(arm.__name__, {})[step] = batch
            return batch

        monkeypatch.setattr(arm, "labelled_batch", recorded)
        own = ["--steps", "4", "--pretrain-steps", "2"]
        own = own if arm is not maml_ssl else ["--pretext", "rotation"]
        arm.main([*TINY, *argv, *own])
    one, *others = seen.values()
    assert [*one] == [0, 1]
    for other in others:
        for step in one:
            assert all(torch.equal(x, y) for x, y in zip(one[step], other[step], strict=True))
    assert not torch.equal(one[0][0], one[1][0])


# --- downloads ---


def md5(content):
    return hashlib.md5(content).hexdigest()


def cifar_archive(monkeypatch, dataset, counts=(40, 20), classes=10):
    """Make `dataset` expect a tiny archive in its own format; -> archive, images, labels."""
    rng, files, truth = np.random.default_rng(classes), {}, []
    key = "fine_labels" if dataset.__name__ == "CIFAR100" else "labels"
    for (name, _), count in zip([dataset.train_list[0], dataset.test_list[0]], counts, strict=True):
        pixels = rng.integers(256, size=(count, 3072)).astype(np.uint8)  # red, green, blue planes
        labels = [i % classes for i in range(count)]
        files[name] = pickle.dumps({"data": pixels, key: labels}, protocol=2)
        truth += [torch.from_numpy(pixels.reshape(-1, 3, 32, 32)), torch.tensor(labels)]
    names = [f"class {i}" for i in range(classes)]
    files[dataset.meta["filename"]] = pickle.dumps({dataset.meta["key"]: names}, protocol=2)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{dataset.base_folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    train, test, meta = ([name, md5(content)] for name, content in files.items())
    monkeypatch.setattr(dataset, "train_list", [train])
    monkeypatch.setattr(dataset, "test_list", [test])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": meta[1]})
    monkeypatch.setattr(dataset, "tgz_md5", md5(file.getvalue()))
    monkeypatch.setattr(dataset, "url", "http://127.0.0.1:9/nobody listens")
    return file.getvalue(), truth


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """Tiny CIFAR-10 and CIFAR-100, downloaded but not unpacked; -> CIFAR-10's archive and truth."""
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "data").mkdir()
    small = cifar_archive(monkeypatch, torchvision.datasets.CIFAR100, classes=20)
    (tmp_path / "data" / "cifar-100-python.tar.gz").write_bytes(small[0])
    made = cifar_archive(monkeypatch, torchvision.datasets.CIFAR10)
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(made[0])
    return made


@pytest.fixture
def server(tmp_path):
    """A web server for the directory web/; -> its address."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "web")
    handler.log_message = None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def holds(truth):
    data = maml_ssl.load("cifar10", arguments(maml_ssl, "--dataset", "cifar10"))
    return all(torch.equal(x, y) for x, y in zip(data[:4], truth, strict=True))


@pytest.mark.parametrize("arm", ARMS)
def test_the_command_dataset_cifar10(cifar, arm, tmp_path):
    arm.main(["--dataset", "cifar10", *TINY])
    assert len([*tmp_path.glob("runs/*/seed0/metrics.csv")]) == 1
    assert holds(cifar[1])


def test_cifar_is_downloaded_where_it_is_not(cifar, server, tmp_path, monkeypatch):
    (tmp_path / "data" / "cifar-10-python.tar.gz").rename(tmp_path / "web" / "c.tar.gz")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{server}/c.tar.gz")
    assert holds(cifar[1])


@pytest.mark.parametrize(
    "damage", ["half an archive", "a byte of it", "half a batch", "a byte", "no"]
)
def test_damaged_cifar_is_refused_or_mended_never_used(
    cifar, server, tmp_path, monkeypatch, capsys, damage
):
    archive = tmp_path / "data" / "cifar-10-python.tar.gz"
    if "archive" in damage or "it" in damage:
        half = cifar[0][:5000] if "half" in damage else cifar[0][:999] + b"\0" + cifar[0][1000:]
        archive.write_bytes(half)
    else:
        assert holds(cifar[1])  # unpacks it
        batch = tmp_path / "data/cifar-10-batches-py/data_batch_1"
        content = batch.read_bytes()
        batch.write_bytes(content[:5000] + (b"" if "half" in damage else b"\0" + content[5001:]))
        if damage == "no":
            batch.unlink()
        assert holds(cifar[1])  # from the archive
        batch.write_bytes(content[:5000])
        archive.unlink()
    command = ["--dataset", "cifar10", *TINY]
    refused(capsys, lambda: maml_ssl.main(command), "cifar10", "--dataset shapes", "folder")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "web" / "c.tar.gz").write_bytes(cifar[0])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{server}/c.tar.gz")
    assert holds(cifar[1])


def idx_files(folder, count=24):
    """MNIST's four files, unpacked, under `folder`; -> the training images [count, 28, 28]."""
    (folder / "raw").mkdir(parents=True)
    for part, seed in ("train", 0), ("t10k", 1):
        pixels = np.random.default_rng(seed).integers(256, size=(count, 28, 28)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in ("images-idx3", pixels), ("labels-idx1", labels):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            (folder / "raw" / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return torch.from_numpy(np.random.default_rng(0).integers(256, size=(count, 28, 28))).byte()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """Tiny MNIST and Fashion-MNIST, and no way to download them."""
    monkeypatch.setenv("no_proxy", "*")
    for dataset in torchvision.datasets.MNIST, torchvision.datasets.FashionMNIST:
        monkeypatch.setattr(dataset, "mirrors", ["http://127.0.0.1:9/"])
    idx_files(tmp_path / "data" / "FashionMNIST")
    return idx_files(tmp_path / "data" / "MNIST")


@pytest.mark.parametrize("size", [28, 32, 16])
def test_digits_are_gray_scaled_and_never_mirrored(mnist, size, monkeypatch):
    args = arguments(maml_ssl, "--dataset", "mnist", "--image-size", 32)
    args.image_size = size
    data = maml_ssl.load("mnist", args)
    assert data.images.shape == (24, 3, size, size) and data.images.is_contiguous()
    assert (data.images[:, :1] == data.images).all()
    assert data.labels.tolist() == [i % 10 for i in range(24)]
    scaled = F.interpolate(mnist[:, None].double(), (size, size), mode="bilinear", antialias=True)
    assert (data.images[:, :1] - scaled).abs().max() <= 1
    assert data.flip is False
    assert maml_ssl.load("fashion_mnist", args).flip is True


@pytest.mark.parametrize("arm", ARMS)
def test_gray_datasets_go_without_colorization(mnist, arm, capsys, tmp_path):
    command = ["--dataset", "mnist", *TINY]
    flag = "--pretext" if arm is maml_ssl else "--pretrain"
    refused(capsys, lambda: arm.main([*command, flag, "rotation", "colorization"]), "colorization")
    assert not (tmp_path / "runs").exists()
    args = arm.parse_args(command)
    if arm is maml_ssl:
        assert args.pretext == ["rotation", "masked_autoencoding", "contrastive"]
        for colour in "shapes", "cifar10":
            assert "colorization" in arm.parse_args(["--dataset", colour]).pretext
    arm.main(command)
    assert len([*tmp_path.glob("runs/*/seed0/metrics.csv")]) == 1


@pytest.mark.parametrize("part", ["train-images-idx3", "t10k-labels-idx1"])
@pytest.mark.parametrize("length", [0, 3, 10, 20])
def test_half_unpacked_digits_are_refused(mnist, capsys, tmp_path, part, length):
    file = tmp_path / "data" / "MNIST" / "raw" / f"{part}-ubyte"
    file.write_bytes(file.read_bytes()[:length])
    refused(capsys, lambda: maml_ssl.main(["--dataset", "mnist"]), "mnist", "damaged")


def test_a_damaged_download_of_digits_is_refused(mnist, server, tmp_path, capsys, monkeypatch):
    (tmp_path / "data/MNIST/raw/train-images-idx3-ubyte").unlink()
    (tmp_path / "web/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"not what it was"))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"{server}/"])
    with pytest.raises(SystemExit) as stop:
        maml_ssl.main(["--dataset", "mnist"])
    assert stop.value.code == 2
    assert "mnist" in capsys.readouterr().err.splitlines()[-1]  # above it, torchvision's bar


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_no_network_is_said_in_one_line_with_the_ways_round_it(dataset, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "*")
    made = maml_ssl.DATASETS[dataset][0]
    name, value = ("url", "") if "cifar" in dataset else ("mirrors", [])
    address = "http://127.0.0.1:9/"
    monkeypatch.setattr(made, name, value + address if value == "" else [address])
    command = ["--dataset", dataset]
    refused(capsys, lambda: maml_ssl.main(command), dataset, "--dataset shapes", "a folder")
