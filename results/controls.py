"""Variants of maml_ssl.py that are no arm: it is run as that file, with its flags.

    python results/controls.py --pretext detached_labels --pretext-weight 0
    python results/controls.py --balance nash --pretext-weight 0

detached_labels: learned_labels, but no gradient reaches the labels: their half of the
head stays as it began (but for weight decay), and they move with the encoder below it.
Does learning what is asked help?

--balance nash: here the mean of normalised gradients, as long as Nash's sum of them.
Does bargaining help, or the length of the step?
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import maml_ssl
import pretext


class DetachedLabels(pretext.LearnedLabels):
    """LearnedLabels whose labels count as constants."""

    def loss(self, outputs, targets):
        answers, labels = outputs.chunk(2, dim=1)  # [N, 10] each
        return F.cross_entropy(answers, labels.detach().softmax(1))


def add_tasks() -> None:
    """Makes the tasks of this file known to --pretext, and to what loads a run."""
    pretext.TASKS["detached_labels"] = DetachedLabels


def normalised_weights(losses: Tensor, weights: maml_ssl.Weights) -> Tensor:
    """1 / |g_t| for each task, times what makes the sum of a_t g_t sqrt(T) long."""
    total, lengths = 0.0, []
    for loss in losses:
        gradients = torch.autograd.grad(
            loss, weights.values(), retain_graph=True, materialize_grads=True
        )
        gradient = torch.cat([g.flatten() for g in gradients])
        lengths.append(gradient.norm().clamp(min=1e-30))
        total = total + gradient / lengths[-1]
    wanted = len(losses) ** 0.5 / total.norm().clamp(min=1e-30)
    return wanted / torch.stack(lengths)


if __name__ == "__main__":
    add_tasks()
    maml_ssl.nash_weights = normalised_weights
    maml_ssl.start(maml_ssl.main)
