"""Subset sums, solved exactly and in batches: which of these numbers add up to that one?

Of n random numbers the 2^n subset sums lie so densely that n = 20 reach most targets to six digits.
Every proof of strong lottery tickets rests on this, and every construction here on this solver.

Sources: G. Lueker, "Exponentially small bounds on the expected optimum of the partition and subset
sum problems", 1998, Corollary 3.3; A. Pensia et al., NeurIPS 2020, arXiv:2006.07990. Meet in the
middle: E. Horowitz and S. Sahni, 1974.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from featherweight.common import unknown

Method = Literal["auto", "enumerate", "meet"]
METHODS = ("auto", "enumerate", "meet")
ENUMERATED = 4  # up to here listing all sums is the faster way
ENTRIES = 2**16  # sums in work at a time: they fit into a core's cache
LONGEST = 32  # more than 2^16 sums a half are slow
LONGEST_LIST = 20
CENTRAL = 1.5  # standard deviations from the mean up to which sums are dense


class SubsetSums(NamedTuple):
    """Solutions of T problems.

    Attributes:
        masks: bool (T, n), the subset of each problem; a candidate that is 0 is in none.
        errors: float64 (T,), the distance of each subset's sum from its target.
        in_range: bool (T,), whether the target lies between the sum of the negative candidates and
            that of the positive ones. Elsewhere no subset can come near.
    """

    masks: Tensor
    errors: Tensor
    in_range: Tensor


class _Task(NamedTuple):
    """How each batch is solved: method, tolerance and largest size, as `subset_sum` got them."""

    method: str
    tolerance: float | None
    max_size: int | None


@torch.no_grad()
def subset_sum(
    candidates: Tensor,
    targets: Tensor,
    method: Method = "auto",
    *,
    tolerance: float | None = None,
    max_size: int | None = None,
    exact: int = 24,
) -> SubsetSums:
    """Find in each row of candidates the subset whose sum is nearest to the row's target.

    The optimum, in float64, for rows of up to ``exact`` nonzero candidates. Of longer rows so many,
    of all sizes, are searched; a few others bring the target to where the sums of these are dense.
    A problem's answer does not depend on the others of its batch. The expected error of n random
    candidates is ``s sqrt(2 pi) / 2^(n + 1)`` with ``s^2 = n E[c^2] / 4``, see `expected_error`.

    Args:
        candidates: (T, n), finite; a zero marks a place without a candidate and costs nothing.
        targets: (T,), finite.
        method: "enumerate" lists all 2^n sums; "meet" those of two halves, sorted, and looks the
            rest up: O(2^(n/2) n). Both are exact; "auto" takes the faster.
        tolerance: take the *smallest* subset with an error up to this, the nearest of that size;
            where there is none, the nearest of all. None: always the nearest of all.
        max_size: allow at most so many candidates in a subset; None: any number.
        exact: largest number of candidates of a row that are searched exhaustively, 1 to 32;
            "enumerate" never searches more than 20.

    Raises:
        ValueError: bad shapes, numbers or options, or ``max_size`` with rows longer than ``exact``.
    """
    _check(candidates, targets, method, tolerance, max_size, exact)
    exact = min(exact, LONGEST_LIST) if method == "enumerate" else exact
    values, goals = candidates.double(), targets.double()
    filled = values != 0
    counts = filled.sum(1)
    if max_size is not None and counts.numel() and int(counts.max()) > exact:
        raise ValueError(f"max_size needs rows of at most exact={exact} candidates")
    # Zeros go last, and rows of the same length are solved together.
    order = values.abs().argsort(dim=1, descending=True, stable=True)
    task = _Task(method, tolerance, max_size)
    masks = torch.zeros_like(filled)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().flatten()
        places = order[rows, :count]
        chosen = _solve(values[rows[:, None], places], goals[rows], task, exact)
        masks[rows[:, None], places] = chosen
    errors = ((values * masks).sum(1) - goals).abs()
    in_range = (values.clamp(max=0).sum(1) <= goals) & (goals <= values.clamp(min=0).sum(1))
    return SubsetSums(masks, errors, in_range)


def expected_error(count: int, second_moment: float) -> float:
    """Return the mean distance of the nearest of all 2^n subset sums from a target near their mean.

    The sums are about normal with variance ``s^2 = n E[c^2] / 4``, so that the nearest is about
    ``s sqrt(2 pi) / 2^(n + 1)`` away; the median is ln 2 of that. Targets away from the mean by z
    standard deviations have errors larger by ``exp(z^2 / 2)``.

    Args:
        count: n, the number of candidates.
        second_moment: E[c^2] of the candidates.
    """
    deviation = math.sqrt(count * second_moment / 4)
    return deviation * math.sqrt(2 * math.pi) * 0.5 ** (count + 1)


def _check(
    candidates: Tensor,
    targets: Tensor,
    method: str,
    tolerance: float | None,
    max_size: int | None,
    exact: int,
) -> None:
    if method not in METHODS:
        raise ValueError(unknown("method", method, METHODS))
    if candidates.dim() != 2 or targets.shape != candidates.shape[:1]:
        raise ValueError(
            "candidates must be (T, n) and targets (T,), got "
            f"{tuple(candidates.shape)} and {tuple(targets.shape)}"
        )
    if not (candidates.isfinite().all() and targets.isfinite().all()):
        raise ValueError("candidates and targets must be finite, got nan or inf")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0 or None, got {tolerance}")
    if max_size is not None and max_size < 0:
        raise ValueError(f"max_size must be >= 0 or None, got {max_size}")
    if not 1 <= exact <= LONGEST:
        raise ValueError(f"exact must lie in [1, {LONGEST}], got {exact}")


def _solve(values: Tensor, goals: Tensor, task: _Task, exact: int) -> Tensor:
    """Solve rows of equal length without zeros, sorted by falling size; bool (T, n)."""
    count = values.shape[1]
    if count == 0:
        return values.bool()
    if count <= exact:
        return _search(values, goals, task)
    # Near ones of all sizes: the sums of equal sizes would lie in clumps.
    near = torch.zeros(count, dtype=torch.bool, device=values.device)
    near[torch.linspace(0, count - 1, exact).round().long()] = True
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[:, ~near] = _prefix(values[:, near], values[:, ~near], goals)
    rest = goals - (values * chosen).sum(1)
    chosen[:, near] = _search(values[:, near], rest, task)
    return chosen


def _prefix(near: Tensor, far: Tensor, goals: Tensor) -> Tensor:
    """Choose the fewest far candidates that bring the rest to where the near ones' sums are dense.

    These sums have mean ``sum(near) / 2`` and variance ``sum(near^2) / 4``.
    """
    gaps = goals - near.sum(1) / 2
    helpful = (far * gaps.sign()[:, None]).clamp(min=0)
    before = helpful.cumsum(1) - helpful
    excess = gaps.abs() - CENTRAL * near.square().sum(1).sqrt() / 2
    return (helpful > 0) & (excess[:, None] > before)


def _search(values: Tensor, goals: Tensor, task: _Task) -> Tensor:
    """Try all subsets, exactly; bool (T, n)."""
    count = values.shape[1]
    listed = task.method == "enumerate" or (task.method == "auto" and count <= ENUMERATED)
    left = count if listed else (count + 1) // 2
    by_size = task.tolerance is not None or task.max_size is not None
    groups = [_groups(size, by_size, values.device) for size in (left, count - left)]
    chunk = max(1, ENTRIES >> left)
    parts = zip(values.split(chunk), goals.split(chunk), strict=True)
    codes = torch.cat([_best(part, goal, groups, task) for part, goal in parts])
    bits = torch.arange(count, device=values.device)
    return (codes[:, None] >> bits & 1).bool()


Groups = list[Tensor]
"""Codes of subsets of one half of the candidates, bit k is candidate k: by size, or all in one."""


def _groups(count: int, by_size: bool, device: torch.device) -> Groups:
    codes = torch.arange(2**count, device=device)
    if not by_size:
        return [codes]
    sizes = sum((codes >> k & 1 for k in range(count)), torch.zeros_like(codes))
    return [(sizes == size).nonzero().flatten() for size in range(count + 1)]


def _best(values: Tensor, goals: Tensor, groups: list[Groups], task: _Task) -> Tensor:
    """Return the code of the best subset of each row."""
    limit = len(groups[0]) + len(groups[1]) - 2
    limit = limit if task.max_size is None else min(task.max_size, limit)
    errors = values.new_full((len(values), limit + 1), math.inf)
    codes = torch.zeros_like(errors, dtype=torch.long)
    for size, pairs in groupby(_nearest(values, goals, groups, limit), itemgetter(0)):
        for _, error, code in pairs:
            better = error < errors[:, size]
            errors[:, size] = torch.where(better, error, errors[:, size])
            codes[:, size] = torch.where(better, code, codes[:, size])
        if task.tolerance is not None and (errors <= task.tolerance).any(1).all():
            break
    best = errors.argmin(1)
    if task.tolerance is not None:
        fits = errors <= task.tolerance
        best = torch.where(fits.any(1), fits.int().argmax(1), best)
    return codes.gather(1, best[:, None])[:, 0]


def _nearest(
    values: Tensor, goals: Tensor, groups: list[Groups], limit: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield size, error and code of the nearest sum in each pair of groups, by rising size."""
    lefts, rights = groups
    left = int(lefts[-1][-1]).bit_length()
    missing = goals[:, None] - _sums(values[:, :left])
    sums = _sums(values[:, left:])
    ranked: dict[int, tuple[Tensor, Tensor]] = {}
    for size in range(limit + 1):
        for b in range(max(0, size - len(lefts) + 1), min(size, len(rights) - 1) + 1):
            if b not in ranked:
                ranked[b] = sums[:, rights[b]].sort(1)
            rows = lefts[size - b]
            errors, places = _lookup(ranked[b][0], missing[:, rows])
            error, best = errors.min(1)
            place = ranked[b][1].gather(1, places.gather(1, best[:, None]))[:, 0]
            yield size, error, rows[best] + (rights[b][place] << left)


def _sums(values: Tensor) -> Tensor:
    """Return the sums of all subsets, (T, 2^n); column c holds the candidates that c has bits of.

    By doubling and not by a matrix product, whose rounding depends on the size of the batch.
    """
    sums = values.new_zeros(len(values), 1)
    for column in values.T:
        sums = torch.cat([sums, sums + column[:, None]], 1)
    return sums


def _lookup(ranked: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return how near and where each wanted number's nearest neighbour in its row's ranking is."""
    if ranked.shape[1] == 1:
        return (ranked - wanted).abs(), torch.zeros_like(wanted, dtype=torch.long)
    above = torch.searchsorted(ranked, wanted).clamp_(1, ranked.shape[1] - 1)
    up = (ranked.gather(1, above) - wanted).abs_()
    down = (ranked.gather(1, above - 1) - wanted).abs_()
    return torch.minimum(up, down), above - (down <= up).long()
