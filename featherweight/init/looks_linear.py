"""Looks-linear initialisation of plain ReLU networks, with zero or with nonzero biases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, unknown
from featherweight.init.gaussians import gaussian, neutralise
from featherweight.init.pairs import (
    Head,
    Odd,
    after,
    check_options,
    plan_between,
    plan_first,
    plan_head,
    plan_plain,
)
from featherweight.init.plan import Plan, Report
from featherweight.init.registry import INITS
from featherweight.init.structure import Block, Network, read

Biases = Literal["independent", "dependent"]
BIASES = ("independent", "dependent")


@INITS.register(
    "looks-linear",
    "plain ReLU networks as exact linear isometries",
    "Balduzzi et al. 2017, arXiv:1702.08591",
)
def looks_linear_(
    model: nn.Module,
    *,
    head: Head = "looks_linear",
    odd: Odd = "raise",
    example: Tensor | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Report:
    """Start a plain ReLU network (no residual sums) as a linear isometry, biases zero.

    First layer ``[U; -U]``, then ``[[U, -U], [-U, U]]``, last layer ``[U, -U]``, with random
    semi-orthogonal U; in the middle of the kernels of convolutions.

    Args:
        model: changed in place: all of it, or nothing if it is refused.
        head, odd, example: as in `risotto_`.
        seed, generator: exactly one of the two.

    Raises:
        ValueError: a bad argument, or a model that is built otherwise, residual ones included:
            across a sum, layers that each look linear are no isometry; `risotto_` is.

    Source: Balduzzi et al. 2017, arXiv:1702.08591, section 4.1; for convolutions with the kernels
        of Xiao et al. 2018, arXiv:1806.05393.
    """
    check_options(head, odd)
    drawn = as_generator(seed, generator)
    network = read(model, example)
    plan = Plan(model, "looks-linear")
    neutralise(plan, network)
    _plan_chain(plan, network, head, odd, drawn)
    return plan.apply_()


@INITS.register(
    "looks-linear-nonzero-bias",
    "plain ReLU networks as exact affine isometries",
    "Fischer, Gadhikar and Burkholz 2021, arXiv:2110.11150",
)
def looks_linear_nonzero_bias_(
    model: nn.Module,
    *,
    bias_factor: float = 1.0,
    biases: Biases = "independent",
    odd: Odd = "raise",
    example: Tensor | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Report:
    """Start a plain ReLU network as an affine isometry with random nonzero biases.

    Weights as in `looks_linear_`; the bias of a pair is ``b`` and ``-b``, so that the pairs d go
    through ``d' = U d + b`` and the Jacobian's singular values stay 1. b is from N(0, s^2), s the
    product of the standard deviations of the weights up to and including the layer.

    Args:
        model: changed in place: all of it, or nothing if it is refused. All layers have biases.
        bias_factor: multiplies s; the published code has 0.05, the paper 1.
        biases: "independent" in every layer, or "dependent": those of layers 2, 4, ... are
            ``-U b`` of the layer before and undo its shift, so that norms are kept exactly.
        odd, example: as in `risotto_`.
        seed, generator: exactly one of the two.

    Raises:
        ValueError: a bad argument, a layer without a bias, or a model that is built otherwise.

    Source: Fischer, Gadhikar and Burkholz 2021, arXiv:2110.11150, section 3.
    """
    check_options("looks_linear", odd)
    if biases not in BIASES:
        raise ValueError(unknown("biases", biases, BIASES))
    drawn = as_generator(seed, generator)
    network = read(model, example)
    plan = Plan(model, "looks-linear-nonzero-bias")
    neutralise(plan, network)
    layers = _plan_chain(plan, network, "looks_linear", odd, drawn)
    _check_biases(network, layers, biases)
    halves = _halves(layers, bias_factor, biases == "dependent", drawn)
    for layer, half in zip(layers, halves, strict=True):
        bias = torch.zeros(len(plan.weight(layer.name)), dtype=torch.float64)
        pair = half if layer is layers[-1] else torch.cat([half, -half])
        bias[: len(pair)] = pair
        plan.set_bias(layer.name, bias)
    return plan.apply_()


@dataclass(frozen=True)
class _Layer:
    name: str
    matrix: Tensor


def _plan_chain(
    plan: Plan, network: Network, head: str, odd: str, generator: Generator
) -> list[_Layer]:
    """Plan the weights of a plain network; return each layer's U, from the first to the last."""
    layers = [_Layer(network.stem.name, plan_first(plan, network, odd, generator))]
    for part, nodes in zip(network.body, network.between, strict=False):
        if isinstance(part, Block):
            raise ValueError(
                f"block {part.name!r} is residual: across a sum, looks-linear layers are no "
                "isometry; use risotto_"
            )
        plan_between(plan, nodes)
        pairs = after(nodes, len(layers[-1].matrix))
        layers.append(_Layer(part.name, plan_plain(plan, network, part, pairs, odd, generator)))
    pairs = after(network.between[-1], len(layers[-1].matrix))
    last = plan_head(plan, network, pairs, head, generator)
    return layers if last is None else [*layers, _Layer(network.head.name, last)]


def _halves(
    layers: Sequence[_Layer], factor: float, dependent: bool, generator: Generator
) -> Iterator[Tensor]:
    """Draw b of each layer: independent, or every second one such that it undoes the one before."""
    std = factor
    shift: Tensor | None = None
    for matrix in (layer.matrix for layer in layers):
        std /= math.sqrt(max(matrix.shape))  # that of the entries of U
        if shift is None:
            half = gaussian(matrix.shape[:1], std, generator)
            shift = half if dependent else None
        else:
            pixels = matrix.shape[1] // len(shift)
            half, shift = -matrix @ shift.repeat_interleave(pixels), None
        yield half


def _check_biases(network: Network, layers: Sequence[_Layer], biases: str) -> None:
    for layer in layers:
        if network.model.get_submodule(layer.name).bias is None:
            raise ValueError(f"layer {layer.name!r} has no bias")
    pools = [node for nodes in network.between for node in nodes if node.kind == "maxpool"]
    if pools and biases == "dependent":
        raise ValueError(f"{pools[0].near}: dependent biases do not pass the max-pooling behind it")
