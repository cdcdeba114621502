"""PHEW: the union of random walks through the network that prefer large weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, kept_density, prunable_weights, unwrap
from featherweight.sparse.constructions.graph import unit_graph, walkable, weight_layers
from featherweight.sparse.constructions.registry import CONSTRUCTIONS
from featherweight.sparse.constructions.union import fill
from featherweight.sparse.constructions.walks import Walks
from featherweight.sparse.masks import Masks

PAPER = "Patil and Dovrolis 2021, arXiv:2010.11354"


@CONSTRUCTIONS.register("phew", "random walks that prefer large weights", PAPER, needs=("inputs",))
def phew(
    model: nn.Module,
    density: float | None = None,
    *,
    inputs: Tensor,
    sparsity: float | None = None,
    support: Masks | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Masks:
    """Keep what random walks between inputs and outputs pass, needing the weights but no data.

    Walks start in turn at the input units, in forward order, and at the output units, backwards.
    At each unit the next entry is drawn with a probability proportional to its absolute value, over
    all units and kernel positions it may lead to; where several layers read or feed a unit (a
    residual branch), one of them is drawn first, all being equally likely. Walks are taken whole:
    one that would go beyond the count is passed over, and where none fits the last ones are taken
    back, so that the count is exact and every kept entry lies on a path from input to output.
    Layers left out by ``exclude`` are walked through but not masked.

    Args:
        model: not touched. Needs a forward pass in which a unit reads at most one unit of each
            layer before it, as sums, norms, pooling, flattening and activations with f(0) = 0 do;
            attention does not.
        density: overall kept fraction, in (0, 1]; or give ``sparsity``. Close to all there is to
            walk on, the last small weights take very many walks.
        inputs: example batch; only its shape, dtype and device matter.
        sparsity: ``1 - density``.
        support: masks that the result must stay inside.
        seed, generator: exactly one of the two.
        include, exclude: shell-style parameter name patterns.

    Raises:
        ValueError: a bad argument, a model whose paths can't be followed, weights that are not
            finite, or fewer nonzero entries on paths than are to be kept.

    Source: Patil and Dovrolis 2021, arXiv:2010.11354.
    """
    density = kept_density(density, sparsity)
    generator = as_generator(seed, generator)
    weights = prunable_weights(model, include, exclude)
    keep = round(density * sum(weight.numel() for weight in weights.values()))
    allowed = _nonzero(model, weights, support)
    layers = weight_layers(unwrap(model))
    calls = unit_graph(model, inputs)
    live = walkable(model, inputs, allowed, weights)
    room = sum(int(live[name].sum()) for name in weights)
    if keep > room:
        raise ValueError(f"{keep} weights are to be kept but only {room} lie on a path")
    if keep == room:
        return Masks({name: live[name] for name in weights})
    mass = {name: mask * layers[name].weight.detach().abs() for name, mask in live.items()}
    walks = Walks(calls, mass, weights, generator)
    empty = Masks({name: torch.zeros_like(live[name]) for name in weights})
    return fill(empty, keep, walks, model, inputs)


def _nonzero(
    model: nn.Module, weights: Mapping[str, Tensor], support: Masks | None
) -> dict[str, Tensor]:
    """Return where walks may go: nonzero weights of all layers, masked ones inside the support."""
    walked = {name: layer.weight for name, layer in weight_layers(unwrap(model)).items()}
    for name, weight in walked.items():
        if not weight.isfinite().all():
            raise ValueError(f"weights of {name!r} hold NaN or infinity")
    allowed = {name: weight.detach() != 0 for name, weight in walked.items()}
    if support is not None:
        support.check(weights)
        allowed |= {n: allowed[n] & support[n].to(allowed[n].device) for n in support}
    return allowed
