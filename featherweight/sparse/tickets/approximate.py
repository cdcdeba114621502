"""Strong lottery tickets by construction: find a target in a random network by masking alone.

Nothing is trained and nothing is redrawn: the ticket's kept parameters are those of the source, bit
for bit. A first layer is thinned until each of its neurons carries one input, or a constant; in the
next layer, subsets of these are chosen that add up to each target weight and bias. ReLU networks
are homogeneous, so the ticket computes the target up to one factor, which is returned.

Sources: E. Malach et al., ICML 2020, arXiv:2002.00585; A. Pensia et al., NeurIPS 2020,
arXiv:2006.07990 (two source layers for one of the target, "2L"); R. Burkholz, "Most Activation
Functions Can Win the Lottery Without Excessive Depth", NeurIPS 2022, arXiv:2205.02321 ("L+1");
J. Fischer, A. Gadhikar and R. Burkholz, arXiv:2110.11150, Theorem 4.2 (biases); A. Gadhikar, S.
Mukherjee and R. Burkholz, ICML 2023, arXiv:2210.02412 (sparse sources). The error bound and the
choice of the output scale are derived here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from featherweight.common import unknown
from featherweight.sparse.masks import Masks
from featherweight.sparse.tickets.basis import Basis, copies, univariate
from featherweight.sparse.tickets.combine import Solver, combine
from featherweight.sparse.tickets.layers import Layer, layers
from featherweight.sparse.tickets.ticket import LayerErrors, Ticket

Construction = Literal["2L", "L+1"]
CONSTRUCTIONS = ("2L", "L+1")


@torch.no_grad()
def approximate(
    target: nn.Sequential,
    source: nn.Sequential,
    construction: Construction = "2L",
    *,
    support: Mapping[str, Tensor] | None = None,
    nonnegative: bool = False,
    tolerance: float | None = None,
    headroom: float = 0.5,
    exact: int = 20,
) -> Ticket:
    """Mask a random network so that it computes the target, up to a factor.

    Args:
        target: Sequential of Linear and ReLU in turn, from a Linear to a Linear, with or without
            biases; zero weights cost nothing.
        source: the same of depth 2 L ("2L") or L + 1, see `source_for`. It is not changed.
        construction: "2L" spends two source layers on each of the target; "L+1" one more in all,
            and builds every hidden neuron in as many copies as there is room for.
        support: parameter name of the source -> bool mask of the edges that exist (a sparse
            source); parameters not named are all there. None: a dense source.
        nonnegative: whether no input is ever negative (pixels): the first layer then takes one
            subset sum for each weight, not two.
        tolerance: take the smallest subset with an error up to this on the target's parameter;
            None: the nearest subset. Smaller tickets against more precise ones.
        headroom: which part of their candidates' reach the targets are scaled to, in (0, 1]:
            smaller values bring all sums into range, larger ones are more precise.
        exact: candidates searched exhaustively, see `subset_sum`.

    Returns:
        The masked network, its masks, the factor, and the error of every parameter.

    Raises:
        ValueError: another form of network, a depth or width that doesn't fit, or a target with
            biases and a source without.
    """
    if construction not in CONSTRUCTIONS:
        raise ValueError(unknown("construction", construction, CONSTRUCTIONS))
    if not 0 < headroom <= 1:
        raise ValueError(f"headroom must lie in (0, 1], got {headroom}")
    wanted, drawn = layers(target), layers(source, "source", support)
    _check(wanted, drawn, construction)
    work = _Work(wanted, drawn, _nothing(drawn), Solver(tolerance, headroom, exact))
    build = _two_layers_each if construction == "2L" else _one_layer_more
    done = build(work, not nonnegative)
    _drop_unused(work)
    return _ticket(target, source, work, done)


class _Work(NamedTuple):
    """Target and source layers, the masks so far by parameter name, and the solver's options."""

    wanted: list[Layer]
    drawn: list[Layer]
    masks: dict[str, Tensor]
    solver: Solver


def _nothing(drawn: Sequence[Layer]) -> dict[str, Tensor]:
    pairs = [(f"{layer.name}.{kind}", value) for layer in drawn for kind, value in layer.parts()]
    return {name: torch.zeros_like(value, dtype=torch.bool) for name, value in pairs}


