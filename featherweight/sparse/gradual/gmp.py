"""Gradual magnitude pruning: from dense to sparse during one training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import Generator, as_generator, kept_density
from featherweight.sparse.criteria import Scores
from featherweight.sparse.dynamic.evolving import Evolving, Moment, Rule
from featherweight.sparse.dynamic.registry import DYNAMIC
from featherweight.sparse.dynamic.schedules import Curve, Timetable, curve, timetable
from featherweight.sparse.dynamic.start import start_dense, target
from featherweight.sparse.gradual.scoring import scorer
from featherweight.sparse.masks import Masks
from featherweight.sparse.select import Scope, select
from featherweight.sparse.structure import Structure

PAPER = "Zhu & Gupta 2017, arXiv:1710.01878"


@DYNAMIC.register("gmp", "prune gradually by magnitude; what is pruned stays pruned", PAPER)
def gmp(
    model: nn.Module,
    optimizer: Optimizer,
    density: float | None = None,
    *,
    steps: int,
    sparsity: float | None = None,
    masks: Masks | None = None,
    support: Masks | None = None,
    criterion: str = "magnitude",
    scope: Scope = "global",
    structure: str | Structure | None = None,
    schedule: str | Curve = "cubic",
    interval: int | None = None,
    begin: int | None = None,
    end: int | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Evolving:
    """Prune the smallest weights little by little while the model trains.

    After every ``interval``-th step the number of kept weights follows the schedule down; at
    ``end`` it is that of the density. What is pruned never comes back: the masks are nested.

    Args:
        model: trained by the user.
        optimizer: the torch optimizer that trains it, wrapped or not.
        density: overall kept fraction at the end, in (0, 1]; or give ``sparsity``. 1 changes
            nothing.
        steps: optimizer steps of the whole training.
        sparsity: ``1 - density``.
        masks: to begin with; None: all of the support.
        support: masks that are never left; None: everything.
        criterion: what a weight is worth: a name of ``CRITERIA`` that needs no data.
        scope: where weights compete, see `sparse.select`.
        structure: which patterns may be kept, see `sparse.select`. Under "N:M" the first pruning
            goes to N/M at least; blocks and channels can miss the counts.
        schedule: of the number kept: a name of ``SCHEDULES`` or a function ``(progress, start,
            end)``; "cubic" is the paper's.
        interval: steps from a pruning to the next; None: 1/100 of the training.
        begin, end: the density falls while the number of steps taken is in [begin, end]; None: 0.2
            and 0.8 of the training.
        seed, generator: at most one of the two, for random criteria.
        include, exclude: shell-style parameter name patterns.

    Returns:
        The masks in force, that change by themselves until ``remove()``.

    Raises:
        ValueError: a bad argument, or a model that does not fit; nothing is touched then.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, equation 1.
    """
    wish = kept_density(density, sparsity)
    if not (seed is None and generator is None):
        generator = as_generator(seed, generator)
    start = start_dense(model, masks=masks, support=support, include=include, exclude=exclude)
    plan = _Plan(
        times=_times(steps, interval, begin, end),
        kept=curve(schedule),
        total=target(wish, start),
        worth=scorer(criterion, model, generator),
        scope=scope,
        structure=structure,
    )

    def change(now: Moment) -> list[Masks]:
        return [plan.select(now, now.weights, now.masks)]

    rule = Rule("gmp", plan.times.due_or_end, change)
    return Evolving(model, optimizer, start, rule, generator, {"start": plan.first(start)})


@DYNAMIC.register(
    "gmp-recoverable", "prune gradually by magnitude; what was pruned may come back", PAPER
)
def gmp_recoverable(
    model: nn.Module,
    optimizer: Optimizer,
    density: float | None = None,
    *,
    steps: int,
    sparsity: float | None = None,
    masks: Masks | None = None,
    support: Masks | None = None,
    criterion: str = "magnitude",
    scope: Scope = "global",
    structure: str | Structure | None = None,
    schedule: str | Curve = "cubic",
    interval: int | None = None,
    begin: int | None = None,
    end: int | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Evolving:
    """Prune little by little, and let pruned weights back in when others become smaller.

    As `gmp`, but a pruned weight rests at the value it had. All weights, resting ones too, are
    ranked at every pruning; one that ranks high enough again returns with that value and zero
    optimizer state. Costs a dense copy of the weights.

    Args:
        model, optimizer, density, steps, sparsity: as for `gmp`.
        masks: to begin with; what they mask rests at zero. None: all of the support.
        support, criterion, scope, structure, schedule, interval, begin, end: as for `gmp`.
        seed, generator, include, exclude: as for `gmp`.

    Returns:
        The masks in force, that change by themselves until ``remove()``.

    Raises:
        ValueError: a bad argument, or a model that does not fit; nothing is touched then.

    Source: Zhu & Gupta 2017, arXiv:1710.01878, whose masked variables keep their values.
    """
    wish = kept_density(density, sparsity)
    if not (seed is None and generator is None):
        generator = as_generator(seed, generator)
    start = start_dense(model, masks=masks, support=support, include=include, exclude=exclude)
    plan = _Plan(
        times=_times(steps, interval, begin, end),
        kept=curve(schedule),
        total=target(wish, start),
        worth=scorer(criterion, model, generator),
        scope=scope,
        structure=structure,
    )

    def change(now: Moment) -> list[Masks]:
        now.memory["resting"] = values = _with_resting(now)
        return [plan.select(now, values, support)]

    rule = Rule(
        "gmp-recoverable",
        plan.times.due_or_end,
        change,
        start_values=lambda now: now.memory["resting"],
    )
    memory = {"start": plan.first(start), "resting": {}}
    return Evolving(model, optimizer, start, rule, generator, memory)


def _with_resting(now: Moment) -> dict[str, Tensor]:
    resting = now.memory["resting"]
    return {
        name: torch.where(mask, now.weights[name], resting[name].to(mask.device))
        if name in resting
        else now.weights[name].clone()
        for name, mask in now.masks.items()
    }


def _times(steps: int, interval: int | None, begin: int | None, end: int | None) -> Timetable:
    return timetable(
        steps,
        max(1, steps // 100) if interval is None else interval,
        round(0.2 * steps) if begin is None else begin,
        round(0.8 * steps) if end is None else end,
    )


@dataclass(frozen=True)
class _Plan:
    """How many weights are kept when, and which."""

    times: Timetable
    kept: Curve
    total: int
    worth: Callable[[Mapping[str, Tensor]], Scores]
    scope: Scope
    structure: str | Structure | None

    def first(self, start: Masks) -> int:
        """Return the number kept at the beginning of the schedule, as the structure lets it."""
        if self.structure is None:
            return start.nonzeros
        room = int(Structure.parse(self.structure).max_density * start.numel)
        if self.total > room:
            raise ValueError(f"structure {self.structure} keeps at most {room} weights")
        return min(start.nonzeros, room)

    def select(self, now: Moment, weights: Mapping[str, Tensor], support: Masks | None) -> Masks:
        count = round(self.kept(self.times.progress(now.step), now.memory["start"], self.total))
        return select(
            self.worth(weights),
            count / now.masks.numel,
            self.scope,
            support=support,
            total=count,
            structure=self.structure,
        )
