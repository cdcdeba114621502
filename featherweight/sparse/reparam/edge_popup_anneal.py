"""Edge-popup from dense to sparse: the density is lowered level by level, scores are kept.

Source: J. Fischer, A. Gadhikar and R. Burkholz, arXiv:2110.11150, and J. Fischer and R. Burkholz,
ICLR 2022, arXiv:2111.11153.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from featherweight.sparse.reparam.edge_popup import EdgePopup, count, popups


def edge_popup_densities(density: float, levels: int, start: float = 1.0) -> list[float]:
    """Return ``start * (density / start)^(t / levels)`` for t = 1, ..., levels; the last is exact.

    The literature uses ``start`` 1 with a level an epoch or more, and 0.6 for images.

    Args:
        density: at the end, in (0, start].
        levels: at least 1; 1 means no annealing.
        start: in (0, 1].

    Raises:
        ValueError: an argument out of range.
    """
    if not 0 < density <= start <= 1 or levels < 1:
        raise ValueError(
            f"need 0 < density <= start <= 1 and levels >= 1: {density=}, {start=}, {levels=}"
        )
    ratio = density / start
    return [*(start * ratio ** (t / levels) for t in range(1, levels)), density]


def set_density_(model: nn.Module, density: float | Mapping[str, float]) -> None:
    """Let a model under edge-popup keep another fraction of each layer, in place.

    Nothing is lost: scores, and weights that are masked now, stay. The state dict does not hold the
    density: call this again on a model that you load it into.

    Args:
        model: a model under `edge_popup`.
        density: as there.

    Raises:
        ValueError: a density out of range or beyond a support, or no layer under `edge_popup`.
            Nothing is changed then.
    """
    for form, kept in _counts(model, density):
        for rival in form.rivals:
            rival.kept = kept


def edge_popup_anneal(
    model: nn.Module, density: float, levels: int, start: float = 1.0
) -> Iterator[float]:
    """Lower the density of a model under edge-popup, and let the user train between.

    Each level is a training of its own, with a fresh schedule of the learning rate::

        for density in edge_popup_anneal(model, 0.05, levels=5):
            train(model)  # the user's own

    Args:
        model: a model under `edge_popup`; its own density is replaced.
        density: at the last level.
        levels: number of trainings.
        start: density that the descent begins from, see `edge_popup_densities`; lowered to that of
            the sparsest support.

    Yields:
        The density that has just been set.

    Raises:
        ValueError: an argument out of range, or no layer under `edge_popup`.
    """
    _counts(model, density)
    for value in edge_popup_densities(density, levels, min(start, *_held(model))):
        set_density_(model, value)
        yield value


@torch.no_grad()
def clamp_scores_(model: nn.Module) -> None:
    """Set negative scores of a model under edge-popup to 0, in place.

    Some published runs do so after each step; then an edge that was voted out stays out until its
    gradient turns, where otherwise ``|c|`` lets it come back with the other sign.
    """
    for form in popups(model).values():
        form.scores.clamp_(min=0)


def _layers(model: nn.Module) -> dict[str, EdgePopup]:
    """Return the forms that stand first in their ranking: one a layer."""
    return {name: form for name, form in popups(model).items() if form.rivals[0] is form}


def _counts(model: nn.Module, density: float | Mapping[str, float]) -> list[tuple[EdgePopup, int]]:
    """Return the first form of each layer and how many entries the layer is to keep."""
    return [
        (form, count(name, density, [rival.support for rival in form.rivals]))
        for name, form in _layers(model).items()
    ]


def _held(model: nn.Module) -> list[float]:
    """Return the density of each layer's support."""
    supports = [[r.support for r in form.rivals] for form in _layers(model).values()]
    return [int(sum(s.sum() for s in layer)) / sum(s.numel() for s in layer) for layer in supports]
