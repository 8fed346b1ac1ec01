"""results/readers.py and results/controls.py: what the controls see, and what not."""

import argparse

import pytest
import torch
import torch.nn.functional as F

import maml_ssl
import pretext
from results import controls, readers, reading


def make(reader, known=2, seed=0, inner_lr=3.0, inner_steps=2):
    args = argparse.Namespace(
        reader=reader, backbone="conv", width=4, amp=False, seed=seed, device="cpu"
    )
    args.known, args.n_classes = known, 3
    args.inner_lr, args.inner_steps = inner_lr, inner_steps
    return readers.make_reader(args)


def images(count, seed=0):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reader", readers.READERS)
def test_encoder_and_classifier_start_as_the_arms_do(reader):
    model = make(reader)
    args = argparse.Namespace(
        backbone="conv", width=4, amp=False, seed=0, device="cpu", encoder=None
    )
    base = maml_ssl.make_model(args, {"target": 3}, {})
    assert model.encoder[0].weight.equal(base.encoder[0].weight)
    assert model.classifier[-1].weight.equal(base.heads["target"][-1].weight)


@pytest.mark.parametrize("reader", readers.READERS)
def test_what_is_said_of_an_image_does_not_depend_on_the_other_images(reader):
    model, support, query = make(reader), images(8), images(5, seed=1)
    alone = [model(support, 0, query[i : i + 1]) for i in range(5)]
    assert torch.allclose(model(support, 0, query), torch.cat(alone), atol=1e-5)


READ_AS_A_SET = set(readers.READERS) - {"told", "inferred"}


@pytest.mark.parametrize("reader", sorted(READ_AS_A_SET))
def test_it_reads_the_support_as_a_set(reader):
    model, support, query = make(reader), images(8), images(5, seed=1)
    said = model(support, 0, query)
    assert torch.allclose(model(support.flip(0), 1, query), said, atol=1e-5)
    assert not torch.allclose(model(support.square(), 0, query), said, atol=1e-3)


PRIORS = ["prior", "log_prior", "inner_prior"]


@pytest.mark.parametrize("reader", PRIORS)
def test_a_prior_says_the_same_of_all_images(reader):
    model, support, query = make(reader), images(8), images(5, seed=1)
    shift = model(support, 0, query) - model.classifier(
        model.encoder(readers.scaled(query))
    )
    assert torch.allclose(shift, shift[:1].expand(5, 3), atol=1e-5)
    said = model.reader(readers.scaled(support))
    expected = {
        "prior": said.mean(0),
        "log_prior": said.softmax(1).mean(0).log(),
        "inner_prior": model.offset(said),
    }
    assert torch.allclose(shift[0], expected[reader], atol=1e-5)


def test_one_inner_step_on_the_logits_is_linear_in_the_labels_mean():
    model, said = make("inner_prior", inner_steps=1), torch.randn(8, 3)
    model.start.data = torch.tensor([1.0, 0.0, -1.0])
    with torch.no_grad():  # as at the evaluation
        moved = model.offset(said)
    slope = model.start.softmax(0) - said.softmax(1).mean(0)
    assert torch.allclose(moved, model.start - 3 * slope, atol=1e-5)


def test_many_inner_steps_on_the_logits_find_the_logarithm():
    model = make("inner_prior", inner_lr=1.0, inner_steps=500)
    said = torch.randn(8, 3)
    logarithm = make("log_prior").offset(said)
    found, wanted = model.offset(said).softmax(0), logarithm.softmax(0)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("reader", readers.INNER)
def test_the_outer_gradient_goes_through_the_inner_step_to_the_labels(reader):
    model, support = make(reader, inner_lr=0.7).double(), images(8).double()
    query, labels = images(5, seed=1).double(), torch.tensor([0, 1, 2, 0, 1])
    parameter = model.reader[-1][-1].bias  # of what gives the labels
    loss = model.loss(support, 0, query, labels)
    slope = torch.autograd.grad(loss, parameter)[0][0].item()
    sides = []
    for change in (1e-5, -2e-5):
        parameter.data[0] += change
        sides.append(model.loss(support, 0, query, labels).item())
    assert slope == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5)
    assert slope != 0


def test_an_inner_step_on_all_weights_is_the_one_of_torch():
    model, support, query = make("inner_weights", inner_steps=1), images(8), images(5)
    with torch.no_grad():  # as at the evaluation
        said = model(support, 0, query)
        labels = model.reader(readers.scaled(support)).softmax(1)
    network = torch.nn.Sequential(model.encoder, model.classifier)
    log_p = network(readers.scaled(support)).log_softmax(1)
    (-(labels * log_p).sum(1).mean()).backward()
    before = network(readers.scaled(query))
    torch.optim.SGD(network.parameters(), lr=3.0).step()
    assert torch.allclose(said, network(readers.scaled(query)), atol=1e-5)
    assert not torch.allclose(said, before, atol=1e-2)


def test_inference_of_the_true_environment_is_the_told_network(monkeypatch):
    inferred, told = make("inferred"), make("told")
    told.load_state_dict(inferred.state_dict(), strict=False)
    support, query = images(8), images(5, seed=1)
    for environment in (0, 1):
        monkeypatch.setattr(inferred, "infer", lambda _, e=environment: e)
        said = inferred(support, None, query)
        assert said.equal(told(support, environment, query))
    assert not told(support, 0, query).equal(told(support, 1, query))
    assert told(support, 2, query).equal(told(support, 0, query))  # the new one's rule


