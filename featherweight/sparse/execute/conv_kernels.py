# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""Sparse convolutions over activations with the batch innermost; importing this needs numba.

A line of outputs is a sum of scaled runs of inputs, one for each kept weight. A tile of outputs
stays in vector registers while the products of all weights of its channel are added to it; all
channels pass over a line before the next, so that its inputs stay in the cache.
"""

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BYTES = 64 if binding.get_host_cpu_features().get("avx512f") else 32  # of a vector
FUSED = ("contract",)  # products may be fused with sums


def _vectors(context, builder, array, start, count, lanes):
    """Return pointers to ``count`` vectors that follow each other from entry ``start`` on."""
    kind, value = array
    data = context.make_array(kind)(context, builder, value).data
    vector = ir.VectorType(context.get_value_type(kind.dtype), lanes)
    first = builder.bitcast(builder.gep(data, [start]), vector.as_pointer())
    return [builder.gep(first, [ir.Constant(ir.IntType(64), k)]) for k in range(count)]


def _entry(context, builder, array, index):
    kind, value = array
    data = context.make_array(kind)(context, builder, value).data
    entry = builder.load(builder.gep(data, [index]))
    if isinstance(kind.dtype, types.Integer) and kind.dtype.bitwidth < 64:
        entry = builder.sext(entry, ir.IntType(64))
    return entry


def _load(builder, pointer, size):
    vector = builder.load(pointer)
    vector.align = size
    return vector


def _store(builder, vector, pointer, size):
    builder.store(vector, pointer).align = size


def _add_product(builder, total, a, b):
    return builder.fadd(total, builder.fmul(a, b, flags=FUSED), flags=FUSED)


def _splat(builder, scalar, lanes):
    empty = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
    return builder.shuffle_vector(first, empty, zeros)


def _lanes(dtype, divisor):
    return max(1, BYTES * 8 // dtype.bitwidth // divisor)


def _weights_of(context, builder, pointers, first, step, width, count):
    """Loop over the positions of weights that reach a tile; yields them inside the loops."""
    with cgutils.for_range(builder, count, intp=ir.IntType(64)) as turn:
        begin = builder.add(first, builder.mul(turn.index, step))
        end = _entry(context, builder, pointers, builder.add(begin, width))
        start = _entry(context, builder, pointers, begin)
        with cgutils.for_range(builder, end, start, intp=ir.IntType(64)) as loop:
            yield loop.index


def _gather(vectors, divisor):
    """Make ``tile(out, to, bias, x, at, offsets, values, pointers, first, step, width, count)``.

    It writes ``vectors`` vectors of outputs from ``out[to]`` on: the bias, plus for each weight j
    the inputs from ``x[at + offsets[j]]`` on times ``values[j]``. Weights are those from
    ``pointers[first + i step]`` to ``pointers[first + i step + width]``, i < count.
    """

    def code(context, builder, signature, arguments):
        typed = list(zip(signature.args, arguments, strict=True))
        out, to, bias, x, at, offsets, values, pointers = typed[:8]
        dtype = out[0].dtype
        lanes, size = _lanes(dtype, divisor), dtype.bitwidth // 8
        start = _splat(builder, bias[1], lanes)
        sums = [cgutils.alloca_once_value(builder, start) for _ in range(vectors)]
        for j in _weights_of(context, builder, pointers, *arguments[8:]):
            weight = _splat(builder, _entry(context, builder, values, j), lanes)
            place = builder.add(at[1], _entry(context, builder, offsets, j))
            inputs = _vectors(context, builder, x, place, vectors, lanes)
            for sum_, pointer in zip(sums, inputs, strict=True):
                value = _load(builder, pointer, size)
                builder.store(_add_product(builder, builder.load(sum_), value, weight), sum_)
        outputs = _vectors(context, builder, out, to[1], vectors, lanes)
        for sum_, pointer in zip(sums, outputs, strict=True):
            _store(builder, builder.load(sum_), pointer, size)
        return context.get_dummy_value()

    @intrinsic
    def tile(_, out, to, bias, x, at, offsets, values, pointers, first, step, width, count):
        i = types.int64
        kinds = (out, i, out.dtype, x, i, offsets, values, pointers, i, i, i, i)
        return types.void(*kinds), code

    return tile


def _correlate(vectors, divisor):
    """Make ``tile(partial, zeroth, y, to, x, at, offsets, pointers, first, step, width, count)``.

    To row ``j - zeroth`` of ``partial`` it adds the products of the ``vectors`` vectors of ``y``
    from ``to`` on with those of ``x`` from ``at + offsets[j]`` on; weights j as in `_gather`.
    """

    def code(context, builder, signature, arguments):
        typed = list(zip(signature.args, arguments, strict=True))
        partial, zeroth, y, to, x, at, offsets, pointers = typed[:8]
        dtype = y[0].dtype
        lanes, size = _lanes(dtype, divisor), dtype.bitwidth // 8
        row = ir.Constant(ir.IntType(64), _lanes(dtype, 1))
        ys = _vectors(context, builder, y, to[1], vectors, lanes)
        ys = [_load(builder, pointer, size) for pointer in ys]
        for j in _weights_of(context, builder, pointers, *arguments[8:]):
            place = builder.mul(builder.sub(j, zeroth[1]), row)
            (slot,) = _vectors(context, builder, partial, place, 1, lanes)
            place = builder.add(at[1], _entry(context, builder, offsets, j))
            inputs = _vectors(context, builder, x, place, vectors, lanes)
            total = _load(builder, slot, size)
            for value, pointer in zip(ys, inputs, strict=True):
                total = _add_product(builder, total, value, _load(builder, pointer, size))
            _store(builder, total, slot, size)
        return context.get_dummy_value()

    @intrinsic
    def tile(_, partial, zeroth, y, to, x, at, offsets, pointers, first, step, width, count):
        i = types.int64
        kinds = (partial, i, y, i, x, i, offsets, pointers, i, i, i, i)
        return types.void(*kinds), code

    return tile


_gather_8, _gather_4, _gather_2 = _gather(8, 1), _gather(4, 1), _gather(2, 1)
_gather_1, _gather_quarter, _gather_entry = _gather(1, 1), _gather(1, 4), _gather(1, BYTES)
_correlate_8, _correlate_4, _correlate_2 = _correlate(8, 1), _correlate(4, 1), _correlate(2, 1)
_correlate_1, _correlate_quarter = _correlate(1, 1), _correlate(1, 4)
_correlate_entry = _correlate(1, BYTES)


@njit(nogil=True, error_model="numpy", cache=True)
def arrange(values, source, channel, pointers, shifts, plane, batch, ordered, offsets):
    """Bring weights into the order of the kernels, and say where the inputs of each begin.

    Args:
        values, source: ``ordered[j] = values[source[j]]``; no values: nothing is brought.
        channel: (nnz,) of the input.
        pointers: (rows * taps + 1,).
        shifts: (taps,), in pixels.
        plane, batch: pixels in a channel, and entries in a pixel, of the input.
        ordered, offsets: (nnz,), written.
    """
    taps = len(shifts)
    for group in range(len(pointers) - 1):
        shift = shifts[group % taps]
        for j in range(pointers[group], pointers[group + 1]):
            offsets[j] = (channel[j] * plane + shift) * batch
    if len(values):
        for j in range(len(source)):
            ordered[j] = values[source[j]]


@njit(nogil=True, error_model="numpy", cache=True)
def gather(
    out, bias, x, offsets, values, pointers, lines, tiles, taps, across, plane, line_out, line_in,
    top, bottom, low, high,
):  # fmt: skip
    """Write lines ``top`` to ``bottom`` of channels ``low`` to ``high``.

    Args:
        out, x: flat, channels, lines, columns, batch.
        bias: (rows,).
        offsets, values: (nnz,), see `arrange`.
        pointers: (rows * taps + 1,).
        lines, tiles: see `conv_geometry.tables`.
        taps, across: of a weight, and in a line of it.
        plane, line_out, line_in: entries in a channel and in a line of the output, and in a line
            of the input.
        top, bottom, low, high: lines and channels.
    """
    for line in range(top, bottom):
        base, first_row, end_row = lines[line]
        for row in range(low, high):
            for number in range(len(tiles)):
                to, at, kind, first, last = tiles[number]
                width, count = last - first, end_row - first_row
                if width == across:  # taps of consecutive rows lie together
                    width, count = across * count, min(count, 1)
                arguments = (
                    out, row * plane + line * line_out + to, bias[row], x, base * line_in + at,
                    offsets, values, pointers, row * taps + first_row * across + first, across,
                    width, count,
                )  # fmt: skip
                if kind == 0:
                    _gather_8(*arguments)
                elif kind == 1:
                    _gather_4(*arguments)
                elif kind == 2:
                    _gather_2(*arguments)
                elif kind == 3:
                    _gather_1(*arguments)
                elif kind == 4:
                    _gather_quarter(*arguments)
                else:
                    _gather_entry(*arguments)


@njit(nogil=True, error_model="numpy", cache=True)
def correlate(
    gradient, y, x, offsets, source, pointers, lines, tiles, taps, across, plane, line_out,
    line_in, low, high,
):  # fmt: skip
    """Write the gradients of the weights of channels ``low`` to ``high``.

    Each weight has one partial sum a lane, and they are added up at the end.

    Args:
        gradient: (nnz,), of the values.
        y, x: gradient of the output, and input; flat, channels, lines, columns, batch.
        source: (nnz,), where to write the gradient of each weight.
        offsets, pointers, lines, tiles, taps, across, plane, line_out, line_in: as in `gather`.
        low, high: channels.
    """
    lanes = BYTES // y.itemsize
    zeroth, end = np.int64(pointers[low * taps]), np.int64(pointers[high * taps])
    partial = np.zeros((end - zeroth) * lanes, y.dtype)
    for line in range(len(lines)):
        base, first_row, end_row = lines[line]
        for row in range(low, high):
            for number in range(len(tiles)):
                to, at, kind, first, last = tiles[number]
                width, count = last - first, end_row - first_row
                if width == across:
                    width, count = across * count, min(count, 1)
                arguments = (
                    partial, zeroth, y, row * plane + line * line_out + to, x,
                    base * line_in + at, offsets, pointers,
                    row * taps + first_row * across + first, across, width, count,
                )  # fmt: skip
                if kind == 0:
                    _correlate_8(*arguments)
                elif kind == 1:
                    _correlate_4(*arguments)
                elif kind == 2:
                    _correlate_2(*arguments)
                elif kind == 3:
                    _correlate_1(*arguments)
                elif kind == 4:
                    _correlate_quarter(*arguments)
                else:
                    _correlate_entry(*arguments)
    for j in range(zeroth, end):
        total = 0.0
        for lane in range((j - zeroth) * lanes, (j - zeroth + 1) * lanes):
            total += partial[lane]
        gradient[source[j]] = total
