"""The everyday calls: masks of a model in one line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, kept_density, prunable_weights
from featherweight.sparse.criteria import CRITERIA, score
from featherweight.sparse.criteria.registry import check_arguments
from featherweight.sparse.density import allocate, kept_counts
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.masks import Masks
from featherweight.sparse.select import Scope, select
from featherweight.sparse.structure import Structure

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
    structure: str | Structure | None = None,
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
        structure: which patterns may be kept, as for `featherweight.sparse.select`; for exact
            sampling alone.
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
        return select(
            scores, density, allocation, support=support, legacy=legacy, structure=structure
        )
    if sampling != "bernoulli":
        raise ValueError(f"sampling must be 'exact' or 'bernoulli', got {sampling!r}")
    if structure is not None:
        raise ValueError(f"structure={structure!r} needs sampling='exact', got 'bernoulli'")
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
    structure: str | Structure | None = None,
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
        structure: which patterns may be kept, as for `featherweight.sparse.select`.
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
        structure=structure,
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
    iterations: int | None = None,
    support: Masks | None = None,
    structure: str | Structure | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    **needs: Any,
) -> Masks:
    """Keep what any registered criterion scores highest.

    Criteria that look at data take it as a list of batches::

        masks = sparse.prune(model, "snip", 0.05, batches=[(images, labels)])

    Args:
        model: its weights are not touched.
        criterion: a name of `featherweight.sparse.CRITERIA`.
        density: overall kept fraction, in (0, 1]; or give ``sparsity``.
        scope: "global", "layer", or an allocation.
        sparsity: ``1 - density``.
        iterations: rounds of scoring what is left and removing some of it; after round t of T the
            density is ``density ** (t / T)``, or where a support or a structure allows a density
            of s at most, ``s * (density / s) ** (t / T)``. 1 is pruning in one shot; None: what
            the criterion's registry row says, else 1.
        support: masks that the result must stay inside; only what they keep is scored.
        structure: which patterns may be kept, as for `featherweight.sparse.select`.
        include, exclude: shell-style parameter name patterns.
        needs: what else the criterion needs, such as ``generator=`` or ``batches=``, and its
            options.

    Raises:
        ValueError: a bad argument, weights or scores that are not finite, or no prunable weights.
    """
    density = kept_density(density, sparsity)
    rounds = CRITERIA[criterion].defaults.get("iterations", 1) if iterations is None else iterations
    if rounds < 1:
        raise ValueError(f"iterations must be at least 1, got {rounds}")
    if "masks" in needs:
        raise ValueError("prune() takes masks to stay inside as support=, got masks=")
    check_arguments(criterion, needs)
    weights = prunable_weights(model, include, exclude)
    if support is not None:
        support.check(weights)
    size = sum(weight.numel() for weight in weights.values())
    masks, most = support, size
    for share in _shares(density, rounds, _start(support, structure)):
        scores = score(criterion, _effective(weights, masks), model=model, masks=masks, **needs)
        total = min(round(share * size), most)
        masks = select(scores, share, scope, support=masks, total=total, structure=structure)
        most = masks.nonzeros  # whole groups can leave fewer than the next round asks for
    assert masks is not None
    return masks


def _start(support: Masks | None, structure: str | Structure | None) -> float:
    """Return the density that a schedule falls from."""
    allowed = 1.0 if structure is None else Structure.parse(structure).max_density
    return min(allowed, 1.0 if support is None else support.density)


def _shares(density: float, rounds: int, start: float) -> Iterator[float]:
    for step in range(1, rounds if start > density else 1):
        yield start * (density / start) ** (step / rounds)
    yield density


def _effective(weights: Mapping[str, Tensor], masks: Masks | None) -> Mapping[str, Tensor]:
    if masks is None:
        return weights
    return {name: w.detach() * masks[name].to(w.device) for name, w in weights.items()}
