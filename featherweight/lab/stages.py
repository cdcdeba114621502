"""From a recipe's sparse part to the levels that a run trains, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from featherweight.lab.data.seeding import derive_generator, derive_seed
from featherweight.lab.errors import BadInput
from featherweight.lab.recipe import Recipe
from featherweight.sparse import LOOPS, Level, Masks, Resume, iterate, prune, random, repair


def plan(
    recipe: Recipe, model: nn.Module, optimizer: Optimizer, seed: int, resume: Resume | None = None
) -> Iterator[Level]:
    """Return the levels of a run; the model is masked when the first is asked for.

    A method that is no loop is a loop of one level inside its masks.

    Args:
        recipe: what to do.
        model: changed in place, between the levels.
        optimizer: its state is treated at each pruning as the recipe says.
        seed: of random masks and resets.
        resume: go on from here.

    Raises:
        BadInput: the recipe does not fit the model.
    """
    sparse = recipe.sparse
    common: dict[str, Any] = {
        "optimizer": optimizer,
        "resume": resume,
        "include": sparse.include,
        "exclude": sparse.exclude,
    }
    try:
        if sparse.method == "dense" and sparse.density < 1:
            raise ValueError(f"method dense keeps every weight, density is {sparse.density:g}")
        if sparse.method not in LOOPS:
            return iterate(model, levels=0, support=_pruned_once(recipe, model, seed), **common)
        return LOOPS[sparse.method].method(model, **_loop_options(recipe, model, seed), **common)
    except ValueError as error:
        raise BadInput(f"sparse: {error}") from error


def _loop_options(recipe: Recipe, model: nn.Module, seed: int) -> dict[str, Any]:
    sparse = recipe.sparse
    options: dict[str, Any] = {
        "per_level": sparse.per_level,
        "criterion": sparse.criterion,
        "scope": sparse.allocation,
        "support": _support(recipe, model, seed),
        "optimizer_state": sparse.optimizer_state,
        "generator": derive_generator(seed, "loop"),
    }
    options |= {"density": sparse.density} if sparse.levels is None else {"levels": sparse.levels}
    if sparse.masks_from is not None:
        options["masks_from"] = _masks_of(Path(sparse.masks_from), seed)
    if sparse.reset is not None:
        options["reset"] = sparse.reset
    if sparse.rewind is not None:
        options["warmup"] = True
    elif sparse.method == "wr":
        raise ValueError("wr needs sparse.rewind, the length of its warm-up, such as 1ep")
    return options


def _masks_of(folder: Path, seed: int) -> Callable[[int], Masks]:
    """Return what reads the masks of a level of another run with the same seed."""
    run = folder / f"seed-{seed}"
    if not (run / "result.json").is_file():
        raise ValueError(f"masks_from: {run} is no finished run")
    return lambda index: Masks.load(run / f"level-{index:02d}" / "masks.safetensors")


def _support(recipe: Recipe, model: nn.Module, seed: int) -> Masks | None:
    support = recipe.sparse.support
    if support.density == 1.0:
        return None
    return random(
        model,
        support.density,
        support.allocation,
        seed=derive_seed(seed, "support"),
        include=recipe.sparse.include,
        exclude=recipe.sparse.exclude,
    )


def _pruned_once(recipe: Recipe, model: nn.Module, seed: int) -> Masks:
    sparse = recipe.sparse
    names: dict[str, Any] = {"include": sparse.include, "exclude": sparse.exclude}
    support = _support(recipe, model, seed)
    generator = derive_generator(seed, "masks")
    if sparse.method == "dense":
        return support if support is not None else Masks.dense(model, **names)
    if sparse.method == "random":
        masks = random(
            model,
            sparse.density,
            sparse.allocation,
            generator=generator,
            sampling=sparse.sampling,
            support=support,
            legacy=sparse.legacy,
            **names,
        )
    else:
        masks = prune(
            model,
            sparse.method,
            sparse.density,
            sparse.allocation,
            support=support,
            generator=generator,
            **names,
        )
    return repair(masks, model, generator=generator).masks if sparse.repair else masks
