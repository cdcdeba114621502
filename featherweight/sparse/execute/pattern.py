"""Where the kept entries of a weight are: compressed rows, and their twin by columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**31 - 1


@dataclass(frozen=True, eq=False)
class SparsePattern:
    """The kept entries of one weight; immutable. Made by `from_mask`.

    A weight of any rank is stored as the matrix of its first axis times all others, so that a
    convolution's ``(O, I, kh, kw)`` is ``O x (I kh kw)``. Values are ordered by rows. All index
    tensors are int32, which every kernel takes.

    Attributes:
        shape: of the dense weight.
        crow: (rows + 1,), where each row begins in ``col``, and the end of the last.
        col: (nnz,), column of each value.
        crow_t: (cols + 1,), where each column begins in ``row_t``, and the end of the last.
        row_t: (nnz,), row of each value in the order of columns.
        perm: (nnz,), position in ``col`` of each value in the order of columns, so that
            ``values.index_select(0, perm)`` are the values by columns.
        derived: what a backend made of the pattern once, by the backend's name; see `derive`.
    """

    shape: tuple[int, ...]
    crow: Tensor
    col: Tensor
    crow_t: Tensor
    row_t: Tensor
    perm: Tensor
    derived: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_mask(cls, mask: Tensor) -> SparsePattern:
        """Build the pattern of a mask.

        Args:
            mask: bool, of rank 2 or more, on any device.

        Raises:
            TypeError: it is not a boolean tensor.
            ValueError: its rank is under 2, or it is too large for int32 indices.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a boolean tensor, got {mask.dtype}")
        if mask.ndim < 2:
            raise ValueError(f"mask must have rank 2 or more, got shape {tuple(mask.shape)}")
        if mask.numel() > LARGEST:
            raise ValueError(f"mask has {mask.numel()} entries, int32 indices reach {LARGEST}")
        rows, cols = mask.shape[0], prod(mask.shape[1:])
        row, col = mask.reshape(rows, cols).nonzero(as_tuple=True)
        perm = col.to(torch.int32).argsort(stable=True)
        return cls(
            shape=tuple(mask.shape),
            crow=_offsets(row, rows),
            col=col.to(torch.int32),
            crow_t=_offsets(col, cols),
            row_t=row[perm].to(torch.int32),
            perm=perm.to(torch.int32),
        )

    @property
    def nnz(self) -> int:
        """Number of kept entries."""
        return self.col.numel()

    @property
    def rows(self) -> int:
        """First axis of the weight."""
        return self.shape[0]

    @property
    def cols(self) -> int:
        """Product of all other axes."""
        return prod(self.shape[1:])

    @property
    def density(self) -> float:
        """Kept fraction; 1 for a weight without entries."""
        size = self.rows * self.cols
        return self.nnz / size if size else 1.0

    @property
    def device(self) -> torch.device:
        """Where the index tensors are."""
        return self.col.device

    @property
    def nbytes(self) -> int:
        """Bytes of all index tensors, those included that a backend derived."""
        own = (self.crow, self.col, self.crow_t, self.row_t, self.perm)
        made = [t for value in self.derived.values() for t in value]
        return sum(tensor.nbytes for tensor in (*own, *made))

    def derive(
        self, name: str, make: Callable[[SparsePattern], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return the index tensors that a backend makes of the pattern; made once and kept."""
        if name not in self.derived:
            self.derived[name] = make(self)
        found: tuple[Tensor, ...] = self.derived[name]
        return found

    def flat(self) -> Tensor:
        """Return the position of each value in the flattened weight: (nnz,), int64, rising."""
        return flat_index(self.crow, self.col, self.cols)

    def mask(self) -> Tensor:
        """Return the mask: bool, of ``shape``."""
        mask = torch.zeros(self.rows * self.cols, dtype=torch.bool, device=self.device)
        return mask.index_fill_(0, self.flat(), True).view(self.shape)

    def gather(self, dense: Tensor) -> Tensor:
        """Return the kept entries of a dense tensor of ``shape``: (nnz,); differentiable."""
        self._check(dense)
        return dense.reshape(-1).index_select(0, self.flat())

    def scatter(self, values: Tensor) -> Tensor:
        """Return values (nnz,) as a dense tensor of ``shape``, zero elsewhere; differentiable.

        Raises:
            ValueError: there are more or fewer values than kept entries.
        """
        if values.shape != (self.nnz,):
            raise ValueError(f"values must be ({self.nnz},), got {tuple(values.shape)}")
        return (
            values.new_zeros(self.rows * self.cols)
            .index_copy(0, self.flat(), values)
            .view(self.shape)
        )

    def values_t(self, values: Tensor) -> Tensor:
        """Return values (nnz,) in the order of columns."""
        return values.index_select(0, self.perm)

    def to(self, device: torch.device | str) -> SparsePattern:
        """Return the pattern on a device; itself where it is there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        return SparsePattern(
            self.shape,
            self.crow.to(device),
            self.col.to(device),
            self.crow_t.to(device),
            self.row_t.to(device),
            self.perm.to(device),
        )

    def same(self, other: SparsePattern) -> bool:
        """Tell whether the other pattern keeps exactly the same entries."""
        if self is other:
            return True
        return (
            self.shape == other.shape
            and torch.equal(self.crow, other.crow.to(self.device))
            and torch.equal(self.col, other.col.to(self.device))
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsePattern:
        return self  # it never changes

    def __repr__(self) -> str:
        return f"SparsePattern(shape={self.shape}, nnz={self.nnz}, density={self.density:.4g})"

    def _check(self, dense: Tensor) -> None:
        if tuple(dense.shape) != self.shape:
            raise ValueError(f"tensor must be of shape {self.shape}, got {tuple(dense.shape)}")


def _offsets(index: Tensor, size: int) -> Tensor:
    offsets = torch.zeros(size + 1, dtype=torch.int32, device=index.device)
    offsets[1:] = torch.bincount(index, minlength=size).cumsum(0)
    return offsets


def flat_index(crow: Tensor, col: Tensor, columns: int) -> Tensor:
    """Return where the entries of a CSR matrix stand when it is flattened: (nnz,), int64."""
    row = torch.arange(len(crow) - 1, device=col.device)
    row = row.repeat_interleave(crow.diff().long(), output_size=len(col))
    return row.mul_(columns).add_(col)
