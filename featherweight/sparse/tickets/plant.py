"""Planting: hide a known small network in a random large one, to see whether pruning finds it.

Source: J. Fischer and R. Burkholz, "Plant 'n' Seek: Can You Find the Winning Ticket?", ICLR 2022,
arXiv:2111.11153. Here neurons are matched by their signs and up to a positive factor, as ReLU
demands, and outputs keep their places.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.sparse.masks import Masks
from featherweight.sparse.tickets.layers import Layer, layers


@dataclass(frozen=True)
class Planted:
    """A network that holds a target: masked, its output i is ``scales[i]`` times the target's.

    Attributes:
        network: a copy of the source, the ticket's entries overwritten.
        masks: the ticket, of weights and biases.
        scales: float64 (outputs,), all positive.
    """

    network: nn.Sequential
    masks: Masks
    scales: Tensor

    def ticket(self) -> nn.Sequential:
        """Return a copy of the network with exact zeros outside the ticket."""
        alone = copy.deepcopy(self.network)
        self.masks.apply_(alone)
        return alone


@dataclass(frozen=True)
class Recovery:
    """How much of a ticket some masks have found.

    Attributes:
        precision: fraction of the masks' entries that belong to the ticket.
        recall: fraction of the ticket's entries that the masks keep.
        jaccard: size of the intersection over that of the union.
        density: fraction of all entries that the ticket keeps.
    """

    precision: float
    recall: float
    jaccard: float
    density: float


def recovery(found: Mapping[str, Tensor], ticket: Mapping[str, Tensor]) -> Recovery:
    """Compare masks, of a pruner for instance, with a planted ticket.

    Args:
        found: parameter name -> bool mask; parameters it does not name are not compared.
        ticket: masks of those parameters and perhaps more.

    Raises:
        ValueError: ``ticket`` lacks a name, a shape differs, or one of the two keeps nothing.
    """
    if missing := [name for name in found if name not in ticket]:
        raise ValueError(f"ticket has no mask of {missing[0]!r}")
    ours, theirs = Masks(found), Masks({name: ticket[name] for name in found})
    both = (ours & theirs).nonzeros
    if not ours.nonzeros or not theirs.nonzeros:
        raise ValueError(f"masks keep {ours.nonzeros} and the ticket {theirs.nonzeros} entries")
    either = (ours | theirs).nonzeros
    return Recovery(both / ours.nonzeros, both / theirs.nonzeros, both / either, theirs.density)


@torch.no_grad()
def plant(target: nn.Sequential, source: nn.Sequential) -> Planted:
    """Write a target into the source neurons that resemble it most.

    Layer by layer, target neuron v (its bias, and its weights divided by the scales of the neurons
    they read) takes the unused source neuron u of v's signs with the smallest ``|u - c v|_1``,
    ``c = <u, v> / <v, v>``, and u becomes ``c v`` where v is not zero. Its output is then c times
    the target neuron's. Where no unused neuron has these signs, ``c = |u| / |v|``.

    Args:
        target: Sequential of Linear and ReLU in turn; its zeros are no part of the ticket.
        source: the same with as many layers, none narrower. It is not changed.

    Raises:
        ValueError: another form of network, a layer that doesn't fit, or a bias in the target and
            none in the source.
    """
    wanted, drawn = layers(target), layers(source, "source")
    _check(wanted, drawn, dict(source.named_parameters()))
    masks: dict[str, Tensor] = {}
    places = torch.arange(wanted[0].weight.shape[1])
    scales = torch.ones(len(places), dtype=torch.float64)
    for index, (layer, host) in enumerate(zip(wanted, drawn, strict=True)):
        rows = Layer(layer.name, layer.weight / scales, layer.bias).rows()
        fixed = index + 1 == len(wanted)
        columns = torch.cat([places, torch.tensor([host.weight.shape[1]])])
        table = host.rows()
        places, scales = _match(rows, table[:, columns], fixed)
        entries, mask = torch.meshgrid(places, columns, indexing="ij"), rows != 0
        kept = tuple(entry[mask] for entry in entries)
        table[kept] = (scales[:, None] * rows)[mask]
        chosen = torch.zeros_like(table, dtype=torch.bool)
        chosen[kept] = True
        host.weight.copy_(table[:, :-1])
        host.bias.copy_(table[:, -1])
        masks |= {f"{host.name}.weight": chosen[:, :-1], f"{host.name}.bias": chosen[:, -1]}
    return _written(source, drawn, masks, scales)


def _match(rows: Tensor, candidates: Tensor, fixed: bool) -> tuple[Tensor, Tensor]:
    """Return the host of each row and its scale; fixed: host i for row i."""
    free = torch.ones(len(candidates), dtype=torch.bool)
    places, scales = [], []
    for index, row in enumerate(rows):
        support = row != 0
        u, v = candidates[:, support], row[support]
        same = (u * v > 0).all(1)
        scale = torch.where(same, u @ v / (v @ v), u.norm(dim=1) / v.norm())
        scale = torch.where(scale > 0, scale, 1)  # also where a row or a host is all zero
        distance = (u - scale[:, None] * v).abs().sum(1)
        allowed = torch.arange(len(free)) == index if fixed else free
        allowed = allowed & same if (allowed & same).any() else allowed
        place = int(distance.masked_fill(~allowed, torch.inf).argmin())
        free[place] = False
        places.append(place)
        scales.append(scale[place])
    return torch.tensor(places), torch.stack(scales)


def _check(wanted: list[Layer], drawn: list[Layer], parameters: Mapping[str, Tensor]) -> None:
    if len(wanted) != len(drawn):
        raise ValueError(f"source must have {len(wanted)} linear layers, got {len(drawn)}")
    ends = [(n[0].weight.shape[1], n[-1].weight.shape[0]) for n in (wanted, drawn)]
    if ends[0] != ends[1]:
        raise ValueError(f"source must have {ends[0]} inputs and outputs, got {ends[1]}")
    for layer, host in zip(wanted, drawn, strict=True):
        if len(host.weight) < len(layer.weight):
            raise ValueError(f"source layer {host.name!r} is narrower than the target's")
        if layer.bias.any() and f"{host.name}.bias" not in parameters:
            raise ValueError(f"source layer {host.name!r} has no bias, the target's has")


def _written(
    source: nn.Sequential, drawn: list[Layer], masks: dict[str, Tensor], scales: Tensor
) -> Planted:
    network = copy.deepcopy(source)
    values = {f"{layer.name}.{kind}": value for layer in drawn for kind, value in layer.parts()}
    own = dict(network.named_parameters())
    for name, parameter in own.items():
        mask = masks[name].to(parameter.device)
        parameter[mask] = values[name].to(parameter)[mask]
    kept = Masks({name: masks[name].to(parameter.device) for name, parameter in own.items()})
    return Planted(network, kept, scales)
