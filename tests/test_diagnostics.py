"""transfer.csv and shift.csv: their numbers, the files, the corruptions; training does not notice.

Oracles: plain autograd on copies, naive loops, colorsys, Pillow.
"""

import argparse
import colorsys
import copy
import csv
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import maml_ssl
import pretext

TINY = "--width 4 --batch-size 16 --warmup-steps 2 --device cpu".split()
FLAGS = "--pretext rotation --eval-every 2 --name x".split()
DRAW = pretext.draw_shapes
LEVELS = [(family, x) for family, levels in maml_ssl.CORRUPTIONS.items() for x in levels]


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
    """A tenth of the embedded dataset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretext, "draw_shapes", lambda n, *rest: DRAW(n // 10, *rest))
        yield


def run(out, *flags, steps=4):
    """Runs the arm in this process; -> the directory of the run."""
    flags = [*TINY, *FLAGS, "--steps", steps, "--out", out, *flags]
    maml_ssl.main([str(flag) for flag in flags])
    return out / "x/seed0"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed"), "--shift", 8)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same_file(name, *directories):
    return len({(directory / name).read_bytes() for directory in directories}) == 1


def settings(*flags):
    return maml_ssl.parse_args([*TINY, *map(str, flags)])


def make(images, *names):
    """-> a model with a head for each of these tasks, and the tasks."""
    tasks = {name: pretext.TASKS[name](images) for name in names}
    heads = {"target": lambda channels: maml_ssl.classifier(10, channels)}
    heads |= {name: task.make_head for name, task in tasks.items()}
    return maml_ssl.make_model(settings(), heads), tasks


# --- what transfer finds ---
@pytest.fixture(scope="module")
def problem():
    """-> a float64 model, its tasks, the support (images, indices), the query (images, labels)."""
    images, labels = DRAW(40)
    model, tasks = make(images, "rotation", "masked_autoencoding", "contrastive")
    for i, p in enumerate(model.double().parameters()):
        p.grad = torch.full_like(p, i)
    x = images.double() / 255
    return model, tasks, (x[:24], torch.arange(24)), (x[24:], labels[24:])


def dot(a, b):
    return sum((x * y).sum().item() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("lr", "steps"), [(0.3, 1), (0.3, 2), (0.0, 1)])
def test_transfer_is_what_backward_and_sgd_on_copies_find(problem, lr, steps):
    model, tasks, support, (images, labels) = problem
    start = copy.deepcopy(model)
    start.zero_grad()
    rows = maml_ssl.transfer(*problem, settings("--inner-lr", lr, "--inner-steps", steps))
    for i, (p, q) in enumerate(zip(model.parameters(), start.parameters(), strict=True)):
        assert torch.equal(p, q) and (p.grad == i).all()  # left as they were
    assert [row[0] for row in rows] == [*tasks]
    for name, cosine, before, after, pretext_loss in rows:
        x, y = tasks[name].make_batch(*support, maml_ssl.rng(0, f"evaluation {name}"))
        desired, twin = copy.deepcopy(start), copy.deepcopy(start)
        losses = F.cross_entropy(desired(images), labels), tasks[name].loss(twin(x, name), y)
        for loss in losses:
            loss.backward()
        assert [before, pretext_loss] == pytest.approx([loss.item() for loss in losses], rel=1e-9)
        g, h = ([p.grad for p in m.encoder.parameters()] for m in (desired, twin))
        assert cosine == pytest.approx(dot(g, h) / (dot(g, g) * dot(h, h)) ** 0.5, rel=1e-9)
        moved = [*twin.encoder.parameters(), *twin.heads[name].parameters()]
        for _ in range(steps):
            grads = torch.autograd.grad(tasks[name].loss(twin(x, name), y), moved)
            for p, grad in zip(moved, grads, strict=True):
                p.data -= lr * grad
        expected = F.cross_entropy(twin(images), labels).item()
        assert after == pytest.approx(expected, rel=1e-9)
        assert abs(after - before) > 1e-3 if lr else after == before


# --- the files ---
def test_the_columns_and_rows_are_those_documented(undisturbed):
    rows = table(undisturbed / "transfer.csv")
    names = "total_step task cosine query_loss query_loss_adapted pretext_loss"
    assert [*rows[0]] == names.split()
    assert [(row["total_step"], row["task"]) for row in rows] == [(k, "rotation") for k in "24"]
    rows = table(undisturbed / "shift.csv")
    assert [*rows[0]] == "family level inner_lr inner_steps accuracy".split()
    found = [(row["family"], float(row["level"]), row["inner_steps"]) for row in rows]
    assert found == [(*x, k) for x in [("clean", 0), *LEVELS] for k in ("0", "1", "3", "10")]
    assert all((8 * float(row["accuracy"])).is_integer() for row in rows)  # of --shift 8 images


@pytest.mark.parametrize(
    ("flags", "files", "steps"),
    [
        ("", {"transfer.csv"}, None),
        ("--inner-lr 0", {"transfer.csv"}, None),
        ("--inner-lr 0 --pretext-weight 0", set(), None),
        ("--inner-lr 0 --pretext-weight 0 --shift 8", {"shift.csv"}, {"0"}),
        ("--inner-lr 0 --shift 8", {"transfer.csv", "shift.csv"}, {"0", "1", "3", "10"}),
    ],
)
def test_each_file_is_written_by_the_runs_that_have_something_to_say(flags, files, steps, tmp_path):
    directory = run(tmp_path, *flags.split(), steps=1)
    assert {p.name for p in directory.glob("*.csv")} == {"metrics.csv"} | files
    if steps:
        assert {row["inner_steps"] for row in table(directory / "shift.csv")} == steps


def test_the_same_command_twice_writes_the_same_bytes(undisturbed, tmp_path):
    torch.manual_seed(1234)  # the global generator has no say
    again = run(tmp_path, "--shift", 8)
    assert all(same_file(name, undisturbed, again) for name in ("transfer.csv", "shift.csv"))


def test_a_run_cut_after_its_rows_were_written_has_them_once(undisturbed, tmp_path, monkeypatch):
    """The checkpoint that goes with the rows of step 4 is missing: step 4 is done again."""
    save = maml_ssl.Run.save

    def cut(self, phase, step, *rest):
        save(self, phase, step, *rest) if step < 4 else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(maml_ssl.Run, "save", cut)
        run(tmp_path)
    assert same_file("transfer.csv", undisturbed, tmp_path / "x/seed0")
    assert same_file("transfer.csv", undisturbed, run(tmp_path, "--resume"))


def test_write_rows_drops_the_rows_of_later_steps(tmp_path):
    path = tmp_path / "rows.csv"
    for step in (2, 4, 10, 4):  # as numbers: "10" < "4"
        maml_ssl.write_rows(path, "step,x", [(step, "a", 1 / 3), (step, "b", 2.0)], step)
    assert path.read_text() == "step,x\n2,a,0.333333\n2,b,2\n4,a,0.333333\n4,b,2\n"


def test_overwrite_leaves_no_row_of_the_older_run(tmp_path):
    (run(tmp_path, "--eval-every", 1) / "shift.csv").touch()
    directory = run(tmp_path, "--lr", 0.01, "--overwrite")
    assert [row["total_step"] for row in table(directory / "transfer.csv")] == ["2", "4"]
    assert not (directory / "shift.csv").exists()


def test_training_does_not_notice_the_diagnostics(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(maml_ssl, "transfer", lambda *_: [])
    both = undisturbed, run(tmp_path)
    logs = [table(directory / "metrics.csv") for directory in both]
    for row in (*logs[0], *logs[1]):
        del row["seconds"]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    states = [torch.load(each / "checkpoint.pt", weights_only=True) for each in both]
    for part in ("model", "average"):
        assert all(torch.equal(v, states[1][part][k]) for k, v in states[0][part].items())


# --- corruptions ---
def by_pillow(images, change):
    """What `change` makes of each image, uint8 [N, 3, H, W], as a Pillow image."""
    each = [change(Image.fromarray(x.movedim(0, 2).numpy())) for x in images]
    return torch.stack([torch.from_numpy(np.array(x)).movedim(2, 0) for x in each])


def difference(a, b):
    return (a.double() - b.double()).abs()


def of(family):
    return pytest.mark.parametrize("level", maml_ssl.CORRUPTIONS[family])


@pytest.mark.parametrize("family", maml_ssl.CORRUPTIONS)
def test_corrupt_is_a_function_of_the_images_and_harder_levels_differ_more(family):
    images, _ = DRAW(20)
    kept, means = images.clone(), [0]
    for level in maml_ssl.CORRUPTIONS[family]:
        found = maml_ssl.corrupt(images, family, level)
        torch.rand(1)  # the global generator has no say
        assert torch.equal(maml_ssl.corrupt(images, family, level), found)
        assert found.dtype == torch.uint8 and found.shape == images.shape
        means.append(difference(found, images).mean())
        for value in (0, 255):  # nothing wraps around
            flat = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
            assert difference(maml_ssl.corrupt(flat, family, level), flat).max() < 128
    assert torch.equal(images, kept)
    assert means[0] < means[1] < means[2] < means[3]


@of("noise")
def test_noise_has_the_standard_deviation_it_says(level):
    gray = torch.full((20, 3, 32, 32), 128, dtype=torch.uint8)
    found = maml_ssl.corrupt(gray, "noise", level).double() / 255
    assert found.std().item() == pytest.approx(level, rel=0.02)
    assert found.mean().item() == pytest.approx(128 / 255, abs=0.002)
    each = torch.corrcoef(found.flatten(0, 1).flatten(1))  # each image and channel has its own
    assert (each - torch.eye(60)).abs().max() < 0.2


@of("blur")
def test_blur_is_a_sum_over_neighbours_with_gaussian_weights(level):
    images, _ = DRAW(2)
    found = maml_ssl.corrupt(images, "blur", level)
    weights = {d: np.exp(-(d**2) / (2 * level**2)) for d in range(-4, 5)}
    for y, x in (5, 7), (16, 16), (27, 27):
        total = 0
        for dy, wy in weights.items():
            for dx, wx in weights.items():
                total = total + wy * wx * images[:, :, y + dy, x + dx].double()
        assert difference(found[:, :, y, x], total / sum(weights.values()) ** 2).max() < 0.51


@of("contrast")
def test_contrast_scales_deviations_and_keeps_the_mean_of_each_channel(level):
    images, _ = DRAW(6)
    std, mean = torch.std_mean(images.double(), (2, 3))
    found = torch.std_mean(maml_ssl.corrupt(images, "contrast", level).double(), (2, 3))
    assert torch.allclose(found[1], mean, atol=0.3)
    assert torch.allclose(found[0], level * std, atol=0.3)


@of("brightness")
def test_brightness_raises_the_largest_channel_and_keeps_hue_and_saturation(level):
    images, _ = DRAW(1)
    found = maml_ssl.corrupt(images, "brightness", level)
    for before, after in zip(*(x[0].flatten(1).T.tolist() for x in (images, found)), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in before))
        rgb = colorsys.hsv_to_rgb(hue, saturation, min(1, value + level))
        assert after == pytest.approx([255 * x for x in rgb], abs=0.51)


def test_brightness_turns_black_into_gray():
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert (maml_ssl.corrupt(black, "brightness", 0.4) == 0.4 * 255).all()


@of("pixelation")
def test_pixelation_is_that_of_cifar_10_c(level):
    """Its authors' make_cifar_c.py: Pillow's BOX filter to int(32 * level), and back."""
    images, small = DRAW(4)[0], [int(32 * level)] * 2
    box = Image.Resampling.BOX
    expected = by_pillow(images, lambda x: x.resize(small, box).resize((32, 32), box))
    assert difference(maml_ssl.corrupt(images, "pixelation", level), expected).max() <= 1


@of("jpeg")
def test_jpeg_is_that_of_pillow(level):
    def there_and_back(image):
        image.save(file := io.BytesIO(), "JPEG", quality=level)
        return Image.open(file)

    images, _ = DRAW(4)
    found = difference(maml_ssl.corrupt(images, "jpeg", level), by_pillow(images, there_and_back))
    assert found.mean() < 0.5 and found.max() <= 8


# --- shift ---
@pytest.fixture(scope="module")
def shifted():
    """-> model, groups, 16 images and, as labels, what the model takes them for."""
    images, _ = DRAW(16)
    model, tasks = make(images, "rotation")
    return model, [tasks], images, maml_ssl.predict(model, images).argmax(1)


def test_an_adaptation_that_goes_nowhere_leaves_the_unadapted_accuracy(shifted, monkeypatch):
    adapted = maml_ssl.predict_adapted

    def slow(*rest):
        changed = vars(rest[-1]) | {"inner_lr": rest[-1].inner_lr * 1e-9}
        return adapted(*rest[:-1], argparse.Namespace(**changed))

    monkeypatch.setattr(maml_ssl, "predict_adapted", slow)
    rows = maml_ssl.shift(*shifted, settings())
    unadapted = {row[:2]: row[-1] for row in rows if row[3] == 0}
    assert len(unadapted) == 19 and len(rows) == 4 * 19
    assert unadapted["clean", 0] == 1 and len({*unadapted.values()}) > 2
    assert all(row[-1] == unadapted[row[:2]] for row in rows)


def test_shift_chooses_its_rate_on_noise_alone(shifted, monkeypatch):
    model, groups, images, labels = shifted
    noisy, seen = maml_ssl.corrupt(images, "noise", 0.08), []

    def adapted(model, groups, support, x, args):
        """Right at a rate of 0.03 on that noise, at 0.1 on all else: there 0.1 would be best."""
        noise = torch.equal(x, noisy)
        seen.append((noise, args.inner_lr, args.inner_steps))
        assert support is None
        right = args.inner_lr == (0.03 if noise else 0.1)
        return F.one_hot(labels if right else (labels + 1) % 10, 10).float()

    monkeypatch.setattr(maml_ssl, "predict_adapted", adapted)
    rows = [row for row in maml_ssl.shift(model, groups, images, labels, settings()) if row[3]]
    assert {row[2] for row in rows} == {0.03} == {lr for noise, lr, _ in seen if not noise}
    assert seen[:5] == [(True, lr, 3) for lr in (0.001, 0.003, 0.01, 0.03, 0.1)]
    assert [row[-1] for row in rows] == [row[:2] == ("noise", 0.08) for row in rows]


def test_shift_adapts_to_each_task_alone_unless_the_inner_loop_is_joint(tmp_path, monkeypatch):
    """So that joint training, whose one group is for speed, adapts as MAML does."""
    seen = []
    monkeypatch.setattr(maml_ssl, "shift", lambda _, groups, *rest: seen.append(groups) or [])
    for flags in ("--inner-lr 0", "--inner-lr 0.01", "--inner joint"):
        tasks = ["--pretext", "rotation", "contrastive", "--shift", 8]
        run(tmp_path / flags, *tasks, *flags.split(), steps=1)
    each = [["rotation"], ["contrastive"]]
    assert [[[*group] for group in groups] for groups in seen] == [
        each,
        each,
        [["rotation", "contrastive"]],
    ]


def test_more_shifted_images_than_there_are_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--shift", 101)
    assert stop.value.code == 2 and "--shift 101: there are 100" in capsys.readouterr().err
