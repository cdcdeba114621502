"""Delta-orthogonal convolutions and orthogonal linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, unwrap
from featherweight.init.matrices import centre_tap, haar
from featherweight.init.plan import Plan, Report
from featherweight.init.registry import INITS

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


@INITS.register(
    "orthogonal-delta",
    "convolutions and linear layers as orthogonal maps",
    "Xiao et al. 2018, arXiv:1806.05393",
)
def orthogonal_delta_(
    model: nn.Module,
    *,
    gain: float = 1.0,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Report:
    """Start every layer as a semi-orthogonal map: all its singular values are the gain.

    A convolution gets a random semi-orthogonal matrix in the middle of its kernels and zeros
    around it, unlike `torch.nn.init.orthogonal_`, which makes the flattened kernels orthogonal and
    not the convolution. Each group has a matrix of its own. Biases are zero, norms at their start.
    Layers act alone: across ReLUs this is no isometry, see `looks_linear_` and `risotto_`.

    Args:
        model: any; changed in place: all of it, or nothing if it is refused.
        gain: multiplies the matrices; sqrt(2) makes up for a ReLU on average.
        seed, generator: exactly one of the two.

    Returns:
        What was done; layers with fewer outputs than inputs, which lose dimensions, and strides
        are remarked.

    Raises:
        ValueError: an even kernel, a transposed convolution, a parametrised weight, or no layer.

    Source: Xiao et al. 2018, arXiv:1806.05393, section 3 and algorithm 1.
    """
    drawn = as_generator(seed, generator)
    layers = _layers(unwrap(model))
    plan = Plan(model, "orthogonal-delta")
    seen: set[int] = set()
    for name, module in layers.items():
        if id(module.weight) in seen:
            plan.row(name, "tied to a layer above")
            continue
        seen.add(id(module.weight))
        groups = 1 if isinstance(module, nn.Linear) else module.groups
        plan.set(module.weight, gain * _weight(module.weight, groups, drawn))
        plan.set_bias(name)
        plan.row(
            name,
            "orthogonal" if module.weight.ndim == 2 else "delta-orthogonal",
            _remark(module, groups),
        )
    plan.reset_norms()
    return plan.apply_()


def _layers(model: nn.Module) -> dict[str, Layer]:
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            raise ValueError(f"layer {name!r} is a transposed convolution")
        if "weight" not in module._parameters:
            raise ValueError(f"layer {name!r} has a parametrised weight; fold it first")
        if any(size % 2 == 0 for size in module.weight.shape[2:]):
            kernel = tuple(module.weight.shape[2:])
            raise ValueError(f"layer {name!r} has an even kernel {kernel}: no middle")
        layers[name] = module  # type: ignore[assignment]
    if not layers:
        raise ValueError("the model has no linear layer and no convolution")
    return layers


def _weight(weight: Tensor, groups: int, generator: Generator) -> Tensor:
    full = torch.zeros(weight.shape, dtype=torch.float64)
    for group in full.chunk(groups):
        rows, columns = group.shape[:2]
        centre_tap(group).copy_(haar(rows, columns, generator=generator))
    return full


def _remark(module: Layer, groups: int) -> str:
    rows, columns = module.weight.shape[0] // groups, module.weight.shape[1]
    contracts = f"contracts {columns} to {rows}" if rows < columns else ""
    strided = not isinstance(module, nn.Linear) and any(s > 1 for s in module.stride)
    return "; ".join(filter(None, [contracts, "stride: skips pixels" if strided else ""]))
