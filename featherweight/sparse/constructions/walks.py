"""Random walks over the units of a network, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from featherweight.common import Generator
from featherweight.sparse.constructions.graph import Call
from featherweight.sparse.flow import _blocks

END = -1
"""Where a link leads that leaves the network."""


@dataclass(frozen=True)
class Rows:
    """Distributions over parts of one long list, drawn from by bisection of its running sum.

    Attributes:
        sums: float64 [n + 1], the mass before each element and in all; not normalised.
        starts: int64 [rows + 1], where each row begins; a row may be empty.
    """

    sums: Tensor
    starts: Tensor

    @classmethod
    def of(cls, mass: Tensor, starts: Tensor) -> Rows:
        """Build the table from the mass [n] of every element."""
        sums = torch.zeros(len(mass) + 1, dtype=torch.float64)
        sums[1:] = mass.cumsum(0, dtype=torch.float64)
        return cls(sums, starts)

    @property
    def mass(self) -> Tensor:
        """Mass of every row, float64 [rows]."""
        return self.sums[self.starts].diff()

    def draw(self, rows: Tensor, generator: Generator) -> Tensor:
        """Draw the place of one element from each of the named rows, int64 [draws]."""
        low, high = self.sums[self.starts[rows]], self.sums[self.starts[rows + 1]]
        if (low >= high).any():
            raise RuntimeError("a walk came to a unit from which nothing leads on")
        at = low + (high - low) * torch.rand(len(rows), generator=generator, dtype=torch.float64)
        at = torch.minimum(at, torch.nextafter(high, low))  # rounding may reach the next row
        return torch.searchsorted(self.sums, at, right=True) - 1


@dataclass(frozen=True)
class Hop:
    """How the walks of one direction cross one layer and come to the next.

    Attributes:
        entries: a row for each unit that walks come from; its elements are the layer's entries.
        extent: groups, and of one group: units to come from, units to go to, kernel positions.
        strides: by which these four count in the layer's weight.
        offset: of the weight in the list of all masked entries; None if the layer is not masked.
        links: a row for each unit that walks go to; its elements are what they come to next.
        places: int64 [links], the call that a link leads to, or `END`.
        units: int64 [links], the unit of that call.
    """

    entries: Rows
    extent: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int | None
    links: Rows
    places: Tensor
    units: Tensor

    def cross(self, units: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw what walks at these units do: the entries they pass, the calls and units next."""
        at = torch.unravel_index(self.entries.draw(units, generator), self.extent)
        entries = torch.full_like(units, self.offset or 0)
        for index, stride in zip(at, self.strides, strict=True):
            entries += index * stride
        link = self.links.draw(at[0] * self.extent[2] + at[2], generator)
        return entries, self.places[link], self.units[link]


class Walks:
    """A stream of walks, forward and backward ones in turn.

    Args:
        calls: the graph.
        mass: what entries are drawn in proportion to, >= 0, by weight; all that is positive must
            lie on a path of such.
        weights: the weights that are masked.
        generator: advanced by every draw.
    """

    def __init__(
        self,
        calls: list[Call],
        mass: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        generator: Generator,
    ) -> None:
        ends = list(accumulate([weight.numel() for weight in weights.values()], initial=0))
        offsets = dict(zip(weights, ends, strict=False))
        self._generator = generator
        self._number = 0
        self._hops: dict[bool, list[Hop]] = {}
        self._starts: dict[bool, Tensor] = {}
        for forward in (True, False):
            tables = [_table(call, mass[call.weight], forward) for call in calls]
            self._hops[forward] = [
                _hop(calls, tables, place, forward, offsets.get(call.weight))
                for place, call in enumerate(calls)
            ]
            self._starts[forward] = _starts(calls, tables, forward)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw the next walks.

        Returns:
            For every masked entry that a walk passes, sorted by walks: the walk, int64 [V] from 0
            to ``count - 1``, and the entry, int64 [V], counted through all masked weights.
        """
        numbers = torch.arange(self._number, self._number + count)
        self._number += count
        passed: list[tuple[Tensor, Tensor]] = []
        for forward, parity in ((True, 0), (False, 1)):
            walks = (numbers % 2 == parity).nonzero().flatten()
            starts = self._starts[forward]
            place, unit = starts[numbers[walks] // 2 % len(starts)].unbind(1)
            passed += [(walks[i], e) for i, e in self._walk(place, unit, forward)]
        walk = torch.cat([walks for walks, _ in passed])
        entry = torch.cat([entries for _, entries in passed])
        order = walk.argsort(stable=True)
        return walk[order], entry[order]

    def _walk(self, place: Tensor, unit: Tensor, forward: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Take walks from their starts to the end; yield, layer by layer, who passed what."""
        place, unit = place.clone(), unit.clone()
        hops = list(enumerate(self._hops[forward]))
        for number, hop in hops if forward else reversed(hops):
            here = (place == number).nonzero().flatten()
            if len(here):
                entries, place[here], unit[here] = hop.cross(unit[here], self._generator)
                if hop.offset is not None:
                    yield here, entries


