"""AC/DC: alternate compressed and decompressed training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import Generator, as_generator, kept_density
from featherweight.sparse.dynamic.evolving import Evolving, Moment, Rule
from featherweight.sparse.dynamic.registry import DYNAMIC
from featherweight.sparse.dynamic.start import start_dense, target
from featherweight.sparse.gradual.scoring import scorer
from featherweight.sparse.masks import Masks
from featherweight.sparse.select import Scope, select
from featherweight.sparse.structure import Structure

PAPER = "Peste et al. 2021, arXiv:2106.12379"

Phase = tuple[int, int, Literal["dense", "sparse"]]
"""First step, step after the last, and how the steps between are trained."""


def acdc_phases(steps: int) -> list[Phase]:
    """Return the published phases of 100 epochs, scaled to a training.

    Dense for 10 epochs, then sparse and dense for 5 each in turn; the last dense phase lasts from
    75 to 85, the rest is sparse.

    Args:
        steps: optimizer steps of the whole training, at least 20.

    Raises:
        ValueError: so few steps that a phase would be empty.

    Source: Peste et al. 2021, arXiv:2106.12379.
    """
    if steps < 20:
        raise ValueError(f"steps must be at least 20 for the published phases, got {steps}")
    epochs = [0, *range(10, 80, 5), 85, 100]
    bounds = [round(epoch * steps / 100) for epoch in epochs]
    turns = enumerate(pairwise(bounds))
    return [(begin, end, "sparse" if i % 2 else "dense") for i, (begin, end) in turns]


@DYNAMIC.register("acdc", "train sparse and dense in turn, the last phase sparse", PAPER)
def acdc(
    model: nn.Module,
    optimizer: Optimizer,
    density: float | None = None,
    *,
    steps: int,
    sparsity: float | None = None,
    masks: Masks | None = None,
    support: Masks | None = None,
    phases: Sequence[Phase] | None = None,
    criterion: str = "magnitude",
    scope: Scope = "global",
    structure: str | Structure | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Evolving:
    """Train in dense and sparse phases that take turns.

    Where a sparse phase begins the weights of largest absolute value are kept; where a dense one
    begins all train again, the pruned ones from zero with zero optimizer state. The model that the
    last dense phase ends with is the dense result, should you want to save it.

    Args:
        model: trained by the user.
        optimizer: the torch optimizer that trains it, wrapped or not.
        density: overall kept fraction of sparse phases, in (0, 1]; or give ``sparsity``. 1 changes
            nothing.
        steps: optimizer steps of the whole training.
        sparsity: ``1 - density``.
        masks: of the first phase; None: all of the support, or the best of it where the first phase
            is sparse.
        support: masks that are never left, in dense phases the masks; None: everything.
        phases: ``(start, end, "dense" or "sparse")`` in steps, each beginning where the one before
            ends, from 0 to ``steps``, the last one sparse; None: `acdc_phases`.
        criterion: what a weight is worth: a name of ``CRITERIA`` that needs no data.
        scope: where weights compete, see `sparse.select`.
        structure: which patterns sparse phases may keep, see `sparse.select`.
        seed, generator: at most one of the two, for random criteria.
        include, exclude: shell-style parameter name patterns.

    Returns:
        The masks in force, that change by themselves until ``remove()``.

    Raises:
        ValueError: a bad argument, or a model that does not fit; nothing is touched then.

    Source: Peste et al. 2021, arXiv:2106.12379, algorithm 1.
    """
    wish = kept_density(density, sparsity)
    if not (seed is None and generator is None):
        generator = as_generator(seed, generator)
    turns = acdc_phases(steps) if phases is None else list(phases)
    check_phases(turns, steps)
    dense = start_dense(model, masks=None, support=support, include=include, exclude=exclude)
    start = start_dense(model, masks=masks, support=support, include=include, exclude=exclude)
    total = target(wish, start)
    worth = scorer(criterion, model, generator)

    def compress(weights: Mapping[str, Tensor], allowed: Masks) -> Masks:
        density = total / allowed.numel
        return select(
            worth(weights), density, scope, support=allowed, total=total, structure=structure
        )

    def change(now: Moment) -> list[Masks]:
        kind = next(kind for begin, _, kind in turns if begin == now.step)
        return [dense if kind == "dense" else compress(now.weights, now.masks)]

    if masks is None and turns[0][2] == "sparse":
        start = compress(start.weights(model), start)
    begins = {begin for begin, _, _ in turns}
    return Evolving(model, optimizer, start, Rule("acdc", begins.__contains__, change), generator)


def check_phases(phases: Sequence[Phase], steps: int) -> None:
    """Refuse phases that leave a gap, overlap, are empty, or do not end sparse.

    Raises:
        ValueError: names the first phase that does not fit.
    """
    expected = 0
    for phase in phases:
        begin, end, kind = phase
        if begin != expected or end <= begin or kind not in ("dense", "sparse"):
            raise ValueError(
                f"phase {phase} must begin at {expected}, end later, and be 'dense' or 'sparse'"
            )
        expected = end
    if expected != steps or phases[-1][2] != "sparse":
        raise ValueError(f"phases must end at steps={steps} with a sparse one, got {list(phases)}")
