"""The two products that a sparse convolution is made of, on activations in the layout of `chwn`.

``convolve`` is the convolution, or its transposed for the gradient of the input; ``correlate`` is
the gradient of the values. Work is shared among as many threads as torch uses, by what is
written: each number is summed by one thread in one order, so that results do not depend on the
number of threads.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, library

from featherweight.sparse.execute import compiled
from featherweight.sparse.execute.chwn import empty_chwn, to_chwn
from featherweight.sparse.execute.conv_geometry import Convolution, Pair, tables

PIECE = 4096  # weights whose partial sums, a vector each, stay in the cache
SMALL = 1 << 19  # products under which a thread is not worth its start


def convolve(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    order: Sequence[Tensor],
    form: Convolution,
    size: Pair,
) -> Tensor:
    """Convolve, or with a flipped form compute the gradient of a convolution's input.

    Args:
        x: (batch, channels, height, width) in the layout of `chwn`, float32 or float64.
        values: (nnz,), in the order of the pattern.
        bias: (rows,) or None.
        order: `Convolution.order` of the same form.
        form: the convolution.
        size: height and width of the result.

    Returns:
        (batch, rows, *size), in that layout.
    """
    if torch.compiler.is_compiling():
        arguments = (x, values, bias, list(order), *_numbers(form), list(size))
        traced: Tensor = traced_convolve(*arguments)
        return traced
    rows = (len(order[2]) - 1) // form.taps
    out = empty_chwn(x, (len(x), rows, *size))
    start = x.new_zeros(rows) if bias is None else bias.detach()
    offsets, ordered, shape = _prepared(x, values, order, form, size)
    arrays = (_flat(out), start.numpy(), _flat(x), offsets, ordered, order[2].numpy())
    call = functools.partial(_kernel("gather"), *arrays, *shape)
    threads = thread_count(len(values) * size[0] * size[1] * len(x))
    lines = cut(size[0], threads)
    across = cut(rows, -(-threads // max(1, len(lines))))
    compiled.spread([functools.partial(call, *a, *b) for a in lines for b in across])
    return out


def correlate(gradient: Tensor, x: Tensor, order: Sequence[Tensor], form: Convolution) -> Tensor:
    """Compute the gradient of a convolution's values.

    Args:
        gradient: of the output, (batch, outputs, height, width) in the layout of `chwn`.
        x: input, (batch, inputs, height, width), in that layout.
        order: `Convolution.order` of the form.
        form: the convolution, not flipped.

    Returns:
        (nnz,), in the order of the pattern.
    """
    if torch.compiler.is_compiling():
        traced: Tensor = traced_correlate(gradient, x, list(order), *_numbers(form))
        return traced
    found = x.new_empty(len(order[0]))
    size = (gradient.shape[2], gradient.shape[3])
    offsets, _, shape = _prepared(x, x.new_empty(0), order, form, size)
    source, pointers = order[1].numpy(), order[2].numpy()
    arrays = (found.numpy(), _flat(gradient), _flat(x), offsets, source, pointers)
    call = functools.partial(_kernel("correlate"), *arrays, *shape)
    threads = thread_count(len(found) * size[0] * size[1] * len(x))
    pieces = _shares(pointers[:: form.taps], threads)
    compiled.spread([functools.partial(_each, call, pieces[i::threads]) for i in range(threads)])
    return found


def _kernel(name: str) -> Callable[..., None]:
    module = importlib.import_module("featherweight.sparse.execute.conv_kernels")
    kernel: Callable[..., None] = getattr(module, name)
    return kernel


def _lanes(itemsize: int) -> int:
    module = importlib.import_module("featherweight.sparse.execute.conv_kernels")
    return int(module.BYTES) // itemsize


def _flat(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().permute(1, 2, 3, 0).view(-1).numpy()


def _prepared(
    x: Tensor, values: Tensor, order: Sequence[Tensor], form: Convolution, size: Pair
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], tuple[Any, ...]]:
    """Return where each weight's inputs begin, the weights in order, and numbers of the shapes."""
    batch, _, height, width = x.shape
    found = tables(form, size, (height, width), batch, _lanes(x.element_size()))
    channel, source, pointers = (t.numpy() for t in order)
    offsets, ordered = np.empty(len(channel), np.int64), x.new_empty(len(channel)).numpy()
    _kernel("arrange")(
        values.detach().numpy(), source, channel, pointers, found.shifts, height * width, batch,
        ordered, offsets,
    )  # fmt: skip
    line = size[1] * batch
    sizes = (form.taps, form.kernel[1], size[0] * line, line, width * batch)
    return offsets, ordered, (found.lines, found.tiles, *sizes)


def thread_count(products: int) -> int:
    """Return how many threads some products are worth, at most those of torch."""
    return max(1, min(torch.get_num_threads(), products // SMALL))


def cut(size: int, parts: int) -> list[Pair]:
    """Cut a range into parts of about the same length."""
    edges = [size * part // parts for part in range(parts + 1)]
    return [(a, b) for a, b in itertools.pairwise(edges) if a < b]


def _shares(edges: np.ndarray[Any, Any], threads: int) -> list[Pair]:
    """Cut rows so that all parts have about as many weights, at most about `PIECE`."""
    weights = int(edges[-1])
    parts = max(threads, -(-weights // PIECE))
    wished = np.arange(1, parts) * (weights / parts)
    cuts = [0, *np.searchsorted(edges, wished).tolist(), len(edges) - 1]
    return [(a, b) for a, b in itertools.pairwise(cuts) if a < b]


def _each(call: Callable[..., None], pieces: Sequence[Pair]) -> None:
    for piece in pieces:
        call(*piece)


def _numbers(form: Convolution) -> tuple[list[int], list[int], list[int], bool]:
    return list(form.kernel), list(form.stride), list(form.padding), form.flipped


def _form(kernel: list[int], stride: list[int], padding: list[int], flipped: bool) -> Convolution:
    pairs = [(a[0], a[1]) for a in (kernel, stride, padding)]
    return Convolution(pairs[0], pairs[1], pairs[2], flipped)


@library.custom_op("featherweight::sparse_convolve", mutates_args=())
def traced_convolve(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    order: list[Tensor],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    flipped: bool,
    size: list[int],
) -> Tensor:
    """Convolve as one operation of a traced graph."""
    form = _form(kernel, stride, padding, flipped)
    return convolve(to_chwn(x), values, bias, order, form, (size[0], size[1]))


@traced_convolve.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    order: list[Tensor],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    flipped: bool,
    size: list[int],
) -> Tensor:
    rows = (order[2].shape[0] - 1) // (kernel[0] * kernel[1])
    return empty_chwn(x, (x.shape[0], rows, *size))


@library.custom_op("featherweight::sparse_correlate", mutates_args=())
def traced_correlate(
    gradient: Tensor,
    x: Tensor,
    order: list[Tensor],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    flipped: bool,
) -> Tensor:
    """Correlate as one operation of a traced graph."""
    form = _form(kernel, stride, padding, flipped)
    return correlate(to_chwn(gradient), to_chwn(x), order, form)


@traced_correlate.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    order: list[Tensor],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    flipped: bool,
) -> Tensor:
    return x.new_empty(order[0].shape[0])
