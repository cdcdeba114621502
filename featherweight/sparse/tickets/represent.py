"""Random sparse networks contain every target: widths that suffice, and the network itself.

A source network that keeps each edge with a probability p, its density, equals a target of depth L
if it is one layer deeper and wider by a factor ``1 / log(1 / (1 - p))``. Source layer 1 copies the
inputs; source layer ``l + 1`` holds ``rho_l`` copies of each neuron of target layer ``l``. A copy
reads input ``i`` from any of the ``rho_{l-1}`` copies of ``i`` that it has an edge to; it lacks all
with probability ``(1 - p_{l+1})^rho_{l-1}``.

Source: A. Gadhikar, S. Mukherjee and R. Burkholz, "Why Random Pruning Is All We Need to Start
Sparse", ICML 2023, arXiv:2210.02412, the representation theorem of depth L + 1 and the lower bound.
The constants are those of a union bound over all copies. A copy that lacks an edge is left unused
here, so building fails less often than ``delta``.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator
from featherweight.sparse.tickets.layers import linears


class MissingConnectionError(RuntimeError):
    """In source layer ``layer`` (from 1) no copy of ``unit`` has all edges; most lack ``input``."""

    def __init__(self, layer: int, unit: int, input: int) -> None:
        super().__init__(f"source layer {layer} connects no copy of neuron {unit} to input {input}")
        self.layer, self.unit, self.input = layer, unit, input


@dataclass(frozen=True)
class Representation:
    """A sparse network that equals its target, exact zeros outside its random masks (out, in)."""

    source: nn.Sequential
    masks: dict[str, Tensor]
    widths: list[int]


def connection_probability(width: int, inputs: int, density: float) -> float:
    """Return ``(1 - (1 - p)^n)^d``: the chance that d inputs all keep an edge to a width of n."""
    _rate(density)
    return float((1 - (1 - density) ** width) ** inputs)


def lower_bound(inputs: int, density: float, delta: float) -> float:
    """Return the width below which a one-hidden-layer source fails with probability > delta.

    ``log(1 / (1 - (1 - delta)^{1/d})) / log(1 / (1 - p))`` where all d inputs matter to the target
    neuron; density p in (0, 1], delta in (0, 1).
    """
    if inputs < 1 or not 0 < delta < 1:
        raise ValueError(f"inputs must be >= 1 and delta in (0, 1), got {inputs=}, {delta=}")
    return -math.log(-math.expm1(math.log1p(-delta) / inputs)) / _rate(density)


def source_widths(
    target_widths: Sequence[int], densities: float | Sequence[float], delta: float
) -> list[int]:
    """Return widths of L + 1 source layers that hold the target with probability >= 1 - delta.

    From the output backwards, ``rho_L = 1`` and
    ``rho_{l-1} = ceil(log((L + 1) rho_l n_l n_{l-1} / delta) / log(1 / (1 - p_{l+1})))``; layer 1
    tries k neurons for each input, with ``P(Bin(k, p_1) < rho_0) <= delta / ((L + 1) n_0)``.

    Args:
        target_widths: ``n_0, ..., n_L``: the target's inputs, hidden widths and outputs.
        densities: edge probabilities ``p_1, ..., p_{L+1}``, each in (0, 1], or one for all.
        delta: failure probability, in (0, 1).
    """
    sizes = list(target_widths)
    if len(sizes) < 2 or min(sizes) < 1 or not 0 < delta < 1:
        raise ValueError(f"need two or more target_widths >= 1, got {sizes}; 0 < {delta=} < 1")
    rates = [_rate(p) for p in _each(densities, len(sizes))]
    share, copies = delta / len(sizes), [1]
    for level in range(len(sizes) - 1, 0, -1):
        links = copies[0] * sizes[level] * sizes[level - 1]
        copies.insert(0, max(1, math.ceil(math.log(links / share) / rates[level])))
    copies[0] = _trials(copies[0], rates[0], share / sizes[0])
    return [size * count for size, count in zip(sizes, copies, strict=True)]


@torch.no_grad()
def represent(
    target: nn.Sequential,
    density: float | Sequence[float],
    *,
    delta: float = 0.1,
    lower: float = -1.0,
    widths: Sequence[int] | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Representation:
    """Draw a random sparse network and set its kept weights so that it equals the target.

    Equal up to rounding where all inputs are ``>= lower``: layer 1 shifts them past its ReLU.
    Biases are free of the masks. The result lies on the CPU.

    Args:
        target: Sequential of Linear and ReLU in turn, from a Linear to a Linear.
        density: edge probabilities of the L + 1 source layers, in (0, 1], or one for all.
        delta: probability of failure that the widths allow for, in (0, 1).
        lower: lower bound of all inputs.
        widths: of the source layers, multiples of the target's; None is `source_widths`.
        seed: of the masks; or
        generator: on the CPU.

    Raises:
        MissingConnectionError: with probability <= delta.
    """
    if not math.isfinite(lower):
        raise ValueError(f"lower must be finite, got {lower}")
    layers = list(linears(target).values())
    sizes = [layers[0].in_features, *(layer.out_features for layer in layers)]
    densities = _each(density, len(sizes))
    widths = source_widths(sizes, densities, delta) if widths is None else list(widths)
    copies = _copies(widths, sizes)
    generator = as_generator(seed, generator)
    source, masks = nn.Sequential(), dict[str, Tensor]()
    usable = torch.ones(sizes[0], 1, dtype=torch.bool)
    for index, (weight, bias) in enumerate(_shifted(layers, lower)):
        if index:
            source.append(nn.ReLU())
        shape = (len(bias), copies[index], *usable.shape)
        mask = torch.rand(shape, generator=generator) < densities[index]
        wired, usable = _wire(weight, mask & usable, index + 1)
        masks[f"{len(source)}.weight"] = mask.view(wired.shape)
        linear = nn.Linear(wired.shape[1], wired.shape[0], device="meta")
        linear.weight = nn.Parameter(wired)
        linear.bias = nn.Parameter(bias.repeat_interleave(copies[index]))
        source.append(linear)
    return Representation(source, masks, widths)


def _wire(weight: Tensor, edges: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Share each target weight among the usable edges, bool (out, copies, in, copies)."""
    count = edges.sum(-1)
    missing = (count == 0) & (weight != 0)[:, None]
    usable = ~missing.any(-1)
    if not (served := usable.any(-1)).all():
        unit = served.tolist().index(False)
        raise MissingConnectionError(layer, unit, int(missing[unit].sum(0).argmax()))
    shares = weight[:, None] / count.clamp_min(1) * usable[..., None]
    return (edges * shares[..., None]).flatten(2).flatten(0, 1), usable


