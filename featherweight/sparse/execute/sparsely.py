"""Training in the sparse form, for every method that was written for masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from featherweight.common import unwrap
from featherweight.sparse.dynamic.evolving import Evolving
from featherweight.sparse.execute.convert import (
    Pair,
    conversions,
    enter,
    leave,
    to_dense,
    to_sparse,
)
from featherweight.sparse.hold import _innermost
from featherweight.sparse.masks import Masks


class Sparsely:
    """A model in sparse form while it trains; made by `sparsely`.

    Usable as a context manager that goes back to the dense form on exit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        masks: Masks | Evolving,
        options: Mapping[str, Any],
    ) -> None:
        if isinstance(model, (nn.Linear, nn.Conv2d)):
            raise ValueError("model must have layers, got a single one: wrap it in nn.Sequential")
        self._model, self._optimizer, self._options = model, optimizer, dict(options)
        self._method = masks if isinstance(masks, Evolving) else None
        self._pairs: list[Pair] = []
        self._handle: Any = None
        if isinstance(masks, Evolving):
            self._handle = _innermost(optimizer).register_step_post_hook(self._after_step)
            self._follow()
        else:
            to_sparse(model, masks, optimizer=optimizer, **self._options)

    @property
    def masks(self) -> Masks | None:
        """The masks of a dynamic method in force, else None."""
        return None if self._method is None else self._method.masks

    def _after_step(self, *_: object) -> None:
        self._follow()

    def _follow(self) -> None:
        """Be dense for a step at which masks change, else sparse."""
        assert self._method is not None
        if changes_next(self._method):
            self._leave()
        elif not self._pairs:
            self._enter(self._method.masks)

    def _enter(self, masks: Masks) -> None:
        self._pairs = conversions(self._model, masks, optimizer=self._optimizer, **self._options)
        enter(self._model, self._pairs, self._optimizer)

    @torch.no_grad()
    def _leave(self) -> None:
        """Go back to the very parameters that the method knows."""
        for pair in self._pairs:
            pair.dense.weight.copy_(pair.sparse.pattern.scatter(pair.sparse.values))  # type: ignore
        leave(self._model, self._pairs, self._optimizer)
        self._pairs = []

    def remove(self) -> None:
        """Go back to the dense form, masked weights being zero; a dynamic method goes on there."""
        if self._handle is None:
            to_dense(self._model, optimizer=self._optimizer)
            return
        self._handle.remove()
        self._leave()

    def __enter__(self) -> Sparsely:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def changes_next(method: Evolving) -> bool:
    """Tell whether the next optimizer step is one at which a dynamic method changes masks."""
    rule, taken = method._rule, method.step
    return rule.due(taken if rule.replaces_step else taken + 1)


def sparsely(
    model: nn.Module, optimizer: Optimizer, masks: Masks | Evolving, **options: Any
) -> Sparsely:
    """Train a model in its sparse form from now on, until ``remove()``.

    With masks, such as those of a loop's level, it takes the place of `sparse.hold`::

        for level in sparse.lrr(model, sparsity=0.95):
            optimizer = ...
            with sparse.sparsely(model, optimizer, level.masks):
                train(model, optimizer)

    With what a dynamic or gradual method returned, the model is sparse between changes. The step
    at which masks change runs dense, so that the method finds all that it looks at, dense
    gradients too; then the model is sparse again with the new masks and the same optimizer state::

        method = sparse.rigl(model, optimizer, density=0.1, steps=1000, seed=0)
        with sparse.sparsely(model, optimizer, method):
            train(model, optimizer)

    Losses are those of the masked form up to rounding. The dense weights that such a method holds
    stay in memory beside the sparse ones.

    Args:
        model: eager; its modules are exchanged in place, so look them up anew inside.
        optimizer: that trains it.
        masks: to train with, or a method in force on the same model and optimizer.
        options: of `to_sparse`: ``backend``, ``example``, ``batch``, ``exclude``.

    Returns:
        The training's handle; use it as a context manager.

    Raises:
        ValueError: as `to_sparse`; nothing is touched then.
    """
    if unwrap(model) is not model:
        raise ValueError(f"model is wrapped in {type(model).__name__}: pass what is inside")
    return Sparsely(model, optimizer, masks, options)
