"""Networks that are shown a support set, without an inner loop: controls, no arms.

    python results/readers.py --reader context --name context --support-batch-size 128

They see the labelled batches of the arms, and in each step for each environment a
support of other training images of it, without labels. At evaluation the support is
what MAML adapts to. What they make of it:

context    a code, a second network's mean output over the support (ARM-CML, 2007.02931)
prior      a number a class, the same mean, added to the logits: linear in how frequent
           the classes are
log_prior  the logarithm of class probabilities' mean, the form of Bayes' rule
inner_prior  a number a class that an inner loop moves, and it alone: MAML, whose inner
           loss compares it with labels that the second network gives to the support.
           One step adds alpha times their mean, as a forward pass could
inner_weights  such labels too, but the inner loss compares them with the support's own
           logits: every weight of encoder and classifier moves
inferred   the environment: a second network classifies each image's environment, the
           log-probabilities are added over the support, and the code of the winner is
           taken: prod p(e|x) ~ p(e|support), as images are independent given e and all
           e equally frequent in training (the product rule, Kittler et al. 1998)
told       nothing: the environment's rule is told, which in use nobody knows
batchnorm  statistics: all layers are normalised by those of the support (ARM-BN)

A code is a number for each channel of the encoder's first layer, added after its
normalisation (which would cancel a constant channel of the input).

Deviations from ARM: there the images to be classified are themselves the support, in
training and test; ARM-CML adds 1 to 12 channels to the input, which differ by place,
has BatchNorm, and a context network of three 5x5 convolutions.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maml_ssl
import pretext
from results import controls

# The environment of training whose rule an environment of coloured_shapes has: in the
# new one colour goes with the label as in the first
RULES = (0, 1, 0)


def scaled(images: Tensor) -> Tensor:
    return (images - 0.5) / 0.25  # as maml_ssl.Model does


def second_network(args: argparse.Namespace, outputs: int) -> nn.Module:
    """Like the encoder: images [N, 3, H, H] -> numbers [N, outputs]."""
    encoder, channels = maml_ssl.make_encoder(args.backbone, args.width)
    return nn.Sequential(encoder, pretext.pooled(nn.Linear(channels, outputs)))


class Reader(nn.Module):
    """The arms' encoder and classifier; the first layer gets a code [channels]."""

    def __init__(self, base: maml_ssl.Model):
        super().__init__()
        self.encoder, self.classifier = base.encoder, base.heads["target"]
        self.channels = self.encoder[0].out_channels

    def classify(self, images: Tensor, code: Tensor) -> Tensor:
        first, rest = self.encoder[:2], self.encoder[2:]  # convolution and norm
        return self.classifier(rest(first(scaled(images)) + code[:, None, None]))

    def loss(self, support, environment: int, images, labels) -> Tensor:
        return F.cross_entropy(self(support, environment, images), labels)


class Context(Reader):
    def __init__(self, base, args):
        super().__init__(base)
        self.reader = second_network(args, self.channels)

    def forward(self, support, environment, images):
        return self.classify(images, self.reader(scaled(support)).mean(0))


class Prior(Reader):
    def __init__(self, base, args):
        super().__init__(base)
        self.reader = second_network(args, args.n_classes)

    def offset(self, said: Tensor) -> Tensor:
        """What is added to all logits: [M, classes], of the support -> [classes]."""
        return said.mean(0)

    def forward(self, support, environment, images):
        logits = self.classifier(self.encoder(scaled(images)))
        return logits + self.offset(self.reader(scaled(support)))


class LogPrior(Prior):
    def offset(self, said):
        return said.log_softmax(1).logsumexp(0) - math.log(len(said))


class InnerPrior(Prior):
    def __init__(self, base, args):
        super().__init__(base, args)
        self.start = nn.Parameter(torch.zeros(args.n_classes))
        self.inner = {"lr": args.inner_lr, "steps": args.inner_steps}

    def offset(self, said):
        labels = said.softmax(1)

        def loss(weights: maml_ssl.Weights) -> Tensor:
            return F.cross_entropy(weights["offset"].expand_as(labels), labels)

        with torch.enable_grad():  # predict_with has none
            weights, _ = maml_ssl.adapt(loss, {"offset": self.start}, **self.inner)
        return weights["offset"]