def _shifted(layers: Sequence[nn.Linear], lower: float) -> list[tuple[Tensor, Tensor]]:
    """Return the target's weights and biases, put behind a first layer ``x - lower``."""
    points = [lower] + [0.0] * (len(layers) - 1)
    biases = [m(torch.full_like(m.weight[0], p)) for m, p in zip(layers, points, strict=True)]
    first = torch.eye(layers[0].in_features).to(layers[0].weight)
    pairs = [(first, -lower * first.sum(0)), *zip([m.weight for m in layers], biases, strict=True)]
    return [(weight.cpu(), bias.cpu()) for weight, bias in pairs]


def _copies(widths: Sequence[int], sizes: Sequence[int]) -> list[int]:
    whole = len(widths) == len(sizes) and widths[-1] == sizes[-1]
    if not whole or any(w < n or w % n for w, n in zip(widths, sizes, strict=True)):
        raise ValueError(f"widths must be multiples of {sizes}, the last equal; got {list(widths)}")
    return [width // size for width, size in zip(widths, sizes, strict=True)]


def _trials(successes: int, rate: float, failure: float) -> int:
    """Return the smallest k with ``P(Bin(k, 1 - e^{-rate}) < successes) <= failure``."""
    hits = torch.arange(successes, dtype=torch.float64)

    def enough(trials: int) -> bool:
        ways = math.lgamma(trials + 1) - torch.lgamma(hits + 1) - torch.lgamma(trials - hits + 1)
        odds = hits * math.log(-math.expm1(-rate)) - (trials - hits) * rate
        return float((ways + odds).exp().sum()) <= failure

    high = successes
    while not enough(high):
        high *= 2
    return bisect.bisect_left(range(high), True, lo=successes, key=enough)


def _rate(density: float) -> float:
    """Return ``log(1 / (1 - p))`` of a density p, after checking it."""
    return -math.log1p(-density) if _each(density, 1) != [1] else math.inf


def _each(density: float | Sequence[float], layers: int) -> list[float]:
    values = [density] * layers if isinstance(density, (int, float)) else list(density)
    if len(values) != layers or not all(0 < value <= 1 for value in values):
        raise ValueError(f"density must be {layers} numbers in (0, 1] or one for all, got {values}")
    return values
