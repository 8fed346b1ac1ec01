"""Images, labels, environments: files, folders, label budgets, batches, support."""

import importlib.util
import os
import pickle
import socket
import struct
import sys
import threading
import zlib
from io import BytesIO
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import PIL
import pytest
import torch
import torchvision
from PIL import Image, ImageOps, JpegImagePlugin

import linear_probe
import maml_ssl
import pretext
import pretrain_finetune

Attack = type("Attack", (), {"__reduce__": lambda self: (os.mkdir, ("attacked",))})
DRAW, COLOURED = pretext.draw_shapes, pretext.draw_coloured_shapes
PLAIN = "train/a/1.png train/b/2.png test/a/3.png test/b/4.png"
HOMES = """train/a/y/1.png train/a/x/2.png train/b/x/3.png train/b/y/4.png
    test/a/y/5.png test/a/y/6.png test/b/w/7.png test/b/w/8.png"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test works in a folder of its own, with few drawn images and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretext, "draw_shapes", lambda n, *rest: DRAW(n // 10, *rest))
    few_coloured = lambda n, *rest: COLOURED(n // 40, *rest)  # noqa: E731
    monkeypatch.setattr(pretext, "draw_coloured_shapes", few_coloured)
    offline = Mock(side_effect=URLError("offline"))
    monkeypatch.setattr("urllib.request.urlopen", offline)


def picture(number):
    """32 x 32 pixels of sixteen random colours: what a palette holds without loss."""
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


def load(root, **how):
    return pretext.load(str(root), "data", 32, "cpu", **how)


def saved(image, kind, **options):
    image.save(file := BytesIO(), kind, **options)
    return file.getvalue()


def chunk(kind, content, damage=0):
    """A part of a PNG file, its checksum wrong where there is damage."""
    check = struct.pack(">I", zlib.crc32(kind + content) ^ damage)
    return struct.pack(">I", len(content)) + kind + content + check


def png(rows, bits, kind, *chunks):
    """A PNG from raw rows; kind 0: gray, 2: RGB, 4 and 6: the same with alpha."""
    width = 8 * len(rows[0]) // bits // {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    size = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    raw = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = (chunk(b"IHDR", size), *chunks, chunk(b"IDAT", raw), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --- files ---
@pytest.mark.parametrize("name, mode, options", [
    ("9.png", "RGB", {}), ("9.png", "P", {}), ("9.png", "RGBA", {}), ("9.gif", "P", {}),
    ("9.png", "L", {}), ("9.png", "1", {}), ("9.bmp", "RGB", {}), ("9.ppm", "RGB", {}),
    ("9.tif", "RGB", {}), ("9.tiff", "CMYK", {}), ("9.tif", "YCbCr", {}),
    ("größer als 猫.png", "RGB", {}), ("no ending", "RGB", {"format": "PNG"}),
    ("is a.jpg", "RGB", {"format": "WEBP", "lossless": True}),
])  # fmt: skip
def test_a_file_of_any_mode_has_its_picture_s_pixels(tmp_path, name, mode, options):
    image = picture(9).quantize(16) if mode == "P" else picture(9).convert(mode)
    image.save(folder(tmp_path / "of any kind") / "train/b" / name, **options)
    found = load(tmp_path / "of any kind").train.images
    assert torch.equal(found, pixels(1, 2, image))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_central_square_is_taken_upright(kind, orientation):
    for size, corner in ((64, 32), (16, 0)), ((32, 64), (0, 16)):
        wide = Image.new("RGB", size, "white")
        wide.paste(picture(9), corner)
        wide.save("wide.png")
        assert torch.equal(pretext.decode("wide.png", 32), pixels(9)[0])
    (exif := Image.Exif())[274] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    picture(9).save("turned", kind, exif=exif, **lossless)
    upright = ImageOps.exif_transpose(Image.open("turned"))
    assert torch.equal(pretext.decode("turned", 32), pixels(upright)[0])


OPAQUE = np.arange(32)[:, None].repeat(32, 1) < 16  # black above, nothing below
BLACK = Image.fromarray(np.dstack([0 * OPAQUE] * 3 + [255 * OPAQUE]).astype(np.uint8))
ONES = Image.fromarray(np.where(OPAQUE, 0, 1).astype(np.uint8))
FLAT = Image.fromarray(np.where(OPAQUE, 0, 1).astype(np.uint8)).convert("P")
FLAT.putpalette([0, 0, 0, 0, 0, 0])
KEY = {"transparency": 1}


def few_grays(bits):
    """The same in grays of so few bits; the white ones are transparent."""
    rows = [bytes([0 if y < 16 else 255] * (4 * bits)) for y in range(32)]
    return png(rows, bits, 0, chunk(b"tRNS", struct.pack(">H", 2**bits - 1)))


@pytest.mark.parametrize("file", {
    "RGBA": saved(BLACK, "PNG"), "RGBA TIFF": saved(BLACK, "TIFF"),
    "WEBP": saved(BLACK, "WEBP", lossless=True, exact=True),
    "LA": saved(BLACK.convert("LA"), "PNG"), "LA 2": saved(BLACK.convert("LA"), "TIFF"),
    "GIF": saved(BLACK, "GIF"), "GIF of one colour": saved(FLAT, "GIF", **KEY),
    "of a palette": saved(FLAT, "PNG", **KEY), "one gray": saved(ONES, "PNG", **KEY),
    "palette": saved(FLAT, "PNG", transparency=b"\xff\0"),
    "one colour": saved(ONES.convert("RGB"), "PNG", transparency=(1, 1, 1)),
    "one bit": few_grays(1), "two bits": few_grays(2), "four bits": few_grays(4),
}.items(), ids=lambda item: item[0])  # fmt: skip
def test_what_is_transparent_is_mid_gray(tmp_path, file):
    (tmp_path / "glyph").write_bytes(file[1])
    found = pretext.decode("glyph", 32)
    assert (found[:, :16] == 0).all() and (found[:, 16:] == 128).all()


def test_half_transparent_is_half_gray():
    Image.new("RGBA", (32, 32), (0, 0, 0, 51)).save("veil.png")  # a fifth of black
    assert pretext.decode("veil.png", 32).unique().tolist() == [102]  # 0.8 * 128


SOUND, MANY = (
    saved(picture(9), "PNG"),
    {"save_all": True, "append_images": [picture(8)]},
)
WRONG = chunk(b"iCCP", b"x\0\1", damage=1)
DEEP = Image.fromarray(np.full((4, 4), 1000, np.uint16))
FLAT85 = Image.new("RGB", (9, 9), (85, 85, 85))
BITS8, BITS16 = struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16)
PLANAR = saved(FLAT85, "TIFF", tiffinfo={284: 2})
TIFF16 = saved(FLAT85, "TIFF").replace(BITS8, BITS16)


@pytest.mark.parametrize("why, file", [
    ("none of BMP, .*WEBP", b""), ("none of BMP", b"<html>404</html>"),
    ("none of", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
    ("none of", saved(picture(9), "AVIF")), ("none of", saved(picture(9), "ICO")),
    ("truncated", SOUND[:300]), ("truncated", saved(picture(9), "JPEG")[:700]),
    ("holds 2 pictures", saved(picture(9), "GIF", **MANY)),
    ("holds 2 pictures", saved(picture(9), "WEBP", **MANY)),
    ("holds 2 pictures", saved(picture(9), "TIFF", **MANY)),
    ("holds 2 pictures", saved(picture(9), "PNG", **MANY)),
    ("none of", SOUND[:33] + WRONG + saved(picture(9), "PNG", **MANY)[33:]),
    ("more than 8 bits", png([b"\1\2" * 4] * 4, 16, 0)),
    ("more than 8 bits", png([b"\1\2" * 12] * 4, 16, 2)),
    ("more than 8 bits", png([b"\1\2" * 8] * 4, 16, 4)),
    ("more than 8 bits", png([b"\1\2" * 16] * 4, 16, 6)),
    ("none of", png([b"\1\2" * 12] * 4, 16, 2, WRONG)),
    ("more than 8 bits", saved(DEEP, "TIFF")), ("more than 8 bits", saved(DEEP, "PPM")),
    ("more than 8 bits", saved(DEEP.convert("F"), "TIFF")),
    ("more than 8 bits", saved(DEEP.convert("F"), "PPM")),
    ("more than 8 bits", TIFF16), ("more than 8 bits", PLANAR.replace(BITS8, BITS16)),
    ("more than 8 bits", b"P6 4 4 65535 " + b"\1\2" * 48),
    ("more than 8 bits", b"P3 1 1 1023 1 2 3 "),
])  # fmt: skip
def test_what_holds_no_one_image_of_eight_bits_is_refused_by_name(tmp_path, why, file):
    (folder(tmp_path / "f") / "train/b/odd.jpg").write_bytes(file)
    with pytest.raises(ValueError, match=f"1 of 5 files .*train/b/odd.jpg: .*{why}"):
        load(tmp_path / "f")


@pytest.mark.parametrize("file", [
    b"P6 1 1 15 \5\5\5", b"P3 1 1 255 85 85 85 ", png([b"\x55" * 3], 8, 2),
    saved(Image.new("RGB", (9999, 1), (85, 85, 85)), "PNG"), saved(FLAT85, "TIFF"),
    saved(FLAT85, "MPO", save_all=True, append_images=[picture(8)]),  # of a phone
])  # fmt: skip
def test_what_looks_like_these_but_is_not_is_read(tmp_path, file):
    (tmp_path / "file").write_bytes(file)
    assert pretext.decode("file", 32).unique().tolist() == [85]


@pytest.mark.parametrize("odd", [
    WRONG, chunk(b"iCCP", b"x\0\1profile"), chunk(b"iCCP", b"x\0\0no profile"),
    chunk(b"pHYs", bytes(9), 1), chunk(b"pHYs", b"\0"), chunk(b"tEXt", b"a\0b", 1),
    chunk(b"eXIf", b"nonsense"), chunk(b"eXIf", b"nonsense", 1),
    chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000))),
], ids=lambda odd: f"{odd[4:8].decode()} of {len(odd)}")  # fmt: skip
def test_bad_metadata_are_not_bad_pixels(tmp_path, odd):
    places = (33, len(SOUND) - 12)  # before and after the pixels
    for place in places[: 2 if odd[4:8] in (b"tEXt", b"eXIf") else 1]:
        (tmp_path / "odd.png").write_bytes(SOUND[:place] + odd + SOUND[place:])
        assert torch.equal(pretext.decode("odd.png", 32), pixels(9)[0])


def test_bad_metadata_of_a_transparent_png_leave_it_transparent(tmp_path):
    glyph = few_grays(1)
    (tmp_path / "odd.png").write_bytes(glyph[:33] + WRONG + glyph[33:])
    assert pretext.decode("odd.png", 32)[:, 16:].unique().tolist() == [128]


def test_bad_metadata_of_others_leave_their_pixels_and_the_orientation(tmp_path):
    garbage = {"exif": b"Exif\0\0nonsense", "lossless": True}
    (tmp_path / "a.webp").write_bytes(saved(picture(9), "WEBP", **garbage))
    assert torch.equal(pretext.decode("a.webp", 32), pixels(9)[0])
    sound = saved(picture(9), "JPEG")
    garbage = b"\xff\xe1\0\x10Exif\0\0nonsense"
    (tmp_path / "a.jpg").write_bytes(sound[:2] + garbage + sound[2:])
    assert torch.equal(pretext.decode("a.jpg", 32), pixels(Image.open("a.jpg"))[0])
    # turned to the right, and two numbers for the resolution, as by Windows Explorer
    tags = struct.pack("<HHHIHH", 2, 274, 3, 1, 6, 0)
    tags += struct.pack("<HHII", 282, 5, 2, 38) + bytes(4)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + tags + struct.pack("<4I", 72, 0, 72, 0)
    (tmp_path / "b.jpg").write_bytes(saved(picture(9), "JPEG", exif=exif))
    turned = pixels(Image.open("b.jpg"))[0].rot90(-1, (1, 2))
    assert torch.equal(pretext.decode("b.jpg", 32), turned)


def test_special_files_and_broken_links_are_refused_at_once(tmp_path):
    home = folder(tmp_path / "f") / "train/a"
    os.mkfifo(home / "pipe.jpg")
    listener = socket.socket(socket.AF_UNIX)
    os.chdir(home)  # the path of a socket must be short
    listener.bind("plug.jpg")
    os.chdir(tmp_path)
    (home / "zero.jpg").symlink_to("/dev/zero")
    (home / "gone.jpg").symlink_to("nowhere.jpg")
    (home / "round.jpg").symlink_to("round.jpg")
    with pytest.raises(ValueError, match="5 of 9 files") as error:
        load(tmp_path / "f")
    for name in "pipe", "plug", "zero":
        assert f"{name}.jpg: it is no regular file" in str(error.value)
    assert "gone.jpg: " in str(error.value) and "round.jpg: " in str(error.value)
    listener.close()


def test_all_broken_files_stand_in_one_message_the_first_ten_by_name(tmp_path):
    root = folder(tmp_path / "f")
    for i in range(12):
        place = root / ("train/a", "test/b")[i % 2] / f"empty{i:02}.jpg"
        place.write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"^12 of 16 files can't be used, .*;"
    ) as error:
        load(root)
    assert str(error.value).count("empty") == 10 and str(error.value).endswith("; ...")


def test_only_a_jpeg_that_is_larger_than_needed_is_read_at_less(tmp_path, monkeypatch):
    smooth = picture(9).resize((9, 9)).resize((256, 256), Image.Resampling.BICUBIC)
    draft, scales = JpegImagePlugin.JpegImageFile.draft, []

    def spy(image, *how):
        result = draft(image, *how)
        scales.append(image.decoderconfig[0])
        return result

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", spy)
    for side, scale in (255, 1), (256, 2), (512, 4), (1024, 8):
        smooth.resize((side, side + 3)).save("photo.jpg", quality=95)
        whole = ImageOps.fit(Image.open("photo.jpg").convert("RGB"), (32, 32))
        found = pretext.decode("photo.jpg", 32).int() - pixels(whole)[0].int()
        assert scales.pop() == scale and not scales
        assert found.abs().max() <= (0 if scale == 1 else 2)


def test_files_are_decoded_side_by_side(tmp_path, monkeypatch):
    meet, decode = threading.Barrier(3, timeout=20), pretext.decode
    root = folder(tmp_path / "f", f"{PLAIN} train/a/5.png test/b/6.png")

    def decode_together(*how):
        meet.wait()
        return decode(*how)

    monkeypatch.setattr(pretext, "decode", decode_together)
    assert torch.equal(load(root).train.images, pixels(1, 5, 2))


# --- the copy of what was decoded ---
def test_files_are_decoded_once_until_something_changes(tmp_path, monkeypatch):
    root, count = folder(tmp_path / "f", f"{PLAIN} train/b/5.bmp"), []
    decode, place = pretext.decode, root / "train/b/5.bmp"
    monkeypatch.setattr(pretext, "decode", lambda *a: count.append(a) or decode(*a))

    def decoded(*numbers):
        before = len(count)
        assert torch.equal(load(root).train.images, pixels(*numbers))
        assert torch.equal(load(root).train.images, pixels(*numbers))  # from the copy
        return len(count) - before

    assert (decoded(1, 2, 5), decoded(1, 2, 5)) == (5, 0)
    (copy,) = (tmp_path / "data").iterdir()
    torch.save(Attack(), "attack")
    for damage in copy.read_bytes()[:999], (tmp_path / "attack").read_bytes():
        copy.write_bytes(damage)
        assert decoded(1, 2, 5) == 5
    assert not (tmp_path / "attacked").exists()
    times = os.stat(place)
    picture(6).save(place)  # of the same size, and as old as it was
    os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert decoded(1, 2, 6) == 5
    picture(7).save("new.bmp")
    os.utime("new.bmp", ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace("new.bmp", place)
    assert decoded(1, 2, 7) == 5
    monkeypatch.setattr(PIL, "__version__", "99.0")
    assert decoded(1, 2, 7) == 5
    root = root.rename(tmp_path / "g")
    assert decoded(1, 2, 7) == 5


@pytest.mark.parametrize("part", ["read", "decode"])
def test_code_that_was_edited_decodes_again(tmp_path, part):
    BLACK.save(folder(tmp_path / "f") / "train/a/1.png")
    assert load(tmp_path / "f").train.images[0, 0, 20, 0] == 128
    with open(pretext.__file__) as file:
        text = file.read()
    if part == "read":
        edited = text.replace("(128, 128, 128)", "(9, 9, 9)")
    else:
        edited = text.replace("return read(path, F", "return 0 * read(path, F")
    (tmp_path / "edited.py").write_text(edited)
    spec = importlib.util.spec_from_file_location("edited", tmp_path / "edited.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    images = module.load(str(tmp_path / "f"), "data", 32, "cpu").train.images
    assert edited != text and images[0, 0, 20, 0] == (9 if part == "read" else 0)


def test_a_full_disk_costs_the_copy_alone(tmp_path, monkeypatch):
    def full(images, place):
        place.write_bytes(b"half")
        raise RuntimeError("no space left on device")

    monkeypatch.setattr(torch, "save", full)
    root = folder(tmp_path / "f")
    assert torch.equal(load(root).train.images, pixels(1, 2))
    assert not [*(tmp_path / "data").iterdir()]


# --- folders ---
@pytest.mark.parametrize("name", [
    ".DS_Store", "._1.png", "Thumbs.db", "ehthumbs_vista.db", "desktop.ini", "Icon\r",
    ".ipynb_checkpoints/1.png", "@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "@Recycle/1.png",
    "__MACOSX/train/._1.png", "$RECYCLE.BIN/1.png", ".Trash-1000/files/1.png",
    "#recycle/1.png", "lost+found/1.png", "System Volume Information/1.png",
])  # fmt: skip
@pytest.mark.parametrize("depth", ["", "train", "test/b", "test/a/y", "train/b/x/deep"])
def test_hidden_and_system_files_are_nowhere_seen(tmp_path, name, depth):
    root = folder(tmp_path / ".hidden/f", f"{HOMES} train/b/x/deep/9.png")
    before = load(root)
    (root / depth / name).parent.mkdir(parents=True, exist_ok=True)
    (root / depth / name).write_bytes(b"\0")
    for old, new in zip(before[:2], load(root)[:2], strict=True):
        assert all(map(torch.equal, old, new))
    assert load(root).classes == ["a", "b"]


@pytest.mark.parametrize(
    "name", ["README.txt", "labels.csv", "$1.jpg", "#1.jpg", "_.md"]
)
def test_other_files_that_are_no_images_are_refused_by_name(tmp_path, name):
    (folder(tmp_path / "f") / "test/a" / name).write_text("x")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "f")
    assert f"test/a/{name}: " in str(error.value)


def test_names_that_begin_with_a_sign_are_classes(tmp_path):
    places = PLAIN.replace("/a/", "/$1/").replace("/b/", "/#cat/")
    assert load(folder(tmp_path / "f", places)).classes == ["#cat", "$1"]


def test_images_come_in_the_order_of_torchvision_at_any_depth(tmp_path):
    names = "a/0/11 a/1 a/10 a/9 a/x/2 a/y/3 a/x/z/4 a-b/5 a-b/x/6 B/7 B/c/8"
    names = [
        f"{split}/{name}.png" for split in ("train", "test") for name in names.split()
    ]
    root = folder(tmp_path / "f", " ".join(names))
    (root / "train/link").symlink_to(root / "train/B")
    (root / "test/link").mkdir()
    (root / "test/link/only.png").symlink_to(root / "test/B/7.png")
    (root / "train/notes.txt").write_text("beside the classes")
    theirs = torchvision.datasets.ImageFolder(root / "train")
    numbers = [int(os.path.basename(path)[:-4]) for path, _ in theirs.samples]
    data = load(root)
    assert torch.equal(data.train.images, pixels(*numbers))
    assert data.train.labels.tolist() == theirs.targets
    assert data.classes == theirs.classes == ["B", "a", "a-b", "link"]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Test", "VALIDATION"])
@pytest.mark.parametrize("beside", ["", "test/0001.jpg", "test/test/1.jpg", "VAL/c/1"])
def test_a_labelled_set_stands_in_for_test_and_a_line_says_so(tmp_path, name, beside):
    root = folder(tmp_path / "f")
    (root / "test").rename(root / name)
    if beside:
        (root / beside).parent.mkdir(parents=True, exist_ok=True)
        (root / beside).write_bytes(b"unlabelled")
    data = load(root)
    assert torch.equal(data.test.images, pixels(3, 4))
    assert pretext.describe("f", data).splitlines()[1:] == [f"{root / name} is scored"]


@pytest.mark.parametrize("places, why", [
    ("train/a/1.png train/b/2.png", "f needs the folders train and test or val or "),
    ("Testing/a/1.png Training/b/2.png", "needs the folders train and test or val or "),
    ("test/a/1.png test/b/2.png", "needs the folders train and"),
    ("train/a/1.png train/b/2.png test/1.png", "and .*test differ in the classes a, b"),
    (f"{PLAIN} test/c/5.png", "train and .*test differ in the classes c"),
    ("train/a/1.png test/a/2.png", "train needs two classes or more, not 1"),
    ("train/1.png test/2.png", "train needs two classes or more, not 0"),
    (f"{PLAIN} train/c/.1.png test/c/5.png", "train/c holds no image"),
])  # fmt: skip
def test_folders_that_are_no_dataset_are_refused_at_once(tmp_path, places, why):
    root = folder(tmp_path / "f", places.replace(".1.png", "1.png"))
    (root / "train/c/1.png").unlink(missing_ok=True)
    for call in pretext.check, load:
        with pytest.raises(ValueError, match=why):
            call(str(root))


def test_a_path_is_what_it_means_and_a_built_in_name_comes_first(tmp_path):
    folder(tmp_path / "shapes")
    for name in "./shapes", "shapes/", str(tmp_path / "shapes/../shapes"):
        assert torch.equal(load(name).train.images, pixels(1, 2))
    data, note = load("shapes"), "It is built in; your folder is ./shapes"
    assert len(data.classes) == 10
    assert pretext.describe("shapes", data).splitlines()[1:] == [note]
    for name, why in (
        (None, "--source"),
        ("Shapes", "Shapes is neither a folder nor one"),
    ):
        with pytest.raises(ValueError, match=why):
            pretext.check(name)


def test_without_the_flag_folders_below_the_classes_mean_nothing(tmp_path):
    places = "train/a/images/1.png train/b/images/2.png train/b/augmented/3.png"
    data = load(folder(tmp_path / "f", f"{places} test/a/4.png test/b/5.png"))
    assert data.environments == ["all"] and not data.train.environments.any()
    assert torch.equal(data.test.images, pixels(4, 5))
    assert "mean nothing without --environments" in pretext.describe("f", data)
    assert load(folder(tmp_path / "g")).notes == ()


def test_with_the_flag_they_are_environments_training_s_first(tmp_path):
    root = folder(tmp_path / "f", HOMES)
    for _ in range(2):  # decoded, and from the copy
        data = load(root, environments=True)
        assert data.environments == ["x", "y", "w"] and data.classes == ["a", "b"]
        assert torch.equal(data.train.images, pixels(2, 1, 3, 4))
        assert data.train.labels.tolist() == [0, 0, 1, 1]
        assert data.train.environments.tolist() == [0, 1, 0, 1]
        assert data.test.environments.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("places, why", [
    (PLAIN, "train/a/1.png is not in CLASS/ENVIRONMENT/"),
    (f"{HOMES} train/b/9.png", "train/b/9.png is not in CLASS/ENVIRONMENT/"),
    (f"{HOMES} test/b/x/deep/9.png", "deep/9.png is not in CLASS/ENVIRONMENT/"),
    ("train/cat/siamese/1.png train/cat/persian/2.png train/dog/poodle/3.png "
     "test/cat/persian/4.png test/dog/poodle/5.png",
     r"3 of 3 \(persian, poodle, siamese\) have training images of one class only"),
    ("train/a/all/1.png train/b/all/2.png test/a/all/3.png test/b/all/4.png",
     "there is one only, all"),
])  # fmt: skip
def test_what_cannot_be_environments_is_refused_by_name(tmp_path, places, why):
    root = folder(tmp_path / "f", places)
    for call in pretext.check, lambda name, flag: load(name, environments=flag):
        with pytest.raises(ValueError, match=f"^--environments: .*{why}"):
            call(str(root), True)
        with pytest.raises(ValueError, match="--environments is for a folder, not for"):
            call("coloured_shapes", True)


# --- downloads ---
def test_cifar_has_its_colours_and_a_damaged_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    planes = np.random.default_rng(0).integers(256, size=(20, 3072)).astype(np.uint8)
    labels, names = [i % 10 for i in range(20)], [f"c{i}" for i in range(10)]
    content = {"data": planes, "labels": labels, "label_names": names}  # R, G, B
    (files := tmp_path / "data/cifar-10-batches-py").mkdir(parents=True)
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    for name in *batches, "test_batch", "batches.meta":
        (files / name).write_bytes(pickle.dumps(content))
    data = load("cifar10")
    assert torch.equal(data.test.images, torch.from_numpy(planes).view(20, 3, 32, 32))
    assert data.train.labels.tolist() == labels * 5 and data.mirror
    assert data.classes == names and data.environments == ["all"]
    (files / "test_batch").write_bytes(b"half of it")
    with pytest.raises(
        ValueError, match=r"^cifar10 is not in data .* remove what is dam"
    ):
        load("cifar10")


def test_digits_are_gray_and_not_mirrored_and_no_network_is_said_with_a_way(tmp_path):
    with pytest.raises(
        ValueError, match=r"(?s)^mnist .*shapes and a folder need no net"
    ):
        pretext.load("mnist", "data", 28, "cpu")
    (tmp_path / "data/MNIST/raw").mkdir(parents=True, exist_ok=True)
    digits = np.random.default_rng(0).integers(256, size=(24, 28, 28)).astype(np.uint8)
    for kind, array in ("images-idx3", digits), ("labels-idx1", digits[:, 0, 0] % 10):
        header = np.array([0x800 + array.ndim, *array.shape], ">i4").tobytes()
        for part in "train", "t10k":
            file = tmp_path / "data/MNIST/raw" / f"{part}-{kind}-ubyte"
            file.write_bytes(header + array.tobytes())
    data, gray = pretext.load("mnist", "data", 28, "cpu"), torch.from_numpy(digits)
    assert torch.equal(data.train.images, gray[:, None].expand(-1, 3, -1, -1))
    assert data.test.labels.tolist() == (digits[:, 0, 0] % 10).tolist()
    assert not data.mirror and data.classes[3] == "3 - three"


def test_coloured_images_are_mirrored_gray_ones_not_and_both_can_be_chosen(tmp_path):
    root = folder(tmp_path / "coloured")
    for place in (gray := folder(tmp_path / "gray")).rglob("*.png"):
        Image.open(place).convert("L").save(place)
    assert load(root).mirror and not load(gray).mirror
    assert load(gray, mirror=True).mirror and not load(root, mirror=False).mirror
    assert not load("shapes", mirror=False).mirror


# --- the desired task ---
def numbered(environments, test_environments=(0, 0), classes=3):
    """Images whose every pixel is their number; the test's go on counting."""
    home = torch.tensor([*environments, *test_environments])
    number = torch.arange(len(home))
    images = number.byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    whole, cut = pretext.Split(images, number % classes, home), len(environments)
    names = [f"e{i}" for i in range(int(home.max()) + 1)]
    train, test = whole.take(number < cut), whole.take(number >= cut)
    return pretext.Data(train, test, ["a", "b", "c"][:classes], names, True)


