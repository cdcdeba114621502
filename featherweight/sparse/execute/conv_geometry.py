"""Which inputs the taps of a convolution reach, and in which order kernels want its weights.

Along each axis an output takes its inputs at ``base(output) + shift(tap)``, from a range of taps.
For the gradient of the input, outputs and inputs change places; with a stride only some taps then
reach a given pixel, so taps are ordered by their remainder first.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featherweight.sparse.execute.pattern import SparsePattern

Ints = NDArray[np.int32]
Pair = tuple[int, int]

TILES = (8, 4, 2, 1)  # vectors in a tile; then a quarter of a vector, then one entry


@dataclass(frozen=True)
class Axis:
    """One axis of a convolution, as an output sees it or, ``flipped``, as an input sees it.

    Attributes:
        taps: size of the kernel.
        stride, padding: as in `torch.nn.Conv2d`.
        flipped: the roles of inputs and outputs are exchanged.
    """

    taps: int
    stride: int
    padding: int
    flipped: bool = False

    def order(self) -> Ints:
        """Return the taps in the order of the kernels."""
        taps = np.arange(self.taps, dtype=np.int32)
        if self.flipped:
            return taps[np.lexsort((taps // self.stride, taps % self.stride))]
        return taps

    def shifts(self) -> Ints:
        """Return what each tap, in that order, adds to the base."""
        return -(self.order() // self.stride) if self.flipped else self.order()

    def reach(self, outputs: int, inputs: int) -> Ints:
        """Return base, first tap and end of taps of each output: (outputs, 3)."""
        out = np.arange(outputs, dtype=np.int32)[:, None]
        if self.flipped:
            base = (out + self.padding) // self.stride
            valid = (out + self.padding) % self.stride == self.order() % self.stride
        else:
            base = out * self.stride - self.padding
            valid = np.ones((outputs, self.taps), dtype=bool)
        places = base + self.shifts()
        valid = valid & (places >= 0) & (places < inputs)
        first = np.where(valid.any(1), valid.argmax(1), 0)
        return np.stack([base[:, 0], first, first + valid.sum(1)], 1).astype(np.int32)


def runs(reach: Ints) -> Ints:
    """Join neighbours that take neighbouring inputs by the same taps.

    Args:
        reach: (outputs, 3).

    Returns:
        (runs, 5): first output, end, base, first tap, end of taps.
    """
    index = np.arange(len(reach), dtype=np.int32)
    joins = (np.diff(reach, axis=0) == (1, 0, 0)).all(1)
    begin = index[np.append(True, ~joins)]
    end = np.append(begin[1:], len(reach))
    return np.column_stack([begin, end, reach[begin]]).astype(np.int32)


def tiles(runs: Ints, batch: int, lanes: int) -> Ints:
    """Cut the runs of a line into what a kernel computes at a time.

    Args:
        runs: see `runs`.
        batch: entries in a pixel.
        lanes: entries in a vector.

    Returns:
        (tiles, 5): first entry of the output, of the input, index of the size in `TILES` and what
        follows it, first tap, end of taps.
    """
    sizes = [*(count * lanes for count in TILES), lanes // 4, 1]
    found: list[tuple[int, ...]] = []
    for begin, end, base, first, last in runs.tolist():
        done, length = 0, (end - begin) * batch
        for kind, size in enumerate(sizes):
            while length - done >= size:
                found.append((begin * batch + done, base * batch + done, kind, first, last))
                done += size
    return np.array(found, dtype=np.int32).reshape(-1, 5)


class Convolution(NamedTuple):
    """The numbers that describe a convolution, or ``flipped`` its transposed.

    Attributes:
        kernel, stride, padding: vertical, horizontal; of the convolution in both cases.
        flipped: outputs of the kernel are the convolution's inputs.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    flipped: bool = False

    @property
    def taps(self) -> int:
        """Taps of the whole kernel."""
        return prod(self.kernel)

    def axes(self) -> tuple[Axis, Axis]:
        """Return the vertical and the horizontal axis."""
        down, right = zip(self.kernel, self.stride, self.padding, strict=True)
        return Axis(*down, self.flipped), Axis(*right, self.flipped)

    def output(self, height: int, width: int) -> Pair:
        """Return height and width of the convolution's output for those of its input."""
        size = zip((height, width), self.kernel, self.stride, self.padding, strict=True)
        down, right = ((n + 2 * p - k) // s + 1 for n, k, s, p in size)
        return down, right

    def order(self, pattern: SparsePattern) -> tuple[Tensor, ...]:
        """Order the weights of a pattern by the kernel's output channel, then by tap.

        Returns:
            Input channel of each weight, (nnz,); its position among the values, (nnz,); where each
            tap of each output channel begins, and the end, (channels * taps + 1,). All int32.
        """
        outputs, inputs = pattern.shape[:2]
        place = pattern.flat().cpu().numpy()
        output, rest = np.divmod(place, inputs * self.taps)
        channel, tap = np.divmod(rest, self.taps)
        row, other = (channel, output) if self.flipped else (output, channel)
        down, right = (axis.order() for axis in self.axes())
        rank = np.argsort((down[:, None] * self.kernel[1] + right).reshape(-1))
        group = row * self.taps + rank[tap]
        source = np.argsort(group, kind="stable")
        pointers = np.zeros((inputs if self.flipped else outputs) * self.taps + 1, dtype=np.int32)
        pointers[1:] = np.bincount(group, minlength=len(pointers) - 1).cumsum()
        found = (other[source].astype(np.int32), source.astype(np.int32), pointers)
        return tuple(torch.from_numpy(array) for array in found)


def form_of(conv: nn.Conv2d) -> Convolution:
    """Describe a dense convolution; its groups, dilation and kind of padding are passed over."""
    padding = conv.padding
    if isinstance(padding, str):
        same = padding == "same"
        padding = (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2) if same else (0, 0)
    kernel, stride = conv.kernel_size, conv.stride
    return Convolution((kernel[0], kernel[1]), (stride[0], stride[1]), (padding[0], padding[1]))


class Tables(NamedTuple):
    """What a kernel needs to know of the shapes.

    Attributes:
        lines: (height, 3): base, first tap and end of taps of each line of the output.
        tiles: see `tiles`.
        shifts: (taps,), in pixels of the input.
    """

    lines: Ints
    tiles: Ints
    shifts: Ints


@functools.lru_cache(maxsize=256)
def tables(form: Convolution, out: Pair, into: Pair, batch: int, lanes: int) -> Tables:
    """Tabulate a convolution for one shape.

    Args:
        form: the convolution.
        out, into: height and width of what the kernel writes and of what it reads.
        batch, lanes: entries in a pixel, and in a vector.
    """
    down, right = form.axes()
    line = runs(right.reach(out[1], into[1]))
    shifts = down.shifts()[:, None] * into[1] + right.shifts()
    return Tables(
        lines=down.reach(out[0], into[0]),
        tiles=tiles(line, batch, lanes),
        shifts=shifts.reshape(-1).astype(np.int32),
    )
