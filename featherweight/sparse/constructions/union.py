"""The union of random walks, taken until exactly as many entries are kept as asked."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.sparse.constructions.walks import Walks
from featherweight.sparse.flow import on_path
from featherweight.sparse.masks import Masks

_PATIENCE = 50_000  # walks in a row that bring the count no nearer before the search ends
_UNDO = 64  # walks that may be taken back where the rest is too small for any walk
_ROUNDS = 100  # times that walks replace entries which no signal reaches


def fill(masks: Masks, keep: int, walks: Walks, model: nn.Module, inputs: Tensor) -> Masks:
    """Add walks to masks until exactly ``keep`` entries are kept, each on a path.

    Args:
        masks: what to begin with, all on paths; not changed.
        keep: how many entries to end with.
        walks: where the walks come from; its weights are those of the masks, in the same order.
        model: left as found.
        inputs: example batch; only its shape, dtype and device matter.

    Raises:
        ValueError: the number can't be met.
    """
    union = _Union(_joined(masks), keep)
    for _ in range(_ROUNDS):
        union.fill(walks)
        found = _split(union.kept, masks)
        live = on_path(found, model, inputs)
        if live.nonzeros == keep:
            return live
        # Shifts by kernels can add up to more than the image: joined units, but no signal.
        union.drop(_joined(found - live))
    raise ValueError(f"walks find no {keep} entries that a signal passes; try another density")


def _joined(masks: Masks) -> Tensor:
    return torch.cat([mask.flatten().cpu() for mask in masks.values()])


def _split(flat: Tensor, like: Masks) -> Masks:
    parts = flat.split([mask.numel() for mask in like.values()])
    return Masks(
        {
            name: part.view(mask.shape).to(mask.device)
            for (name, mask), part in zip(like.items(), parts, strict=True)
        }
    )


class _Union:
    """The entries of the walks taken so far, a given number in the end.

    Args:
        kept: bool [N], the entries to begin with.
        keep: how many are to be kept in the end.
    """

    def __init__(self, kept: Tensor, keep: int) -> None:
        self.kept = kept.clone()
        self.missing = keep - int(kept.sum())
        self._last: list[Tensor] = []  # what each of the last walks added

    def drop(self, entries: Tensor) -> None:
        """Drop entries, named by number or by bool [N]."""
        self.missing += int(self.kept[entries].sum())
        self.kept[entries] = False

    def fill(self, walks: Walks) -> None:
        """Take walks until the number is met.

        Raises:
            ValueError: many walks in a row brought nothing that fits.
        """
        best, idle, blocked = self.missing, 0, False
        while self.missing:
            count = min(max(512, 2 * self.missing), 2**16)
            drawn = walks.draw(count)
            if blocked:
                self._exchange(*drawn)
            else:
                blocked = self._take(*drawn, count)
            idle = 0 if self.missing < best else idle + count
            best = min(best, self.missing)
            if idle > _PATIENCE:
                raise ValueError(
                    f"{idle} walks in a row found nothing that fits, with {best} weights to go: "
                    "the density is too close to all or to nothing"
                )

    def _exchange(self, walk: Tensor, entry: Tensor) -> None:
        """Take the last walk back, and others that together bring just what is missing then.

        Latest first, so that no walk that was taken later loses its path.
        """
        if self._last:
            self.drop(self._last.pop())
        fresh = ~self.kept[entry]
        offers: dict[int, set[int]] = {}
        for number, new in zip(walk[fresh].tolist(), entry[fresh].tolist(), strict=True):
            offers.setdefault(number, set()).add(new)
        sets = list(offers.values())
        taken: set[int] = set()
        for number in choose_sum([len(new) for new in sets], self.missing):
            self._last.append(torch.tensor(list(sets[number] - taken), dtype=torch.long))
            taken |= sets[number]
        self.kept[list(taken)] = True
        self.missing -= len(taken)

    def _take(self, walk: Tensor, entry: Tensor, count: int) -> bool:
        """Take, in their order, the walks that bring no more than is missing.

        Args:
            walk: int64 [V], sorted; the walk that passed each entry.
            entry: int64 [V].
            count: number of walks.

        Returns:
            Whether some walk was passed over.
        """
        fresh = ~self.kept[entry]
        walk, entry = walk[fresh], entry[fresh]
        first = torch.from_numpy(np.unique(entry.numpy(), return_index=True)[1])
        gains = torch.bincount(walk[first], minlength=count).cumsum(0)
        whole = int((gains <= self.missing).sum())  # walks before the first that does not fit
        if whole < count:
            whole = max(0, whole - _UNDO)
        self.kept[entry[walk < whole]] = True
        self.missing -= int(gains[whole - 1]) if whole else 0
        rest = ~self.kept[entry]
        walk, entry = walk[rest], entry[rest]
        bounds = torch.searchsorted(walk, torch.arange(whole, count + 1))
        return self._take_singly(entry.tolist(), bounds.tolist())

    def _take_singly(self, entries: list[int], bounds: list[int]) -> bool:
        taken: set[int] = set()
        blocked = False
        for start, end in pairwise(bounds):
            if not self.missing:
                break
            new = set(entries[start:end]) - taken
            if len(new) > self.missing:
                blocked = True
            elif new:
                taken |= new
                self.missing -= len(new)
                self._last.append(torch.tensor(list(new)))
        self.kept[list(taken)] = True
        return blocked


def choose_sum(sizes: list[int], total: int) -> list[int]:
    """Choose places, few and early ones, whose sizes sum to ``total``; none if none do.

    Args:
        sizes: positive numbers.
        total: the sum to meet.
    """
    reached = [1]  # bit s of element i: the first i sizes hold some of sum s
    for size in sizes:
        reached.append((reached[-1] | reached[-1] << size) & ((1 << total + 1) - 1))
    if not reached[-1] >> total & 1:
        return []
    chosen = []
    for place in reversed(range(len(sizes))):
        if not reached[place] >> total & 1:
            chosen.append(place)
            total -= sizes[place]
    return chosen
