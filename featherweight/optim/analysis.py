"""Measurements of which weights move: by gradient, by mask, by size, by sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor
from torch.optim import Optimizer

from featherweight.common import Generator, as_generator
from featherweight.optim.nanoadam import NanoAdam

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Relation:
    """How large weights with large gradients are; see `relation`.

    Attributes:
        ratio: median |w| of the largest gradients over max |w| of the smallest; small means that
            large gradients sit on small weights.
        null: the same for each permutation of the gradients, ascending.
        p_value: share of permutations with a ratio as small, itself counted in.
        rank_correlation: of |w| and |g|, Spearman's; 0 if they have nothing to do with each other.
    """

    ratio: float
    null: tuple[float, ...]
    p_value: float
    rank_correlation: float


@torch.no_grad()
def relation(
    weights: Tensor,
    gradients: Tensor,
    *,
    top: float = 1e-4,
    bottom: float = 0.8,
    permutations: int = 99,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Relation:
    """Measure whether large gradients sit on small weights, against chance.

    The ratio alone says nothing: if weights and gradients are independent it is about the median
    over the largest weight, 0.14 for a million Gaussian weights. So it is also taken with the
    gradients permuted.

    Args:
        weights, gradients: finite, of one shape, at least two entries.
        top: fraction of entries with the largest gradients, in (0, 1]; one entry at least.
        bottom: fraction with the smallest, in (0, 1].
        permutations: how many; 0: no null, p_value 1.
        seed, generator: exactly one of the two.

    Raises:
        ValueError: an argument is out of range, or the shapes differ.

    Source: Zhou et al. 2025, arXiv:2506.21374, Table 1 (the ratio); the null is not in the paper.
    """
    if weights.shape != gradients.shape or weights.numel() < 2:
        raise ValueError(
            "weights and gradients must have one shape and two entries or more, got "
            f"{tuple(weights.shape)} and {tuple(gradients.shape)}"
        )
    for name, value in (("top", top), ("bottom", bottom)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} must lie in (0, 1], got {value}")
    if permutations < 0:
        raise ValueError(f"permutations must be at least 0, got {permutations}")
    generator = as_generator(seed, generator)
    sizes = weights.detach().abs().flatten().cpu().double()
    slopes = gradients.detach().abs().flatten().cpu().double()
    order = slopes.argsort(stable=True)
    few, many = max(1, round(top * len(sizes))), max(1, round(bottom * len(sizes)))
    ratio = _ratio(sizes[order], few, many)
    shuffles = (torch.randperm(len(sizes), generator=generator) for _ in range(permutations))
    null = sorted(_ratio(sizes[shuffle], few, many) for shuffle in shuffles)
    as_small = sum(value <= ratio for value in null)
    return Relation(
        ratio, tuple(null), (1 + as_small) / (1 + permutations), _spearman(sizes, slopes)
    )


def _ratio(sizes: Tensor, few: int, many: int) -> float:
    """Return the ratio of weights that are sorted by their gradients."""
    largest = float(sizes[:many].max())
    return float(sizes[-few:].quantile(0.5)) / largest if largest else float("nan")


def _spearman(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([_ranks(first), _ranks(second)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Return ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts.double() - 1) / 2
    return ranks[inverse]


class MaskHistory:
    """Watches which weights a NanoAdam selects, from its first look to its last.

    Call `look` after steps, as often as masks are refreshed. It keeps two bits an entry.

    Args:
        optimizer: whose selected tensors are watched.
    """

    def __init__(self, optimizer: NanoAdam) -> None:
        self._optimizer = optimizer
        self._last: dict[Tensor, Tensor] = {}
        self._ever: dict[Tensor, Tensor] = {}
        self._overlaps: list[float] = []

    def look(self) -> None:
        """Compare the masks in force with those at the look before."""
        common = selected = 0
        for parameter, state in self._optimizer.state.items():
            if "index" not in state:
                continue
            now = self._optimizer.expand(parameter)["selected"]
            if parameter in self._last:
                common += int((now & self._last[parameter]).sum())
                selected += int(now.sum())
            self._ever[parameter] = self._ever.get(parameter, now) | now
            self._last[parameter] = now
        if selected:
            self._overlaps.append(common / selected)

    @property
    def overlaps(self) -> tuple[float, ...]:
        """Share of the selected that were selected at the look before; from the second look on."""
        return tuple(self._overlaps)

    @property
    def ever(self) -> float:
        """Share of the entries of all watched tensors that were selected at some look."""
        entries = sum(mask.numel() for mask in self._ever.values())
        return sum(int(mask.sum()) for mask in self._ever.values()) / entries if entries else 0.0


@torch.no_grad()
def touched(before: Weights, after: Weights) -> dict[str, float]:
    """Return for each tensor the fraction of weights that are not what they were.

    Args:
        before, after: state dicts with the same names and shapes; integer tensors are left out.
    """
    return {name: float((a != b).double().mean()) for name, a, b in _pairs(before, after)}


@torch.no_grad()
def sign_flips(before: Weights, after: Weights) -> dict[str, float]:
    """Return for each tensor the fraction of weights whose sign is now the opposite.

    A weight that is zero before or after has not flipped.

    Args:
        before, after: state dicts with the same names and shapes; integer tensors are left out.
    """
    return {
        name: float((a.sign() * b.sign() < 0).double().mean())
        for name, a, b in _pairs(before, after)
    }


@torch.no_grad()
def shift_by_size(
    before: Weights, after: Weights, fraction: float = 0.3
) -> dict[str, tuple[float, float, float]]:
    """Return how far small, medium and large weights moved: the means of |after - before|.

    Args:
        before, after: state dicts with the same names and shapes; integer tensors are left out.
        fraction: that counts as small, and as large, by the size before; in (0, 0.5].

    Returns:
        Name to means over the smallest, those between, and the largest; nan where there are none.

    Raises:
        ValueError: fraction out of range.

    Source: Zhou et al. 2025, arXiv:2506.21374, Table 7.
    """
    if not 0 < fraction <= 0.5:
        raise ValueError(f"fraction must lie in (0, 0.5], got {fraction}")
    shifts = {}
    for name, a, b in _pairs(before, after):
        moved = (b.double() - a.double()).abs().flatten()[a.abs().flatten().argsort(stable=True)]
        edge = round(fraction * len(moved))
        parts = moved[:edge], moved[edge : len(moved) - edge], moved[len(moved) - edge :]
        small, medium, large = (float(part.mean()) for part in parts)
        shifts[name] = small, medium, large
    return shifts


def _pairs(before: Weights, after: Weights) -> list[tuple[str, Tensor, Tensor]]:
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ValueError(f"before and after must have the same names; only one has {odd[0]!r}")
    pairs = [(n, t.detach(), after[n].detach()) for n, t in before.items() if t.is_floating_point()]
    for name, a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"{name!r}: shape {tuple(a.shape)} before, {tuple(b.shape)} after")
    return pairs


def forgetting(accuracies: Sequence[Sequence[float]]) -> float:
    """Return the mean drop of earlier tasks from their best accuracy to their last.

    Args:
        accuracies: one row for each task learnt, in order: the accuracies after it on the tasks
            up to it, so that row t holds t + 1 numbers or more.

    Returns:
        In the unit of the accuracies; negative if later tasks help earlier ones.

    Raises:
        ValueError: fewer than two tasks, or a row too short.

    Source: Chaudhry et al. 2018, arXiv:1801.10112; for two tasks the forgetting of Zhou et al.
    2025, arXiv:2506.21374, Table 4.
    """
    if len(accuracies) < 2:
        raise ValueError(f"accuracies must cover two tasks or more, got {len(accuracies)}")
    for task, row in enumerate(accuracies):
        if len(row) <= task:
            raise ValueError(f"accuracies[{task}] must hold {task + 1} numbers, got {len(row)}")
    last = len(accuracies) - 1
    best = [max(row[task] for row in accuracies[task:last]) for task in range(last)]
    return mean(top - accuracies[last][task] for task, top in enumerate(best))


def state_bytes(optimizer: Optimizer) -> int:
    """Return the size of an optimizer's state on this process: the sum over its tensors."""
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    local = [getattr(t, "to_local", lambda t=t: t)() for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)