class InnerWeights(Reader):
    def __init__(self, base, args):
        super().__init__(base)
        self.reader = second_network(args, args.n_classes)
        self.inner = {"lr": args.inner_lr, "steps": args.inner_steps}

    def forward(self, support, environment, images):
        network = nn.Sequential(self.encoder, self.classifier)
        labels = self.reader(scaled(support)).softmax(1)

        def logits(weights: maml_ssl.Weights, images: Tensor) -> Tensor:
            return functional_call(network, weights, (scaled(images),))

        def loss(weights: maml_ssl.Weights) -> Tensor:
            return F.cross_entropy(logits(weights, support), labels)

        with torch.enable_grad():
            weights = dict(network.named_parameters())
            weights, _ = maml_ssl.adapt(loss, weights, **self.inner)
        return logits(weights, images)


class Told(Reader):
    def __init__(self, base, args):
        super().__init__(base)
        self.codes = nn.Linear(args.known, self.channels, bias=False)

    def told(self, environment: int, images) -> Tensor:
        return self.classify(images, self.codes.weight[:, environment])

    def forward(self, support, environment, images):
        return self.told(RULES[environment], images)


class Inferred(Told):
    def __init__(self, base, args):
        super().__init__(base, args)
        self.reader = second_network(args, args.known)

    def infer(self, support) -> int:
        """The most probable environment; all are equally frequent in training."""
        return int(self.reader(scaled(support)).log_softmax(1).sum(0).argmax())

    def forward(self, support, environment, images):
        return self.told(self.infer(support), images)

    def loss(self, support, environment, images, labels):
        homes = torch.full((len(support),), environment, device=support.device)
        inference = F.cross_entropy(self.reader(scaled(support)), homes)
        return F.cross_entropy(self.told(environment, images), labels) + inference


