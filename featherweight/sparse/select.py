"""The one selection primitive: keep the highest scores, exactly as many as asked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from featherweight.sparse.density import allocate, kept_counts
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.masks import Masks

Scope = Allocation
"""Where entries compete: "global", "layer" (the same density in each), or any allocation."""


def top_k(scores: Tensor, keep: int, support: Tensor | None = None) -> Tensor:
    """Mark the ``keep`` largest scores.

    Of equal scores the one with the lowest index is kept, on every device.

    Args:
        scores: real tensor of any shape, no NaN; larger is kept first.
        keep: how many, from 0 to the size of the support.
        support: bool, same shape; entries outside are never kept. None: all may be kept.

    Returns:
        Bool tensor of the scores' shape with exactly ``keep`` entries True.

    Raises:
        ValueError: ``keep`` is out of range, or a score is NaN.
    """
    candidates = scores.detach().flatten()
    if support is not None:
        candidates = candidates[support.flatten()]
    if not 0 <= keep <= len(candidates):
        raise ValueError(f"keep must lie in [0, {len(candidates)}], got {keep}")
    if candidates.isnan().any():
        raise ValueError("scores hold NaN")
    chosen = _largest(candidates, keep)
    if support is None:
        return chosen.view(scores.shape)
    mask = torch.zeros_like(support)
    mask[support] = chosen
    return mask


def _largest(values: Tensor, keep: int) -> Tensor:
    if keep == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    # topk picks arbitrarily among ties, so only its threshold is used.
    threshold = values.topk(keep, sorted=False).values.min()
    chosen = values > threshold
    ties = (values == threshold).nonzero().flatten()
    chosen[ties[: keep - int(chosen.sum())]] = True
    return chosen


def select(
    scores: Mapping[str, Tensor],
    density: float,
    scope: Scope = "global",
    *,
    support: Masks | None = None,
    total: int | None = None,
    legacy: bool = False,
) -> Masks:
    """Turn scores into masks of an exact density.

    Args:
        scores: parameter name to scores, in forward order; larger is kept first.
        density: overall kept fraction of all entries, in (0, 1].
        scope: "global": all entries compete; "layer": each layer keeps the same fraction; or an
            allocation (a density rule's name, other masks, densities by layer).
        support: masks that the result must stay inside (sparse-to-sparse); the density still
            counts against all entries.
        total: exact number of entries to keep; None: the rounded share.
        legacy: allocate by the formulas of published code.

    Raises:
        ValueError: bad density or scope, a NaN score (its tensor is named), or a support too small.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density:g}")
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"scores of {name!r} hold NaN")
    if support is not None:
        support.check(scores)
    size = sum(score.numel() for score in scores.values())
    total = round(density * size) if total is None and not legacy else total
    if scope == "global":
        return _select_global(scores, round(density * size) if total is None else total, support)
    shapes = {name: score.shape for name, score in scores.items()}
    rule = "uniform" if scope == "layer" else scope
    densities = allocate(shapes, density, rule, legacy=legacy)
    counts = kept_counts(densities, shapes, total, support)
    return Masks(
        {
            name: top_k(
                score, counts[name], None if support is None else support[name].to(score.device)
            )
            for name, score in scores.items()
        }
    )


def _select_global(scores: Mapping[str, Tensor], keep: int, support: Masks | None) -> Masks:
    device = next(iter(scores.values())).device
    flat = torch.cat([score.detach().flatten().to(device) for score in scores.values()])
    allowed = None
    if support is not None:
        allowed = torch.cat([support[name].flatten().to(device) for name in scores])
        if keep > (room := int(allowed.sum())):
            raise ValueError(f"{keep} weights are to be kept but the support holds {room}")
    parts = top_k(flat, keep, allowed).split([score.numel() for score in scores.values()])
    return Masks(
        {
            name: part.view(score.shape).to(score.device)
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }
    )
