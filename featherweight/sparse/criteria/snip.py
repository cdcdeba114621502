"""SNIP: a weight is worth what the loss would change by if it were cut off, to first order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from featherweight.sparse.criteria import probe
from featherweight.sparse.criteria.probe import Batch, Objective
from featherweight.sparse.criteria.registry import CRITERIA, Scores


@CRITERIA.register(
    "snip",
    "absolute value of gradient times weight",
    "Lee, Ajanthan & Torr 2019, arXiv:1810.02340",
    needs=["model", "batches"],
)
def snip(
    weights: Mapping[str, Tensor],
    *,
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective = cross_entropy,
) -> Scores:
    """Score every weight by ``|g * w|``, ``g`` the gradient of the mean loss of the batches.

    It is the derivative of the loss by a mask that multiplies the weight, at mask one. Norms use
    batch statistics; dropout is off.

    Args:
        weights: parameter name to weight, of the model; used in the place of its own.
        model: is not touched.
        batches: pairs of inputs [B, ...] and targets [B], one backward pass each; a batch counts
            by its number of examples.
        objective: from logits and targets to the mean loss.

    Returns:
        Scores of the weights' shapes, at least float32, none negative.

    Raises:
        TypeError: batches are no list of pairs of tensors, or the model returns no logits.
        ValueError: there is no batch.

    Source: Lee, Ajanthan & Torr 2019, arXiv:1810.02340, on the weights as they are; the sum that
        the paper divides by does not change the order.
    """
    probe.check_batches(batches)
    free = probe.leaves(weights)
    with probe.quiet(model, batch_statistics=True) as forward:
        loss = probe.loss_of(forward, objective)
        slopes = probe.mean_gradient(lambda batch: loss(free, batch), free, batches)
    return {n: (slopes[n] * probe.widened(weight)).abs() for n, weight in weights.items()}
