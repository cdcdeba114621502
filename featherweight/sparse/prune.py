"""The everyday calls: masks of a model in one line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from featherweight.common import Generator, as_generator, kept_density, prunable_weights
from featherweight.sparse.criteria import score
from featherweight.sparse.density import allocate, kept_counts
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.masks import Masks
from featherweight.sparse.select import Scope, select

Sampling = Literal["exact", "bernoulli"]


def random(
    model: nn.Module,
    density: float | None = None,
    allocation: Allocation = "erk",
    *,
    sparsity: float | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    sampling: Sampling = "exact",
    support: Masks | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    legacy: bool = False,
) -> Masks:
    """Draw random masks, the same for the same seed on every device.

    Args:
        model: its weights are not touched.
        density: overall kept fraction, in (0, 1]; or give ``sparsity``.
        allocation: density rule, other masks, densities by layer, or "global" for no rule: any
            set of entries is equally likely.
        sparsity: ``1 - density``.
        seed, generator: exactly one of the two.
        sampling: "exact" keeps exactly the allocated number of each layer; "bernoulli" keeps each
            entry on its own with its layer's density, so that counts fluctuate.
        support: masks that the result must stay inside.
        include, exclude: shell-style parameter name patterns.
        legacy: allocate by the formulas of published code, which can miss the density.

    Raises:
        ValueError: a bad argument, or a model without prunable weights.

    Source: Gadhikar, Mukherjee & Burkholz 2023, arXiv:2210.02412.
    """
    density = kept_density(density, sparsity)
    generator = as_generator(seed, generator)
    weights = prunable_weights(model, include, exclude)
    if sampling == "exact":
        scores = score("random", weights, generator=generator)
        return select(scores, density, allocation, support=support, legacy=legacy)
    if sampling != "bernoulli":
        raise ValueError(f"sampling must be 'exact' or 'bernoulli', got {sampling!r}")
    return _bernoulli(weights, density, allocation, generator, support, legacy)


def _bernoulli(
    weights: dict[str, nn.Parameter],
    density: float,
    allocation: Allocation,
    generator: Generator,
    support: Masks | None,
    legacy: bool,
) -> Masks:
    shapes = {name: weight.shape for name, weight in weights.items()}
    densities = allocate(
        shapes, density, "uniform" if allocation == "global" else allocation, legacy=legacy
    )
    if support is not None:
        support.check(weights)
        counts = kept_counts(densities, shapes, support=support)
        densities = {n: counts[n] / max(1, int(support[n].sum())) for n in weights}
    masks = {}
    for name, weight in weights.items():
        draw = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        masks[name] = (draw < densities[name]).to(weight.device)
    drawn = Masks(masks)
    return drawn if support is None else drawn & support


def magnitude(
    model: nn.Module,
    density: float | None = None,
    scope: Scope = "global",
    *,
    sparsity: float | None = None,
    support: Masks | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Masks:
    """Keep the weights of largest absolute value.

    At initialisation with layers of different fan-in, scope "global" empties the wide layers; use
    it on trained models.

    Args:
        model: its weights are not touched.
        density: overall kept fraction, in (0, 1]; or give ``sparsity``.
        scope: "global", "layer", or an allocation.
        sparsity: ``1 - density``.
        support: masks that the result must stay inside.
        include, exclude: shell-style parameter name patterns.

    Raises:
        ValueError: a bad argument, weights that are not finite, or no prunable weights.
    """
    return prune(
        model,
        "magnitude",
        density,
        scope,
        sparsity=sparsity,
        support=support,
        include=include,
        exclude=exclude,
    )


def prune(
    model: nn.Module,
    criterion: str,
    density: float | None = None,
    scope: Scope = "global",
    *,
    sparsity: float | None = None,
    support: Masks | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    **needs: Any,
) -> Masks:
    """Keep what any registered criterion scores highest.

    Args:
        model: its weights are not touched.
        criterion: a name of `featherweight.sparse.CRITERIA`.
        density: overall kept fraction, in (0, 1]; or give ``sparsity``.
        scope: "global", "layer", or an allocation.
        sparsity: ``1 - density``.
        support: masks that the result must stay inside.
        include, exclude: shell-style parameter name patterns.
        needs: what else the criterion's registry row asks for, such as ``generator=``.

    Raises:
        ValueError: a bad argument, weights that are not finite, or no prunable weights.
    """
    density = kept_density(density, sparsity)
    scores = score(criterion, prunable_weights(model, include, exclude), model=model, **needs)
    return select(scores, density, scope, support=support)
