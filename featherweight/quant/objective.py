"""Proxies of the weight quantisation error: fourth powers of rotated weights.

Every weight that R1 turns is written with the residual stream along its columns: a matrix that
reads the stream as ``W diag(gain)``, one that writes to it as ``W^T``. Stacked, they are A
``[rows, d]``, and the objective is a sum over ``(A R1)^4`` (Gadhikar et al. 2025,
arXiv:2512.24124). The norm of W is fixed under rotation, so fourth powers measure outliers:
``max |W| <= ||W||_4``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from featherweight.common import Generator, Registry
from featherweight.quant.decoder import Decoder, Matrix


@dataclass(frozen=True)
class Source:
    """One matrix as rows of A.

    Attributes:
        kind: q, k, v, o, gate, up or down.
        weight: as stored, ``[out, in]``.
        gain: of the norm in front, ``[d]``; None where there is none.
        writes: whether the matrix writes to the residual stream; its *columns* are then rows of A.
    """

    kind: str
    weight: Tensor
    gain: Tensor | None
    writes: bool

    @property
    def rows(self) -> int:
        """Number of rows of A."""
        return self.weight.shape[1 if self.writes else 0]

    @cached_property
    def squares(self) -> Tensor:
        """Squared Frobenius norm with the gain folded; no rotation changes it."""
        weight = self.weight.float()
        return (weight if self.gain is None else weight * self.gain).pow(2).sum()

    def take(self, index: Tensor | None = None) -> Tensor:
        """Return rows of A in float32, ``[m, d]``; all without an index."""
        axis = 1 if self.writes else 0
        part = self.weight if index is None else self.weight.index_select(axis, index)
        part = part.float().mT if self.writes else part.float()
        return part if self.gain is None else part * self.gain


def sources(decoder: Decoder, values: Tensor | None = None) -> list[Source]:
    """List the matrices that will be quantised, with R2 applied to v and o.

    Args:
        decoder: the model.
        values: R2 of each layer, ``[layers, d_h, d_h]``, or None for the identity.
    """
    found = []
    for index, block in enumerate(decoder.blocks):
        turn = None if values is None else values[index].float()
        gains = decoder.gain(block.attention_norm).float(), decoder.gain(block.mlp_norm).float()
        for matrix in block.attention:
            weight = matrix.view() if matrix.kind != "v" else turned_value(matrix, turn)
            found.append(Source(matrix.kind, weight, gains[0], False))
        found.append(Source("o", turned_output(block.output, turn), None, True))
        readers = (matrix for matrix in block.mlp if matrix.kind != "router")
        found += [Source(m.kind, w, gains[1], False) for m in readers for w in _each(m)]
        found += [Source(m.kind, w, None, True) for m in block.down for w in _each(m)]
    return found


def _each(matrix: Matrix) -> Iterable[Tensor]:
    view = matrix.view()
    return view if view.dim() == 3 else (view,)


def turned_value(matrix: Matrix, turn: Tensor | None) -> Tensor:
    """Return ``B^T W_v`` with R2 in each head's block of B; W_v itself without R2."""
    weight = matrix.view()
    if turn is None:
        return weight
    heads = weight.float().view(-1, len(turn), weight.shape[-1])
    return (turn.mT.to(heads) @ heads).view(weight.shape)


def turned_output(matrix: Matrix, turn: Tensor | None) -> Tensor:
    """Return ``W_o B`` with R2 in each head's block of B; W_o itself without R2."""
    weight = matrix.view()
    if turn is None:
        return weight
    heads = weight.float().view(len(weight), -1, len(turn))
    return (heads @ turn.to(heads)).view(weight.shape)


# Weights of rows


Weighting = Callable[[Source, Tensor], Tensor]
"""How much each of the rows ``[m, d]`` of a source counts: ``[m]``."""

OBJECTIVES: Registry[Weighting | None] = Registry("rotation objective")
"""What a rotation minimises: weights of rows, or None for norms over quantised rows."""


@OBJECTIVES.register("l4", "fourth powers of all weights", "Gadhikar et al. 2025, arXiv:2512.24124")
def _plain(source: Source, rows: Tensor) -> Tensor:
    return rows.new_ones(len(rows))


@OBJECTIVES.register("l4_matrix", "the kurtosis of every matrix counts equally")
def _by_matrix(source: Source, rows: Tensor) -> Tensor:
    scale = source.weight.numel() / source.squares.clamp_min(1e-30).pow(2)
    return scale.expand(len(rows))


@OBJECTIVES.register("l4_row", "the kurtosis of every row along the residual stream counts equally")
def _by_row(source: Source, rows: Tensor) -> Tensor:
    return 1 / rows.pow(2).sum(1).pow(2).clamp_min(1e-30)


OBJECTIVES.register("l4_sq", "squared 4-norm of every quantised row or group")(None)