def numbers(split):
    return split.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("environments", [1, 2])
@pytest.mark.parametrize("eval_on, held", [("test", 0), ("val", 4)])
def test_a_label_budget_holds_exactly_and_in_equal_parts(environments, eval_on, held):
    data = numbered([i // 3 % environments for i in range(120)])  # 40 of each class
    found = pretext.desired_task(data, 20, eval_on, 0)
    kept, scored = numbers(found.train), numbers(found.test)
    assert len({*kept}) == len(kept) == 3 * (20 - held)
    assert found.train.labels.tolist() == [i % 3 for i in kept]
    assert found.train.environments.tolist() == [i // 3 % environments for i in kept]
    kinds = (found.train.labels * environments + found.train.environments).bincount()
    assert kinds.tolist() == [(20 - held) // environments] * 3 * environments
    if held:  # with two environments half of it is not scored, but adapted to
        assert len({*scored}) == 3 * held // environments and max(scored) < 120
        assert found.test.labels.tolist() == [i % 3 for i in scored]
        assert not {*kept} & {*scored}
    other = pretext.desired_task(data, 20, eval_on, 1)
    assert {*kept} != {*numbers(other.train)}
    assert {*range(120)} == {*numbers(pretext.limit_labels(data, None, 0))}


@pytest.mark.parametrize("rooms", [(20, 20), (1, 9, 30), (0, 2, 7, 3), (5, 5, 5, 1)])
def test_a_class_s_budget_is_shared_out_as_evenly_as_its_environments_allow(rooms):
    homes = [home for home, room in enumerate(rooms) for _ in range(room)]
    data = numbered(homes, classes=1)
    for budget in range(1, sum(rooms) + 1):
        parts = [0] * len(rooms)
        for _ in range(budget):  # one by one, to who has least and has room
            open_ones = [i for i, room in enumerate(rooms) if parts[i] < room]
            parts[min(open_ones, key=lambda i: parts[i])] += 1
        found = pretext.limit_labels(data, budget, 0).environments
        assert found.bincount(minlength=len(rooms)).tolist() == parts
    for budget in 0, sum(rooms) + 1:
        with pytest.raises(
            ValueError, match=f"^--labels-per-class {budget}: class a has"
        ):
            pretext.limit_labels(data, budget, 0)


@pytest.mark.parametrize(
    "size, held", [(1, 0), (2, 1), (5, 1), (9, 1), (10, 2), (14, 2)]
)
def test_a_fifth_is_held_out_where_there_is_more_than_one_image(size, held):
    data = numbered([0] * 60 + [1] * (3 * size))
    train, val = pretext.hold_out(data.train)
    for split, big, small in (train, 16, size - held), (val, 4, held):
        kinds = split.labels * 2 + split.environments
        assert kinds.bincount(minlength=6).tolist() == [big, small] * 3
    assert sorted(numbers(train) + numbers(val)) == numbers(data.train)


def test_one_image_a_class_cannot_be_split_and_the_message_says_what_to_do():
    with pytest.raises(
        ValueError, match=r"val: .* one image .*; raise --labels-per-class"
    ):
        pretext.desired_task(numbered([0] * 60), 1, "val", 0)


def test_the_checksum_changes_with_one_pixel_label_or_environment():
    sums = {pretext.checksum(numbered([0] * 9))}
    for part in range(6):
        data = numbered([0] * 9)
        (*data.train, *data.test)[part].view(-1)[0] += 1
        sums.add(pretext.checksum(data))
    assert len(sums) == 7


@pytest.mark.parametrize(
    "test", [[0] * 9 + [1] * 8 + [2] * 7, [1] * 9 + [2] * 8, [0] * 9]
)
@pytest.mark.parametrize("train", [[0, 1] * 9, [0] * 18])
def test_evaluation_adapts_to_images_of_its_environment_unscored(train, test):
    data, home = numbered(train, test), [*train, *test]
    data = pretext.desired_task(data, None, "test", 0)
    aside = numbers(data.unlabelled.take(data.aside))
    scored = numbers(data.test)
    assert aside and not {*aside} & {*scored} and min(scored) >= 18
    if len({*home}) == 1:
        assert sorted(aside) == [*range(18)] and len(scored) == 9
        return
    for environment in {*test}:
        of = [sum(home[i] == environment for i in part) for part in (aside, scored)]
        assert of == [test.count(environment) // 2, (test.count(environment) + 1) // 2]


def test_no_more_than_256_images_are_adapted_to(monkeypatch):
    monkeypatch.setattr(pretext, "ADAPT_TO", 5)
    for homes, expected in ([0] * 20, [5]), ([0] * 20 + [1] * 6, [5, 3]):
        data = pretext.desired_task(numbered([0] * 30, homes), None, "test", 0)
        found = data.unlabelled.take(data.aside).environments
        assert found.bincount().tolist() == expected
    assert pretext.Data._field_defaults["aside"] is None


def test_a_line_says_what_was_read_and_which_environments_are_new():
    data = numbered([0, 1] * 600, [0, 1, 2, 2, 3, 3])
    assert pretext.describe("f", data) == (
        "f: 1,200 images of 3 classes in 2 environments; "
        "6 are scored in 4 (new: e2, e3); mirrored"
    )
    plain = numbered([0] * 9)._replace(mirror=False)
    expected = "f: 9 images of 3 classes; 2 are scored; not mirrored"
    assert pretext.describe("f", plain) == expected


def test_an_environment_of_one_image_is_left_out_and_a_line_names_it():
    data = pretext.desired_task(numbered([0, 1, 0, 1, 2], [3, 3, 4]), None, "test", 0)
    assert {*data.train.environments.tolist()} == {0, 1}
    assert data.test.environments.tolist() == [3]  # the other image is adapted to
    assert data.notes == ("Left out, as they have one image: e2, e4",)
    with pytest.raises(ValueError, match="of one image each, no environment has any"):
        pretext.desired_task(numbered([0, 1] * 9, [3, 4]), None, "test", 0)


# --- batches ---
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
    out = (pretext.mirror(shifted, generator, flip) * 255).round().byte()
    found = [places[x.numpy().tobytes()] for x in out]  # KeyError: it is none of these
    assert len({*found}) == (50 if flip else 25)
    assert 220 < sum(place[2] for place in found) < 380 or not flip


@pytest.mark.parametrize("size", [3, 5, 25])
@pytest.mark.parametrize("environments", [[0] * 10, [0, 1, 1, 0, 1, 0, 1, 0, 0] * 4])
def test_batches_are_equal_parts_of_epochs_of_each_environment(environments, size):
    data, taken = numbered(environments), []
    for step in range(40):
        batch = pretext.labelled_batch(data, step, size, 4, 0)
        assert len(batch.indices) == size
        assert torch.equal(batch.labels, data.train.labels[batch.indices])
        assert torch.equal(batch.environments, data.train.environments[batch.indices])
        parts = batch.environments.bincount(minlength=max(environments) + 1)
        assert parts.max() - parts.min() <= 1
        taken += batch.indices.tolist()
    for environment in {*environments}:
        members = [i for i, e in enumerate(environments) if e == environment]
        order, n = [i for i in taken if i in members], len(members)
        epochs = [order[i : i + n] for i in range(0, len(order) - n, n)]
        assert all(sorted(epoch) == members for epoch in epochs)
        assert epochs[0] != epochs[1]


def test_with_one_environment_draws_are_those_before_there_were_several():
    data = numbered([0] * 60)
    for most in 1, 4:
        batch = pretext.labelled_batch(data, 7, 8, most, 0)
        assert batch.indices.tolist() == [10, 44, 49, 9, 48, 58, 33, 19]
    found = pretext.desired_task(data, 10, "val", 0)
    assert numbers(found.test) == [15, 3, 10, 55, 59, 53]
    assert numbers(found.train)[:8] == [27, 12, 33, 39, 57, 0, 9, 21]


def test_with_few_environments_draws_are_those_before_there_were_many():
    data = numbered([i % 3 for i in range(90)])
    few = [78, 24, 0, 58, 61, 34, 11, 59]
    for most in 3, 4, 99:
        batch = pretext.labelled_batch(data, 7, 8, most, 0)
        assert batch.indices.tolist() == few
    assert pretext.labelled_batch(data, 7, 8, 2, 0).indices.tolist() != few


def test_more_environments_than_a_step_takes_come_in_shuffled_epochs():
    data, seen, taken = numbered([i % 11 for i in range(220)]), [], []
    for step in range(50):  # an epoch is 5 steps of 2 environments, and one is left out
        batch = pretext.labelled_batch(data, step, 9, 2, 0)
        homes, parts = batch.environments.unique(return_counts=True)
        assert sorted(parts.tolist()) == [4, 5]
        seen += homes.tolist()
        taken += batch.indices[batch.environments == 3].tolist()[:4]
    epochs = [seen[i : i + 10] for i in range(0, 100, 10)]
    assert all(len({*epoch}) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10 and {*seen} == {*range(11)}
    assert len({*taken}) > 14  # of the 20 images of one, in an order of its own


def test_of_an_environment_that_is_smaller_than_its_share_half_is_left_to_adapt_to():
    data = numbered([0] * 40 + [1] * 7 + [2] * 2)
    seen = set()
    for step in range(30):
        batch = pretext.labelled_batch(data, step, 30, 4, 0)
        assert batch.environments.bincount().tolist() == [10, 10, 10]
        for home, most in (1, 3), (2, 1):
            drawn = {*batch.indices[batch.environments == home].tolist()}
            assert len(drawn) == most
            seen |= drawn
    assert seen == {*range(40, 49)}  # in turn, all of them


def test_a_step_draws_as_much_for_two_hundred_environments_as_for_four(monkeypatch):
    calls = []
    monkeypatch.setattr(pretext, "rng", Mock(wraps=pretext.rng))
    for environments in 4, 200:
        data = numbered([i % environments for i in range(2400)])
        before = pretext.rng.call_count
        pretext.labelled_batch(data, 1, 64, 4, 0)
        calls.append(pretext.rng.call_count - before)
    assert calls[1] == calls[0] + 1  # the order of the environments


def test_two_hundred_uneven_environments_keep_every_rule():
    rng = np.random.default_rng(0)
    homes = np.repeat(np.arange(200), rng.integers(3, 61, 200))
    labels = rng.integers(0, 3, len(homes))
    labels[(homes < 5) & (labels == 2)] = 0  # five lack a class
    images = torch.zeros(len(homes), 3, 8, 8, dtype=torch.uint8)
    whole = pretext.Split(images, torch.from_numpy(labels), torch.from_numpy(homes))
    names = [f"e{i}" for i in range(200)]
    data = pretext.Data(whole, whole, ["a", "b", "c"], names, True)
    for budget, eval_on in (None, "test"), (20, "test"), (200, "val"), (None, "val"):
        found = pretext.desired_task(data, budget, eval_on, 0)
        if budget and eval_on == "test":  # a few may be alone in their environment
            assert 3 * budget - 6 <= len(found.train.labels) <= 3 * budget
        sizes = found.train.environments.bincount(minlength=200)
        assert (sizes != 1).all() and len(found.test.labels)
        for step in range(3):
            batch = pretext.labelled_batch(found, step, 64, 4, 0)
            assert batch.environments.unique(return_counts=True)[1].tolist() == [16] * 4
            for home in batch.environments.unique():  # some are left to adapt to
                left = found.train.environments == home
                assert int(left.index_fill(0, batch.indices, False).sum()) > 0
        for home in found.test.environments.unique():
            assert (found.aside & (found.unlabelled.environments == home)).any()


@pytest.mark.parametrize("dataset", ["shapes", "coloured_shapes"])
def test_arms_see_the_same_batches(monkeypatch, dataset):
    batch = pretext.labelled_batch
    monkeypatch.setattr(pretext, "labelled_batch", seen := Mock(wraps=batch))
    flags = f"--dataset {dataset} --width 4 --batch-size 8 --labels-per-class 10"
    for arm in maml_ssl, pretrain_finetune, linear_probe:
        own = "--steps 2 --pretext rotation" if arm is maml_ssl else "--steps 4"
        own += "" if arm is maml_ssl else " --pretrain-steps 2"
        words = f"{arm.__name__} {flags} --eval-on val {own}"
        monkeypatch.setattr(sys, "argv", words.split())
        arm.main()
    calls = [call.args for call in seen.mock_calls]
    queries = [batch(*args) for args in calls if args[5:] in ((), ("query",))]
    assert len(queries) == 6
    assert not torch.equal(queries[0].images, queries[1].images)
    for i, query in enumerate(queries):
        assert all(map(torch.equal, query, queries[i % 2]))


def test_several_environments_have_no_use_for_a_source_s_images():
    one, two = numbered([0] * 6).train, numbered([0, 1] * 3).train
    both = pretext.join(one, two)
    assert torch.equal(both.images, torch.cat((one.images, two.images)))
    assert not both.environments.any() and both.labels.tolist()[6:] == [-1] * 6
    with pytest.raises(ValueError, match="the source's are of no known environment"):
        pretext.join(two, one)


def test_support_is_drawn_out_of_the_candidates_alone_and_none_is_an_error():
    split = numbered([0] * 40).train
    candidates = torch.arange(40) % 4 == 1
    task = Mock(make_batch=lambda images, indices, generator: (images, indices))
    for count in 4, 10, 99:
        key = (0, "pretext", count)
        made = pretext.draw_batches({"t": task}, split, candidates, count, False, key)
        images, indices = made["t"]
        assert len({*indices.tolist()}) == len(indices) == min(count, 10)
        assert candidates[indices].all()
        assert torch.equal(images, split.images[indices] / 255)
    with pytest.raises(ValueError, match="no image is left to adapt to"):
        pretext.draw_batches({"t": task}, split, candidates & False, 4, False, key)


# --- drawn images ---
def test_shape_colour_and_label_agree_in_the_shares_written_and_are_tested_equally():
    data = load("coloured_shapes")
    assert data.test.environments.bincount().tolist() == [1256 // 40] * 3
    assert data.environments == ["80%", "10%", "90%"]
    agreement = (0.8, 0.1, 0.9)
    shape, colour, label = pretext.coloured_labels(10_000, agreement, 0)
    for e, share in enumerate(agreement):
        wrong, agrees = label[e] != shape[e], colour[e] == label[e]
        assert shape[e].mean() == 0.5  # below: within 4 standard deviations
        assert wrong.mean() == pytest.approx(0.25, abs=4 * 0.0044)
        assert agrees.mean() == pytest.approx(share, abs=4 * 0.004)
        both = (wrong & agrees).mean()  # independent
        assert both == pytest.approx(0.25 * share, abs=4 * 0.004)
    seen = 2 * shape + colour  # by a rule for one image; each cell's majority is best
    known = seen + 4 * np.arange(3)[:, None]
    limit = pretext.LIMITS["coloured_shapes"]
    for cells, most in (seen, limit), (known, 0.867):
        best = sum(np.bincount(label[cells == cell]).max() for cell in np.unique(cells))
        assert best / label.size == pytest.approx(most, abs=0.01)


def test_pictures_have_the_colours_shapes_and_labels_that_they_say():
    said = pretext.coloured_labels(100, (0.8, 0.1), 3)
    shape, colour, label = (x.flatten() for x in said)
    images, labels, environments = COLOURED(100, (0.8, 0.1), 3)
    assert labels.tolist() == label.tolist()
    assert environments.tolist() == [0] * 100 + [1] * 100
    red = (images[:, 0].int() - images[:, 1].int()).double()
    assert red[colour == 0].mean() > 10 and red[colour == 1].mean() < -10
    stars = []  # a star, not a ring, covers the middle of all that has its colour
    for difference, sign in zip(red, 1 - 2 * colour, strict=True):
        covered = sign * difference > 80
        middle = [k.double().mean().round().long() for k in covered.nonzero().T]
        stars.append(covered[middle[0], middle[1]].item())
    assert (np.array(stars) == (shape == 0)).mean() > 0.8


@pytest.mark.parametrize("name", ["shapes", "coloured_shapes"])
def test_drawn_images_differ_by_seed(monkeypatch, name):
    seeds, draw = [], getattr(pretext, f"draw_{name}")

    def spy(*arguments):
        seeds.append(arguments[-1])
        return draw(*arguments)

    monkeypatch.setattr(pretext, f"draw_{name}", spy)
    first, *others = (pretext.load(name, "", 16, "cpu", seed=k) for k in range(3))
    assert seeds == [0, 1, 2, 3, 4, 5]  # not even a test set is another's training set
    assert pretext.load(name, "", 16, "cpu").train.images.equal(first.train.images)
    for other in others:
        assert not other.train.images.equal(first.train.images)
        assert not other.test.images.equal(first.test.images)
