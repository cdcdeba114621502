"""What the initialisations with independent entries share: draws, fans, and a neutral rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from featherweight.common import Generator, unknown
from featherweight.init.plan import Plan
from featherweight.init.structure import Network

FanMode = Literal["fan_in", "fan_out"]
FAN_MODES = ("fan_in", "fan_out")


def gaussian(shape: Sequence[int], std: float, generator: Generator) -> Tensor:
    """Draw from N(0, std^2) in float64, so that one seed means one result in every dtype."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * std


def fan(weight: Tensor, mode: str) -> int:
    """Count the inputs a unit has, or the outputs that an input of a convolution or layer reaches.

    Args:
        weight: [outputs, inputs, *kernel].
        mode: "fan_in", or "fan_out": outputs times kernel size.

    Raises:
        ValueError: another mode.
    """
    if mode not in FAN_MODES:
        raise ValueError(unknown("fan_mode", mode, FAN_MODES))
    return weight[0].numel() if mode == "fan_in" else weight.numel() // weight.shape[1]


def plan_gaussian(
    plan: Plan, name: str, std: float, generator: Generator, remark: str = ""
) -> None:
    """Plan a layer's weight from N(0, std^2)."""
    weight = plan.weight(name)
    plan.set(weight, gaussian(weight.shape, std, generator))
    plan.row(name, f"N(0, {std:.4g}^2)", remark)


def plan_he(
    plan: Plan, name: str, generator: Generator, mode: str = "fan_in", factor: float = 1.0
) -> None:
    """Plan a layer's weight from N(0, 2 factor^2 / fan)."""
    std = factor * math.sqrt(2 / fan(plan.weight(name), mode))
    plan_gaussian(plan, name, std, generator)


def plan_torch_default(plan: Plan, name: str, generator: Generator) -> None:
    """Plan torch's own start of a layer: weight and bias from U(-1, 1) / sqrt(fan_in)."""
    weight, bias = plan.weight(name), plan.module(name).bias
    bound = 1 / math.sqrt(weight[0].numel())
    for tensor in (weight, bias):
        if isinstance(tensor, Tensor):
            drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            plan.set(tensor, bound * (2 * drawn - 1))
    plan.row(name, "torch's default")


def neutralise(plan: Plan, network: Network) -> None:
    """Plan that norms are at their start, and biases and shifts at zero, everywhere."""
    for path in network.paths:
        for name in path.layers:
            plan.set_bias(name)
        for name in path.norms:
            plan.reset_norm(name)
        for name in path.owners("scale"):
            plan.set_parameter(name, 1.0)
        for name in path.owners("shift"):
            plan.set_parameter(name, 0.0)
    for nodes in network.between:
        for name in (node.owner for node in nodes if node.kind == "shift"):
            plan.set_parameter(name, 0.0)


def refuse_norms(network: Network, method: str) -> None:
    """Refuse a model with norms, for a method that stands in for them.

    Raises:
        ValueError: names the first norm.
    """
    for path in network.paths:
        if path.norms:
            raise ValueError(
                f"{method} is for models without norms, this one has {path.norms[0]!r}"
            )


def refuse_plain(network: Network, method: str) -> None:
    """Refuse a model without residual blocks.

    Raises:
        ValueError: there is no block.
    """
    if not network.blocks:
        raise ValueError(f"{method} is for residual networks, this one has no block")
