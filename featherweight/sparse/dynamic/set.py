"""SET, sparse evolutionary training: drop the smallest weights, grow as many at random."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import Generator, as_generator
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.dynamic.evolving import Evolving, Moment, Rule
from featherweight.sparse.dynamic.exchange import by_layer, rewire, within
from featherweight.sparse.dynamic.registry import DYNAMIC
from featherweight.sparse.dynamic.schedules import Curve, curve, fraction_of, timetable
from featherweight.sparse.dynamic.start import start_random
from featherweight.sparse.masks import Masks

PAPER = "Mocanu et al. 2018, arXiv:1707.04780"


@DYNAMIC.register("set", "drop the smallest weights, grow as many at random", PAPER, ["generator"])
def set(
    model: nn.Module,
    optimizer: Optimizer,
    density: float | None = None,
    *,
    steps: int,
    sparsity: float | None = None,
    masks: Masks | None = None,
    support: Masks | None = None,
    allocation: Allocation = "erk",
    fraction: float = 0.3,
    schedule: str | Curve = "constant",
    interval: int = 100,
    begin: int = 0,
    end: int | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Evolving:
    """Train sparse weights whose masks are rewired at random from time to time.

    After every ``interval``-th step each layer drops a fraction of its weights, those of smallest
    absolute value, and grows as many elsewhere, chosen uniformly among the entries that were masked
    before; these start at zero. The number of weights of each layer never changes.

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
        fraction: of each layer's weights, dropped at the first change, in [0, 1]; 0: none.
        schedule: how the fraction goes to zero from begin to end: a name of ``SCHEDULES`` or a
            function ``(progress, start, end)``; "constant": not at all.
        interval: steps from a change to the next; the paper's is an epoch.
        begin, end: changes come when the number of steps taken is in [begin, end); None: to the
            end of the training.
        seed, generator: exactly one of the two.
        include, exclude: shell-style parameter name patterns, for random masks.

    Returns:
        The masks in force, that change by themselves until ``remove()``.

    Raises:
        ValueError: a bad argument, or a model that does not fit; nothing is touched then.

    Source: Mocanu et al. 2018, arXiv:1707.04780, algorithm 1.
    """
    generator = as_generator(seed, generator)
    times = timetable(steps, interval, begin, steps if end is None else end)
    fraction_at = fraction_of(fraction, curve(schedule))
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
        share = fraction_at(times.progress(now.step))

        def layer(name: str, mask: Tensor) -> Tensor:
            assert now.generator is not None
            count = int(share * int(mask.count_nonzero()))
            worth = now.weights[name].abs()
            return rewire(mask, worth, count, now.generator, within(support, name, mask))

        return [by_layer(now, layer)]

    return Evolving(model, optimizer, start, Rule("set", times.due, change), generator)
