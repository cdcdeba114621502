"""Quantise experts that transformers keeps as one tensor for all: ``[experts, rows, columns]``.

Each expert is a matrix of its own, with the Hessian of the tokens that the router sends to it. One
that gets none on the calibration text is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from featherweight.quant.calibrate import Gram, Stream, check_hessian, reach
from featherweight.quant.decoder import Block
from featherweight.quant.gptq import Gptq, Outcome, gptq_matrix
from featherweight.quant.grid import Grid, Quantized
from featherweight.quant.matrix import QuantizedMatrix, relative_error, split
from featherweight.quant.rtn import round_to_nearest

READ, WRITE = "gate_up_proj", "down_proj"  # parameters of the experts' module
PARTS = ("gate_proj", "up_proj", "down_proj")  # matrices of one expert, as checkpoints name them


def expert_sizes(experts: nn.Module) -> dict[str, int]:
    """Return the columns of both parameters.

    Raises:
        ValueError: the module has another layout.
    """
    found = {}
    for name in (READ, WRITE):
        parameter = getattr(experts, name, None)
        if not isinstance(parameter, nn.Parameter) or parameter.dim() != 3:
            raise ValueError(f"{type(experts).__name__} has no tensor {name} of all experts")
        found[name] = parameter.shape[2]
    if getattr(experts, "is_transposed", False) or getattr(experts, "has_bias", False):
        raise ValueError(f"{type(experts).__name__} stores its experts transposed or with biases")
    return found


def round_experts(
    experts: nn.Module, grids: dict[str, Grid]
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Yield ``EXPERT.PART`` and its rounding to nearest."""
    for index, (read, write) in enumerate(_weights(experts)):
        for weight, name in ((read, READ), (write, WRITE)):
            outcome = Outcome(round_to_nearest(weight, grids[name]), None)
            yield from _parts(index, name, weight, outcome, None)


def gptq_experts(
    stream: Stream,
    index: int,
    block: Block,
    experts: nn.Module,
    grids: dict[str, Grid],
    options: Gptq | None,
) -> Iterator[tuple[str, QuantizedMatrix]]:
    """Yield ``EXPERT.PART`` and what GPTQ made of it, on the tokens that reach the expert.

    Args:
        stream: hidden states in front of the layer.
        index: of the layer.
        block: the layer, whose attention holds its quantised weights.
        experts: its experts.
        grids: for ``gate_up_proj`` and ``down_proj``.
        options: of GPTQ.
    """
    routed = [(args[0].flatten(0, -2), args[1]) for args in reach(stream, index, block, experts)]
    activation: Any = experts.act_fn
    for expert, (read, write) in enumerate(_weights(experts)):
        inputs = torch.cat([x[(chosen == expert).any(-1)] for x, chosen in routed])
        outcome, hessian = _on(inputs, read, grids[READ], options, f"{block.name}, {expert}")
        yield from _parts(expert, READ, read, outcome, hessian)
        gate, up = linear(inputs, outcome.quantized.dequantize(read.dtype)).chunk(2, dim=-1)
        inner = activation(gate) * up
        outcome, hessian = _on(inner, write, grids[WRITE], options, f"{block.name}, {expert}")
        yield from _parts(expert, WRITE, write, outcome, hessian)


def _on(
    inputs: Tensor, weight: Tensor, grid: Grid, options: Gptq | None, name: str
) -> tuple[Outcome, Tensor | None]:
    if not len(inputs):
        return Outcome(round_to_nearest(weight, grid), None), None
    gram = Gram(weight.shape[1], weight.device)
    gram.add(inputs)
    hessian = gram.mean()
    check_hessian(hessian, f"expert of {name}")
    return gptq_matrix(weight, hessian, grid, options), hessian


def _weights(experts: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    read, write = (getattr(experts, name).detach() for name in (READ, WRITE))
    yield from zip(read, write, strict=True)


def _parts(
    index: int, name: str, weight: Tensor, outcome: Outcome, hessian: Tensor | None
) -> Iterator[tuple[str, QuantizedMatrix]]:
    weights = weight.chunk(2) if name == READ else (weight,)
    parts = PARTS[:2] if name == READ else PARTS[2:]
    for part, one, quantized in zip(parts, weights, split(outcome, weights), strict=True):
        error = relative_error(one, quantized, hessian)
        yield f"{index}.{part}", QuantizedMatrix(quantized, error, outcome.damping)


def dense_experts(found: dict[str, QuantizedMatrix], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return both parameters from the codes of all experts."""
    count = 1 + max(int(name.partition(".")[0]) for name in found)

    def dense(index: int, part: str) -> Tensor:
        quantized: Quantized = found[f"{index}.{part}"].quantized
        return quantized.dequantize(dtype)

    read = [torch.cat([dense(i, PARTS[0]), dense(i, PARTS[1])]) for i in range(count)]
    write = [dense(i, PARTS[2]) for i in range(count)]
    return {READ: torch.stack(read), WRITE: torch.stack(write)}
