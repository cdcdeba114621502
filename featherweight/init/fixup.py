"""Fixup: residual networks without norms that start with silent branches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from featherweight.common import Generator, as_generator
from featherweight.init.gaussians import (
    neutralise,
    plan_he,
    plan_torch_default,
    refuse_norms,
    refuse_plain,
)
from featherweight.init.plan import Plan, Report
from featherweight.init.registry import INITS
from featherweight.init.structure import AFFINE, Block, Network, Path, Plain, read
from featherweight.init.trace import Node


@INITS.register(
    "fixup",
    "residual networks without norms: silent branches, scaled weights, scalar biases",
    "Zhang, Dauphin and Ma 2019, arXiv:1901.09321",
)
def fixup_(
    model: nn.Module,
    *,
    weights_only: bool = False,
    example: Tensor | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Report:
    """Start a residual network without norms as Fixup does.

    The last layer of each branch and the classifier are zero. The other layers of a branch have
    He's weights for fan-out, times ``L^(-1 / (2m - 2))`` for L blocks of m layers; projections have
    He's weights, the first layer torch's default. Scalar biases start at 0, multipliers at 1. In
    the lab's networks ``norm="fixup"`` has the scalars; `scalar_groups` trains them slower.

    Args:
        model: changed in place: all of it, or nothing if it is refused.
        weights_only: do without the scalar parameters that the model lacks.
        example: inputs [B, ...] for the pass that reads the structure; None: zeros of a guessed
            shape.
        seed, generator: exactly one of the two.

    Raises:
        ValueError: a bad argument, a model with norms or without blocks, or one that lacks a scalar
            bias before a layer, a ReLU or the classifier, or a multiplier on a branch; what
            is missing is named.

    Source: Zhang, Dauphin and Ma 2019, arXiv:1901.09321, section 3; the variant whose
        shortcuts are convolutions.
    """
    drawn = as_generator(seed, generator)
    network = read(model, example)
    refuse_plain(network, "fixup")
    refuse_norms(network, "fixup")
    missing = next(_missing(network), None)
    if missing and not weights_only:
        raise ValueError(f"fixup needs {missing}; weights_only=True does without")
    plan = Plan(model, "fixup")
    neutralise(plan, network)
    plan_torch_default(plan, network.stem.name, drawn)
    plan.set_bias(network.stem.name)
    for part in network.body:
        if isinstance(part, Plain):
            plan_he(plan, part.name, drawn, "fan_out")
        else:
            _plan_block(plan, part, len(network.blocks), drawn)
    plan.set(plan.weight(network.head.name), 0.0)
    plan.row(network.head.name, "zero")
    return plan.apply_()


def _plan_block(plan: Plan, block: Block, blocks: int, generator: Generator) -> None:
    *layers, last = block.branch.layers
    for name in layers:
        plan_he(plan, name, generator, "fan_out", blocks ** (-1 / (2 * len(layers))))
    plan.set(plan.weight(last), 0.0)
    plan.row(last, "zero")
    for name in block.skip.layers:
        plan_he(plan, name, generator, "fan_out")


def _missing(network: Network) -> Iterator[str]:
    """Name the scalar parameters that Fixup has and the model lacks."""
    for block in network.blocks:
        if not block.branch.outer_scales:
            yield f"a multiplier on the branch of block {block.name!r}"
        for node in block.branch.nodes:
            if node.kind in AFFINE and not _shifted(network, node):
                yield f"a scalar bias before layer {node.owner!r}"
            if node.kind == "relu" and not _shifted(network, node):
                yield f"a scalar bias before the ReLU behind {node.near}"
        if not _ends_in_shift(network, block.branch):
            yield f"a scalar bias on the branch of block {block.name!r}"
    if not _shifted(network, network.head.path.nodes[0]):
        yield f"a scalar bias before the classifier {network.head.name!r}"


def _shifted(network: Network, node: Node) -> bool:
    before = node.inputs[0]
    return before.kind == "shift" and network.model.get_parameter(before.owner).numel() == 1


def _ends_in_shift(network: Network, path: Path) -> bool:
    last = path.nodes[-1]
    return last.kind == "shift" and network.model.get_parameter(last.owner).numel() == 1


def scalar_groups(model: nn.Module, lr: float, *, factor: float = 0.1) -> list[dict[str, object]]:
    """Split parameters into optimizer groups: all others, and single numbers at a lower rate.

    Args:
        model: any.
        lr: learning rate of the others.
        factor: that of single numbers (Fixup's biases and multipliers), times ``lr``.

    Source: the learning rates of Zhang, Dauphin and Ma 2019, arXiv:1901.09321, appendix.
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.numel() > 1], "lr": lr},
        {"params": [p for p in parameters if p.numel() == 1], "lr": factor * lr},
    ]