def test_a_code_counts_at_each_place_and_is_not_normalised_away():
    model, query = make("told"), images(1)
    first, codes = [], model.codes.weight.detach().T
    for code in codes:  # of each environment
        hook = model.encoder[2].register_forward_pre_hook(
            lambda _, inputs: first.append(inputs[0])
        )
        model.classify(query, code)
        hook.remove()
    change = (codes[1] - codes[0])[None, :, None, None]
    assert torch.allclose(first[1] - first[0], change.expand_as(first[0]), atol=1e-5)


def test_the_winner_has_the_highest_sum_of_log_probabilities():
    model, support = make("inferred", known=3), images(3)
    # one image is almost sure of 0, one excludes 0 almost: 2 has the highest product
    said = torch.tensor([[0.90, 0.04, 0.06], [0.001, 0.35, 0.649], [0.4, 0.2, 0.4]])
    model.reader.forward = lambda _: said.log()
    assert model.infer(support) == 2
    assert model.infer(support.flip(0)) == 2
    labels = torch.tensor([0, 1, 2, 0])
    loss = model.loss(support, 1, images(4), labels)
    told = F.cross_entropy(model.told(1, images(4)), labels)
    inference = -said[:, 1].log().mean()
    assert loss.item() == pytest.approx((told + inference).item(), rel=1e-5)


def test_the_support_normalises_itself_and_not_the_query():
    norm = readers.SupportNorm(4)
    x = torch.randn(12, 4, 2, 2) * 3 + 1
    norm.count = 8
    support, query = norm(x)[:8], norm(x)[8:]
    assert support.mean((0, 2, 3)).abs().max() < 1e-5
    assert support.std((0, 2, 3), correction=0).sub(1).abs().max() < 1e-3
    by_hand = (x[8:] - x[:8].mean((0, 2, 3), keepdim=True)) / x[:8].std(
        (0, 2, 3), correction=0, keepdim=True
    )
    assert torch.allclose(query, by_hand, atol=1e-4)


def test_the_support_of_a_step_is_of_its_environment_and_without_the_query(
    monkeypatch, tmp_path
):
    drawn = []

    def spy(split, candidates, count, flip, generator):
        drawn.append((candidates.clone(), count))
        return draw(split, candidates, count, flip, generator)

    draw = readers.draw_support
    monkeypatch.setattr(readers, "draw_support", spy)
    command = "readers.py --image-size 8 --width 2 --batch-size 8 --steps 1 --name x"
    command += f" --support-batch-size 6 --device cpu --out {tmp_path}"
    monkeypatch.setattr("sys.argv", command.split())
    small = pretext.draw_coloured_shapes
    monkeypatch.setattr(
        pretext, "draw_coloured_shapes", lambda n, a, s: small(n // 50, a, s)
    )
    readers.main()
    args = readers.parse_args()
    data = maml_ssl.load_data(args)
    query = pretext.labelled_batch(data, 0, 8, 4, args.seed)
    training = [one for one in drawn if one[1] == 6]
    assert len(training) == 2
    for environment, (candidates, _) in enumerate(training):
        expected = data.train.environments == environment
        expected[query.indices] = False
        assert candidates.equal(expected)


# --- variants of MAML ---
def test_no_gradient_reaches_what_makes_detached_labels():
    outputs = torch.randn(6, 20, requires_grad=True)
    for task, reached in (
        (controls.DetachedLabels(None), False),
        (pretext.LearnedLabels(None), True),
    ):
        loss = task.loss(outputs, None)
        (gradient,) = torch.autograd.grad(loss, outputs)
        assert gradient[:, :10].abs().max() > 0
        assert (gradient[:, 10:].abs().max() > 0) == reached
    value = pretext.LearnedLabels(None).loss(outputs, None)
    assert controls.DetachedLabels(None).loss(outputs, None).equal(value)


def test_normalised_gradients_have_equal_shares_and_nash_s_length():
    weights = {"w": torch.randn(7, requires_grad=True)}
    a, b = torch.randn(7), torch.randn(7)
    losses = torch.stack((weights["w"] @ a, 100 * weights["w"] @ b))
    found = controls.normalised_weights(losses, weights)
    parts = found[0] * a, 100 * found[1] * b
    assert parts[0].norm().item() == pytest.approx(parts[1].norm().item(), rel=1e-4)
    assert sum(parts).norm().item() == pytest.approx(2**0.5, rel=1e-4)


# --- the tables ---
def test_the_part_of_the_way_is_paired_by_seed(tmp_path):
    path = tmp_path / "sites_ways.csv"
    lines = ["run,seed,way,all,seen,new,error"]
    for seed, shift in ((10, 0.0), (11, 0.2)):
        for run, way, accuracy in (
            ("scratch", "plain", 0.4),
            ("scratch", "known", 0.6),
            ("context", "plain", 0.45),
        ):
            value = accuracy + shift
            lines.append(f"{run},{seed},{way},{value},{value},{value},0")
    path.write_text("\n".join(lines))
    rows = {(row[0], row[1]): row for row in reading.site_rows(path, {})}
    assert rows["context", "plain"][5] == "25.0 ± 0.0"
    assert rows["scratch", "known"][5] == "100.0 ± 0.0"
    assert rows["scratch", "plain"][2].startswith("50.0 ± ")


def test_contrasts_are_corrected_for_their_number():
    clear = reading.Answer("clear", 5 + torch.tensor([0.1, -0.1, 0, 0.2, -0.2]).numpy())
    vague = reading.Answer("vague", torch.tensor([0.5, -0.4, 0.2, -0.3, 0.1]).numpy())
    rows = reading.contrast_rows([clear, vague], 3)
    assert rows[0][2].startswith("+5.0") and rows[0][5] == "above"
    assert rows[1][5] == "undecided" and rows[1][6] == "yes"
    assert float(rows[0][4]) == pytest.approx(3 * float(rows[0][3]), rel=0.1)
