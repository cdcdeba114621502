"""The driver of all iterative loops: yield a level, let the user train it, prune, reset, again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import Generator, as_generator, kept_density
from featherweight.sparse.criteria import CRITERIA, score
from featherweight.sparse.hold import elementwise_state
from featherweight.sparse.loops.reset import RESETS, Reset, Rewind, snapshot
from featherweight.sparse.masks import Masks
from featherweight.sparse.select import Scope, select

OptimizerState = Literal["reset", "carry", "rewind"]
MaskSource = Sequence[Masks] | Callable[[int], Masks]


@dataclass(frozen=True)
class Resume:
    """Where a loop stands: what it needs, beside the model, to go on after an interruption.

    Attributes:
        index: the level under training, -1 for the warm-up.
        masks: its masks.
        rewind: the state at the rewinding point; empty before it or where nothing is rewound.
        generator_state: of the loop's random generator; None where it has none.
        optimizer: state dict of the optimizer at the rewinding point; None where it is not rewound.
    """

    index: int
    masks: Masks
    rewind: Rewind = field(default_factory=dict)
    generator_state: Tensor | None = None
    optimizer: dict[str, Any] | None = None


@dataclass(frozen=True)
class Level:
    """One stage of a loop: train the model with ``masks`` held, then ask for the next.

    Attributes:
        index: 0 for the first level, -1 for the warm-up before it.
        last: index of the last level.
        masks: masks to train with; the model's masked weights are zero already.
        resume: pass it to the same loop as ``resume=`` to go on from here in another process,
            with the model's state as saved.
    """

    index: int
    last: int
    masks: Masks
    resume: Resume

    @property
    def warmup(self) -> bool:
        """Whether this is the short training before the rewinding point."""
        return self.index < 0

    @property
    def final(self) -> bool:
        """Whether no level follows."""
        return self.index == self.last

    @property
    def density(self) -> float:
        """Kept fraction of the masks."""
        return self.masks.density

    def __str__(self) -> str:
        name = "warm-up" if self.warmup else f"level {self.index} of {self.last}"
        return f"{name}, density {self.density:.4g}"


def level_counts(
    size: int,
    per_level: float,
    *,
    density: float | None = None,
    levels: int | None = None,
    start: int | None = None,
) -> list[int]:
    """Return how many weights each level keeps: ``round((1 - per_level)**t * start)``.

    Given a density, levels go on until it is reached, and the last one keeps exactly the asked
    number where the formula would keep fewer.

    Args:
        size: number of prunable weights.
        per_level: fraction of the kept weights that each pruning removes, in [0, 1).
        density: wished-for final density; or
        levels: number of prunings.
        start: kept at level 0; None: all.

    Raises:
        ValueError: not exactly one of density and levels, or a value out of range.
    """
    if (density is None) == (levels is None):
        raise ValueError("give exactly one of density= (or sparsity=) and levels=")
    if not 0.0 <= per_level < 1.0:
        raise ValueError(f"per_level must lie in [0, 1), got {per_level:g}")
    start = size if start is None else start
    if levels is not None:
        if levels < 0:
            raise ValueError(f"levels must be at least 0, got {levels}")
        return [round((1 - per_level) ** t * start) for t in range(levels + 1)]
    target = round(kept_density(density) * size)
    if target > start:
        raise ValueError(
            f"density {density:g} asks for {target} weights, the support holds {start}"
        )
    if target < 1:
        raise ValueError(f"density {density:g} of {size} weights keeps none")
    if per_level == 0.0 and target < start:
        raise ValueError("per_level must be over 0 to reach a density; or give levels=")
    counts = [start]
    while counts[-1] > target:
        counts.append(max(round((1 - per_level) ** len(counts) * start), target))
    return counts


def iterate(
    model: nn.Module,
    density: float | None = None,
    per_level: float = 0.2,
    *,
    sparsity: float | None = None,
    levels: int | None = None,
    reset: str | Reset | Sequence[str | Reset] = "nothing",
    warmup: bool = False,
    criterion: str = "magnitude",
    scope: Scope = "global",
    support: Masks | None = None,
    masks_from: MaskSource | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    optimizer: Optimizer | None = None,
    optimizer_state: OptimizerState = "reset",
    seed: int | None = None,
    generator: Generator | None = None,
    resume: Resume | None = None,
) -> Iterator[Level]:
    """Prune a model level by level; the user trains between.

    Arguments are checked at the call; the model is first touched when the first level is asked for.

    Args:
        model: trained and changed in place.
        density: final kept fraction, in (0, 1]; or ``sparsity``, or ``levels``.
        per_level: fraction of the kept weights that each pruning removes, in [0, 1).
        sparsity: ``1 - density``.
        levels: number of prunings; 0 is one plain training.
        reset: what goes back to the rewinding point after each pruning: a name of ``RESETS``, a
            function ``(model, rewind) -> None``, or several of them in order.
        warmup: yield a level of index -1 first; the state after it is the rewinding point.
            Without it, the state at the call of the first level is.
        criterion: a name of ``CRITERIA``.
        scope: where weights compete, see `featherweight.sparse.select`.
        support: masks that are never left; level 0 trains inside them.
        masks_from: masks of another run, used at level ``t`` in place of pruning.
        include, exclude: shell-style parameter name patterns.
        optimizer: where the user keeps one optimizer over all levels, its state is treated by:
        optimizer_state: "reset" empties it at each pruning (neutral: as a new optimizer), "carry"
            keeps it for kept weights, "rewind" goes back to the rewinding point.
        seed, generator: for random criteria and resets.
        resume: go on from an earlier `Level.resume`.

    Yields:
        One `Level` after the other.

    Raises:
        ValueError: a bad argument, or a model without prunable weights.
    """
    dense = Masks.dense(model, include, exclude)
    start = dense if support is None else support
    dense.check(start)
    if levels is not None and not (density is None and sparsity is None):
        raise ValueError("give exactly one of density= (or sparsity=) and levels=")
    wish = None if levels is not None else kept_density(density, sparsity)
    counts = level_counts(dense.numel, per_level, density=wish, levels=levels, start=start.nonzeros)
    resets = [reset] if isinstance(reset, str) or callable(reset) else list(reset)
    entries = [RESETS[r] for r in resets if isinstance(r, str)]
    random = CRITERIA[criterion].needs + tuple(n for entry in entries for n in entry.needs)
    if "generator" in random or seed is not None or generator is not None:
        generator = as_generator(seed, generator)
    if optimizer_state not in ("reset", "carry", "rewind"):
        raise ValueError(f"optimizer_state must be reset, carry or rewind, got {optimizer_state!r}")
    if resume is not None and not -1 <= resume.index < len(counts):
        raise ValueError(f"resume is at level {resume.index}, the loop has {len(counts)} levels")
    plan = _Plan(
        model,
        counts,
        resets,
        warmup,
        criterion,
        scope,
        masks_from,
        optimizer,
        optimizer_state,
        generator,
    )
    return plan.run(start, resume)


@dataclass
class _Plan:
    model: nn.Module
    counts: list[int]
    resets: list[str | Reset]
    warmup: bool
    criterion: str
    scope: Scope
    masks_from: MaskSource | None
    optimizer: Optimizer | None
    optimizer_state: OptimizerState
    generator: Generator | None

    def run(self, masks: Masks, resume: Resume | None) -> Iterator[Level]:
        rewind: Rewind = {}
        optimizer: dict[str, Any] | None = None
        first = -1 if self.warmup else 0
        if resume is not None:
            first, masks = resume.index, resume.masks
            rewind, optimizer = resume.rewind, resume.optimizer
            if self.generator is not None and resume.generator_state is not None:
                self.generator.set_state(resume.generator_state)
        elif self.masks_from is not None:
            masks = self._given(0)
        masks.apply_(self.model)
        for index in range(first, len(self.counts)):
            if index >= 0 and not rewind and self._rewinds():
                rewind = snapshot(self.model)
                if self.optimizer is not None and self.optimizer_state == "rewind":
                    optimizer = deepcopy(self.optimizer.state_dict())
            yield self._level(Resume(index, masks, rewind, self._generator_state(), optimizer))
            if 0 <= index < len(self.counts) - 1:
                masks = self._prune(index + 1, masks)
                self._reset(rewind)
                masks.apply_(self.model)
                self._treat_optimizer(masks, optimizer)

    def _level(self, resume: Resume) -> Level:
        return Level(resume.index, len(self.counts) - 1, resume.masks, resume)

    def _generator_state(self) -> Tensor | None:
        return None if self.generator is None else self.generator.get_state()

    def _rewinds(self) -> bool:
        return self.resets != ["nothing"] or self.optimizer_state == "rewind"

    def _given(self, index: int) -> Masks:
        assert self.masks_from is not None
        given = self.masks_from(index) if callable(self.masks_from) else self.masks_from[index]
        given.weights(self.model)
        return given

    def _prune(self, index: int, masks: Masks) -> Masks:
        if self.masks_from is not None:
            return self._given(index)
        offered = {"model": self.model, "generator": self.generator}
        scores = score(self.criterion, masks.weights(self.model), **offered)
        total = self.counts[index]
        return select(scores, total / masks.numel, self.scope, support=masks, total=total)

    def _reset(self, rewind: Rewind) -> None:
        for reset in self.resets:
            if callable(reset):
                reset(self.model, rewind)
                continue
            entry = RESETS[reset]
            entry.method(self.model, rewind, **{n: getattr(self, n) for n in entry.needs})

    @torch.no_grad()
    def _treat_optimizer(self, masks: Masks, rewind: dict[str, Any] | None) -> None:
        if self.optimizer is None:
            return
        if self.optimizer_state == "rewind" and rewind is not None:
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict(
                {"state": deepcopy(rewind["state"]), "param_groups": groups}
            )
        if self.optimizer_state == "reset":
            self.optimizer.state.clear()
        for name, weight in masks.weights(self.model).items():
            state = self.optimizer.state.get(weight, {})
            for tensor in elementwise_state(weight, state).values():
                tensor.masked_fill_(~masks[name].to(tensor.device), 0)
