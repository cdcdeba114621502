"""ProsPr: a weight is worth what cutting it off would change after a few steps of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from featherweight.common import unwrap
from featherweight.sparse.criteria import probe
from featherweight.sparse.criteria.probe import Batch, Loss, Objective
from featherweight.sparse.criteria.registry import CRITERIA, Scores


@CRITERIA.register(
    "prospr",
    "absolute derivative, by the mask, of the loss after a few steps of training",
    "Alizadeh et al. 2022, arXiv:2202.08132",
    needs=["model", "batches"],
)
def prospr(
    weights: Mapping[str, Tensor],
    *,
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective = cross_entropy,
    steps: int = 3,
    lr: float = 0.1,
    first_order: bool = False,
    masks: Mapping[str, Tensor] | None = None,
) -> Scores:
    """Score every weight by the meta-gradient ``|dL/dm|`` of a mask applied before training.

    Training starts at ``m * w`` and takes plain gradient steps, of all parameters that require
    gradients; the loss after them, on the next batch, is differentiated through the steps by the
    mask at one. Norms use batch statistics; dropout is off.

    Args:
        weights: parameter name to weight, of the model; used in the place of its own.
        model: is not touched; must be twice differentiable. The memory of ``steps + 1`` forward
            passes is held at once.
        batches: pairs of inputs [B, ...] and targets [B], one for each step and one for the loss
            at the end; fewer are used in turn.
        objective: from logits and targets to the mean loss.
        steps: of training; 0 is SNIP on the first batch.
        lr: of these steps; 0 is SNIP on the last batch used.
        first_order: leave the second derivatives out: ``|w * g|`` with the gradient at the end of
            training, in the memory of one forward pass.
        masks: which weights exist, by name; the others stay zero in training. None: all.

    Returns:
        Scores of the weights' shapes, at least float32, none negative.

    Raises:
        TypeError: batches are no list of pairs of tensors, or the model returns no logits.
        ValueError: there is no batch, or ``steps`` or ``lr`` is negative.

    Source: Alizadeh et al. 2022, arXiv:2202.08132, algorithm 1, and its first-order variant.
    """
    probe.check_batches(batches)
    if steps < 0 or not lr >= 0:
        raise ValueError(f"steps and lr must be at least 0, got {steps} and {lr:g}")
    free = probe.leaves(weights)
    trained = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
    current = {**probe.leaves(trained), **free}
    # Fused attention has no second derivative.
    with probe.quiet(model, batch_statistics=True) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = probe.loss_of(forward, objective)
        for step in range(steps):
            batch = batches[step % len(batches)]
            current = _stepped(loss, current, batch, lr, masks or {}, graph=not first_order)
        last = loss(current, batches[steps % len(batches)])
        slopes = probe.gradient(last, free)
    return {
        n: (probe.widened(slopes[n]) * probe.widened(weight)).abs() for n, weight in weights.items()
    }


def _stepped(
    loss: Loss,
    current: dict[str, Tensor],
    batch: Batch,
    lr: float,
    masks: Mapping[str, Tensor],
    *,
    graph: bool,
) -> dict[str, Tensor]:
    slopes = probe.gradient(loss(current, batch), current, create_graph=graph)
    for name, mask in masks.items():
        slopes[name] = slopes[name] * mask.to(slopes[name].device)
    return {name: weight - lr * slopes[name] for name, weight in current.items()}
