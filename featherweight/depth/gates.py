"""Gates: by what a learned router's score multiplies the update of a chosen token.

A score must reach the output for its router to learn. ``raw`` is the paper's (Raposo et al. 2024,
arXiv:2404.02258); attached to a trained model it nearly removes the layer, for its scores
start near 0. ``unit`` and ``tanh`` equal 1 there and leave the layer as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from featherweight.common import Registry, unwrap
from featherweight.depth.ledger import Ledger, Prediction

Gate = Callable[[Tensor], Tensor]
GATES: Registry[Gate] = Registry("gate")
TANH_SPAN = 0.2  # of p-MoD, Zhang et al. 2024, arXiv:2412.04449


@GATES.register(
    "raw", "the score itself; 0 at a score of 0", "Raposo et al. 2024, arXiv:2404.02258"
)
def raw(scores: Tensor) -> Tensor:
    """Return the scores."""
    return scores


@GATES.register("unit", "twice the logistic function; 1 at a score of 0")
def unit(scores: Tensor) -> Tensor:
    """Return 2 sigmoid(scores), in (0, 2)."""
    return 2 * scores.sigmoid()


@GATES.register("sigmoid", "the logistic function; 1/2 at a score of 0")
def sigmoid(scores: Tensor) -> Tensor:
    """Map scores to (0, 1)."""
    return scores.sigmoid()


@GATES.register("tanh", "1 + 0.2 tanh; 1 at a score of 0", "Zhang et al. 2024, arXiv:2412.04449")
def tanh(scores: Tensor) -> Tensor:
    """Map scores to (0.8, 1.2)."""
    return 1 + TANH_SPAN * scores.tanh()


def auxiliary_loss(model: torch.nn.Module) -> Tensor:
    """Return how badly each token's own logit predicts whether top-k chose it in the last forward.

    Binary cross-entropy, averaged over tokens and then over layers; padding doesn't count. Added
    to the task's loss with a small weight (0.01) it makes ``sigmoid(logit) > 0.5`` a rule that
    needs no other token, which generation needs (Raposo et al. 2024).

    Args:
        model: converted by `mod` with ``auxiliary="router"`` or ``"predictor"``, after a forward
            in training mode.

    Raises:
        ValueError: the model has made no predictions.
    """
    ledgers: dict[int, Ledger] = {
        id(ledger): ledger
        for ledger in (vars(m).get("depth_ledger") for m in unwrap(model).modules())
        if isinstance(ledger, Ledger)
    }
    predictions = [p for ledger in ledgers.values() for p in ledger.predictions if p is not None]
    if not predictions:
        raise ValueError(
            "no predictions: convert with auxiliary='router' or 'predictor', and run the model in "
            "training mode first"
        )
    return torch.stack([_cross_entropy(p) for p in predictions]).mean()


def _cross_entropy(prediction: Prediction) -> Tensor:
    logits, chosen, valid = prediction
    losses = F.binary_cross_entropy_with_logits(logits, chosen.to(logits.dtype), reduction="none")
    if valid is None:
        return losses.mean()
    weight = valid.expand_as(losses).to(losses.dtype)
    return (losses * weight).sum() / weight.sum().clamp(min=1)
