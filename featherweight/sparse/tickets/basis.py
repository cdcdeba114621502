"""What the neurons of a source layer carry: the numbers that subset sums are made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Basis(NamedTuple):
    """Groups of neurons that carry multiples of the same signal.

    With target inputs x_0, ..., x_{n-1}, a group carries ``relu(x_i)``, ``relu(-x_i)`` or 1.

    Attributes:
        inputs: long (groups,), the i of each group; n for the constant.
        members: long (groups, size), its neurons; rows are filled up with 0.
        gains: float64 (groups, size), what the signal is multiplied by; 0 in the filling. The gain
            on ``relu(-x_i)`` is negative: that of the weight on x_i it stands for.
        copies: whether members have errors of their own; else they have that of the signal.
    """

    inputs: Tensor
    members: Tensor
    gains: Tensor
    copies: bool


def univariate(
    weight: Tensor, bias: Tensor, gain: float, columns: Tensor, signed: bool, constants: int
) -> Basis:
    """Let each neuron of a layer read one input, or none and be its bias.

    Neurons with large positive biases become constants. The others go, in turn, to the input that
    has fewest so far among those with a useful edge, and there to the largest weight.

    Args:
        weight: float64 (neurons, inputs); zero where there is no edge.
        bias: float64 (neurons,).
        gain: what the network's inputs to this layer are, in units of the target's.
        columns: bool (inputs,), which inputs the target reads.
        signed: whether inputs can be negative: then negative weights serve ``relu(-x)``. Else they
            are useless.
        constants: number of neurons that are to be constants.
    """
    n = weight.shape[1]
    ranked = bias.argsort(descending=True, stable=True)[:constants]
    constant = ranked[bias[ranked] > 0]
    free = torch.ones(len(bias), dtype=torch.bool)
    free[constant] = False
    readers = free.nonzero().flatten()
    edges = torch.where(columns, weight[readers], 0)
    choice = _share_out(edges, signed)
    served = choice >= 0
    readers, choice = readers[served], choice[served]
    taken = weight[readers, choice] * gain
    # Groups of the positive parts, then of the negative parts, then the constant.
    place = torch.cat([choice + n * (taken < 0), torch.full_like(constant, 2 * n)])
    neurons, gains = torch.cat([readers, constant]), torch.cat([taken, bias[constant]])
    inputs = torch.cat([torch.arange(n), torch.arange(n), torch.tensor([n])])
    present = torch.cat([columns, columns & signed, torch.tensor([constants > 0])])
    return _grouped(place, neurons, gains, inputs, present)


def copies(rows: Tensor, gain: float, units: int) -> Basis:
    """Group neurons by the target neuron that each is a copy of; unit ``units - 1`` may be 1."""
    neurons = torch.arange(len(rows))
    gains = torch.full((len(rows),), gain, dtype=torch.float64)
    present = torch.ones(units, dtype=torch.bool)
    basis = _grouped(rows, neurons, gains, torch.arange(units), present)
    return basis._replace(copies=True)


def _share_out(edges: Tensor, signed: bool) -> Tensor:
    """Return the input that each neuron reads, -1 where it has no useful edge."""
    useful = edges != 0 if signed else edges > 0
    negative = edges < 0
    # How attractive an edge is, less than one neuron's worth; infinitely bad where it is useless.
    cost = -edges.abs() / edges.abs().amax().clamp(min=1e-300) / 2 if edges.numel() else edges
    cost = cost.masked_fill(~useful, torch.inf)
    counts = edges.new_zeros(2, edges.shape[1])
    choice = torch.full((len(edges),), -1)
    for k in useful.any(1).nonzero().flatten().tolist():
        best = int((torch.where(negative[k], counts[1], counts[0]) + cost[k]).argmin())
        choice[k] = best
        counts[int(negative[k, best]), best] += 1
    return choice


def _grouped(
    place: Tensor, neurons: Tensor, gains: Tensor, inputs: Tensor, present: Tensor
) -> Basis:
    """Lay neurons out by the group that each belongs to."""
    order = place.argsort(stable=True)
    counts = place.bincount(minlength=len(inputs))
    starts = counts.cumsum(0) - counts
    column = torch.arange(len(place)) - starts[place[order]]
    shape = (len(inputs), int(counts.max()) if len(place) else 0)
    members = torch.zeros(shape, dtype=torch.long)
    table = torch.zeros(shape, dtype=torch.float64)
    members[place[order], column] = neurons[order]
    table[place[order], column] = gains[order]
    return Basis(inputs[present], members[present], table[present], copies=False)
