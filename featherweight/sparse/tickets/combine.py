"""One layer of a construction: target rows as subset sums of what the layer before carries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from featherweight.sparse.tickets.basis import Basis
from featherweight.sparse.tickets.subset_sum import subset_sum
from featherweight.sparse.tickets.ticket import LayerErrors

ENTRIES = 2**22  # candidates in work at a time
OUTLIER = 4.0  # how far the worst reach may be below that of the rest and still set the scale


class Solver(NamedTuple):
    """Options of the subset sums, see `featherweight.sparse.tickets.approximate`."""

    tolerance: float | None
    headroom: float
    exact: int


def combine(
    weight: Tensor, basis: Basis, wanted: Tensor, solver: Solver
) -> tuple[Tensor, LayerErrors]:
    """Choose in each row of a source layer the weights whose sums are the wanted numbers.

    Args:
        weight: float64 (R, neurons) of the source, zero where there is no edge.
        basis: what the neurons carry.
        wanted: float64 (R, n + 1), target weights and bias of each row.
        solver: options.

    Returns:
        The kept second weights, bool (R, neurons), and how well the rows came out.
    """
    goals = wanted[:, basis.inputs]
    parts = max(1, ENTRIES // max(1, basis.gains.numel()))
    blocks = list(zip(weight.split(parts), goals.split(parts), strict=True))
    reach = torch.cat([_reach(_candidates(w, basis), g) for w, g in blocks])
    gain = _gain(reach, goals, solver.headroom)
    masks, errors, spreads = zip(
        *(_solve(w, basis, g, gain, solver) for w, g in blocks), strict=True
    )
    index = basis.inputs.expand(len(goals), -1)
    error = wanted.abs().scatter_reduce(1, index, torch.cat(errors), "amax", include_self=False)
    size = torch.zeros_like(wanted).scatter_reduce(1, index, torch.cat(spreads), "amax")
    if not basis.copies:
        size = wanted.abs() + error
        size[:, -1] = 0  # the constant is exact
    missed = (reach < gain * goals.abs()) & (goals != 0)
    counts = int((goals != 0).sum()), int(missed.sum())
    return torch.cat(masks), LayerErrors(error, size, gain, *counts)


def _candidates(weight: Tensor, basis: Basis) -> Tensor:
    """Return (R, groups, size): a neuron's second weight times what it carries."""
    return weight[:, basis.members] * basis.gains


def _reach(candidates: Tensor, goals: Tensor) -> Tensor:
    """Return how far the candidates of the goal's sign reach; float64 (R, groups)."""
    return (candidates * goals.sign()[..., None]).clamp(min=0).sum(-1)


def _gain(reach: Tensor, goals: Tensor, headroom: float) -> float:
    """Return the output scale at which goals lie within a part of their candidates' reach."""
    ratios = (reach / goals.abs())[(goals != 0) & (reach > 0)]
    if not len(ratios):
        return 1.0
    # The worst goal decides, unless it is so bad that all others would lose precision by it.
    typical = float(ratios.kthvalue(1 + len(ratios) // 200).values)
    return headroom * max(float(ratios.min()), typical / OUTLIER)


def _solve(
    weight: Tensor, basis: Basis, goals: Tensor, gain: float, solver: Solver
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mask (R, neurons), errors and spreads (R, groups) of some rows."""
    row, group = goals.nonzero(as_tuple=True)
    members = basis.members[group]
    candidates = weight[row[:, None], members] * basis.gains[group]
    tolerance = None if solver.tolerance is None else solver.tolerance * gain
    found = subset_sum(
        candidates, gain * goals[row, group], tolerance=tolerance, exact=solver.exact
    )
    mask = torch.zeros_like(weight, dtype=torch.bool)
    kept = found.masks.nonzero(as_tuple=True)
    mask[row[kept[0]], members[kept]] = True
    errors, spreads = torch.zeros_like(goals), torch.zeros_like(goals)
    errors[row, group] = found.errors / gain
    spreads[row, group] = (candidates.abs() * found.masks).sum(1) / gain
    return mask, errors, spreads
