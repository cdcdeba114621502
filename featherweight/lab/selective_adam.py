"""Adam on a selection of each tensor's entries, by any rule: a slow stand-in to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.sparse import top_k

Worth = Callable[[Tensor, Tensor], Tensor]
"""From a weight and its gradient to what its entries are worth; the largest are selected."""


def small_weights(weight: Tensor, gradient: Tensor) -> Tensor:
    """Prefer the smallest weights, as `featherweight.optim.NanoAdam` does."""
    return -weight.abs()


def large_gradients(weight: Tensor, gradient: Tensor) -> Tensor:
    """Prefer the largest gradients, as methods with sparse gradients do."""
    return gradient.abs()


class SelectiveAdam(Optimizer):
    """Adam without weight decay on the entries of greatest worth, with state for all entries.

    At a refresh survivors keep their moments; newcomers begin at zero, with their own bias
    correction. With `small_weights` it walks as NanoAdam does with ``on_refresh="carry"``.

    Args:
        params: parameters or groups; a group's ``density`` 1 trains all of it.
        lr: learning rate.
        density: selected fraction of each tensor, in (0, 1].
        interval: steps from a refresh to the next.
        worth: what is selected.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, object]],
        lr: float,
        density: float,
        interval: int,
        worth: Worth,
    ) -> None:
        super().__init__(params, {"lr": lr, "density": density})
        self._interval = interval
        self._worth = worth
        self._step = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for weight in group["params"]:
                self._refresh(weight, group["density"])
                self._move(weight, group["lr"])
        self._step += 1

    def _refresh(self, weight: Tensor, density: float) -> None:
        state = self.state[weight]
        if not state:
            state.update({key: torch.zeros_like(weight) for key in ("first", "second", "age")})
        if self._step % self._interval == 0:
            count = math.ceil(density * weight.numel())
            assert weight.grad is not None
            selected = top_k(self._worth(weight, weight.grad), count)
            for key in ("first", "second", "age"):
                state[key] *= selected
            state["selected"] = selected

    def _move(self, weight: Tensor, rate: float) -> None:
        state = self.state[weight]
        assert weight.grad is not None
        gradient = weight.grad * state["selected"]
        state["age"] += state["selected"]
        state["first"].lerp_(gradient, 0.1)
        state["second"].mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        age = state["age"].clamp(min=1)
        mean = state["first"] / (1 - 0.9**age)
        size = (state["second"] / (1 - 0.999**age)).sqrt()
        weight -= rate * mean / (size + 1e-8)
