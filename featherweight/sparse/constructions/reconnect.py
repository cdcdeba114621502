"""Move entries that no signal reaches to places where one does."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from featherweight.common import Generator, unwrap
from featherweight.sparse.constructions.graph import Layer, unit_graph, weight_layers
from featherweight.sparse.constructions.union import fill
from featherweight.sparse.constructions.walks import Walks
from featherweight.sparse.flow import _blocks, _unblock, on_path
from featherweight.sparse.masks import Masks
from featherweight.sparse.select import top_k


def reconnect(
    masks: Masks, room: Masks, model: nn.Module, inputs: Tensor, generator: Generator
) -> Masks:
    """Move every entry on no path from input to output to a place on one, keeping their number.

    Such entries are dropped, and as many added in the same layer between an input unit that a
    signal reaches and an output unit that has a way on: first to the kernels that hold most.
    Where a layer has no such place left, the rest goes to random walks, on which all entries are
    equally likely; layers can then keep more or less than before.

    Args:
        masks: the masks to mend; not changed.
        room: where entries may be kept, all on a path inside.
        model: left as found.
        inputs: example batch; only its shape, dtype and device matter.
        generator: decides among equals.

    Returns:
        Masks of the same number of entries, all on a path.

    Raises:
        ValueError: the number can't be met, such as a number of less than one path.

    Source: the last step of Pham et al. 2023, with entries between used units added where its
    kernels are full.
    """
    total, counts = masks.nonzeros, masks.counts()
    owners = weight_layers(unwrap(model))
    tried = masks
    while True:
        live = on_path(masks, model, inputs)
        if live.nonzeros == total:
            return live
        masks = _refill(live, room - tried, counts, owners, generator)
        if masks.nonzeros < total:
            break
        tried = tried | masks
    mass = {name: torch.ones_like(layer.weight) for name, layer in owners.items()}
    mass |= {name: mask.to(mass[name]) for name, mask in room.items()}
    walks = Walks(unit_graph(model, inputs), mass, room, generator)
    return fill(live, total, walks, model, inputs)


def _refill(
    live: Masks,
    free: Masks,
    counts: dict[str, int],
    owners: Mapping[str, Layer],
    generator: Generator,
) -> Masks:
    """Give each layer back what it lost, as far as it has places between used units."""
    filled = {}
    for name, mask in live.items():
        wish = counts[name] - int(mask.sum())
        filled[name] = mask | _add(mask, free[name] & ~mask, wish, owners[name], generator)
    return Masks(filled)


def _add(live: Tensor, free: Tensor, wish: int, layer: Layer, generator: Generator) -> Tensor:
    """Choose up to ``wish`` free entries between used units, in the fullest kernels first."""
    block = _blocks(live.cpu(), layer)
    kernels = block.sum(3)
    used = (kernels.sum(2) > 0)[:, :, None, None] & (kernels.sum(1) > 0)[:, None, :, None]
    places = _blocks(free.cpu(), layer) & used
    worth = kernels[..., None] + torch.rand(block.shape, generator=generator)
    chosen = top_k(worth, min(wish, int(places.sum())), places)
    return _unblock(chosen, live, layer)
