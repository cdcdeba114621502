"""Decoding on a CPU with 4-bit weights, by torch's own kernel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from featherweight.quant.quantize import QuantizedLinear, quantized_layers

_GROUPS = (256, 128, 64, 32)  # that the kernel knows
_FEW = 4  # rows up to which the packed kernel is faster than a dense product


class Int4Linear(nn.Module):
    """A quantised layer that reads packed 4-bit weights for few tokens, dense ones for many.

    Args:
        layer: with 4 bits, in bfloat16 on a CPU.
    """

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        quantized = layer.quantized
        self.group_size = kernel_group(layer)
        repeats = layer.in_features // self.group_size // quantized.scale.shape[1]
        scale = quantized.scale.float().repeat_interleave(repeats, dim=1)
        shift = scale * (8 - quantized.zero.repeat_interleave(repeats, dim=1))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized.codes.int(), 1)
        both = torch.stack([scale.mT, shift.mT], dim=-1).contiguous()  # [groups, rows, 2]
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("scales", both.to(torch.bfloat16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` for ``x [..., in_features]``."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) > _FEW or x.requires_grad:
            return linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), self.packed, self.group_size, self.scales
        )
        out = out if self.bias is None else out + self.bias
        return out.view(*x.shape[:-1], self.out_features)


def kernel_group(layer: QuantizedLinear) -> int:
    """Return the largest group size of the kernel in which each group has one scale.

    Raises:
        ValueError: the kernel can't hold the layer.
    """
    quantized, rows = layer.quantized, layer.out_features
    if quantized.grid.bits != 4 or rows % 16:
        raise ValueError(
            f"need 4 bits and rows in 16s, got {quantized.grid.bits} bits, {rows} rows"
        )
    if layer.weight.dtype != torch.bfloat16 or layer.weight.device.type != "cpu":
        got = f"{layer.weight.dtype} on {layer.weight.device.type}"
        raise ValueError(f"need torch.bfloat16 on cpu, got {got}")
    size = layer.in_features // quantized.scale.shape[1]
    for group in _GROUPS:
        if size % group == 0:
            return group
    raise ValueError(f"need groups of a multiple of 32, got {size}")


def int4_decoding(model: nn.Module) -> nn.Module:
    """Let a model quantised to 4 bits decode from packed weights on a CPU, in place.

    Products with up to four tokens read a quarter of the memory; others use the dense weights,
    which stay. Save the model before: packed layers are for running.

    Args:
        model: in bfloat16 on a CPU, quantised to 4 bits.

    Returns:
        The same model, with :class:`Int4Linear` layers; outputs differ by bfloat16's rounding.

    Raises:
        ValueError: the model has no quantised layer, or torch's kernel can't hold one of them;
            nothing was changed.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantised layer")
    for name, layer in layers.items():
        try:
            kernel_group(layer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, layer in layers.items():
        model.set_submodule(name, Int4Linear(layer))
    return model
