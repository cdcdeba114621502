"""GraNet: prune gradually, and exchange by the gradient all along."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import Generator, as_generator, kept_density
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.dynamic.evolving import Evolving, Moment, Rule
from featherweight.sparse.dynamic.exchange import by_layer, exchange, within
from featherweight.sparse.dynamic.registry import DYNAMIC
from featherweight.sparse.dynamic.schedules import (
    Curve,
    Timetable,
    cosine,
    curve,
    fraction_of,
    timetable,
)
from featherweight.sparse.dynamic.start import checked, start_random, target
from featherweight.sparse.masks import Masks
from featherweight.sparse.select import select

PAPER = "Liu et al. 2021, arXiv:2106.10404"


@DYNAMIC.register(
    "granet", "prune gradually, exchange by the gradient all along", PAPER, ["generator"]
)
def granet(
    model: nn.Module,
    optimizer: Optimizer,
    density: float | None = None,
    *,
    steps: int,
    sparsity: float | None = None,
    initial_density: float = 0.5,
    masks: Masks | None = None,
    support: Masks | None = None,
    allocation: Allocation = "erk",
    schedule: str | Curve = "cubic",
    fraction: float = 0.5,
    last_fraction: float = 0.005,
    interval: int | None = None,
    begin: int = 0,
    end: int | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Evolving:
    """Train from a denser to a sparser network, regenerating weights where the gradient is large.

    After every ``interval``-th step the network is pruned by global magnitude to the density of the
    schedule, and then each layer exchanges a fraction of its weights: those of smallest absolute
    value go, as many come where the dense gradient of the step's batch is largest. What pruning
    removed and the exchange brings back starts at zero. The exchange goes on to the end of the
    training, its fraction following a cosine.

    Args:
        model: trained by the user.
        optimizer: the torch optimizer that trains it, wrapped or not; stepped without closure.
        density: overall kept fraction at the end, in (0, 1]; or give ``sparsity``.
        steps: optimizer steps of the whole training.
        sparsity: ``1 - density``.
        initial_density: of the random masks to begin with; 1 begins dense.
        masks: to begin with, in place of random ones.
        support: masks that are never left. The published code has none: only its first masks are
            random.
        allocation: how random masks share the density among layers, see `sparse.random`.
        schedule: of the density: a name of ``SCHEDULES`` or a function ``(progress, start, end)``.
        fraction, last_fraction: of each layer's weights exchanged, at the beginning and at the end
            of the training, in [0, 1]; both 0: gradual pruning alone.
        interval: steps from a change to the next; None: 1/64 of the training, about the paper's.
        begin, end: the density falls while the number of steps taken is in [begin, end]; None: 110
            of 160 parts of the training.
        seed, generator: exactly one of the two, for random masks.
        include, exclude: shell-style parameter name patterns, for random masks.

    Returns:
        The masks in force, that change by themselves until ``remove()``.

    Raises:
        ValueError: a bad argument, or a model that does not fit; nothing is touched then.

    Source: Liu et al. 2021, arXiv:2106.10404, algorithm 1.
    """
    wish = kept_density(density, sparsity)
    every = max(1, steps // 64) if interval is None else interval
    pruning = timetable(steps, every, begin, round(110 / 160 * steps) if end is None else end)
    whole = Timetable(pruning.begin, steps, every)
    if masks is None:
        start = start_random(
            model,
            initial_density,
            allocation,
            sparsity=None,
            masks=None,
            support=support,
            generator=as_generator(seed, generator),
            include=include,
            exclude=exclude,
        )
    else:
        start = checked(masks, model, support)
    total = target(wish, start)
    kept_at, share_at = curve(schedule), fraction_of(fraction, cosine, last_fraction)

    def change(now: Moment) -> list[Masks]:
        first = now.memory["start"]
        kept = round(kept_at(pruning.progress(now.step), first, total))
        pruned = _prune(now, kept)
        share = share_at(now.step / steps)

        def layer(name: str, mask: Tensor) -> Tensor:
            if name not in now.gradients:
                return mask
            weight, gradient = now.weights[name], now.gradients[name]
            count = int(share * int(mask.count_nonzero()))
            return exchange(mask, weight, gradient, count, within(support, name, mask))

        return [pruned, by_layer(replace(now, masks=pruned), layer)]

    due = lambda step: whole.due(step) or step == pruning.end  # noqa: E731
    rule = Rule("granet", due, change, gradients=True)
    return Evolving(model, optimizer, start, rule, memory={"start": start.nonzeros})


def _prune(now: Moment, kept: int) -> Masks:
    scores = {name: weight.abs() for name, weight in now.weights.items()}
    return select(scores, kept / now.masks.numel, support=now.masks, total=kept)
