"""From a recipe's sparse part to the levels that a run trains, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from featherweight.lab.control import CYCLIC, cycles
from featherweight.lab.data.seeding import derive_generator
from featherweight.lab.errors import BadInput
from featherweight.lab.recipe import Recipe, SparseRecipe
from featherweight.lab.start import ScoringBatches
from featherweight.sparse import CRITERIA, LOOPS, Level, Masks, Resume


def plan(
    recipe: Recipe,
    model: nn.Module,
    optimizer: Optimizer,
    seed: int,
    start: Masks,
    batches: Callable[[], ScoringBatches],
    resume: Resume | None = None,
) -> Iterator[Level]:
    """Return the levels of a run; the model is masked when the first is asked for.

    A method that is no loop is a loop of one level inside its masks.

    Args:
        recipe: what to do.
        model: changed in place, between the levels.
        optimizer: its state is treated at each pruning as the recipe says.
        seed: of random criteria and resets.
        start: masks that no level leaves.
        batches: called where a criterion looks at data.
        resume: go on from here.

    Raises:
        BadInput: the recipe does not fit the model.
    """
    sparse = recipe.sparse
    if sparse.method not in LOOPS:
        return single_level(model, resume.masks if resume is not None else start)
    options: dict[str, Any] = {
        "optimizer": optimizer,
        "optimizer_state": sparse.optimizer_state,
        "generator": derive_generator(seed, "loop"),
        "support": start,
        "resume": resume,
        "include": sparse.include,
        "exclude": sparse.exclude,
    }
    try:
        if "batches" in CRITERIA[sparse.criterion].needs:
            options["batches"] = batches()
        if sparse.method in CYCLIC:
            options |= _cyclic_options(recipe)
        else:
            options |= _loop_options(sparse, seed)
        return LOOPS[sparse.method].method(model, **options)
    except (ValueError, TypeError) as error:
        raise BadInput(f"sparse: {error}") from error


def single_level(model: nn.Module, masks: Masks) -> Iterator[Level]:
    """Yield the only level of a training inside masks."""
    masks.apply_(model)
    yield Level(0, 0, masks, Resume(0, masks))


def _cyclic_options(recipe: Recipe) -> dict[str, Any]:
    sparse, count = recipe.sparse, cycles(recipe)
    trainings = count + (sparse.method == "sculpt")
    options: dict[str, Any] = {"cycles": count, "budget": trainings * recipe.fit.length.amount}
    if sparse.method == "sculpt":
        names = ("density", "criterion", "structure", "iterations")
        options |= {name: getattr(sparse, name) for name in names}
        options["scope"] = sparse.allocation or "global"
    return options | {k: v for k, v in sparse.options.items() if k != "cycles"}


def _loop_options(sparse: SparseRecipe, seed: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "criterion": sparse.criterion,
        "scope": sparse.allocation or "global",
        "structure": sparse.structure,
        "iterations": sparse.iterations,
    }
    if sparse.densities is not None:
        options["densities"] = sparse.densities
    elif sparse.levels is not None:
        options |= {"levels": sparse.levels, "per_level": sparse.per_level}
    else:
        options |= {"density": sparse.density, "per_level": sparse.per_level}
    if sparse.masks_from is not None:
        options["masks_from"] = _masks_of(Path(sparse.masks_from), seed)
    if sparse.reset is not None:
        options["reset"] = sparse.reset
    if sparse.rewind is not None:
        options["warmup"] = True
    elif sparse.method == "wr":
        raise ValueError("wr needs sparse.rewind, the length of its warm-up, such as 1ep")
    return options | sparse.options


def _masks_of(folder: Path, seed: int) -> Callable[[int], Masks]:
    """Return what reads the masks of a level of another run with the same seed."""
    run = folder / f"seed-{seed}"
    if not (run / "result.json").is_file():
        raise ValueError(f"masks_from: {run} is no finished run")
    return lambda index: Masks.load(run / f"level-{index:02d}" / "masks.safetensors")
