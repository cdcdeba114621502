"""What `HamSGD` and `HamAdamW` share: both steps on a chunk of weights while it is in the cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.optim.ham_groups import (
    Group,
    acts,
    check_group,
    keep_options,
    refuse_sparse,
    split_groups,
)
from featherweight.optim.hyperbolic import chunk_, chunkable, chunks, finish, prepare, rates

Fused = Callable[..., None]


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return an optimizer's step without torch's wrapper that runs the step hooks.

    A subclass that calls its parent's step would else run them twice.
    """
    bare: Callable[..., Any] = inspect.unwrap(step, stop=lambda f: not hasattr(f, "hooked"))
    return bare


class Native(Optimizer):
    """A torch optimizer with HAM's step built in; a mixin to put before the torch class."""

    base_step: Callable[..., Any]

    def _add_ham(
        self, options: dict[str, Any], weights: nn.Module | Iterable[Tensor] | None
    ) -> None:
        self.defaults.update(options)
        for group in self.param_groups:
            check_group({**options, **group}, self.defaults)
        self.param_groups = split_groups([{**options, **g} for g in self.param_groups], weights)
        # GradScaler must unscale, and skip the step, itself: HAM reads the gradients after.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; ``ham_...`` keys are HAM's options for it."""
        check_group(param_group, self.defaults)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer, of its wrapped form, or of the base optimizer."""
        load = super().load_state_dict
        keep_options(lambda: load(state_dict), lambda: self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            The closure's loss.

        Raises:
            RuntimeError: a gradient is sparse; nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_sparse(self.param_groups)
        if all(_in_chunks(group) for group in self.param_groups):
            for group in self.param_groups:
                self._step_in_chunks(group)
        else:
            pending = prepare(self.param_groups)
            type(self).base_step(self)
            finish(pending, self.param_groups[0]["foreach"])
        return loss

    def _step_in_chunks(self, group: Group) -> None:
        alpha, beta = (float(rate) for rate in rates(group))
        update, clamp, acting = group["ham_direction"] == "update", group["ham_clamp"], acts(group)
        for tensors, fused in self._rows(group):
            for chunk in chunks(tensors):
                weight, direction = chunk[:2]
                old = weight.clone() if acting and update else None
                fused(*chunk)
                if acting:
                    direction = direction if old is None else weight - old
                    chunk_(weight, direction, alpha, beta, clamp)

    def _rows(self, group: Group) -> Iterator[tuple[list[Tensor], Fused]]:
        """Yield for each weight: itself, its gradient and state, and the fused step of a chunk."""
        raise NotImplementedError


def laid_like(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor with the memory layout of a weight, itself where it has it already."""
    if tensor.stride() == weight.stride():
        return tensor
    return torch.empty_like(weight, dtype=tensor.dtype).copy_(tensor)


def _in_chunks(group: Group) -> bool:
    """Tell whether torch's fused CPU kernel, on chunks, can make the step of a group."""
    if group["fused"] is False or group["foreach"] or group.get("capturable"):
        return False
    return all(_fits(p) for p in group["params"] if p.grad is not None)


def _fits(weight: Tensor) -> bool:
    same = weight.grad is not None and weight.grad.dtype == weight.dtype
    return same and weight.is_floating_point() and chunkable(weight) and bool(chunks([weight]))
