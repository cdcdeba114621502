"""SkipInit: residual networks without norms whose branches start multiplied by zero."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.common import Generator, as_generator
from featherweight.init.gaussians import neutralise, plan_he, refuse_norms, refuse_plain
from featherweight.init.plan import Plan, Report
from featherweight.init.registry import INITS
from featherweight.init.structure import read


@INITS.register(
    "skipinit",
    "residual networks without norms: He weights, branches multiplied by zero",
    "De and Smith 2020, arXiv:2002.10444",
)
def skipinit_(
    model: nn.Module,
    *,
    value: float = 0.0,
    example: Tensor | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Report:
    """Start a residual network without norms: He's weights, zero biases, zero multipliers.

    Args:
        model: changed in place: all of it, or nothing if it is refused. Each branch has a trained
            multiplier (``scale="branch"`` in the lab's networks).
        value: start of the multipliers.
        example: inputs [B, ...] for the pass that reads the structure; None: zeros of a guessed
            shape.
        seed, generator: exactly one of the two.

    Raises:
        ValueError: a bad argument, a model with norms or without blocks, or a branch without a
            multiplier.

    Source: De and Smith 2020, arXiv:2002.10444, section 4.
    """
    drawn = as_generator(seed, generator)
    network = read(model, example)
    refuse_plain(network, "skipinit")
    refuse_norms(network, "skipinit")
    for block in network.blocks:
        if not block.branch.outer_scales:
            raise ValueError(f"skipinit needs a multiplier on the branch of block {block.name!r}")
    plan = Plan(model, "skipinit")
    neutralise(plan, network)
    for path in network.paths:
        for name in path.layers:
            plan_he(plan, name, drawn)
    for block in network.blocks:
        plan.set_parameter(block.branch.outer_scales[0], value)
        plan.row(block.branch.outer_scales[0], f"{value:g}")
    return plan.apply_()
