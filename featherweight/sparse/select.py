"""The one selection primitive: keep the highest scores, exactly as many as asked."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from featherweight.sparse.density import allocate, kept_counts
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.kth_largest import kth_largest
from featherweight.sparse.masks import Masks
from featherweight.sparse.structure import NM, Structure, Whole

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
    values = scores.detach()
    room = values.numel() if support is None else int(support.count_nonzero())
    if not 0 <= keep <= room:
        raise ValueError(f"keep must lie in [0, {room}], got {keep}")
    if support is None or room == values.numel():
        return _largest(values, keep)
    if room < FEW * values.numel():
        places = support.flatten().nonzero().squeeze(1)
        mask = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
        mask[places[_largest(values.flatten()[places], keep)]] = True
        return mask.view(values.shape)
    return _largest(values.where(support, _least(values.dtype)), keep, support)


FEW = 1 / 4
"""Share of the entries; of fewer it pays to gather them."""


def _largest(values: Tensor, keep: int, support: Tensor | None = None) -> Tensor:
    """Mark the largest; values outside the support must be the least that there are."""
    if values.numel() and values.amax().isnan():
        raise ValueError("scores hold NaN")
    if keep == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    threshold = kth_largest(values.flatten(), keep)
    chosen = values >= threshold
    if support is not None:
        chosen &= support
    surplus = int(chosen.count_nonzero()) - keep
    if surplus:
        ties = (chosen & (values == threshold)).nonzero()
        chosen[ties[-surplus:].unbind(1)] = False
    return chosen


def _least(dtype: torch.dtype) -> float | int:
    return -math.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def select(
    scores: Mapping[str, Tensor],
    density: float,
    scope: Scope = "global",
    *,
    support: Masks | None = None,
    total: int | None = None,
    legacy: bool = False,
    structure: str | Structure | None = None,
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
        structure: None: any set of entries; "N:M": exact too, at densities up to N/M; "RxC" blocks
            or "channel": whole groups of the highest mean score, in that order, up to the last
            that does not take the count (of all entries, or of its layer, as the scope says)
            beyond what is asked. Inside a support a group is what the support leaves of it.

    Raises:
        ValueError: bad density, scope or structure, a NaN score (its tensor is named), or a support
            or N:M too small for the count.
    """
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density:g}")
    kind = None if structure is None else Structure.parse(structure)
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"scores of {name!r} hold NaN")
    if support is not None:
        support.check(scores)
        support = Masks({n: support[n].to(score.device) for n, score in scores.items()})
    size = sum(score.numel() for score in scores.values())
    wanted = round(density * size) if total is None else total
    if isinstance(kind, NM):
        support = _narrowed(scores, kind, support, wanted)
    groups = kind if isinstance(kind, Whole) else None
    if scope == "global":
        return _together(scores, wanted, support, groups)
    shapes = {name: score.shape for name, score in scores.items()}
    rule = "uniform" if scope == "layer" else scope
    densities = allocate(shapes, density, rule, legacy=legacy)
    counts = kept_counts(densities, shapes, total if legacy else wanted, support)
    layers = {
        name: _together(
            {name: score},
            counts[name],
            None if support is None else Masks({name: support[name]}),
            groups,
        )[name]
        for name, score in scores.items()
    }
    return Masks(layers)


def _narrowed(scores: Mapping[str, Tensor], kind: NM, support: Masks | None, wanted: int) -> Masks:
    """Return the entries that N:M leaves to choose from."""
    room = Masks(
        {n: kind.narrow(s, None if support is None else support[n]) for n, s in scores.items()}
    )
    if wanted > room.nonzeros:
        where = "" if support is None else " inside the support"
        raise ValueError(
            f"structure {kind} allows {room.nonzeros} of {room.numel} weights{where}, "
            f"{wanted} are to be kept"
        )
    return room


def _together(
    scores: Mapping[str, Tensor], keep: int, support: Masks | None, groups: Whole | None
) -> Masks:
    """Let all entries, or all groups, of these tensors compete."""
    if support is not None and keep > support.nonzeros:
        raise ValueError(f"{keep} weights are to be kept but the support holds {support.nonzeros}")
    if groups is not None:
        return _whole_groups(scores, keep, support, groups)
    flat = _joined(scores)
    allowed = None if support is None else _joined(support)
    parts = top_k(flat, keep, allowed).split([score.numel() for score in scores.values()])
    return Masks(
        {
            name: part.view(score.shape).to(score.device)
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }
    )


def _whole_groups(
    scores: Mapping[str, Tensor], keep: int, support: Masks | None, groups: Whole
) -> Masks:
    """Keep groups in the order of their worth as long as the next one fits."""
    inside = {name: None if support is None else support[name] for name in scores}
    rated = {name: groups.worth(score, inside[name]) for name, score in scores.items()}
    worth = _joined({name: worth for name, (worth, _) in rated.items()})
    sizes = _joined({name: sizes for name, (_, sizes) in rated.items()})
    order = worth.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(worth, dtype=torch.bool)
    chosen[order] = sizes[order].cumsum(0) <= keep
    parts = chosen.split([len(worth) for worth, _ in rated.values()])
    return Masks(
        {
            name: groups.expand(part.to(score.device), score.shape, inside[name])
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }
    )


def _joined(tensors: Mapping[str, Tensor]) -> Tensor:
    device = next(iter(tensors.values())).device
    return torch.cat([tensor.detach().flatten().to(device) for tensor in tensors.values()])
