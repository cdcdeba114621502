"""What holds a run's weights to its method while a level trains."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from featherweight.lab.data.seeding import derive_generator
from featherweight.lab.errors import BadInput
from featherweight.lab.recipe import Recipe
from featherweight.sparse import DYNAMIC, FORMS, Masks, fold, hold, rescale_every
from featherweight.sparse.reparam import nonzero


class Kept(Protocol):
    """Masks in force, until they are let go."""

    @property
    def masks(self) -> Masks:
        """Of this moment."""

    def remove(self) -> None:
        """Let go."""


def put_form(recipe: Recipe, model: nn.Module, start: Masks, seed: int) -> None:
    """Put the recipe's form on the weights of a model, in place, before its optimizer is made.

    Raises:
        BadInput: the method's options are wrong, or the model can't be treated.
    """
    sparse = recipe.sparse
    if sparse.structure is not None:
        raise BadInput(f"sparse.structure: {sparse.method} takes none")
    entry = FORMS[sparse.method]
    given: dict[str, Any] = {
        "support": start,
        "include": sparse.include,
        "exclude": sparse.exclude,
        **sparse.options,
    }
    if "density" in entry.needs:
        given["density"] = sparse.density
    elif sparse.density < 1.0:
        raise BadInput(f"sparse: {sparse.method} finds its own density; leave sparse.density out")
    if "generator" in entry.needs:
        given["generator"] = derive_generator(seed, "form")
    try:
        entry.method(model, **given)
    except (ValueError, TypeError) as error:
        raise BadInput(f"sparse: {error}") from error


@contextmanager
def accompany(
    recipe: Recipe,
    model: nn.Module,
    optimizer: Optimizer,
    steps: int,
    taken: int,
    per_epoch: int,
) -> Iterator[None]:
    """Do what goes along with the steps of a level: rescalings, rising temperatures.

    Args:
        recipe: what to do.
        model: the user's own module.
        optimizer: wrapped or not.
        steps: of the level.
        taken: of them before an interruption; 0 at the beginning.
        per_epoch: steps of an epoch.
    """
    sparse, fit = recipe.sparse, recipe.fit
    handle = None
    if fit.optimizer == "sign-in":
        every = None if fit.rescale is None else fit.rescale.steps(per_epoch)
        handle = rescale_every(
            model, optimizer, steps, every=every, until=fit.rescale_until, start=taken
        )
    elif sparse.method in FORMS and (follow := FORMS[sparse.method].defaults.get("follow")):
        handle = follow(model, optimizer, steps, start=taken)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


class Formed:
    """A model under a form of its weights, until it is folded."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._folded: Masks | None = None

    @property
    def masks(self) -> Masks:
        """The weights that are not zero now."""
        return nonzero(self._model) if self._folded is None else self._folded

    def remove(self) -> None:
        """Leave a plain model with the same weights."""
        if self._folded is None:
            self._folded = self.masks
            fold(self._model)


class Resting:
    """The masks of a level that is held by what executes it, see `execution.executed`."""

    def __init__(self, masks: Masks) -> None:
        self.masks = masks

    def update(self, masks: Masks) -> None:
        """Take the masks of the next level."""
        self.masks = masks

    def remove(self) -> None:
        """There is nothing to let go."""


def keep(
    recipe: Recipe,
    model: nn.Module,
    optimizer: Optimizer,
    masks: Masks,
    support: Masks,
    seed: int,
    steps: int,
) -> Kept:
    """Put the method of a recipe in force.

    Args:
        recipe: what to do.
        model: as it is when training begins.
        optimizer: that trains it.
        masks: of the level.
        support: masks that dynamic methods never leave.
        seed: of random masks and of their changes.
        steps: optimizer steps of a level.

    Raises:
        BadInput: the method's options are wrong.
    """
    sparse = recipe.sparse
    if sparse.method not in DYNAMIC:
        resting = recipe.execute.form != "masked"
        return Resting(masks) if resting else hold(model, optimizer, masks)
    given: dict[str, Any] = {
        "steps": steps,
        "include": sparse.include,
        "exclude": sparse.exclude,
        **sparse.options,
    }
    entry = DYNAMIC[sparse.method]
    if "generator" in entry.needs:
        given["generator"] = derive_generator(seed, "masks")
    if sparse.support.density < 1.0:
        given["support"] = support
    takes = inspect.signature(entry.method).parameters
    if sparse.allocation is not None:
        given["allocation" if "allocation" in takes else "scope"] = sparse.allocation
    if sparse.structure is not None:
        if "structure" not in takes:
            raise BadInput(f"sparse.structure: {sparse.method} takes none")
        given["structure"] = sparse.structure
    try:
        return entry.method(model, optimizer, sparse.density, **given)
    except (ValueError, TypeError) as error:
        raise BadInput(f"sparse: {error}") from error
