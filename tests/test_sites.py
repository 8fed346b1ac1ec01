"""results/sites.py: sites with equal margins, label shift, what each way gets right."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

import pretext
from results import measure, reading, sites
from results.protocols import SITES_TRIALS

MEANS = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])  # classes of unit Gaussians
PRIOR, SHIFTED = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])


def generator(seed=0):
    return np.random.default_rng(seed)


def draw(frequencies, count, seed=0):
    """Points [count, 2] of the three classes, and labels."""
    labels = generator(seed).choice(3, count, p=frequencies)
    return MEANS[labels] + generator(seed + 1).normal(size=(count, 2)), labels


def posterior(points, prior):
    """Bayes' rule, point by point."""
    densities = [np.exp(-((points - mean) ** 2).sum(1) / 2) for mean in MEANS]
    joint = prior * np.stack(densities, 1)
    return joint / joint.sum(1, keepdims=True)


# --- the images of each site ---
@pytest.mark.parametrize("concentration", [0.2, 1.0, np.inf])
@pytest.mark.parametrize("seed", range(5))
def test_counts_have_exact_margins_and_no_site_is_degenerate(concentration, seed):
    counts = sites.draw_counts(10, concentration, generator(seed))
    seen, new = counts.test[:32], counts.test[32:]
    for split, images in (counts.train, 1000), (seen, 200), (new, 200):
        assert (split >= 0).all() and (split.sum(1) == images).all()
        assert (split.sum(0) == len(split) * images // 10).all()
    assert counts.train.shape == (32, 10) and counts.test.shape == (40, 10)
    for split in counts:
        assert ((split > 0).sum(1) > 1).all()
    # seen sites keep their frequencies, to two images of 200 and of 1,000
    assert np.abs(seen / 200 - counts.train / 1000).max() < 2 / 200 + 2 / 1000


def test_sites_differ_the_more_the_lower_the_concentration():
    largest = {}
    for concentration in 0.2, 1.0, np.inf:
        train = sites.draw_counts(10, concentration, generator()).train
        largest[concentration] = train.max(1).mean() / 1000
    assert largest[0.2] > 0.4 > largest[1.0] > 0.2 > largest[np.inf] == 0.1


def test_frequencies_that_fit_are_left_as_they_are():
    fit = np.array([[0.75, 0.25], [0.25, 0.75]])
    assert np.allclose(sites.balance(fit), fit)
    assert (sites.whole(fit, 4) == [[3, 1], [1, 3]]).all()


def test_shares_that_do_not_come_out_even_are_refused():
    with pytest.raises(ValueError, match="2 sites of 5 images"):
        sites.whole(np.full((2, 4), 0.25), 5)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A source of five classes, and sites of few images."""
    sizes = {"SEEN": 4, "NEW": 2, "TRAIN_IMAGES": 50, "TEST_IMAGES": 20}
    for name, size in sizes.items():
        monkeypatch.setattr(sites, name, size)
    noise = generator()
    for label in "abcde":
        for split, count in ("train", 50), ("test", 30):
            home = tmp_path / "source" / split / label
            home.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(home / f"{i:04d}.jpg")
    return tmp_path


def contents(folder):
    """[(SPLIT, CLASS, bytes)] of all files below."""
    parts = ((x.relative_to(folder).parts, x) for x in folder.rglob("*.jpg"))
    return [(*part[:2], path.read_bytes()) for part, path in parts]


def test_no_image_twice_each_with_its_class_and_the_same_for_each_concentration(small):
    source, used = {*contents(small / "source")}, {}
    for seed, concentration in (0, 0.5), (0, np.inf), (1, 0.5):
        folder = small / f"{seed}-{concentration}"
        sites.write_sites(folder, small / "source", concentration, seed)
        found = contents(folder)
        assert len({image for *_, image in found}) == len(found) == 4 * 50 + 6 * 20
        assert {*found} < source
        used[seed, concentration] = {*found}
    assert used[0, 0.5] == used[0, np.inf] != used[1, 0.5]


def test_the_loader_reads_the_sites_that_were_drawn(small):
    folder = small / "sites"
    sites.write_sites(folder, small / "source", 0.5, 0)
    data = pretext.load(str(folder), str(small), 16, "cpu", environments=True)
    assert data.environments == [f"site0{i}" for i in range(6)]
    draws = generator()
    for images in 50, 30:
        for _ in "abcde":  # write_sites shuffles each class first
            draws.permutation(images)
    counts = sites.draw_counts(5, 0.5, draws)
    for split, expected in zip((data.train, data.test), counts, strict=True):
        found = np.zeros_like(expected)
        np.add.at(found, (split.environments.numpy(), split.labels.numpy()), 1)
        assert (found == expected).all()
    scored = pretext.desired_task(data, None, "test", 0)
    assert (scored.test.environments.bincount() == 10).all()
    assert (scored.unlabelled.environments[scored.aside].bincount() == 10).all()
    with pytest.raises(FileExistsError, match="remove it"):
        sites.write_sites(folder, small / "source", 0.5, 0)


# --- label shift ---
def test_adjusting_is_bayes_rule_with_other_frequencies():
    points, _ = draw(SHIFTED, 50)
    adjusted = sites.adjust(posterior(points, PRIOR), PRIOR, SHIFTED)
    assert np.allclose(adjusted, posterior(points, SHIFTED), atol=1e-12)


@pytest.mark.parametrize("frequencies", [PRIOR, SHIFTED])
def test_em_finds_the_frequencies_shifted_or_not(frequencies):
    points, _ = draw(frequencies, 2000)
    found = sites.em_frequencies(posterior(points, PRIOR), PRIOR)
    assert found.sum() == pytest.approx(1)
    assert np.abs(found - frequencies).max() < 0.04  # three standard errors


@pytest.mark.parametrize("true", [0.2, 1, 20])
def test_how_alike_sites_are_is_found_again(true):
    frequencies = generator().dirichlet(np.full(5, true), 300)
    counts = np.stack(
        [generator(i).multinomial(200, f) for i, f in enumerate(frequencies)]
    )
    assert sites.fit_concentration(counts) == pytest.approx(true, rel=0.25)
    assert sites.fit_concentration(np.full((300, 5), 40)) == pytest.approx(10_000)


def test_with_labels_for_certain_the_frequencies_are_the_dirichlets_mean():
    counts = np.array([6, 0, 1])
    certain = np.eye(3)[np.repeat(range(3), counts)]
    found = sites.expected_frequencies(certain, PRIOR, 0.5)
    assert np.allclose(found, (counts + 0.5) / (7 + 1.5))


def test_frequencies_are_the_fixed_point_of_variational_bayes():
    points, _ = draw(SHIFTED, 20)
    probabilities = posterior(points, PRIOR)
    found = sites.expected_frequencies(probabilities, PRIOR, 0.5)
    counts = found * (20 + 3 * 0.5)
    logarithm = np.log(generator().dirichlet(counts, 100_000)).mean(0)
    answers = sites.adjust(probabilities, PRIOR, np.exp(logarithm))
    assert np.allclose(0.5 + answers.sum(0), counts, atol=0.02)


def test_the_more_alike_sites_are_the_less_images_count():
    points, _ = draw(SHIFTED, 2000)
    probabilities = posterior(points, PRIOR)
    found = sites.expected_frequencies(probabilities, PRIOR, 1.0)
    assert np.abs(found - SHIFTED).max() < 0.04  # as EM with so many images
    few = probabilities[:20]
    uniform = sites.expected_frequencies(few, PRIOR, 10_000)
    assert np.allclose(uniform, 1 / 3, atol=0.001)
    # sites alike, few images: EM finds what is not there
    far = [np.abs(f - 1 / 3).max() for f in (sites.em_frequencies(few, PRIOR), uniform)]
    assert far[0] > 0.1 > far[1]


def test_counts_are_of_each_site_that_has_images():
    homes, labels = torch.tensor([2, 0, 2, 2]), torch.tensor([1, 0, 1, 2])
    split = pretext.Split(torch.zeros(4, 3, 8, 8), labels, homes)
    assert sites.site_counts(split, 3).tolist() == [[1, 0, 0], [0, 2, 1]]


@pytest.mark.parametrize("true", [0.5, 1, 3])
def test_temperature_is_found_again(true):
    logits = torch.from_numpy(generator().normal(size=(20_000, 5)) * 2)
    honest = logits.softmax(1)
    labels = torch.multinomial(honest, 1, generator=torch.Generator().manual_seed(0))
    given = (logits * true).softmax(1).numpy()
    assert sites.temperature(given, labels[:, 0].numpy()) == pytest.approx(true, 0.05)
    assert np.allclose(sites.temper(given, true), honest)


# --- measuring ---
def photograph(points):
    """Points [N, 2] as images of 8 x 8 pixels, in two channels."""
    pixels = torch.from_numpy((points * 20 + 120).clip(0, 255).round())
    channels = torch.cat((pixels, torch.zeros(len(points), 1)), 1)
    return channels.byte()[:, :, None, None].expand(-1, -1, 8, 8).contiguous()


def predict(support, images):
    """Bayes' rule with a uniform prior for each image alone."""
    points = (images[:, :2, 0, 0].double().numpy() - 120) / 20
    return torch.from_numpy(posterior(points, np.ones(3) / 3)).float()


def split_of(homes, count):
    """`count` images of each site: its own frequencies, one class most of the time."""
    parts = []
    for home in homes:
        frequencies = np.roll((0.8, 0.15, 0.05), home)
        points, labels = draw(frequencies, count, 10 * home + count)
        home = torch.full((count,), home)
        parts.append((photograph(points), torch.from_numpy(labels), home))
    return pretext.Split(*map(torch.cat, zip(*parts, strict=True)))


@pytest.fixture(scope="module")
def data():
    """Sites 0 to 5, of which training has the first three."""
    names = [f"site{i}" for i in range(6)]
    data = pretext.Data(
        split_of(range(3), 300), split_of(range(6), 400), [*"abc"], names
    )
    return pretext.set_aside(data, 0)


def test_known_frequencies_beat_those_of_em_and_both_beat_none(data):
    rows = sites.measure(predict, data, 1)
    assert rows.sites == data.environments and rows.new.tolist() == 3 * [False] + 3 * [
        True
    ]
    mean = {way: accuracy.mean() for way, accuracy in rows.accuracy.items()}
    assert mean["known"] >= mean["em"] > mean["plain"] + 0.03
    assert mean["known"] >= mean["em prior"] > mean["plain"] + 0.03
    assert mean["known"] > mean["most frequent"] + 0.01
    # naively: the most frequent class of all 400 images, of those scored
    for site, accuracy in enumerate(rows.accuracy["most frequent"]):
        here = data.unlabelled.environments == site
        label = data.unlabelled.labels[here].mode().values
        scored = data.test.labels[data.test.environments == site]
        assert accuracy == pytest.approx((scored == label).double().mean().item())


def test_a_classifier_gets_unlabelled_images_of_one_site_and_never_those_scored(data):
    calls = []

    def spy(support, images):
        calls.append((support, images))
        return predict(support, images)

    sites.measure(spy, data, 1)
    assert len(calls) == 2 * 6
    for site, (first, second) in enumerate(zip(calls[::2], calls[1::2], strict=True)):
        aside = data.aside & (data.unlabelled.environments == site)
        scored = data.test.images[data.test.environments == site]
        assert len(scored) == 200 and aside.sum() == 200
        for support in first[0], first[1], second[0]:
            assert torch.equal(support, data.unlabelled.images[aside])
        assert torch.equal(second[1], scored)


def test_labels_of_unlabelled_images_move_the_known_frequencies_alone(data):
    wrong = data.unlabelled._replace(labels=(data.unlabelled.labels + 1) % 3)
    rows = sites.measure(predict, data, 1).accuracy
    moved = sites.measure(predict, data._replace(unlabelled=wrong), 1).accuracy
    assert (rows["plain"] == moved["plain"]).all() and (rows["em"] == moved["em"]).all()
    assert rows["known"].mean() > moved["known"].mean()


def test_calibration_undoes_overconfidence_and_em_gains_by_it(data):
    def sure(support, images):
        return (predict(support, images).log() * 4).softmax(1)

    # without shift `predict` is honest: so T is 4
    shares = [draw(np.ones(3) / 3, 1000, seed) for seed in range(2)]
    parts = [
        (photograph(points), torch.from_numpy(labels)) for points, labels in shares
    ]
    images, labels = map(torch.cat, zip(*parts, strict=True))
    homes = torch.arange(2).repeat_interleave(1000)
    split = pretext.Split(images, labels, homes)
    validation = pretext.set_aside(pretext.Data(split, split, [*"abc"], [*"xy"]), 0)
    found = sites.calibrate(sure, validation)
    assert found == pytest.approx(4, 0.15)
    raw, better = (sites.measure(sure, data, T).accuracy for T in (1, found))
    assert (raw["plain"] == better["plain"]).all()
    assert better["em"].mean() > raw["em"].mean()


def test_summary_is_the_mean_and_its_error_over_sites():
    values = generator().normal(size=400)
    new = np.arange(400) < 100
    found = sites.summary(values, new, generator())
    for name, group in ("all", values), ("seen", values[100:]), ("new", values[:100]):
        assert found[name].mean == pytest.approx(group.mean())
        error = group.std(ddof=1) / math.sqrt(len(group))  # the closed form
        assert found[name].error == pytest.approx(error, rel=0.1)
    assert "new" not in sites.summary(values, np.zeros(400, bool), generator())


def test_the_lines_of_a_run_have_each_way_with_the_temperature_of_its_trial(
    data, monkeypatch, tmp_path
):
    loaded = []

    def sure(support, images):
        return (predict(support, images).log() * 4).softmax(1)

    def load(folder):
        loaded.append(folder.relative_to(tmp_path).as_posix())
        return sure, data

    monkeypatch.setattr(measure, "load", load)
    measure.temperature.cache_clear()
    lines = []
    for run in "prior-32", "prior-128", "joint":
        lines += measure.by_way(tmp_path / "sites-0.2" / run / "seed7", tmp_path)
    best = SITES_TRIALS["prior"].best
    trial = f"tune-sites/prior-{best}/seed100"
    runs = [f"sites-0.2/{run}/seed7" for run in ("prior-32", "prior-128", "joint")]
    assert sorted(loaded) == sorted([trial, *runs])  # the trial once
    ways = ["plain", "em", "em prior", "known", "most frequent"]
    assert [line.split(",")[:3] for line in lines] == [
        *([run, "7", way] for run in ("prior-32", "prior-128") for way in ways),
        ["joint", "7", "plain"],  # without a trial no more can be said
    ]
    rows = sites.measure(sure, data, measure.temperature(tmp_path / trial))
    for line, way in zip(lines, ways, strict=False):
        accuracy = rows.accuracy[way]
        told = [float(cell) for cell in line.split(",")[3:]]
        means = [accuracy.mean(), accuracy[~rows.new].mean(), accuracy[rows.new].mean()]
        assert told[:3] == pytest.approx(means, abs=1e-4)
        assert told[3] == pytest.approx(accuracy.std() / 6**0.5, rel=0.15, abs=1e-4)

    (tmp_path / "x.csv").write_text("\n".join([measure.WAYS_HEADER, *lines]))
    found = reading.read_ways(tmp_path / "x.csv", "new")["prior-32", "em"]
    assert found == {
        7: pytest.approx(100 * rows.accuracy["em"][rows.new].mean(), abs=0.01)
    }
