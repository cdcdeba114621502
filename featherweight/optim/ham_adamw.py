"""AdamW with HAM built in.

HAM: Tom Jacobs, Advait Gadhikar, Celia Rubio-Madrigal, Rebekka Burkholz 2025, arXiv:2506.02630.
AdamW: Ilya Loshchilov, Frank Hutter 2019, arXiv:1711.05101.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from featherweight.common import unknown
from featherweight.optim import compiled
from featherweight.optim.ham import PAPER
from featherweight.optim.ham_groups import Group, hyperbolic_options
from featherweight.optim.hyperbolic import rates
from featherweight.optim.native import Fused, Native, laid_like, unhooked
from featherweight.optim.registry import OPTIMIZERS

SEGMENT = 1 << 20  # entries a thread takes at a time; a multiple of the kernel's blocks
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@OPTIMIZERS.register("ham-adamw", "AdamW and HAM's hyperbolic step, chunk by chunk", PAPER)
class HamAdamW(Native, torch.optim.AdamW):
    """AdamW, and HAM's hyperbolic step with each of its steps.

    What `ham` does around `torch.optim.AdamW`, on CPUs faster: with numba both steps are one pass
    over memory; without, both steps of a chunk of weights are made while it is in the cache, the
    first by torch's fused kernel. Same groups, state and state dicts. On other devices, and under
    ``torch.compile``, torch's own AdamW is followed by HAM.

    Args:
        params: parameters, named parameters or groups. A group may have ``ham_alpha``,
            ``ham_beta``, ``ham_direction``, ``ham_clamp``; see `ham`.
        lr: learning rate, a float or a 0-d tensor.
        betas: decay of the two moments, of `torch.optim.AdamW`; so are ``eps``,
            ``weight_decay``, ``amsgrad``, ``maximize`` and ``capturable``.
        alpha: strength of HAM's geometry; 0: none. See `ham` and `suggest_alpha`. The exponent
            ``lr alpha g`` takes the raw gradient, which at Adam's learning rates makes HAM far
            weaker than with SGD; ``direction="update"`` takes Adam's step.
        beta: decay of the weights by HAM; 0: none. With weight_decay, both act.
        weights: what HAM acts on: parameters, or the model; splits groups. None: everything.
        direction: "gradient" or "update".
        clamp: largest size of the exponent; None: no limit.
        foreach: torch's multi-tensor form.
        fused: torch's fused form; None: on CPUs.
        backend: "auto": numba where it is installed and handles the group (CPU, float32, the
            gradient's direction, a clamp from 1/32 to 5, no amsgrad), torch elsewhere; "torch".
            Equal to rounding.

    Raises:
        ValueError: an argument is out of range.
        TypeError: a parameter is complex.

    Source:
        Jacobs, Gadhikar, Rubio-Madrigal, Burkholz 2025, arXiv:2506.02630, Algorithm 1, HYP*.
    """

    backend: str

    base_step = staticmethod(unhooked(torch.optim.AdamW.step))

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        alpha: float,
        beta: float = 0.0,
        weights: nn.Module | Iterable[Tensor] | None = None,
        direction: str = "gradient",
        clamp: float | None = 5.0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        backend: str = "auto",
    ) -> None:
        if backend not in ("auto", "torch"):
            raise ValueError(unknown("backend", backend, ("auto", "torch")))
        options = hyperbolic_options(alpha, beta, direction, clamp)
        self.backend = backend
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        self._add_ham(options, weights)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def _step_in_chunks(self, group: Group) -> None:
        if self.backend == "torch" or not _compiles(group):
            super()._step_in_chunks(group)
            return
        rows = [tensors for tensors, _ in self._rows(group)]
        steps = [self.state[weight]["step"].item() for weight, *_ in rows]
        arrays = [[_flat(tensor) for tensor in tensors] for tensors in rows]
        compiled.spread(
            [c for a, s in zip(arrays, steps, strict=True) for c in _one_pass(group, s, a)]
        )
        torch.autograd.graph.increment_version([weight for weight, *_ in rows])

    def _rows(self, group: Group) -> Iterator[tuple[list[Tensor], Fused]]:
        lists: list[list[Tensor]] = [[] for _ in range(6)]
        self._init_group(group, *lists)  # type: ignore[no-untyped-call]
        if lists[-1]:
            torch._foreach_add_(lists[-1], 1)
        for weight, gradient, step in zip(lists[0], lists[1], lists[-1], strict=True):
            state = self.state[weight]
            for key in MOMENTS:
                if key in state:
                    state[key] = laid_like(state[key], weight)
            moments = [state[key] for key in MOMENTS if key in state]
            row = [weight, laid_like(gradient, weight), *moments]
            yield row, partial(_fused_adamw, group, step)


def _fused_adamw(
    group: Group, step: Tensor, weight: Tensor, gradient: Tensor, *moments: Tensor
) -> None:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    torch._fused_adamw_(
        [weight],
        [gradient],
        [moments[0]],
        [moments[1]],
        list(moments[2:]),
        [step],
        amsgrad=group["amsgrad"],
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _compiles(group: Group) -> bool:
    """Tell whether `ham_kernel` handles a group."""
    clamp = group["ham_clamp"]
    fits = group["ham_direction"] == "gradient" and clamp is not None and 1 / 32 <= clamp <= 5
    single = all(p.dtype == torch.float32 for p in group["params"])
    return (
        bool(fits and single and group["ham_alpha"])
        and not group["amsgrad"]
        and compiled.available()
    )


def _flat(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a tensor's memory as an array."""
    array: np.ndarray[Any, np.dtype[np.float32]]
    array = tensor.detach().permute(tensor.dim_order()).view(-1).numpy()
    return array


def _one_pass(group: Group, step: float, arrays: list[Any]) -> Iterator[Callable[[], None]]:
    kernel = importlib.import_module("featherweight.optim.ham_kernel").step
    (beta1, beta2), lr = (float(b) for b in group["betas"]), float(group["lr"])
    sign = -1.0 if group["maximize"] else 1.0
    alpha, beta = (float(rate) for rate in rates(group))
    scalars = (
        *(1 - beta1, beta2, 1 - beta2),
        *(lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), group["eps"]),
        *(1 - lr * group["weight_decay"], sign, sign * alpha, beta, group["ham_clamp"]),
    )
    numbers = [np.float32(scalar) for scalar in scalars]
    for low in range(0, len(arrays[0]), SEGMENT):
        yield partial(kernel, *(array[low : low + SEGMENT] for array in arrays), *numbers)
