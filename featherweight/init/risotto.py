"""RISOTTO: residual networks that start as exact isometries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator
from featherweight.init.gaussians import gaussian, neutralise
from featherweight.init.matrices import centre_tap, haar, looks_linear_matrix
from featherweight.init.pairs import (
    Head,
    Odd,
    after,
    centred,
    check_options,
    joined,
    paired_weight,
    pairs_in,
    plan_between,
    plan_first,
    plan_head,
    plan_plain,
    reading,
)
from featherweight.init.plan import Plan, Report
from featherweight.init.registry import INITS
from featherweight.init.structure import Block, Network, Plain, read


@INITS.register(
    "risotto",
    "residual networks as exact isometries, branch and skip in balance",
    "Gadhikar and Burkholz 2022, arXiv:2210.02411",
)
def risotto_(
    model: nn.Module,
    *,
    alpha: float = 1.0,
    head: Head = "looks_linear",
    odd: Odd = "raise",
    example: Tensor | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Report:
    """Start a residual ReLU network such that its state keeps all distances, to rounding.

    A state x holds pairs: its first half is ``relu(d)``, its second ``relu(-d)`` of the same d.
    Every block ``relu(a * branch(x) + skip(x))`` maps d to ``M d`` with a random orthogonal M,
    exactly, at any width, depth and a. So all singular values of the Jacobian from the input to
    the state are 1, and branch and skip are both at work from the first step. With
    ``LL(U) = [[U, -U], [-U, U]]`` and random semi-orthogonal U:

    * Where the skip has a projection (type C), the branch is ``LL(U_1), ..., LL(U_k)`` and the
      projection ``LL(M - a U_k ... U_1)``.
    * Where it is the identity (type B), the first layers pass the pairs on and the last one is
      ``(LL(M) - 1) / a``. If the branch is narrower than the state (bottlenecks), it rotates a
      random subset of the pairs, in each block another one.

    Convolutions act in the middle of their kernels. The structure is read from one forward pass,
    whatever classes are called: ResNets of basic or bottleneck blocks as in torchvision or
    Transformers, residual perceptrons, plain networks. Norms are set to their start; in evaluation
    mode a batch norm then keeps the isometry, but for its eps.

    Args:
        model: changed in place: all of it, or nothing if it is refused.
        alpha: start of the multiplier a on each branch, where the model has one (a parameter times
            the branch); elsewhere a is 1. Not 0 where a skip is the identity.
        head: the last layer: "looks_linear" is [U, -U] with semi-orthogonal U, "torch" is torch's
            default, "zero" is zero.
        odd: at an odd number of channels "raise", or "isolate" the last one: it reads the others
            and nothing reads it, until training changes that.
        example: inputs [B, ...] for the pass that reads the structure; None: zeros of a shape
            guessed from the first layer, images of 32 x 32 pixels.
        seed, generator: exactly one of the two.

    Returns:
        What was done to each layer, with a remark where isometry ends: strides, contractions,
        pooling.

    Raises:
        ValueError: a bad argument, or a model that is built otherwise: pre-activation blocks,
            grouped or even convolutions, padded shortcuts, other activations. The layer and the
            reason are named.

    Source: Gadhikar and Burkholz 2022, arXiv:2210.02411. Bottlenecks with identity skips, odd
        widths and the head are this library's.
    """
    check_options(head, odd)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    drawn = as_generator(seed, generator)
    network = read(model, example)
    plan = Plan(model, "risotto")
    neutralise(plan, network)
    pairs = len(plan_first(plan, network, odd, drawn))
    for part, nodes in zip(network.body, network.between, strict=False):
        plan_between(plan, nodes)
        pairs = after(nodes, pairs)
        if isinstance(part, Plain):
            pairs = len(plan_plain(plan, network, part, pairs, odd, drawn))
        elif part.skip.layers:
            pairs = _plan_projected(plan, network, part, pairs, alpha, odd, drawn)
        else:
            _plan_identity(plan, network, part, pairs, alpha, odd, drawn)
    plan_head(plan, network, after(network.between[-1], pairs), head, drawn)
    return plan.apply_()


def _multiplier(plan: Plan, block: Block, alpha: float) -> tuple[float, str]:
    """Plan the multiplier of a branch; return its value and a remark where there is none."""
    scales = block.branch.outer_scales
    if not scales:
        return 1.0, "" if alpha == 1 else f"no multiplier: alpha=1, not {alpha:g}"
    plan.set_parameter(scales[0], alpha)
    plan.row(scales[0], f"{alpha:g}")
    return alpha, ""


def _plan_projected(
    plan: Plan,
    network: Network,
    block: Block,
    pairs: int,
    alpha: float,
    odd: str,
    generator: Generator,
) -> int:
    """Plan a block with a projection (type C); return the pairs of its state."""
    modules = [centred(network, name) for name in block.branch.layers]
    scale, remark = _multiplier(plan, block, alpha)
    product = torch.eye(pairs, dtype=torch.float64)
    for name, module in zip(block.branch.layers, modules, strict=True):
        width = pairs_in(module.weight.shape[0], odd, name)
        matrix = haar(width, len(product), generator=generator)
        product = matrix @ product
        plan.set(module.weight, paired_weight(module.weight, matrix, generator))
        plan.row(name, "LL(U)", reading(module))
    (name,) = block.skip.layers
    skip = centred(network, name)
    rotation = haar(len(product), pairs, generator=generator)
    weight = paired_weight(skip.weight, rotation - scale * product, generator)
    plan.set(skip.weight, weight)
    plan.row(name, "LL(M - a U...U)", joined(reading(skip, rotation.shape), remark))
    return len(rotation)


def _plan_identity(
    plan: Plan,
    network: Network,
    block: Block,
    pairs: int,
    alpha: float,
    odd: str,
    generator: Generator,
) -> None:
    """Plan a block with an identity skip (type B): chosen pairs are rotated, the others stay."""
    modules = [centred(network, name) for name in block.branch.layers]
    scale, remark = _multiplier(plan, block, alpha)
    if scale == 0:
        raise ValueError(f"alpha must not be 0: block {block.name!r} has an identity skip")
    widths = [
        pairs_in(module.weight.shape[0], odd, name)
        for name, module in zip(block.branch.layers[:-1], modules, strict=False)
    ]
    count = min([pairs, *widths])
    chosen = torch.arange(pairs)
    if count < pairs:
        chosen = torch.randperm(pairs, generator=generator)[:count].sort().values
        remark = joined(f"rotates {count} of {pairs} pairs", remark)
    units = torch.cat([chosen, pairs + chosen])
    columns = units
    for name, module in zip(block.branch.layers[:-1], modules, strict=False):
        readable = 2 * pairs if columns is units else 2 * count
        plan.set(module.weight, _passing(module.weight, columns, readable, generator))
        plan.row(name, "1")
        columns = torch.arange(2 * count)
    rotation = looks_linear_matrix(haar(count, count, generator=generator))
    weight = torch.zeros(modules[-1].weight.shape, dtype=torch.float64)
    turned = (rotation - torch.eye(2 * count, dtype=torch.float64)) / scale
    centre_tap(weight)[units[:, None], columns] = turned
    plan.set(modules[-1].weight, weight)
    plan.row(block.branch.layers[-1], "(LL(M) - 1) / a", remark)


def _passing(weight: Tensor, columns: Tensor, readable: int, generator: Generator) -> Tensor:
    """Return a weight whose first rows pass on chosen inputs; the other rows are He-random.

    Args:
        weight: gives the shape.
        columns: the chosen inputs.
        readable: how many inputs belong to pairs; the other rows read these.
        generator: of the other rows.
    """
    full = torch.zeros(weight.shape, dtype=torch.float64)
    spare = full[len(columns) :, :readable]
    if spare.numel():
        spare.copy_(gaussian(spare.shape, math.sqrt(2 / weight[0].numel()), generator))
    centre_tap(full)[torch.arange(len(columns)), columns] = 1.0
    return full
