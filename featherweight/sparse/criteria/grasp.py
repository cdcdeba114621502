"""GraSP: a weight is worth what the gradient's norm would lose if it were cut off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from featherweight.sparse.criteria import probe
from featherweight.sparse.criteria.probe import Batch, Objective
from featherweight.sparse.criteria.registry import CRITERIA, Scores


@CRITERIA.register(
    "grasp",
    "weight times Hessian times gradient: what keeps the gradient flowing",
    "Wang, Zhang & Grosse 2020, arXiv:2002.07376",
    needs=["model", "batches"],
)
def grasp(
    weights: Mapping[str, Tensor],
    *,
    model: nn.Module,
    batches: Sequence[Batch],
    objective: Objective = cross_entropy,
    temperature: float = 200.0,
    masks: Mapping[str, Tensor] | None = None,
) -> Scores:
    """Score every weight by ``w * (H g)``, with its sign: the largest are kept.

    ``g`` and ``H`` are gradient and Hessian of the mean loss by the given weights. Cutting off
    weight i changes ``|g|^2`` by ``-2 w_i (H g)_i`` to first order, so a large score marks a weight
    that the gradient flow needs and a negative one a weight that hinders it. Norms use batch
    statistics; dropout is off.

    Args:
        weights: parameter name to weight, of the model; used in the place of its own.
        model: is not touched; must be twice differentiable.
        batches: pairs of inputs [B, ...] and targets [B], by default of classes in equal numbers,
            ten of each; each is run in two halves, which bounds memory.
        objective: from logits and targets to the mean loss.
        temperature: logits are divided by it; over 0, 1 is neutral.
        masks: which weights exist, by name; the gradient of the others does not count. None: all.

    Returns:
        Scores of the weights' shapes, at least float32, of both signs.

    Raises:
        TypeError: batches are no list of pairs of tensors, or the model returns no logits.
        ValueError: there is no batch, or the temperature is not positive.

    Source: Wang, Zhang & Grosse 2020, arXiv:2002.07376, algorithm 1, on the weights as they are.
    """
    probe.check_batches(batches)
    if not temperature > 0:
        raise ValueError(f"temperature must be over 0, got {temperature:g}")
    free = probe.leaves(weights)
    halves = [half for batch in batches for half in _halves(batch)]
    # Fused attention has no second derivative.
    with probe.quiet(model, batch_statistics=True) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = probe.loss_of(forward, lambda logits, t: objective(logits / temperature, t))
        slopes = probe.mean_gradient(lambda batch: loss(free, batch), free, halves)
        for name, mask in (masks or {}).items():
            slopes[name].mul_(mask.to(slopes[name].device))

        def along(batch: Batch) -> Tensor:
            local = probe.gradient(loss(free, batch), free, create_graph=True)
            products = [(slopes[name] * part).sum() for name, part in local.items()]
            return torch.stack([p.to(products[0].device) for p in products]).sum()

        curvature = probe.mean_gradient(along, free, halves)
    return {n: curvature[n] * probe.widened(weight) for n, weight in weights.items()}


def _halves(batch: Batch) -> list[Batch]:
    inputs, targets = batch
    return list(zip(inputs.chunk(2), targets.chunk(2), strict=True))
