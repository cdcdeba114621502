"""Layers that carry a state of pairs: unit i holds relu(d_i), unit i + h holds relu(-d_i)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from featherweight.common import Generator, unknown
from featherweight.init.gaussians import gaussian, plan_torch_default
from featherweight.init.matrices import (
    centre_tap,
    haar,
    looks_linear_first,
    looks_linear_last,
    looks_linear_matrix,
)
from featherweight.init.plan import Plan
from featherweight.init.structure import Network, Plain
from featherweight.init.trace import Node

Head = Literal["looks_linear", "torch", "zero"]
HEADS = ("looks_linear", "torch", "zero")
Odd = Literal["raise", "isolate"]
ODD = ("raise", "isolate")

Affine = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def check_options(head: str, odd: str) -> None:
    """Refuse words that `Head` and `Odd` do not list.

    Raises:
        ValueError: names the option, its value and the allowed ones.
    """
    for name, value, allowed in (("head", head, HEADS), ("odd", odd, ODD)):
        if value not in allowed:
            raise ValueError(unknown(name, value, allowed))


def centred(network: Network, name: str) -> Affine:
    """Return a layer whose kernels have a middle that reads the pixel they are centred on.

    Raises:
        ValueError: groups, an even kernel, or a padding that moves the middle; names the layer.
    """
    module = network.model.get_submodule(name)
    if isinstance(module, nn.Linear):
        return module
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise ValueError(f"layer {name!r} is a {type(module).__name__}, not linear or convolution")
    if module.groups != 1:
        raise ValueError(f"layer {name!r} has {module.groups} groups, which split the pairs")
    if any(size % 2 == 0 for size in module.kernel_size):
        raise ValueError(f"layer {name!r} has an even kernel {module.kernel_size}: no middle")
    whole = [d * (k // 2) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if module.padding != "same" and list(module.padding) != whole:
        raise ValueError(
            f"layer {name!r} has padding {module.padding}, {tuple(whole)} keeps the middle in place"
        )
    return module


def pairs_in(width: int, odd: str, name: str) -> int:
    """Count the pairs among the units a layer makes.

    Raises:
        ValueError: an odd width where that is refused, or a single unit.
    """
    if width % 2 and odd == "raise":
        raise ValueError(
            f"layer {name!r} has an odd number of outputs, {width}: "
            'odd="isolate" sets the last one apart'
        )
    if width < 2:
        raise ValueError(f"layer {name!r} has {width} output: a pair needs two")
    return width // 2


def after(between: Iterable[Node], pairs: int) -> int:
    """Count the pairs behind pooling and reshaping: a flattened pair of images is many pairs."""
    for node in between:
        if node.kind == "reshape":
            pairs = pairs * math.prod(node.shape[1:2]) // node.inputs[0].shape[1]
    return pairs


def paired_weight(weight: Tensor, matrix: Tensor, generator: Generator) -> Tensor:
    """Return a weight that acts as a matrix on pairs.

    Units beyond the pairs read them with weights from N(0, 2 / fan_in) and are read by nobody.

    Args:
        weight: gives the shape [rows, columns, *kernel].
        matrix: [r, c] with 2 r <= rows and 2 c <= columns.
        generator: of the units beyond the pairs.
    """
    return _placed(weight, looks_linear_matrix(matrix), generator)


def first_weight(weight: Tensor, matrix: Tensor, generator: Generator) -> Tensor:
    """Return a weight that makes pairs from an input: see `paired_weight`."""
    return _placed(weight, looks_linear_first(matrix), generator)


def _placed(weight: Tensor, matrix: Tensor, generator: Generator) -> Tensor:
    rows, columns = matrix.shape
    full = torch.zeros(weight.shape, dtype=torch.float64)
    spare = full[rows:, :columns]
    if spare.numel():
        spare.copy_(gaussian(spare.shape, math.sqrt(2 / weight[0].numel()), generator))
    centre_tap(full)[:rows, :columns] = matrix
    return full


def plan_first(plan: Plan, network: Network, odd: str, generator: Generator) -> Tensor:
    """Plan the first layer, which makes pairs; return U."""
    name = network.stem.name
    module = centred(network, name)
    inputs = module.weight.shape[1]
    pairs = pairs_in(module.weight.shape[0], odd, name)
    matrix = haar(pairs, inputs, generator=generator)
    plan.set(module.weight, first_weight(module.weight, matrix, generator))
    lost = f"{inputs} inputs, {pairs} pairs: not injective" if pairs < inputs else ""
    plan.row(name, "[U; -U]", joined(lost, reading(module)))
    return matrix


def plan_plain(
    plan: Plan, network: Network, layer: Plain, pairs: int, odd: str, generator: Generator
) -> Tensor:
    """Plan a plain layer on pairs; return U."""
    module = centred(network, layer.name)
    matrix = haar(pairs_in(module.weight.shape[0], odd, layer.name), pairs, generator=generator)
    plan.set(module.weight, paired_weight(module.weight, matrix, generator))
    plan.row(layer.name, "[U, -U; -U, U]", reading(module, matrix.shape))
    return matrix


def plan_head(
    plan: Plan, network: Network, pairs: int, head: str, generator: Generator
) -> Tensor | None:
    """Plan the last layer; return U of a looks-linear one."""
    name = network.head.name
    module = centred(network, name)
    plan.set_bias(name)
    if head == "looks_linear":
        matrix = haar(module.weight.shape[0], pairs, generator=generator)
        full = torch.zeros(module.weight.shape, dtype=torch.float64)
        centre_tap(full)[:, : 2 * pairs] = looks_linear_last(matrix)
        plan.set(module.weight, full)
        plan.row(name, "[U, -U]")
        return matrix
    if head == "zero":
        plan.set(module.weight, 0.0)
        plan.row(name, "zero")
        return None
    plan_torch_default(plan, name, generator)
    return None


def reading(module: Affine, shape: Sequence[int] = (1, 1)) -> str:
    """Say what a layer can't keep: pixels that a stride skips, or dimensions of a contraction."""
    remarks = []
    if not isinstance(module, nn.Linear) and math.prod(module.stride) > 1:
        remarks.append(f"stride: reads 1 of {math.prod(module.stride)} pixels")
    if shape[0] < shape[1]:
        remarks.append(f"contracts {shape[1]} pairs to {shape[0]}")
    return joined(*remarks)


def plan_between(plan: Plan, nodes: Iterable[Node]) -> None:
    """Note pooling between layers, which keeps no isometry."""
    for node in nodes:
        if node.kind in ("maxpool", "pool"):
            plan.note(node.nearest, f"then {node.kind}", "no isometry across it")


def joined(*remarks: str) -> str:
    """Join the remarks that are not empty."""
    return "; ".join(filter(None, remarks))