def _check(wanted: Sequence[Layer], drawn: Sequence[Layer], construction: str) -> None:
    depth = 2 * len(wanted) if construction == "2L" else len(wanted) + 1
    if len(drawn) != depth:
        raise ValueError(f"source must have {depth} linear layers for {construction}: {len(drawn)}")
    ends = [(n[0].weight.shape[1], n[-1].weight.shape[0]) for n in (wanted, drawn)]
    if ends[0] != ends[1]:
        raise ValueError(f"source must have {ends[0]} inputs and outputs, got {ends[1]}")
    biased = [bool(layer.bias.any()) for layer in wanted]
    seconds = drawn[1::2] if construction == "2L" else drawn[1:]
    for index, (target, second) in enumerate(zip(wanted, seconds, strict=True)):
        least = len(target.weight) + (construction == "L+1" and any(biased[index + 1 :]))
        if len(second.weight) < least:
            raise ValueError(
                f"source layer {second.name!r} must have {least} or more neurons, "
                f"got {len(second.weight)}"
            )
    firsts = drawn[::2] if construction == "2L" else drawn[:1]
    needed = biased if construction == "2L" else [any(biased)]
    for first, bias in zip(firsts, needed, strict=True):
        if bias and not (first.bias > 0).any():
            raise ValueError(
                f"target has biases but source layer {first.name!r} has no positive one: networks "
                "without biases are homogeneous, whatever their masks"
            )


def _two_layers_each(work: _Work, signed: bool) -> list[LayerErrors]:
    done: list[LayerErrors] = []
    for index, target in enumerate(work.wanted):
        first, second = work.drawn[2 * index : 2 * index + 2]
        gain = done[-1].gain if done else 1.0
        constant = bool(target.bias.any())
        basis = _first_stage(work, first, target, gain, signed and index == 0, constant)
        done.append(_second_stage(work, second, basis, target.rows(), len(target.weight)))
    return done


def _one_layer_more(work: _Work, signed: bool) -> list[LayerErrors]:
    done: list[LayerErrors] = []
    # Whether a layer passes the constant on: some later layer has a bias.
    passes = [any(bool(t.bias.any()) for t in work.wanted[k:]) for k in range(len(work.wanted))]
    basis = _first_stage(work, work.drawn[0], work.wanted[0], 1.0, signed, passes[0])
    for index, (target, layer) in enumerate(zip(work.wanted, work.drawn[1:], strict=True)):
        rows = target.rows()
        if last := index + 1 == len(work.wanted):
            unit = torch.arange(len(rows))
        else:
            if passes[index + 1]:  # the constant is one more unit: 1 times itself
                rows = torch.cat([rows, torch.eye(rows.shape[1]).double()[-1:]])
            unit = torch.arange(len(layer.weight)) % len(rows)
        done.append(_second_stage(work, layer, basis, rows[unit], len(unit)))
        if not last:
            basis = copies(unit, done[-1].gain, len(rows))
    return done


def _first_stage(
    work: _Work, layer: Layer, target: Layer, gain: float, signed: bool, constant: bool
) -> Basis:
    """Thin a source layer to neurons of one input or none, and keep all of these."""
    inputs = target.weight.shape[1]
    columns = target.weight.any(0)
    constants = len(layer.bias) // (int(columns.sum()) + 1) if constant else 0
    basis = univariate(layer.weight[:, :inputs], layer.bias, gain, columns, signed, constants)
    group, place = basis.gains.nonzero(as_tuple=True)
    neurons, sources = basis.members[group, place], basis.inputs[group]
    read = sources < inputs
    work.masks[f"{layer.name}.weight"][neurons[read], sources[read]] = True
    work.masks[f"{layer.name}.bias"][neurons[~read]] = True
    return basis


def _second_stage(work: _Work, layer: Layer, basis: Basis, rows: Tensor, count: int) -> LayerErrors:
    """Combine what the layer before carries into the first ``count`` rows of a layer."""
    mask, errors = combine(layer.weight[:count], basis, rows, work.solver)
    work.masks[f"{layer.name}.weight"][:count] = mask
    return errors


def _drop_unused(work: _Work) -> None:
    """Mask all that leads only to neurons which nothing reads."""
    for layer, reader in zip(work.drawn[-2::-1], work.drawn[:0:-1], strict=True):
        unread = ~work.masks[f"{reader.name}.weight"].any(0)
        work.masks[f"{layer.name}.weight"][unread] = False
        work.masks[f"{layer.name}.bias"][unread] = False


def _ticket(
    target: nn.Sequential, source: nn.Sequential, work: _Work, done: Sequence[LayerErrors]
) -> Ticket:
    network = copy.deepcopy(source)
    own = dict(network.named_parameters())
    masks = Masks(
        {name: mask.to(own[name].device) for name, mask in work.masks.items() if name in own}
    )
    masks.apply_(network)
    return Ticket(network, masks, 1 / done[-1].gain, tuple(done), copy.deepcopy(target))
