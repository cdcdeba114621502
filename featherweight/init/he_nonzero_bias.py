"""He initialisation with nonzero biases that have the scale of the signal."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, unknown, unwrap
from featherweight.init.gaussians import FanMode, fan, gaussian
from featherweight.init.plan import Plan, Report
from featherweight.init.registry import INITS
from featherweight.init.trace import Node, Trace, trace

Distribution = Literal["normal", "uniform"]
DISTRIBUTIONS = ("normal", "uniform")


@INITS.register(
    "he-nonzero-bias",
    "He weights, and biases that scale as the product of the weights before them",
    "Fischer, Gadhikar and Burkholz 2021, arXiv:2110.11150",
)
def he_nonzero_bias_(
    model: nn.Module,
    *,
    bias_factor: float = 1.0,
    fan_mode: FanMode = "fan_in",
    distribution: Distribution = "normal",
    density: float = 1.0,
    example: Tensor | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Report:
    """Draw weights with standard deviation s = sqrt(2 / fan), biases with the product of all s.

    The product runs over the layers on the way to a bias, this one included: scaling every weight
    of a layer and every bias by these only scales the output. In a residual network the way is
    the main path (the longest); a shortcut continues the product at its input.

    Args:
        model: any that runs; changed in place: all of it, or nothing if it is refused. Norms are
            set to their start.
        bias_factor: multiplies the standard deviation of biases: 1 as in the paper, 0.05 in its
            published code, 0 for zero biases.
        fan_mode: "fan_in", or "fan_out", which Lemma 3.2 of the paper is about.
        distribution: "normal", or "uniform" with the same standard deviations.
        density: fraction of weights that a mask will keep: s is divided by its root.
        example: inputs [B, ...] for the pass that finds the order; None: zeros of a guessed shape.
        seed, generator: exactly one of the two.

    Raises:
        ValueError: a bad argument, a weight that is tied or computed from others, or no bias at
            all.

    Source: Fischer, Gadhikar and Burkholz 2021, arXiv:2110.11150, section 3; the weights of He et
        al. 2015, arXiv:1502.01852.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(unknown("distribution", distribution, DISTRIBUTIONS))
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density:g}")
    drawn = as_generator(seed, generator)
    model = unwrap(model)
    traced = trace(model, example)
    layers = _layers(model, traced)
    plan = Plan(model, "he-nonzero-bias")
    stds = {
        node: math.sqrt(2 / fan(plan.weight(node.owner), fan_mode) / density) for node in layers
    }
    products = running_products(traced, stds)
    for node in layers:
        plan.set(
            plan.weight(node.owner), _draw(plan.weight(node.owner), stds[node], distribution, drawn)
        )
        bias = plan.module(node.owner).bias
        what = f"std {stds[node]:.4g}"
        if isinstance(bias, Tensor):
            std = bias_factor * products[node]
            plan.set(bias, _draw(bias, std, distribution, drawn))
            what += f", bias {std:.4g}"
        plan.row(node.owner, what, _remark(node, traced, bias is None))
    plan.reset_norms()
    return plan.apply_()


def running_products(traced: Trace, stds: dict[Node, float]) -> dict[Node, float]:
    """Multiply standard deviations along the longest way from the input to each call.

    Args:
        traced: the recorded calls.
        stds: factor of each layer.
    """
    depths = traced.depths()
    products: dict[Node, float] = {}
    for node in traced.nodes:
        before = max(node.inputs, key=depths.__getitem__, default=None)
        products[node] = stds.get(node, 1.0) * (1.0 if before is None else products[before])
    return products


def _layers(model: nn.Module, traced: Trace) -> list[Node]:
    """Return the calls of layers, each of which has a weight of its own."""
    layers = [node for node in traced.nodes if node.kind in ("conv", "linear")]
    computed = [node for node in traced.nodes if "computed weight" in node.kind]
    if computed:
        raise ValueError(f"a layer behind {computed[0].near} has a parametrised weight")
    if not layers:
        raise ValueError("the model has no linear layer and no convolution")
    names = [node.owner for node in layers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"layer {name!r} runs more than once (tied weights)")
    if all(model.get_submodule(name).bias is None for name in names):
        raise ValueError("no layer of the model has a bias")
    return layers


def _draw(like: Tensor, std: float, distribution: str, generator: Generator) -> Tensor:
    if distribution == "normal":
        return gaussian(like.shape, std, generator)
    drawn = torch.rand(like.shape, generator=generator, dtype=torch.float64)
    return math.sqrt(3) * std * (2 * drawn - 1)


def _remark(node: Node, traced: Trace, biasless: bool) -> str:
    if biasless:
        return "no bias"
    behind = any(other.kind == "norm" and node in other.inputs for other in traced.nodes)
    return "the norm behind it removes the bias" if behind else ""
