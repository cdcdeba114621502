"""Structure: which sets of entries may be kept, apart from what they are worth and how many."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


class Structure(ABC):
    """A way to cut a weight into groups of entries; each structure says what a group may keep.

    The first dimension of a weight counts as outputs, the second as inputs, the rest as kernel.
    """

    max_density = 1.0
    """Kept fraction that every weight can reach, whatever its shape."""

    @staticmethod
    def parse(text: str | Structure) -> Structure:
        """Read a structure from text.

        Args:
            text: "N:M" such as "2:4", "RxC" such as "4x4", or "channel"; a structure is returned
                as it is.

        Raises:
            ValueError: the text is none of these, or its numbers make no sense.
        """
        if isinstance(text, Structure):
            return text
        if text == "channel":
            return Channel()
        for kind, pattern in ((NM, r"(\d+):(\d+)"), (Block, r"(\d+)x(\d+)")):
            if found := re.fullmatch(pattern, text, re.ASCII):
                return kind(int(found[1]), int(found[2]))
        raise ValueError(
            f"structure must be 'N:M' such as '2:4', 'RxC' such as '4x4', or 'channel', "
            f"got {text!r}"
        )

    @abstractmethod
    def tiles(self, tensor: Tensor, fill: float | bool = 0) -> Tensor:
        """Cut a tensor into its groups.

        Args:
            tensor: any shape ``[outputs, inputs, *kernel]``.
            fill: what stands where a group reaches over the edge.

        Returns:
            Tensor [groups, entries of a group].
        """

    @abstractmethod
    def untile(self, tiles: Tensor, shape: torch.Size) -> Tensor:
        """Undo `tiles` for a tensor of this shape."""

    @abstractmethod
    def allows(self, mask: Tensor, support: Tensor | None = None) -> bool:
        """Tell whether one mask follows the structure; see `satisfies`."""


@dataclass(frozen=True)
class NM(Structure):
    """At most ``n`` kept of every ``m`` consecutive inputs of an output (N:M sparsity).

    In a convolution the groups run over input channels, for each output and each position in the
    kernel on its own: channels last, the layout that sparse tensor cores multiply in. What is left
    of the inputs after the last whole group is a group too, as if padded by zeros: it keeps up to
    ``n`` of its fewer entries.

    Args:
        n: how many of a group may be kept, at least 1.
        m: size of a group, at least ``n``.

    Raises:
        ValueError: ``n`` lies outside [1, m].

    Source: Mishra et al. 2021, arXiv:2104.08378.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise ValueError(f"structure {self}: n must lie in [1, m], got n={self.n}, m={self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def max_density(self) -> float:  # type: ignore[override]
        """Kept fraction that every weight can reach, whatever its shape: ``n / m``."""
        return self.n / self.m

    def tiles(self, tensor: Tensor, fill: float | bool = 0) -> Tensor:
        """Cut a tensor into groups [outputs * kernel * groups, m]."""
        rows = _channels_last(tensor)
        return pad(rows, (0, -rows.shape[1] % self.m), value=fill).reshape(-1, self.m)

    def untile(self, tiles: Tensor, shape: torch.Size) -> Tensor:
        """Undo `tiles` for a tensor of this shape."""
        like = _channels_last(torch.empty(shape, device="meta"))
        rows = tiles.reshape(like.shape[0], -1)[:, : like.shape[1]]
        if len(shape) < 3:
            return rows.reshape(shape)
        return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def allows(self, mask: Tensor, support: Tensor | None = None) -> bool:
        """Tell whether no group of a mask keeps more than ``n``."""
        return bool((self.tiles(mask, fill=False).sum(1) <= self.n).all())

    def narrow(self, scores: Tensor, support: Tensor | None = None) -> Tensor:
        """Mark the ``n`` largest scores of every group, of equal ones those with the lowest index.

        What any selection inside these entries keeps follows the structure; and the highest scores
        under the structure, however many, are the highest of these.

        Args:
            scores: real tensor, no NaN.
            support: bool, same shape; entries outside are not marked, in a group that has fewer
                than ``n`` inside all of those are.

        Returns:
            Bool tensor of the scores' shape.
        """
        values = scores.detach()
        values = values if values.is_floating_point() else values.double()
        lowest = torch.finfo(values.dtype).min  # an entry of the support comes before padding
        values = values.clamp(min=lowest)
        if support is not None:
            values = values.masked_fill(~support, -torch.inf)
        tiles = self.tiles(values, fill=-torch.inf)
        order = tiles.sort(dim=1, descending=True, stable=True).indices[:, : self.n]
        chosen = torch.zeros_like(tiles, dtype=torch.bool).scatter_(1, order, True)
        mask = self.untile(chosen, scores.shape)
        return mask.contiguous() if support is None else mask & support


class Whole(Structure):
    """A structure whose groups are kept or dropped as one; inside a support, what it leaves."""

    def allows(self, mask: Tensor, support: Tensor | None = None) -> bool:
        """Tell whether a mask keeps, of every group, all that the support holds or nothing."""
        kept = self.tiles(mask, fill=False)
        room = self.tiles(torch.ones_like(mask) if support is None else support, fill=False)
        return bool(((kept == room).all(1) | ~kept.any(1)).all())

    def worth(self, scores: Tensor, support: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rate every group by the mean score of its entries inside the support.

        The mean is what a group gives for each weight it costs. Where groups are of one size it
        ranks them as the sum does; where they are not (a global scope, edges, a support), the sum
        would prefer a group for being large.

        Args:
            scores: real tensor, no NaN.
            support: bool, same shape.

        Returns:
            Mean scores, float64 [groups], -inf for a group with nothing inside or with infinities
            of both signs; and the numbers of entries inside, int64 [groups].
        """
        inside = torch.ones_like(scores, dtype=torch.bool) if support is None else support
        sizes = self.tiles(inside, fill=False).sum(1)
        counted = torch.where(inside, scores.detach(), 0)
        means = self.tiles(counted).sum(1, dtype=torch.float64) / sizes
        return means.masked_fill(means.isnan(), -torch.inf), sizes

    def expand(self, chosen: Tensor, shape: torch.Size, support: Tensor | None = None) -> Tensor:
        """Return the mask that keeps the chosen groups, bool [groups], inside the support."""
        width = self.tiles(torch.empty(shape, device="meta")).shape[1]
        mask = self.untile(chosen[:, None].expand(-1, width), shape)
        return mask.contiguous() if support is None else mask & support


@dataclass(frozen=True)
class Block(Whole):
    """Tiles of ``rows`` x ``columns`` of the matrix view, kept or dropped as one.

    The matrix is ``weight.flatten(1)``: outputs by inputs, a convolution's kernel innermost, so
    that "1x9" means whole 3 x 3 kernels. Tiles start at the first row and column; those at the far
    edges are smaller.

    Raises:
        ValueError: a side is not positive.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.rows, self.columns) < 1:
            raise ValueError(f"structure {self}: rows and columns must be positive")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def tiles(self, tensor: Tensor, fill: float | bool = 0) -> Tensor:
        """Cut a tensor into blocks [vertical * horizontal, rows * columns]."""
        matrix = _matrix(tensor)
        below, right = (-matrix.shape[0] % self.rows, -matrix.shape[1] % self.columns)
        matrix = pad(matrix, (0, right, 0, below), value=fill)
        grid: Tensor = matrix.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        return grid.transpose(1, 2).reshape(-1, self.rows * self.columns)

    def untile(self, tiles: Tensor, shape: torch.Size) -> Tensor:
        """Undo `tiles` for a tensor of this shape."""
        outputs, inputs = _matrix(torch.empty(shape, device="meta")).shape
        across = -(-inputs // self.columns)
        grid = tiles.reshape(-1, across, self.rows, self.columns).transpose(1, 2)
        matrix = grid.reshape(-1, across * self.columns)
        return matrix[:outputs, :inputs].reshape(shape)


@dataclass(frozen=True)
class Channel(Whole):
    """Whole output channels (of a linear layer: neurons), kept or dropped as one."""

    def __str__(self) -> str:
        return "channel"

    def tiles(self, tensor: Tensor, fill: float | bool = 0) -> Tensor:
        """Cut a tensor into its output channels [outputs, inputs * kernel]."""
        return _matrix(tensor)

    def untile(self, tiles: Tensor, shape: torch.Size) -> Tensor:
        """Undo `tiles` for a tensor of this shape."""
        return tiles.reshape(shape)


def satisfies(
    masks: Mapping[str, Tensor],
    structure: str | Structure | None,
    support: Mapping[str, Tensor] | None = None,
) -> bool:
    """Tell whether masks follow a structure.

    Args:
        masks: bool tensors by name.
        structure: "N:M", "RxC", "channel", or a `Structure`; None is followed by all masks.
        support: masks inside which groups are whole; None: everywhere. N:M does not ask.

    Raises:
        ValueError: the structure is unknown.
    """
    if structure is None:
        return True
    kind = Structure.parse(structure)
    return all(
        kind.allows(mask, None if support is None else support[name])
        for name, mask in masks.items()
    )


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0] if tensor.dim() else 1, -1)


def _channels_last(tensor: Tensor) -> Tensor:
    """View as rows of inputs: one row for each output and kernel position."""
    if tensor.dim() < 3:
        return _matrix(tensor)
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])
