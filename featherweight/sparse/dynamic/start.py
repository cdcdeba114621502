"""The masks that a training begins with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from featherweight.common import Generator, prunable_weights
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.masks import Masks
from featherweight.sparse.prune import random


def start_random(
    model: nn.Module,
    density: float | None,
    allocation: Allocation,
    *,
    sparsity: float | None,
    masks: Masks | None,
    support: Masks | None,
    generator: Generator | None,
    include: Iterable[str] | None,
    exclude: Iterable[str],
) -> Masks:
    """Return the given masks, or else random ones.

    Raises:
        ValueError: masks and a density were given, the masks leave the support, or random masks
            can't be drawn.
    """
    if masks is None:
        return random(
            model,
            density,
            allocation,
            sparsity=sparsity,
            support=support,
            generator=generator,
            include=include,
            exclude=exclude,
        )
    if not (density is None and sparsity is None):
        raise ValueError("give either masks= or a density, not both: masks have their own")
    return checked(masks, model, support)


def start_dense(
    model: nn.Module,
    *,
    masks: Masks | None,
    support: Masks | None,
    include: Iterable[str] | None,
    exclude: Iterable[str],
) -> Masks:
    """Return the given masks, or else the support, or else everything.

    Raises:
        ValueError: the masks leave the support, or either does not fit the model.
    """
    weights = prunable_weights(model, include, exclude)
    if masks is not None:
        return checked(masks, model, support)
    if support is not None:
        support.check(weights)
        return support
    # Not Masks.dense, whose masks of sharded weights are sharded.
    return Masks(
        {n: torch.ones(w.shape, dtype=torch.bool, device=w.device) for n, w in weights.items()}
    )


def checked(masks: Masks, model: nn.Module, support: Masks | None) -> Masks:
    """Return the masks if they fit the model and lie within the support.

    Raises:
        ValueError: they don't.
    """
    masks.check(model)
    if support is not None and not masks <= support:
        raise ValueError("masks= keep entries outside support=")
    return masks


def target(density: float, start: Masks) -> int:
    """Return how many entries a final density keeps.

    Raises:
        ValueError: none, or more than the start masks.
    """
    total = round(density * start.numel)
    if not 1 <= total <= start.nonzeros:
        raise ValueError(
            f"density {density:g} keeps {total} of {start.numel} weights, the start masks "
            f"{start.nonzeros}; it must keep at least 1 and no more than they"
        )
    return total