def quartic(rows: Tensor, rotation: Tensor, weights: Tensor) -> tuple[float, Tensor]:
    """Return ``sum_r w_r ||a_r R||_4^4`` and its gradient ``4 A^T diag(w) (A R)^3``.

    Args:
        rows: A, ``[..., m, n]``.
        rotation: R, ``[..., n, n]``.
        weights: w, ``[..., m]``.
    """
    turned = rows @ rotation
    cubes = turned.pow(3).mul_(weights[..., None])
    value = torch.sum(cubes * turned).item()
    return value, 4 * (rows.mT @ cubes)


def grouped(turned: Tensor, writes: bool, group_size: int | None) -> Tensor:
    """Return ``||w||_4^4`` of every quantised row, or group of it, from ``A R``.

    A quantised row of a reading matrix is a row of ``A R``; of a writing one, a column.

    Args:
        turned: ``A R``, ``[m, d]``.
        writes: whether the matrix writes to the residual stream.
        group_size: weights of a row that share a scale; None for the whole row.
    """
    fourth = (turned.mT if writes else turned).pow(4)
    groups: Tensor = fourth.unflatten(1, (-1, group_size or fourth.shape[1]))
    return groups.sum(-1)


def group_norms(
    rows: Tensor, rotation: Tensor, writes: bool, group_size: int | None
) -> tuple[float, Tensor]:
    """Return ``sum ||w||_4^2`` over quantised rows or groups, and its gradient in R."""
    turned = rows @ rotation
    norms = grouped(turned, writes, group_size).sqrt()
    inverse = (2 / norms.clamp_min(1e-30)).repeat_interleave(
        group_size or (len(rows) if writes else rows.shape[1]), dim=1
    )
    slopes = turned.pow(3).mul_(inverse.mT if writes else inverse)
    return norms.sum().item(), rows.mT @ slopes


class Objective:
    """Value and gradient in R1, whole or estimated on a sample.

    Args:
        parts: the matrices.
        name: of :data:`OBJECTIVES`.
        group_size: for ``l4_sq``.
    """

    def __init__(self, parts: Sequence[Source], name: str, group_size: int | None = None) -> None:
        self.parts = list(parts)
        self.weighting = OBJECTIVES[name].method
        self.group_size = group_size

    def of(self, source: Source, rotation: Tensor) -> tuple[float, Tensor]:
        """Return value and gradient of one whole matrix."""
        rows = source.take()
        if self.weighting is None:
            return group_norms(rows, rotation, source.writes, self.group_size)
        return quartic(rows, rotation, self.weighting(source, rows))

    def value(self, rotation: Tensor) -> float:
        """Return the objective over all matrices."""
        return sum(self.of(source, rotation)[0] for source in self.parts)

    def shares(self, rotation: Tensor) -> dict[str, float]:
        """Return which part of the objective comes from each kind of matrix; sums to one."""
        totals = dict.fromkeys((source.kind for source in self.parts), 0.0)
        for source in self.parts:
            totals[source.kind] += self.of(source, rotation)[0]
        whole = sum(totals.values()) or 1.0
        return {kind: total / whole for kind, total in totals.items()}

    def sampled(self, rotation: Tensor, rows: int, generator: Generator) -> tuple[float, Tensor]:
        """Return unbiased estimates of value and gradient from about so many rows of A."""
        total = sum(source.rows for source in self.parts)
        if self.weighting is None:
            return self._sampled_matrices(rotation, min(1.0, rows / total), generator)
        parts, weights = [], []
        for source in self.parts:
            count = max(1, round(source.rows * rows / total))
            index = torch.randint(source.rows, (count,), generator=generator)
            part = source.take(index.to(source.weight.device))
            parts.append(part)
            weights.append(self.weighting(source, part) * (source.rows / count))
        return quartic(torch.cat(parts), rotation, torch.cat(weights))

    def _sampled_matrices(
        self, rotation: Tensor, share: float, generator: Generator
    ) -> tuple[float, Tensor]:
        count = max(1, round(share * len(self.parts)))
        chosen = torch.randperm(len(self.parts), generator=generator)[:count].tolist()
        value, gradient = 0.0, torch.zeros_like(rotation)
        for index in chosen:
            one, slope = self.of(self.parts[index], rotation)
            value, gradient = value + one, gradient + slope
        scale = len(self.parts) / count
        return scale * value, scale * gradient


def largest(parts: Sequence[Source], count: int, rotation: Tensor) -> list[int]:
    """Return which matrices have the largest sums of squared row maxima, after a rotation.

    The sum bounds a matrix's rounding error up to its inputs; the paper reports such a restriction
    without details.
    """

    def size(source: Source) -> float:
        turned = source.take() @ rotation
        return (turned.mT if source.writes else turned).abs().amax(1).pow(2).sum().item()

    return sorted(sorted(range(len(parts)), key=lambda i: -size(parts[i]))[:count])
