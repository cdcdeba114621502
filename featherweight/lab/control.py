"""The matched-budget control: what the same epochs bring in one long schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from featherweight.lab.duration import Duration
from featherweight.lab.identity import distinctive
from featherweight.lab.recipe import Recipe, SupportRecipe

CYCLIC = ("cyclic", "sculpt")
"""Methods whose gain may be that of training longer."""


def control(recipe: Recipe) -> Recipe | None:
    """Return the recipe that a cyclic result must be read against; None for other methods.

    It trains masks of the same density, made in the same way, for the same number of epochs in a
    single learning-rate schedule, whose milestones move along; the warm-up stays as long as it is.
    For cyclic training the masks are the very same.

    Source: reviews of Gadhikar, Nelaturu & Burkholz 2024, arXiv:2406.02773, asked for it.
    """
    sparse, fit = recipe.sparse, recipe.fit
    if sparse.method not in CYCLIC:
        return None
    trainings = cycles(recipe) + (sparse.method == "sculpt")
    allocation: str | None
    if sparse.method == "cyclic":
        method, allocation, support = "random", sparse.allocation or "erk", sparse.support
        if sparse.density == 1.0:
            method, allocation = "dense", None
    else:
        method, allocation = sparse.support.method, sparse.support.allocation
        support = SupportRecipe()
    return replace(
        recipe,
        name=f"{recipe.name}-one-schedule",
        sparse=replace(sparse, method=method, allocation=allocation, support=support, options={}),
        fit=replace(
            fit,
            length=_times(fit.length, trainings),
            milestones=[_times(milestone, trainings) for milestone in fit.milestones],
        ),
    )


def _times(length: Duration, factor: int) -> Duration:
    return Duration(factor * length.amount, length.unit)


def cycles(recipe: Recipe) -> int:
    """Return how many cycles a recipe of `CYCLIC` trains, without the last one of sculpt."""
    return int(recipe.sparse.options.get("cycles", 4))


def with_controls(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return the recipes, each cyclic one followed by its control unless that is there already."""
    known = [distinctive(recipe) for recipe in recipes]
    result = []
    for recipe in recipes:
        result.append(recipe)
        added = control(recipe)
        if added is not None and distinctive(added) not in known:
            known.append(distinctive(added))
            result.append(added)
    return result
