"""One quantised matrix: its codes, and what rounding cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.quant.gptq import Outcome
from featherweight.quant.grid import Quantized


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantised matrix.

    Attributes:
        quantized: codes, scales and zero points.
        error: ``tr(dW H dW^T) / tr(W H W^T)`` on the calibration inputs; without any, H = I.
        damping: that GPTQ needed; None for round to nearest.
    """

    quantized: Quantized
    error: float
    damping: float | None


def split(outcome: Outcome, weights: Sequence[Tensor]) -> Iterator[Quantized]:
    """Take the result for stacked matrices apart."""
    whole, sizes = outcome.quantized, [len(weight) for weight in weights]
    parts = (tensor.split(sizes) for tensor in (whole.codes, whole.scale, whole.zero))
    for codes, scale, zero in zip(*parts, strict=True):
        yield Quantized(codes.clone(), scale.clone(), zero.clone(), whole.grid)


def relative_error(weight: Tensor, quantized: Quantized, hessian: Tensor | None) -> float:
    """Return ``tr(dW H dW^T) / tr(W H W^T)``, with H = I where there is none."""
    weight = weight.detach().float()
    difference = quantized.dequantize() - weight

    def size(matrix: Tensor) -> Tensor:
        return torch.sum(matrix * (matrix if hessian is None else matrix @ hessian))

    return (size(difference) / size(weight).clamp_min(1e-30)).item()
