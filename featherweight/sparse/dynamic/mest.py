"""MEST: random exchange under an elastic (EM) or a soft (EM&S) bound of memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import Generator, as_generator
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.dynamic.evolving import Evolving, Moment, Rule
from featherweight.sparse.dynamic.exchange import by_layer, drop, rewire, sample, within
from featherweight.sparse.dynamic.registry import DYNAMIC
from featherweight.sparse.dynamic.schedules import Timetable, stairs, timetable
from featherweight.sparse.dynamic.start import start_random
from featherweight.sparse.masks import Masks

PAPER = "Yuan et al. 2021, arXiv:2110.14032"

Stairs = Sequence[tuple[float, float]]
"""Rows ``(share of the training from which it holds, fraction)``."""


@DYNAMIC.register(
    "mest-em", "random exchange by |w| + c |gradient|, in steps down to none", PAPER, ["generator"]
)
def mest_em(
    model: nn.Module,
    optimizer: Optimizer,
    density: float | None = None,
    *,
    steps: int,
    sparsity: float | None = None,
    masks: Masks | None = None,
    support: Masks | None = None,
    allocation: Allocation = "erk",
    fractions: Stairs = ((0, 0.2), (90 / 160, 0.1), (120 / 160, 0)),
    gradient_weight: float = 0.0,
    interval: int | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Evolving:
    """Train sparse weights with elastic mutation: drop the least important, grow at random.

    As `set`, with an importance that may count the gradient, and a fraction that falls in stairs.

    Args:
        model: trained by the user.
        optimizer: the torch optimizer that trains it, wrapped or not.
        density: overall kept fraction, in (0, 1]; or give ``sparsity``, or ``masks``. 1 changes
            nothing.
        steps: optimizer steps of the whole training.
        sparsity: ``1 - density``.
        masks: to begin with; None: random ones.
        support: masks that are never left.
        allocation: how random masks share the density among layers, see `sparse.random`.
        fractions: rows ``(share of the training from which it holds, fraction of each layer's
            weights exchanged)``. The paper's: at sparsity 0.9 exchange 0.02, 0.01, 0 of all entries
            from epoch 0, 90, 120 of 160.
        gradient_weight: c of the importance ``|w| + c |gradient|``, >= 0; 0 is the published
            code's. Over 0 the optimizer must be stepped without closure.
        interval: steps from a change to the next; None: 1/32 of the training, the paper's.
        seed, generator: exactly one of the two.
        include, exclude: shell-style parameter name patterns, for random masks.

    Returns:
        The masks in force, that change by themselves until ``remove()``.

    Raises:
        ValueError: a bad argument, or a model that does not fit; nothing is touched then.

    Source: Yuan et al. 2021, arXiv:2110.14032, MEST (EM).
    """
    generator = as_generator(seed, generator)
    times = _times(steps, interval, fractions, gradient_weight)
    start = start_random(
        model,
        density,
        allocation,
        sparsity=sparsity,
        masks=masks,
        support=support,
        generator=generator,
        include=include,
        exclude=exclude,
    )

    def change(now: Moment) -> list[Masks]:
        share = stairs(now.step / steps, fractions)

        def layer(name: str, mask: Tensor) -> Tensor:
            assert now.generator is not None
            count = int(share * int(mask.count_nonzero()))
            worth = importance(now, name, gradient_weight)
            return rewire(mask, worth, count, now.generator, within(support, name, mask))

        return [by_layer(now, layer)]

    rule = Rule("mest-em", times.due, change, gradients=gradient_weight > 0)
    return Evolving(model, optimizer, start, rule, generator)


@DYNAMIC.register(
    "mest-ems", "grow extra weights at random, later prune to the density", PAPER, ["generator"]
)
def mest_ems(
    model: nn.Module,
    optimizer: Optimizer,
    density: float | None = None,
    *,
    steps: int,
    sparsity: float | None = None,
    masks: Masks | None = None,
    support: Masks | None = None,
    allocation: Allocation = "erk",
    fractions: Stairs = ((0, 0.5), (90 / 160, 0.25), (120 / 160, 0)),
    gradient_weight: float = 0.0,
    interval: int | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Evolving:
    """Train sparse weights with elastic mutation and a soft bound of memory.

    Each change prunes every layer to its own number of weights, the least important going, and then
    grows extra ones at random among entries that were masked before. These train along until the
    next change decides who stays. As soon as the fraction of extra weights is 0 the layers
    have exactly their numbers.

    Args:
        model: trained by the user.
        optimizer: the torch optimizer that trains it, wrapped or not.
        density: overall kept fraction without the extra weights, in (0, 1]; or give ``sparsity``,
            or ``masks``. 1 changes nothing.
        steps: optimizer steps of the whole training.
        sparsity: ``1 - density``.
        masks: to begin with, without extra weights; None: random ones.
        support: masks that are never left.
        allocation: how random masks share the density among layers, see `sparse.random`.
        fractions: rows ``(share of the training from which it holds, extra weights as a fraction of
            each layer's own)``; the last fraction must be 0. The paper's: at sparsity 0.9 train at
            0.85, 0.875, 0.9 from epoch 0, 90, 120 of 160.
        gradient_weight: c of the importance ``|w| + c |gradient|``, >= 0; 0 is the published
            code's. Over 0 the optimizer must be stepped without closure.
        interval: steps from a change to the next; None: 1/32 of the training, the paper's.
        seed, generator: exactly one of the two.
        include, exclude: shell-style parameter name patterns, for random masks.

    Returns:
        The masks in force, that change by themselves until ``remove()``.

    Raises:
        ValueError: a bad argument, or a model that does not fit; nothing is touched then.

    Source: Yuan et al. 2021, arXiv:2110.14032, MEST (EM&S).
    """
    generator = as_generator(seed, generator)
    times = _times(steps, interval, fractions, gradient_weight)
    if fractions[-1][1] != 0:
        raise ValueError(f"fractions must end with 0, got {fractions[-1][1]:g}")
    start = start_random(
        model,
        density,
        allocation,
        sparsity=sparsity,
        masks=masks,
        support=support,
        generator=generator,
        include=include,
        exclude=exclude,
    )

    def change(now: Moment) -> list[Masks]:
        share = stairs(now.step / steps, fractions)

        def layer(name: str, mask: Tensor) -> Tensor:
            assert now.generator is not None
            own = now.memory["counts"][name]
            worth = importance(now, name, gradient_weight)
            pruned = drop(mask, worth, int(mask.count_nonzero()) - own)
            allowed = within(support, name, mask)
            free = ~mask if allowed is None else allowed & ~mask
            return pruned | sample(
                free, min(int(share * own), int(free.count_nonzero())), now.generator
            )

        return [by_layer(now, layer)]

    rule = Rule("mest-ems", times.due_or_end, change, gradients=gradient_weight > 0)
    return Evolving(model, optimizer, start, rule, generator, {"counts": start.counts()})


def importance(now: Moment, name: str, gradient_weight: float) -> Tensor:
    """Return ``|w| + c |gradient|`` of one tensor; a gradient that is missing counts as zero."""
    size = now.weights[name].abs()
    gradient = now.gradients.get(name)
    return size if gradient is None else torch.add(size, gradient.abs(), alpha=gradient_weight)


def _times(
    steps: int, interval: int | None, fractions: Stairs, gradient_weight: float
) -> Timetable:
    """Check the arguments; changes end where the fraction becomes 0 for good."""
    stairs(0, fractions)
    if not all(0 <= fraction <= 1 and begin < 1 for begin, fraction in fractions):
        raise ValueError(f"rows (from, fraction) must lie in [0, 1) and [0, 1], got {fractions}")
    if gradient_weight < 0:
        raise ValueError(f"gradient_weight must be at least 0, got {gradient_weight:g}")
    last_begin, last = fractions[-1]
    end = steps if last > 0 else max(1, math.ceil(last_begin * steps))
    return timetable(steps, max(1, steps // 32) if interval is None else interval, 0, end)
