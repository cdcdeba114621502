"""When NanoAdam chooses its weights anew, how many, and what becomes of the moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.optim import compact
from featherweight.optim.compact import Entry
from featherweight.optim.selection import smallest


def density_at(group: Mapping[str, Any], step: int) -> float:
    """Return the density in force after ``step`` updates.

    Args:
        group: with "density", "final_density", "total_steps" and "density_interval".
        step: updates done.

    Source: Zhou et al. 2025, arXiv:2506.21374, Algorithm 1 and its linear schedule.
    """
    start, end = float(group["density"]), group["final_density"]
    if end is None:
        return start
    evaluated: int = step // group["density_interval"] * group["density_interval"]
    done = min(1.0, evaluated / int(group["total_steps"]))
    return start + (float(end) - start) * done


def is_due(group: Mapping[str, Any], step: int) -> bool:
    """Tell whether the mask is refreshed before the update that follows ``step`` updates."""
    by_density = group["final_density"] is not None and step % group["density_interval"] == 0
    return step % int(group["mask_interval"]) == 0 or bool(by_density)


@torch.no_grad()
def refresh(
    state: Entry, weights: Tensor, order: list[int], group: Mapping[str, Any], step: int
) -> None:
    """Select anew and carry or reset the moments, in ``state``.

    Args:
        state: compact state of one tensor; nothing but "step" at first.
        weights: flat, its dimensions taken in ``order``.
        group: the options.
        step: updates done.
    """
    kind = group["state_dtype"] or torch.promote_types(weights.dtype, torch.float32)
    chunk = group["chunk"]
    new = smallest(weights, density_at(group, step), chunk, group["skip_zeros"])
    stored = compact.encode(new, len(weights), chunk)
    if group["on_refresh"] == "carry" and len(state.get("index", ())):
        old = compact.decode(state)
        oldest = compact.horizon(group["betas"], torch.promote_types(kind, torch.float32))
        moments = compact.carry(state, old, new, len(weights), step, oldest)
    else:
        moments = compact.fresh(new, step, kind)
    _forget_chunks(state)
    state.update({**stored, **moments, "order": torch.tensor(order)})


@torch.no_grad()
def follow_layout(state: Entry, shape: torch.Size, order: list[int]) -> None:
    """Renumber the selected entries of a tensor whose memory format has changed.

    The mask stays as it is; chunks of the new format come with the next refresh.

    Args:
        state: compact state, changed.
        shape: of the tensor.
        order: its dimensions as they lie in memory now.
    """
    index = compact.decode(state)
    before = state["order"].tolist()
    numbers = torch.arange(shape.numel(), device=index.device)
    moved = numbers.view([shape[d] for d in before])
    moved = moved.permute([before.index(d) for d in order]).reshape(-1)
    place = torch.empty_like(numbers)
    place[moved] = numbers
    new, rank = place[index.long()].sort()
    for key in ("exp_avg", "exp_avg_sq", *(["born"] if len(state["born"]) else [])):
        state[key] = state[key][rank]
    _forget_chunks(state)
    state.update(compact.encode(new, shape.numel(), None), order=torch.tensor(order))


def _forget_chunks(state: Entry) -> None:
    state.pop("offsets", None)
    state.pop("chunk", None)
