"""Which examples each client trains on, step by step.

Epochs are shuffled anew, the last batch of an epoch is kept though it be smaller, and a client's
batches are a pure function of (seed, client, round).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from featherweight.federated.population import Population
from featherweight.federated.streams import shuffles

Batch = tuple[Tensor, Tensor | None]  # indices [k, b], mask [k, b] or None where all count


@dataclass(frozen=True, eq=False)
class Work:
    """The batches of clients that train side by side.

    Attributes:
        places: where the clients stand in the cohort, int64, [C]; most steps first.
        clients: their ids, int64, [C].
        sizes: their numbers of examples, int64, [C].
        steps: their numbers of local steps, int64, [C], falling.
        width: largest batch.
        orders: [C, epochs, max(sizes)], see `shuffles`; None: every batch is all examples.
        population: whose examples.
    """

    places: Tensor
    clients: Tensor
    sizes: Tensor
    steps: Tensor
    width: int
    orders: Tensor | None
    population: Population

    @property
    def active(self) -> list[int]:
        """For each step, how many clients (from the first on) still train."""
        longest = int(self.steps[0])
        counts = (self.steps[:, None] > torch.arange(longest)).sum(0)
        return [int(count) for count in counts]

    def batch(self, step: int, rows: int) -> Batch:
        """Return the examples of a step of the first ``rows`` clients."""
        sizes = self.sizes[:rows, None]
        column = torch.arange(self.width)
        if self.orders is None:
            position, inside = column.expand(rows, -1), column < sizes
        else:
            position, inside = self._positions(step, sizes, column)
        starts = self.population.offsets[self.clients[:rows]][:, None]
        indices = self.population.indices[starts + torch.where(inside, position, 0)]
        return indices, None if bool(inside.all()) else inside

    def _positions(self, step: int, sizes: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        assert self.orders is not None
        batches = -(-sizes // self.width)
        place = (step % batches) * self.width + column
        inside = place < sizes
        place = place.clamp(max=self.orders.shape[2] - 1)
        epoch = (step // batches)[:, :, None].expand(-1, 1, self.orders.shape[2])
        order = self.orders[: len(sizes)].gather(1, epoch)[:, 0]
        return order.gather(1, place), inside

    def rows(self, mask: Tensor) -> Work:
        """Return the work of some of the clients."""
        chosen = (self.places, self.clients, self.sizes, self.steps)
        places, clients, sizes, steps = (values[mask] for values in chosen)
        orders = None if self.orders is None else self.orders[mask]
        return Work(places, clients, sizes, steps, self.width, orders, self.population)

    def counts(self) -> Tensor:
        """Return the number of examples that each client's steps visit, int64, [C]."""
        if self.orders is None:
            return self.steps * self.sizes
        batches = -(-self.sizes // self.width)
        rest = (self.steps % batches) * self.width  # the short batch ends an epoch
        return (self.steps // batches) * self.sizes + rest


def everything(work: Work, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches that together hold each example of each client once, in its own order."""
    for start in range(0, int(work.sizes.max()), width):
        position = torch.arange(start, start + width)
        inside = position < work.sizes[:, None]
        starts = work.population.offsets[work.clients][:, None]
        yield work.population.indices[starts + torch.where(inside, position, 0)], inside


def plan(
    population: Population,
    cohort: Tensor,
    steps: Tensor,
    *,
    batch_size: int | None,
    round: int,
    seed: int,
    limit: int,
) -> list[Work]:
    """Group a cohort into clients that train side by side.

    Args:
        population: whose examples.
        cohort: ids, int64, [M].
        steps: local steps of each, int64, [M].
        batch_size: examples a step; None: all of a client.
        round: from 0.
        seed: of the stream of batches.
        limit: most clients in a group.

    Returns:
        Groups of like batch width (within a factor of two, unless padding is cheap), and of at most
        ``limit`` clients, most steps first.
    """
    if not len(cohort):
        return []
    sizes = population.sizes[cohort]
    widths = sizes if batch_size is None else sizes.clamp(max=batch_size)
    groups: list[Work] = []
    for members in _like(widths):
        members = members[steps[members].argsort(descending=True, stable=True)]
        for places in members.split(limit):
            groups.append(_group(population, cohort, steps, places, batch_size, round, seed))
    return groups


def _like(widths: Tensor) -> list[Tensor]:
    if int(widths.max()) * len(widths) <= 2 * int(widths.sum()):
        return [torch.arange(len(widths))]
    classes = widths.double().log2().ceil()
    return [(classes == value).nonzero()[:, 0] for value in classes.unique()]


def _group(
    population: Population,
    cohort: Tensor,
    steps: Tensor,
    places: Tensor,
    batch_size: int | None,
    round: int,
    seed: int,
) -> Work:
    clients = cohort[places]
    sizes, own = population.sizes[clients], steps[places]
    largest = int(sizes.max())
    width = largest if batch_size is None else min(batch_size, largest)
    orders = None
    if width < largest:
        epochs = int((-(-own // -(-sizes // width))).max())
        orders = shuffles(seed, round, clients, sizes, max(epochs, 1))
    return Work(places, clients, sizes, own, width, orders, population)
