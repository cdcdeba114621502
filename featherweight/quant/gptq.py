"""GPTQ: round column by column and let the columns to come make up for the error.

Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", arXiv:2210.17323. With the damped Hessian ``H = X^T X / T`` and ``H^-1 = U^T U``, U
upper triangular, the error of column c over U[c, c] is subtracted from the later columns along
``U[c, c:]``. Equals LDLQ (Chee et al. 2023, arXiv:2307.13304): the loss is exactly
``sum_c D_c ||rounding error of column c||^2`` for ``H = V D V^T``, V unit upper triangular.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.quant.grid import Grid, Quantized, encode, fit, fit_groups, pack_codes
from featherweight.quant.rtn import round_to_nearest


@dataclass(frozen=True)
class Gptq:
    """Options of GPTQ.

    Attributes:
        damping: share of the mean diagonal that is added to the Hessian's, in (0, 1].
        act_order: visit columns by falling diagonal of the Hessian; scales of groups are then
            fixed before, so that no loader needs to know the order.
        static_groups: fix the scales of groups from the original weights; otherwise when the sweep
            reaches them, from the corrected weights (better).
        block: columns whose corrections are applied at once to the rest. Changes no result.
        keep_zeros: weights that are exactly zero stay so: a pruned model keeps its mask.
    """

    damping: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    block: int = 32
    keep_zeros: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")


@dataclass(frozen=True)
class Outcome:
    """A matrix that GPTQ quantised, and how.

    Attributes:
        quantized: codes, scales, zero points.
        damping: that made the Hessian positive definite; None where none did and the matrix was
            rounded to nearest.
    """

    quantized: Quantized
    damping: float | None


def gptq_matrix(
    weight: Tensor, hessian: Tensor, grid: Grid, options: Gptq | None = None
) -> Outcome:
    """Quantise a matrix so that its outputs on the calibration inputs change little.

    If the damped Hessian has no Cholesky factor, in float32 and then in float64, the damping is
    doubled up to 1; if that fails too, the matrix is rounded to nearest and the outcome says so.

    Args:
        weight: ``[rows, columns]``, floating; rows are independent, so matrices that share their
            inputs may be stacked.
        hessian: ``X^T X`` up to a factor, ``[columns, columns]``, symmetric.
        grid: the grid.
        options: see :class:`Gptq`; None for its defaults.

    Raises:
        ValueError: the Hessian has the wrong shape or holds values that are not finite, or groups
            do not divide the row.
    """
    options = options or Gptq()
    columns = weight.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"hessian must be {columns} x {columns}, got {tuple(hessian.shape)}")
    if not torch.isfinite(hessian).all():
        raise ValueError("hessian holds values that are not finite")
    size = grid.size(columns)
    hessian, original = hessian.clone(), weight.float()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    order = _order(hessian, options)
    factor, damping = inverse_factor(hessian[order][:, order], options.damping)
    if factor is None:
        return Outcome(round_to_nearest(weight, grid), None)
    start = original.masked_fill(dead, 0.0)
    fixed = options.static_groups or options.act_order or size == columns
    scales = fit_groups(original, grid) if fixed else None
    sweep = _Sweep(start[:, order], factor.float(), grid, size, options.block, order, scales)
    if options.keep_zeros:
        sweep.frozen = (original == 0)[:, order].mT.contiguous()
    codes, scale, zero = sweep.run()
    return Outcome(Quantized(pack_codes(codes, grid), scale, zero, grid), damping)


def _order(hessian: Tensor, options: Gptq) -> Tensor:
    diagonal = hessian.diagonal()
    if options.act_order:
        return diagonal.argsort(descending=True, stable=True)
    return torch.arange(len(diagonal), device=hessian.device)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor | None, float | None]:
    """Return the upper factor U of ``(H + damping mean(diag H) I)^-1 = U^T U``, and the damping.

    The damping is doubled until float32 or float64 finds a factor, up to 1; None if none is found.
    """
    mean = hessian.diagonal().mean()
    while damping <= 1:
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().add_(damping * mean.to(dtype))
            factor = _upper_factor(damped)
            if factor is not None:
                return factor, damping
        damping *= 2
    return None, None


def _upper_factor(damped: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or not torch.isfinite(upper).all() else upper


def ldl_diagonal(hessian: Tensor) -> Tensor:
    """Return D of ``H = V D V^T`` with V unit upper triangular, by one Cholesky, no inverse.

    Differentiable. ``D_c = 1 / U[c, c]^2``: what a unit of squared rounding error in column c costs
    GPTQ; round to nearest pays ``H[c, c]``.

    Args:
        hessian: positive definite, ``[..., n, n]``.
    """
    lower = torch.linalg.cholesky(hessian.flip(-2, -1))
    diagonal: Tensor = lower.diagonal(dim1=-2, dim2=-1)
    return diagonal.pow(2).flip(-1)


class _Sweep:
    """One pass over the columns, on the transposed weights so that a column is contiguous.

    ``order`` maps the position in the sweep to the column of the stored matrix; groups are of
    stored columns.
    """

    def __init__(
        self,
        weight: Tensor,
        factor: Tensor,
        grid: Grid,
        size: int,
        block: int,
        order: Tensor,
        scales: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.weight = weight.mT.contiguous()  # [columns, rows], becomes the corrected weights
        self.unit = (factor / factor.diagonal()[:, None]).contiguous()  # rows with a diagonal of 1
        self.grid, self.size, self.block, self.order = grid, size, block, order
        groups, rows = len(order) // size, weight.shape[0]
        self.fitted = scales is not None
        self.scale = weight.new_zeros(groups, rows) if scales is None else scales[0].mT.contiguous()
        zero = weight.new_zeros(groups, rows) if scales is None else scales[1].mT.float()
        self.zero = zero.contiguous()
        self.codes = torch.empty_like(self.weight)
        self.frozen: Tensor | None = None

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes ``[rows, columns]``, scale and zero ``[rows, groups]``, as stored."""
        groups = (self.order // self.size).tolist()
        columns = len(groups)
        for start in range(0, columns, self.block):
            stop = min(start + self.block, columns)
            errors = self._run_block(start, stop, groups)
            self.weight[stop:].addmm_(self.unit[start:stop, stop:].mT, errors, alpha=-1)
        codes = torch.empty_like(self.codes)
        codes[self.order] = self.codes
        return codes.mT.contiguous(), self.scale.mT.contiguous(), self.zero.mT.int().contiguous()

    def _run_block(self, start: int, stop: int, groups: list[int]) -> Tensor:
        """Quantise columns start..stop and correct those of the block; return their errors."""
        errors = torch.empty_like(self.weight[start:stop])
        for column in range(start, stop):
            group = groups[column]
            if not self.fitted and column % self.size == 0:
                self._fit(group, column, start, stop, errors)
            errors[column - start] = self._round(column, group)
            later = self.weight[column + 1 : stop]
            later.addr_(self.unit[column, column + 1 : stop], errors[column - start], alpha=-1)
        return errors

    def _round(self, column: int, group: int) -> Tensor:
        current, zero = self.weight[column], self.zero[group]
        codes = encode(current, self.scale[group], zero, self.grid)
        if self.frozen is not None:
            codes = torch.where(self.frozen[column], zero, codes)
        self.codes[column] = codes
        return current - (codes - zero) * self.scale[group]

    def _fit(self, group: int, column: int, start: int, stop: int, errors: Tensor) -> None:
        """Fit a group on weights corrected by *all* columns before, also those of this block."""
        end = column + self.size
        current = self.weight[column:end].clone()
        if end > stop:
            done = self.unit[start:column, stop:end].mT @ errors[: column - start]
            current[stop - column :] -= done
        scale, zero = fit(current.mT, self.grid)
        self.scale[group], self.zero[group] = scale, zero.float()
