# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""The pass of `compiled` over selected entries; importing this needs numba.

Gather, moments and scatter are one loop: while one entry waits for memory, the processor
computes others, and the memory of entries to come is asked for ahead. That is worth more than
vector instructions. Products and sums are rounded one by one, while torch fuses some of them, so
that results differ from torch's in the last bit.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

AHEAD = 64  # entries


@njit(nogil=True, error_model="numpy")
def step(
    weights, gradient, index, first, second, born, scale, floor,
    edges, stride, begin, end, beta1, beta2, rest1, rest2, decay, sign,
):  # fmt: skip
    """Step the entries of segments ``begin`` to ``end``; bfloat16 arrays come as uint16.

    Args:
        weights, gradient: flat.
        index, first, second, born: (K,); ``born`` may be empty.
        scale, floor: per generation.
        edges: where each segment begins in ``index``, and the end of the last.
        stride: what a segment's indices are counted from is its number times this.
        begin, end: segments.
        beta1, beta2, rest1, rest2, decay, sign: float32; ``rest`` is 1 - beta, ``sign`` is -1 to
            ascend.
    """
    generations = len(born) > 0
    for segment in range(begin, end):
        base = np.uint64(segment * stride)  # a signed index would be tested for being negative
        low, high = edges[segment], edges[segment + 1]
        for j in range(low, high):
            ahead = base + np.uint64(index[min(j + AHEAD, high - 1)])
            prefetch(weights, ahead)
            prefetch(gradient, ahead)
            i = base + np.uint64(index[j])
            g = sign * load(gradient, i)
            m = load(first, j)
            m = m + rest1 * (g - m)
            v = beta2 * load(second, j) + rest2 * (g * g)
            store(first, j, m)
            store(second, j, v)
            k = born[j] if generations else 0
            change = scale[k] * m / (np.sqrt(v) + floor[k])
            store(weights, i, decay * load(weights, i) - change)


def load(array, i):
    """Read an entry as float32."""


def store(array, i, value):
    """Write a float32 to an entry."""


@overload(load)
def _load(array, i):
    if array.dtype == types.uint16:
        return lambda array, i: np.uint32(np.uint32(array[i]) << np.uint32(16)).view(np.float32)
    return lambda array, i: array[i]


@overload(store)
def _store(array, i, value):
    if array.dtype != types.uint16:

        def plain(array, i, value):
            array[i] = value

        return plain

    def rounded(array, i, value):  # to the nearest, ties to even
        bits = np.float32(value).view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        nearest = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
        array[i] = np.uint16(0x7FC0) if value != value else np.uint16(nearest)

    return rounded


@intrinsic
def prefetch(_, array, i):
    """Ask for the memory of an entry."""

    def code(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        read, keep, is_data = word(0), word(3), word(1)
        builder.call(function, [place, read, keep, is_data])
        return context.get_dummy_value()

    return types.void(array, i), code
