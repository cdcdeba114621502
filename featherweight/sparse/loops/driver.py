"""The driver of all iterative loops: yield a level, let the user train it, prune, reset, again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import Generator, as_generator
from featherweight.sparse.criteria import CRITERIA, Scores, score
from featherweight.sparse.criteria.registry import check_arguments
from featherweight.sparse.hold import elementwise_state
from featherweight.sparse.loops.guard import (
    check_structure,
    check_units,
    keep_units_,
    within_structure,
)
from featherweight.sparse.loops.level import Level, Resume, wished_counts
from featherweight.sparse.loops.reset import RESETS, Reset, Rewind, snapshot
from featherweight.sparse.masks import Masks
from featherweight.sparse.prune import _shares, _start
from featherweight.sparse.select import Scope, select
from featherweight.sparse.structure import Structure

OptimizerState = Literal["reset", "carry", "rewind"]
MaskSource = Sequence[Masks] | Callable[[int], Masks]
Batches = Sequence[tuple[Tensor, Tensor]]
BatchSource = Batches | Callable[[int], Batches]


def iterate(
    model: nn.Module,
    density: float | None = None,
    per_level: float = 0.2,
    *,
    sparsity: float | None = None,
    levels: int | None = None,
    densities: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
    reset: str | Reset | Sequence[str | Reset] = "nothing",
    warmup: bool = False,
    criterion: str = "magnitude",
    scope: Scope = "global",
    iterations: int | None = None,
    structure: str | Structure | None = None,
    keep_units: bool = False,
    support: Masks | None = None,
    masks_from: MaskSource | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    optimizer: Optimizer | None = None,
    optimizer_state: OptimizerState = "reset",
    seed: int | None = None,
    generator: Generator | None = None,
    batches: BatchSource | None = None,
    resume: Resume | None = None,
    **needs: Any,
) -> Iterator[Level]:
    """Prune a model level by level; the user trains between.

    Arguments are checked at the call; the model is first touched when the first level is asked for.

    Args:
        model: trained and changed in place.
        density: final kept fraction, in (0, 1]; or ``sparsity``, ``levels``, or ``densities``.
        per_level: fraction of the kept weights that each pruning removes, in [0, 1).
        sparsity: ``1 - density``.
        levels: number of prunings; 0 is one plain training.
        densities: kept fraction of each level, never rising, the first that of the support (1
            without one). Between equal neighbours nothing is pruned.
        lengths: how long to train each level, handed out as `Level.length`; None: the user knows.
        reset: what goes back to the rewinding point after each pruning: a name of ``RESETS``, a
            function ``(model, rewind) -> None``, or several of them in order.
        warmup: yield a level of index -1 first; the state after it is the rewinding point.
            Without it, the state at the call of the first level is.
        criterion: a name of ``CRITERIA``.
        scope: where weights compete, see `featherweight.sparse.select`.
        iterations: rounds of each pruning, see `featherweight.sparse.prune`; None: what the
            criterion's registry row says, else 1.
        structure: which patterns may be kept, see `featherweight.sparse.select`; None: any. Under
            N:M the first pruning goes to what the pattern has room for, at least.
        keep_units: whether the highest-scoring in-edge and out-edge of every unit are kept
            whatever their rank, so that no unit is cut off; global scope only.
        support: masks that are never left; level 0 trains inside them.
        masks_from: masks of another run, used at level ``t`` in place of pruning.
        include, exclude: shell-style parameter name patterns.
        optimizer: where the user keeps one optimizer over all levels, its state is treated by:
        optimizer_state: "reset" empties it after each level (neutral: as a new optimizer), "carry"
            keeps it for kept weights, "rewind" goes back to the rewinding point.
        seed, generator: for random criteria and resets.
        batches: inputs and targets for criteria that look at data; or a function of the index of
            the level to be pruned for, called once for each, that returns them.
        resume: go on from an earlier `Level.resume`.
        needs: what else the criterion takes, such as ``objective=``.

    Yields:
        One `Level` after the other.

    Raises:
        ValueError: a bad argument, or a model without prunable weights.
    """
    dense = Masks.dense(model, include, exclude)
    start = dense if support is None else support
    dense.check(start)
    counts = wished_counts(
        dense.numel, start.nonzeros, per_level, density, sparsity, levels, densities
    )
    if structure is not None:
        counts = within_structure(start, counts, structure)
        check_structure(start, counts, scope, structure)
    if keep_units:
        check_units(model, start, counts[-1], scope, structure)
    if resume is not None and not -1 <= resume.index < len(counts):
        raise ValueError(f"resume is at level {resume.index}, the loop has {len(counts)} levels")
    resets = [reset] if isinstance(reset, str) or callable(reset) else list(reset)
    rounds = CRITERIA[criterion].defaults.get("iterations", 1)
    plan = _Plan(
        model=model,
        counts=counts,
        lengths=lengths,
        resets=resets,
        warmup=warmup,
        criterion=criterion,
        scope=scope,
        iterations=rounds if iterations is None else iterations,
        structure=structure,
        keep_units=keep_units,
        masks_from=masks_from,
        optimizer=optimizer,
        optimizer_state=optimizer_state,
        generator=_generator(criterion, resets, seed, generator),
        batches=batches,
        needs=needs,
    )
    return plan.run(start, resume)


def _generator(
    criterion: str, resets: Sequence[str | Reset], seed: int | None, generator: Generator | None
) -> Generator | None:
    needs = [RESETS[reset].needs for reset in resets if isinstance(reset, str)]
    random = any("generator" in names for names in [CRITERIA[criterion].needs, *needs])
    if not random and seed is None and generator is None:
        return None
    return as_generator(seed, generator)


@dataclass(kw_only=True)
class _Plan:
    model: nn.Module
    counts: list[int]
    lengths: Sequence[int] | None
    resets: list[str | Reset]
    warmup: bool
    criterion: str
    scope: Scope
    iterations: int
    structure: str | Structure | None
    keep_units: bool
    masks_from: MaskSource | None
    optimizer: Optimizer | None
    optimizer_state: OptimizerState
    generator: Generator | None
    batches: BatchSource | None
    needs: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Refuse before the first training what would fail at the first pruning."""
        levels = len(self.counts)
        if self.lengths is not None and len(self.lengths) != levels:
            raise ValueError(f"lengths has {len(self.lengths)} entries, the loop {levels} levels")
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")
        if self.optimizer_state not in get_args(OptimizerState):
            raise ValueError(
                f"optimizer_state must be reset, carry or rewind, got {self.optimizer_state!r}"
            )
        check_arguments(self.criterion, self.needs)
        offered = {"model", "generator", *self.needs}
        offered |= {"batches"} if self.batches is not None else set()
        for need in CRITERIA[self.criterion].needs:
            if need not in offered:
                raise ValueError(f"criterion {self.criterion!r} needs {need}=")

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
        index = resume.index
        length = None if self.lengths is None or index < 0 else self.lengths[index]
        return Level(index, len(self.counts) - 1, resume.masks, resume, length)

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
        total = self.counts[index]
        if masks.nonzeros <= total:
            return masks
        batches = self.batches(index) if callable(self.batches) else self.batches
        size, start = masks.numel, _start(masks, self.structure)
        for share in _shares(total / size, self.iterations, start):
            scores = self._scores(masks, batches)
            if self.keep_units:
                keep_units_(scores, masks, self.model)
            # Whole groups can leave fewer than the next round asks for.
            count = min(round(share * size), masks.nonzeros)
            masks = select(
                scores, share, self.scope, support=masks, total=count, structure=self.structure
            )
        return masks

    def _scores(self, masks: Masks, batches: Batches | None) -> Scores:
        offered = {"model": self.model, "generator": self.generator, "batches": batches}
        weights = {
            name: weight.detach().masked_fill(~masks[name].to(weight.device), 0)
            for name, weight in masks.weights(self.model).items()
        }
        return score(self.criterion, weights, masks=masks, **offered, **self.needs)

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
