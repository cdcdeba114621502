"""What a pruning must respect: a structure that has room, and units that are not cut off."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from featherweight.sparse.flow import _blocks, _degrees, _modules, _unblock
from featherweight.sparse.masks import Masks
from featherweight.sparse.select import Scope, select
from featherweight.sparse.structure import NM, Structure


def within_structure(masks: Masks, counts: Sequence[int], structure: str | Structure) -> list[int]:
    """Lower the counts of pruned levels to what an N:M structure has room for inside the masks.

    The number of levels stays, so that a loop trains as long as without the structure.

    Raises:
        ValueError: the last level asks for more.
    """
    kind = Structure.parse(structure)
    if not isinstance(kind, NM):
        return list(counts)
    room = sum(
        int(kind.narrow(torch.zeros_like(m, dtype=torch.float), m).sum()) for m in masks.values()
    )
    if room < counts[-1] < counts[0]:
        raise ValueError(
            f"structure {kind} allows {room} of {masks.numel} weights, {counts[-1]} are to be kept"
        )
    return [count if count == counts[0] else min(count, room) for count in counts]


def check_structure(
    masks: Masks, counts: Sequence[int], scope: Scope, structure: str | Structure
) -> None:
    """Refuse before the first training a structure that the first pruning could not follow.

    Raises:
        ValueError: the structure has no room for the first pruned count, or nothing is pruned.
    """
    pruned = [count for count in counts if count < counts[0]]
    if not pruned:
        raise ValueError("structure= needs a pruning, the loop keeps its first masks")
    blank = {name: torch.zeros(mask.shape, device=mask.device) for name, mask in masks.items()}
    share = pruned[0] / masks.numel
    select(blank, share, scope, support=masks, total=pruned[0], structure=structure)


def check_units(
    model: nn.Module, masks: Masks, keep: int, scope: Scope, structure: object | None
) -> None:
    """Refuse a final count in which the best edges of all units might not find room.

    Raises:
        ValueError: the count is too small, or weights compete otherwise than one by one, globally.
    """
    if scope != "global" or structure is not None:
        raise ValueError("keep_units=True needs scope='global' and structure=None")
    modules = _modules(model, masks)
    ends = sum(
        int((degree > 0).sum())
        for name in masks
        for degree in _degrees(_blocks(masks[name], modules[name]))
    )
    if keep < ends:
        raise ValueError(
            f"keep_units=True may have to keep {ends} edges, the density leaves {keep}"
        )


def keep_units_(scores: dict[str, Tensor], masks: Masks, model: nn.Module) -> None:
    """Raise the score of each unit's best kept in-edge and out-edge to infinity, in place.

    Args:
        scores: parameter name to scores; replaced entry by entry.
        masks: edges outside them don't count.
        model: for groups and transposed convolutions; not touched.
    """
    for name, module in _modules(model, masks).items():
        if scores[name].isnan().any():
            return  # for the selection to refuse
        mask = masks[name].to(scores[name].device)
        best = _unblock(_best_edges(scores[name], mask, module), mask, module)
        scores[name] = scores[name].masked_fill(best, torch.inf)


def _best_edges(scores: Tensor, mask: Tensor, module: nn.Module) -> Tensor:
    """Mark, as [groups, outputs, inputs, kernel], the best edge of every unit.

    Where a unit has none, that is some entry outside the masks, which selection never keeps.
    """
    ranked = _blocks(scores.masked_fill(~mask, -torch.inf), module)
    best = torch.zeros_like(ranked, dtype=torch.bool)
    for units in (1, 2):
        rows = ranked.movedim(units, 1).flatten(2)
        marks = torch.zeros_like(rows, dtype=torch.bool)
        marks.scatter_(2, rows.argmax(2, keepdim=True), True)
        shape = ranked.movedim(units, 1).shape
        best |= marks.view(shape).movedim(1, units)
    return best
