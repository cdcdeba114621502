"""HAM around any optimizer: hyperbolic aware minimization.

Tom Jacobs, Advait Gadhikar, Celia Rubio-Madrigal, Rebekka Burkholz 2025, arXiv:2506.02630.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.optim.ham_groups import (
    check_group,
    hyperbolic_options,
    keep_options,
    refuse_sparse,
    split_groups,
)
from featherweight.optim.hyperbolic import finish, prepare
from featherweight.optim.registry import OPTIMIZERS

PAPER = "Jacobs et al. 2025, arXiv:2506.02630"


class HAM(Optimizer):
    """An optimizer whose every step is followed by HAM's hyperbolic step; see `ham`.

    Attributes:
        optimizer: the optimizer inside. Groups, state and state dicts of this object are its own.
        foreach: whether the hyperbolic step treats all tensors at a time.
    """

    optimizer: Optimizer
    foreach: bool | None

    def __init__(
        self,
        optimizer: Optimizer,
        alpha: float,
        beta: float = 0.0,
        *,
        weights: nn.Module | Iterable[Tensor] | None = None,
        direction: str = "gradient",
        clamp: float | None = 5.0,
        foreach: bool | None = None,
    ) -> None:
        options = hyperbolic_options(alpha, beta, direction, clamp)
        _check(optimizer, weights is not None)
        parts = split_groups([{**options, **g} for g in optimizer.param_groups], weights)
        if weights is None:  # keep the dicts that others may hold
            for group, part in zip(optimizer.param_groups, parts, strict=True):
                group.update(part)
        else:
            optimizer.param_groups[:] = parts
        optimizer.defaults.update(options)
        # What Optimizer.__init__ makes besides groups and state, which are the inner one's.
        self.__setstate__({"optimizer": optimizer, "foreach": foreach})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "foreach": self.foreach}

    # Optimizer assigns these; here they live in the inner optimizer, and only there.
    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The inner optimizer's state; HAM has none."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults, and HAM's."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; ``ham_...`` keys are HAM's options for it."""
        check_group(param_group, self.defaults)
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state dict; its groups hold HAM's options."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        found = self.optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            found = after(self, found) or found
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, of its native form, or of the inner one alone."""
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        inner = self.optimizer
        keep_options(lambda: inner.load_state_dict(state_dict), lambda: inner.param_groups)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients."""
        self.optimizer.zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make the inner optimizer's step, then the hyperbolic step.

        Args:
            closure: evaluates the model again and returns the loss; handed to the inner optimizer.

        Returns:
            What the inner step returns.

        Raises:
            RuntimeError: a gradient is sparse; nothing is changed then.
        """
        refuse_sparse(self.param_groups)
        pending = prepare(self.param_groups, closure is not None)
        # Some optimizers take no closure, some take it by name only.
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure=closure)
        finish(pending, self.foreach)
        return loss


def _check(optimizer: Optimizer, split: bool) -> None:
    """Refuse what HAM can't go around, before it is touched."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("HAM needs one gradient a step; LBFGS takes many")
    if "ham_alpha" in optimizer.defaults:
        raise ValueError(f"{type(optimizer).__name__} makes HAM's step already")
    for group in optimizer.param_groups:
        if "lr" not in group:
            raise ValueError(f"HAM needs a learning rate; {type(optimizer).__name__} has none")
        if split and "initial_lr" in group:
            raise ValueError("weights= splits parameter groups: call it before a scheduler is made")
        check_group(group, optimizer.defaults)


@OPTIMIZERS.register("ham", "any optimizer, and a hyperbolic step after each of its steps", PAPER)
def ham(
    optimizer: Optimizer,
    alpha: float,
    beta: float = 0.0,
    *,
    weights: nn.Module | Iterable[Tensor] | None = None,
    direction: str = "gradient",
    clamp: float | None = 5.0,
    foreach: bool | None = None,
) -> HAM:
    """Put HAM's hyperbolic step around any torch optimizer.

    After each of its steps every weight θ is multiplied by ``exp(-lr (alpha sign(θ) g + beta))``,
    g the gradient of that step: what the gradient wants larger grows, what it wants smaller
    shrinks, in proportion to its size. Biased towards sparse weights, but never across zero: that
    is left to the base step. Costs no state; groups, state and state dicts are those of the
    optimizer, so schedulers and checkpoints may use either object.

    Each parameter group has ``ham_alpha``, ``ham_beta``, ``ham_direction`` and ``ham_clamp``; a
    group with both of ``ham_alpha=0, ham_beta=0`` is left to the base optimizer alone.

    Args:
        optimizer: with ``lr`` in its groups and one gradient a step.
        alpha: strength of the geometry, in units of one over a weight. 0: none. The step of a
            weight becomes ``1 + alpha |θ|`` times as long: see `suggest_alpha`; 200 in the paper's
            ImageNet runs is far too much where weights are large. With momentum mu the limit of
            training is that of ``alpha (1 - mu)``.
        beta: decay of the weights, tuned like weight decay. 0: none.
        weights: the parameters to act on, or a model, whose weights `ham_weights` finds; groups
            are split accordingly. None: all of each group, biases and norms included.
        direction: "gradient", the paper's, takes the gradient that the optimizer consumed, so that
            the scale of the loss and clipping matter; "update" takes the step that the optimizer
            made, ``exp(alpha sign(θ) Δθ - lr beta)``, with its momentum, preconditioner and
            weight decay; the same for plain gradient descent. It copies the weights for the
            duration of a step.
        clamp: largest size of the exponent, as in the authors' code; None: no limit.
        foreach: all tensors at a time; None: on CUDA.

    Returns:
        The optimizer to train with.

    Raises:
        ValueError: a value is out of range, the optimizer has no learning rate, is LBFGS or makes
            HAM's step already, or groups would be split under a scheduler.
        TypeError: ``optimizer`` is none, or a parameter is complex.

    Source:
        Jacobs, Gadhikar, Rubio-Madrigal, Burkholz 2025, arXiv:2506.02630, Algorithm 1, HYP*.
        ``direction="update"`` is not of the paper. Its code also rescales tensors of a norm above
        1000 and clips gradients after the step; this does neither.
    """
    return HAM(
        optimizer,
        alpha,
        beta,
        weights=weights,
        direction=direction,
        clamp=clamp,
        foreach=foreach,
    )
