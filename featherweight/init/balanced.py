"""He initialisation with branch and skip weighted such that norms are kept on average."""

from __future__ import annotations

import math

from torch import Tensor, nn

from featherweight.common import Generator, as_generator
from featherweight.init.gaussians import FanMode, fan, neutralise, plan_gaussian, refuse_plain
from featherweight.init.plan import Plan, Report
from featherweight.init.registry import INITS
from featherweight.init.structure import Block, Path, read


@INITS.register(
    "balanced",
    "He weights in residual networks, branch and skip weighted to keep the norm on average",
    "He et al. 2015, arXiv:1502.01852; so weighted in Gadhikar and Burkholz 2022, arXiv:2210.02411",
)
def balanced_(
    model: nn.Module,
    *,
    alpha: float = math.sqrt(0.5),
    fan_mode: FanMode = "fan_out",
    example: Tensor | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Report:
    """Start a residual network with He's weights and alpha^2 + beta^2 = 1 on its two ways.

    With fan-out the expected squared norm of the state stays that of the input
    (`expected_square_norm`), while different inputs become alike with depth
    (`similarity_by_depth`).

    Args:
        model: changed in place: all of it, or nothing if it is refused.
        alpha: weight of the branch in [0, 1]; the skip has ``sqrt(1 - alpha^2)``. A multiplier of
            the model takes it; where there is none, the last layer of that way.
        fan_mode: "fan_out", for which the norm is kept, or "fan_in"; the last layer of the model
            always has fan-in.
        example: inputs [B, ...] for the pass that reads the structure; None: zeros of a guessed
            shape.
        seed, generator: exactly one of the two.

    Raises:
        ValueError: a bad argument, a model without blocks, or an identity skip without a multiplier
            (``scale="both"`` in the lab's networks).

    Source: the setting of the norm theorem of Gadhikar and Burkholz 2022, arXiv:2210.02411.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha:g}")
    drawn = as_generator(seed, generator)
    network = read(model, example)
    refuse_plain(network, "balanced")
    plan = Plan(model, "balanced")
    neutralise(plan, network)
    factors: dict[str, float] = {}
    for block in network.blocks:
        factors |= _weigh(plan, block, block.branch, alpha)
        factors |= _weigh(plan, block, block.skip, math.sqrt(1 - alpha**2))
    for path in network.paths:
        for name in path.layers:
            mode = "fan_in" if name == network.head.name else fan_mode
            std = factors.get(name, 1.0) * math.sqrt(2 / fan(plan.weight(name), mode))
            plan_gaussian(plan, name, std, drawn)
    return plan.apply_()


def _weigh(plan: Plan, block: Block, path: Path, factor: float) -> dict[str, float]:
    """Plan the multiplier of a way, or return the layer that takes it and the factor."""
    if path.outer_scales:
        plan.set_parameter(path.outer_scales[0], factor)
        plan.row(path.outer_scales[0], f"{factor:.4g}")
        return {}
    if path.layers:
        return {path.layers[-1]: factor}
    if factor == 1:
        return {}
    raise ValueError(f"block {block.name!r} has an identity skip without a multiplier")
