"""The networks that tickets are built of and from: Linear and ReLU in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featherweight.sparse.masks import Masks


class Layer(NamedTuple):
    """A linear layer in float64: its name in the network, weight (out, in) and bias (out,)."""

    name: str
    weight: Tensor
    bias: Tensor

    def parts(self) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        """Return both tensors with their names in the module."""
        return ("weight", self.weight), ("bias", self.bias)

    def rows(self) -> Tensor:
        """Return weight and bias side by side, (out, in + 1)."""
        return torch.cat([self.weight, self.bias[:, None]], 1)


def linears(network: nn.Sequential, argument: str = "target") -> dict[str, nn.Linear]:
    """Return the linear layers of a network of Linear, ReLU, ..., Linear, by name.

    Raises:
        ValueError: the network has another form.
    """
    modules = dict(network.named_children())
    kinds = [type(module) for module in modules.values()]
    if len(kinds) % 2 == 0 or kinds != ([nn.Linear, nn.ReLU] * len(kinds))[: len(kinds)]:
        raise ValueError(f"{argument} must be Linear, ReLU, ..., Linear in a Sequential: {kinds}")
    return {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}


def layers(
    network: nn.Sequential, argument: str = "target", support: Mapping[str, Tensor] | None = None
) -> list[Layer]:
    """Return weights and biases as float64 copies on the CPU, zero outside a support.

    Raises:
        ValueError: the network has another form, or the support doesn't fit it.
    """
    found = linears(network, argument)
    if support is not None:
        Masks(support).check(network)
    masks = support or {}
    return [
        Layer(name, _copy(m.weight, masks, name, "weight"), _copy(_bias(m), masks, name, "bias"))
        for name, m in found.items()
    ]


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _copy(value: Tensor, masks: Mapping[str, Tensor], name: str, attribute: str) -> Tensor:
    copy = value.detach().to("cpu", torch.float64, copy=True)
    mask = masks.get(f"{name}.{attribute}")
    return copy if mask is None else copy.masked_fill_(~mask.cpu(), 0)
