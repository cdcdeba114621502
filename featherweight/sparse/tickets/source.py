"""Random networks of the widths that the constructions need."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, unknown
from featherweight.sparse.tickets.layers import linears

Law = Literal["uniform", "normal", "looks-linear"]
LAWS = ("uniform", "normal", "looks-linear")


@torch.no_grad()
def source_for(
    target: nn.Sequential,
    construction: Literal["2L", "L+1"] = "2L",
    width_factor: int = 40,
    *,
    law: Law = "uniform",
    bias_factor: float = 1.0,
    seed: int | None = None,
    generator: Generator | None = None,
) -> nn.Sequential:
    """Draw a random network that a target can be found in by `approximate`.

    Weights have the standard deviation ``sigma_l = sqrt(2 / fan in)``, biases that of the running
    product, ``bias_factor * sigma_1 ... sigma_l``: then scaling a layer's weights scales what comes
    after by one factor, biases included.

    Args:
        target: Sequential of Linear and ReLU in turn, with inputs n_0 and layer widths n_l.
        construction: "2L" gives the widths ``rho (n_{l-1} + 1)`` and n_l in turn; "L+1" gives
            ``2 rho (n_0 + 1)``, then ``rho (n_l + 1)``, and n_L at the end.
        width_factor: rho, the neurons for each input and for the constant, at least 1. About 20
            candidates for each sum are good: half of rho in the first layer of "2L", where each
            weight takes two sums; rho beyond.
        law: of weights and biases: "uniform", "normal", or "looks-linear": pairs of layers
            ``[U; -U]`` with orthogonal U and biases ``[b; -b]``, then ``[V, -V]`` ("2L" alone; it
            makes odd widths even).
        bias_factor: 0 draws no biases: such a network is homogeneous.
        seed: of all draws; or give ``generator``.
        generator: on the CPU.

    Returns:
        A network on the CPU with the target's dtype.

    Raises:
        ValueError: a bad argument.
    """
    found = list(linears(target).values())
    if construction not in ("2L", "L+1"):
        raise ValueError(unknown("construction", construction, ("2L", "L+1")))
    if law not in LAWS or (law, construction) == ("looks-linear", "L+1"):
        raise ValueError(unknown(f"law for {construction}", law, LAWS))
    if width_factor < 1 or bias_factor < 0:
        raise ValueError(f"need {width_factor=} >= 1 and {bias_factor=} >= 0")
    generator = as_generator(seed, generator)
    sizes = [found[0].in_features, *(layer.out_features for layer in found)]
    widths = _widths(sizes, construction, width_factor, law)
    product, modules = bias_factor, list[nn.Module]()
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        sigma = (2 / inputs) ** 0.5
        product *= sigma
        linear = nn.Linear(inputs, outputs, bias=bias_factor > 0, dtype=found[0].weight.dtype)
        first = index % 2 == 0
        linear.weight.copy_(_weights(outputs, inputs, sigma, law, first, generator))
        if bias_factor > 0:
            linear.bias.copy_(_biases(outputs, product, law, first, generator))
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _widths(sizes: list[int], construction: str, rho: int, law: str) -> list[int]:
    if construction == "L+1":
        return [
            sizes[0],
            2 * rho * (sizes[0] + 1),
            *(rho * (n + 1) for n in sizes[1:-1]),
            sizes[-1],
        ]
    firsts = [rho * (n + 1) for n in sizes[:-1]]
    if law == "looks-linear":
        firsts = [width + width % 2 for width in firsts]
    pairs = zip(firsts, sizes[1:], strict=True)
    return [sizes[0], *itertools.chain.from_iterable(pairs)]


def _weights(
    outputs: int, inputs: int, sigma: float, law: str, first: bool, generator: Generator
) -> Tensor:
    if law != "looks-linear":
        return sigma * _draw((outputs, inputs), law, generator)
    shape = (outputs // 2, inputs) if first else (outputs, inputs // 2)
    half = nn.init.orthogonal_(torch.empty(shape, dtype=torch.float64), generator=generator)
    return torch.cat([half, -half], 0 if first else 1)


def _biases(outputs: int, sigma: float, law: str, first: bool, generator: Generator) -> Tensor:
    if law == "looks-linear" and first:
        half = sigma * _draw((outputs // 2,), "normal", generator)
        return torch.cat([half, -half])
    return sigma * _draw((outputs,), law, generator)


def _draw(shape: tuple[int, ...], law: str, generator: Generator) -> Tensor:
    """Draw with variance 1."""
    if law == "uniform":
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * 3**0.5
    return torch.randn(shape, generator=generator, dtype=torch.float64)