class SupportNorm(nn.Module):
    """Normalises [N, C, h, w] by mean and variance of the first `count` images."""

    count = 0

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        of, shape = x[: self.count], (-1, 1, 1)
        variance, mean = torch.var_mean(of, (0, 2, 3), correction=0, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
        return x * self.weight.view(shape) + self.bias.view(shape)


class BatchNorm(nn.Module):
    def __init__(self, base, args):
        super().__init__()
        self.encoder, self.classifier = base.encoder, base.heads["target"]
        for i, layer in enumerate(self.encoder):
            if isinstance(layer, nn.GroupNorm):
                self.encoder[i] = SupportNorm(layer.num_channels)

    def forward(self, support, environment, images):
        for layer in self.encoder:
            layer.count = len(support)
        features = self.encoder(scaled(torch.cat((support, images))))
        return self.classifier(features[len(support) :])

    loss = Reader.loss


READERS = {
    "context": Context,
    "prior": Prior,
    "log_prior": LogPrior,
    "inner_prior": InnerPrior,
    "inner_weights": InnerWeights,
    "inferred": Inferred,
    "told": Told,
    "batchnorm": BatchNorm,
}
INNER = ("inner_prior", "inner_weights")  # those with an inner loop


def make_reader(args: argparse.Namespace) -> nn.Module:
    """Encoder and classifier start as the arms' do with this seed."""
    base = maml_ssl.make_model(args, {"target": args.n_classes}, {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(pretext.rng(args.seed, "init reader").initial_seed())
        return READERS[args.reader](base, args).to(args.device)


def draw_support(split, candidates, count: int, flip: bool, generator) -> Tensor:
    """[count, 3, H, H] in [0, 1], mirrored as a pretext task's are."""
    indices = pretext.draw(candidates, count, generator)
    return pretext.mirror(split.images[indices], generator, flip)


def main() -> None:
    args = parse_args()
    data = maml_ssl.load_data(args)
    train = data.train
    args.known = len(train.environments.unique())
    args.n_classes = len(data.classes)
    model = make_reader(args)

    def backward(model: nn.Module, step: int) -> maml_ssl.Used:
        size, most = args.batch_size, args.meta_batch_size
        query = pretext.labelled_batch(data, step, size, most, args.seed)
        total, seen = 0.0, 0
        for environment in query.environments.unique().tolist():
            others = train.environments == environment
            others = others.index_fill(0, query.indices, False)
            draw = pretext.rng(args.seed, f"support {environment}", step, args.device)
            count, flip = args.support_batch_size, data.mirror
            support = draw_support(train, others, count, flip, draw)
            share = query.environments == environment
            x, y = query.images[share], query.labels[share]
            loss = len(y) / size * model.loss(support, environment, x, y)
            loss.backward()
            total += loss.item()
            seen += len(support) + len(y)
        return maml_ssl.Used(total, seen, size)

    def evaluate(model: nn.Module) -> maml_ssl.Evaluation:
        correct = torch.zeros_like(data.test.labels, dtype=torch.bool)
        for environment in data.test.environments.unique().tolist():
            scored = data.test.environments == environment
            chosen = data.aside & (data.unlabelled.environments == environment)
            images = data.test.images[scored]
            seen = Seen(data.unlabelled, chosen, environment)
            found = predict_with(model, args, data.mirror, seen, images)
            correct[scored] = found.argmax(1) == data.test.labels[scored]
        return maml_ssl.Evaluation(correct)

    run = maml_ssl.Run(args, model, data, [], {})
    maml_ssl.train(run, "target", args.steps, model, backward, evaluate, args)
    run.conclude()


def parse_args() -> argparse.Namespace:
    parser = maml_ssl.common_arguments()
    parser.description = __doc__.partition("\n")[0]
    add = parser.add_argument_group("reader").add_argument
    add("--reader", choices=READERS, default="context", help="what reads the support")
    add("--support-batch-size", type=int, default=128, help="of each environment")
    add("--inner-lr", type=float, help="alpha of an inner loop", **maml_ssl.DEPENDS)
    add("--inner-steps", type=int, help="K", **maml_ssl.DEPENDS)
    args = maml_ssl.parse(parser, {}, {})
    args.name = args.name.replace("maml_ssl", "reader")
    if args.encoder or args.backbone != "conv" or args.amp:
        maml_ssl.fail("no --encoder, --amp or other --backbone: these are for the arms")
    inner = vars(args).keys() & {"inner_lr", "inner_steps"}
    if len(inner) != (2 if args.reader in INNER else 0):
        which = " and ".join(INNER)
        maml_ssl.fail(f"--inner-lr and --inner-steps are for {which}, which need both")
    if args.reader == "told" and args.dataset != "coloured_shapes":
        maml_ssl.fail("--reader told knows the rules of coloured_shapes alone")
    return args


# --- finished runs, of any arm ---
class Seen(NamedTuple):
    """What may be read: unlabelled images of one environment."""

    split: pretext.Split
    chosen: Tensor  # bool [M]
    environment: int  # only `told` looks at it


Predict = Callable[[Seen, Tensor], Tensor]  # uint8 [N, 3, H, H] -> [N, classes]


@torch.no_grad()
def predict_with(model, args, flip: bool, seen: Seen, images: Tensor) -> Tensor:
    """The class probabilities [N, classes] of uint8 images [N, 3, H, H]."""
    draw = pretext.rng(args.seed, "evaluation support", 0, images.device)
    support = draw_support(seen.split, seen.chosen, pretext.ADAPT_TO, flip, draw)
    logits = [model(support, seen.environment, x / 255) for x in images.split(500)]
    return torch.cat(logits).softmax(1)


class Finished(NamedTuple):
    args: argparse.Namespace  # what config.json says
    predict: Predict


def load(folder: Path, **settings: float) -> Finished:
    """A finished run of any arm or control. settings: other than those it had."""
    config = json.loads((folder / "config.json").read_bytes()) | {"device": "cpu"}
    args = argparse.Namespace(**config | settings)
    state = torch.load(folder / "checkpoint.pt", "cpu", weights_only=True)
    weights = {k.removeprefix("module."): v for k, v in state["averaged"].items()}
    if "reader" in config:
        model = make_reader(args)
        model.load_state_dict({k: v for k, v in weights.items() if k != "n_averaged"})
        return Finished(args, partial(predict_with, model, args, args.mirror))
    if "detached_labels" in state["tasks"]:
        controls.add_tasks()
    tasks = pretext.restore_tasks(state["tasks"]) if args.arm == "maml_ssl" else {}
    model = maml_ssl.make_model(args, {"target": len(args.classes)}, tasks)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})

    def predict(seen: Seen, images: Tensor) -> Tensor:
        if not tasks or args.inner_steps == 0:
            return maml_ssl.predict(model, {}, images)
        key, count = (args.seed, "evaluation", 0), pretext.ADAPT_TO
        split, chosen, _ = seen
        batches = pretext.draw_batches(tasks, split, chosen, count, args.mirror, key)
        found = maml_ssl.predict_adapted(model, tasks, batches, images, args)
        return found.probabilities

    return Finished(args, predict)


if __name__ == "__main__":
    maml_ssl.start(main)