def _table(call: Call, mass: Tensor, forward: bool) -> Rows:
    """Weigh the entries that lead from each input unit (forward) or output unit of a layer."""
    block = _blocks(mass, call.module)
    block = block.transpose(1, 2) if forward else block
    rows, length = block.shape[0] * block.shape[1], block.shape[2] * block.shape[3]
    return Rows.of(block.reshape(-1).cpu(), torch.arange(rows + 1) * length)


def _hop(
    calls: list[Call], tables: list[Rows], place: int, forward: bool, offset: int | None
) -> Hop:
    call = calls[place]
    blank = torch.empty(call.module.weight.shape, device="meta")
    block = _blocks(blank, call.module)
    block = block.transpose(1, 2) if forward else block
    links = _readers(calls, tables, place) if forward else _sources(call, tables)
    row, mass, places, units = (torch.cat(parts) for parts in zip(*links, strict=True))
    order = row.argsort(stable=True)
    count = torch.bincount(row, minlength=call.outputs if forward else call.inputs)
    starts = pad(count.cumsum(0), (1, 0))
    rows = Rows.of(mass[order], starts)
    return Hop(
        tables[place],
        tuple(block.shape),
        block.stride(),
        offset,
        rows,
        places[order],
        units[order],
    )


Links = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of links: the unit they leave, their mass, the call and the unit they lead to."""


def _readers(calls: list[Call], tables: list[Rows], place: int) -> Iterator[Links]:
    """Find what the outputs of a layer lead to: each layer alike, and its units alike."""
    yield _links(calls[place].exit.nonzero().flatten(), END)
    for later, call in enumerate(calls):
        if place in call.sources:
            source = call.sources[place]
            units = ((source >= 0) & (tables[later].mass > 0)).nonzero().flatten()
            row, _, places, _ = _links(source[units], later)
            copies = torch.bincount(row)  # a flattened image has many units for one channel
            yield row, 1 / copies[row].double(), places, units


def _sources(call: Call, tables: list[Rows]) -> Iterator[Links]:
    """Find where the inputs of a layer come from, each layer alike."""
    yield _links(call.entry.nonzero().flatten(), END)
    for earlier, source in call.sources.items():
        live = (source >= 0) & (tables[earlier].mass[source.clamp(min=0)] > 0)
        row, mass, places, _ = _links(live.nonzero().flatten(), earlier)
        yield row, mass, places, source[row]


def _links(row: Tensor, place: int) -> Links:
    return row, torch.ones(len(row), dtype=torch.float64), torch.full_like(row, place), row


def _starts(calls: list[Call], tables: list[Rows], forward: bool) -> Tensor:
    """List the call and unit, int64 [starts, 2], where walks of one direction begin."""
    found = []
    for place, (call, table) in enumerate(zip(calls, tables, strict=True)):
        units = ((call.entry if forward else call.exit) & (table.mass > 0)).nonzero()
        found.append(pad(units, (1, 0), value=place))
    return torch.cat(found)
