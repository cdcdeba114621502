"""A sparse convolution with its gradients, and the dense one that stands in for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.sparse.execute import compiled, masked
from featherweight.sparse.execute.chwn import to_chwn
from featherweight.sparse.execute.conv_geometry import Convolution
from featherweight.sparse.execute.conv_products import convolve, correlate
from featherweight.sparse.execute.pattern import SparsePattern, flat_index


def masked_conv2d(
    x: Tensor, values: Tensor, pattern: SparsePattern, bias: Tensor | None, form: Convolution
) -> Tensor:
    """Convolve with the dense weight, zero outside the pattern; arguments as `chwn_conv2d`."""
    weight = masked.scatter(values, pattern)
    return functional.conv2d(x, weight, bias, form.stride, form.padding)


def chwn_conv2d(
    x: Tensor, values: Tensor, pattern: SparsePattern, bias: Tensor | None, form: Convolution
) -> Tensor:
    """Convolve with the kept weights alone.

    Inputs that the kernels don't take, of another device, dtype or rank, go to `masked_conv2d`.

    Args:
        x: (N, I, H, W), any strides; none are copied if they are those of `chwn`.
        values: (nnz,).
        pattern: of the weight (O, I, kh, kw).
        bias: (O,) or None.
        form: kernel, stride, padding.

    Returns:
        (N, O, H', W'), with the strides of `chwn`.
    """
    if not _takes(x, values, pattern, form):
        return masked_conv2d(x, values, pattern, bias, form)
    index = (pattern.crow, pattern.col, *prepare(pattern, form))
    arguments = (to_chwn(x), values, bias, form, pattern.shape, *index)
    y: Tensor = _Convolution.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


def prepare(pattern: SparsePattern, form: Convolution) -> tuple[Tensor, ...]:
    """Return the two orders of a pattern's weights, made once and kept with it."""

    def orders(pattern: SparsePattern) -> tuple[Tensor, ...]:
        return *form.order(pattern), *form._replace(flipped=True).order(pattern)

    return pattern.derive(f"chwn, stride {form.stride}", orders)


def _takes(x: Tensor, values: Tensor, pattern: SparsePattern, form: Convolution) -> bool:
    """Tell whether the kernels can do it; what is wrong is left for torch to say."""
    return (
        x.ndim == 4
        and x.numel() > 0
        and x.shape[1] == pattern.shape[1]
        and min(form.output(x.shape[2], x.shape[3])) > 0
        and x.dtype == values.dtype
        and x.dtype in compiled.DTYPES
        and x.device.type == values.device.type == "cpu"
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        form: Convolution,
        shape: tuple[int, ...],
        *index: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, values, *index)
        ctx.form, ctx.shape = form, shape
        return convolve(x, values, bias, index[2:5], form, form.output(x.shape[2], x.shape[3]))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *index = ctx.saved_tensors
        form, wanted = ctx.form, ctx.needs_input_grad
        of_x = of_values = of_bias = None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            of_x, of_values = _differentiable(gradient, x, values, ctx.shape, form, *index[:2])
        else:
            gradient = to_chwn(gradient)
            if wanted[0]:
                flipped, size = form._replace(flipped=True), (x.shape[2], x.shape[3])
                of_x = convolve(gradient, values, None, index[5:], flipped, size)
            if wanted[1]:
                of_values = correlate(gradient, x, index[2:5], form)
        if wanted[2]:
            of_bias = gradient.sum((0, 2, 3))
        return (of_x, of_values, of_bias, *[None] * (2 + len(index)))


def _differentiable(
    gradient: Tensor,
    x: Tensor,
    values: Tensor,
    shape: tuple[int, ...],
    form: Convolution,
    crow: Tensor,
    col: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return gradients through the dense weight, which can be differentiated again."""
    columns = shape[1] * shape[2] * shape[3]
    index = flat_index(crow, col, columns)
    weight = values.new_zeros(shape[0] * columns).scatter(0, index, values).view(shape)
    of_x, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, form.stride, form.padding, (1, 1), False, (0, 0), 1,
        (True, True, False),
    )  # fmt: skip
    return of_x, of_weight.flatten().index_select(0, index)
