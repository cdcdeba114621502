"""RigL: drop the smallest weights, grow where the dense gradient is largest."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import Generator, as_generator
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.dynamic.evolving import Evolving, Moment, Rule
from featherweight.sparse.dynamic.exchange import by_layer, exchange, within
from featherweight.sparse.dynamic.registry import DYNAMIC
from featherweight.sparse.dynamic.schedules import Curve, curve, fraction_of, timetable
from featherweight.sparse.dynamic.start import start_random
from featherweight.sparse.masks import Masks

PAPER = "Evci et al. 2020, arXiv:1911.11134"


@DYNAMIC.register(
    "rigl", "drop the smallest weights, grow where the gradient is largest", PAPER, ["generator"]
)
def rigl(
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
    schedule: str | Curve = "cosine",
    interval: int = 100,
    begin: int = 0,
    end: int | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Evolving:
    """Train sparse weights whose masks follow the dense gradient.

    Every ``interval``-th step does not move weights. In its place each layer drops
    ``int(fraction_t * kept)`` weights, those of smallest absolute value, and grows as many where
    the gradient of the batch is largest among all entries not kept. Grown weights start at zero
    with zero optimizer state; a weight dropped and grown in the same change keeps both. The number
    of weights of each layer never changes. Equal magnitudes are resolved by index (published code
    adds tiny noise).

    The gradient is that with which the optimizer would have stepped: summed over micro-batches and
    averaged over ranks as the user's training does it. Only for these steps is it dense; nothing
    dense is kept. A weight without a gradient keeps its mask.

    Args:
        model: trained by the user.
        optimizer: the torch optimizer that trains it, wrapped or not; stepped without closure.
        density: overall kept fraction, in (0, 1]; or give ``sparsity``, or ``masks``. 1 changes no
            mask.
        steps: optimizer steps of the whole training.
        sparsity: ``1 - density``.
        masks: to begin with; None: random ones.
        support: masks that are never left.
        allocation: how random masks share the density among layers, see `sparse.random`.
        fraction: of each layer's weights, dropped at the first change, in [0, 1]; 0 changes no
            mask.
        schedule: how the fraction goes to zero from begin to end: a name of ``SCHEDULES`` or a
            function ``(progress, start, end)``.
        interval: steps from a change to the next.
        begin, end: changes come when the number of steps taken is in [begin, end); None: three
            quarters of the training.
        seed, generator: exactly one of the two, for random masks.
        include, exclude: shell-style parameter name patterns, for random masks.

    Returns:
        The masks in force, that change by themselves until ``remove()``.

    Raises:
        ValueError: a bad argument, or a model that does not fit; nothing is touched then.

    Source: Evci et al. 2020, arXiv:1911.11134, algorithm 1.
    """
    times = timetable(steps, interval, begin, round(0.75 * steps) if end is None else end)
    fraction_at = fraction_of(fraction, curve(schedule))
    start = start_random(
        model,
        density,
        allocation,
        sparsity=sparsity,
        masks=masks,
        support=support,
        generator=as_generator(seed, generator) if masks is None else generator,
        include=include,
        exclude=exclude,
    )

    def change(now: Moment) -> list[Masks]:
        share = fraction_at(times.progress(now.step))

        def layer(name: str, mask: Tensor) -> Tensor:
            if name not in now.gradients:
                return mask
            weight, gradient = now.weights[name], now.gradients[name]
            count = int(share * int(mask.count_nonzero()))
            return exchange(mask, weight, gradient, count, within(support, name, mask))

        return [by_layer(now, layer)]

    rule = Rule("rigl", times.due, change, gradients=True, replaces_step=True)
    return Evolving(model, optimizer, start, rule)
