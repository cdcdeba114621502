"""SGD with HAM built in.

Tom Jacobs, Advait Gadhikar, Celia Rubio-Madrigal, Rebekka Burkholz 2025, arXiv:2506.02630.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from featherweight.optim.ham import PAPER
from featherweight.optim.ham_groups import Group, hyperbolic_options
from featherweight.optim.native import Fused, Native, laid_like, unhooked
from featherweight.optim.registry import OPTIMIZERS


@OPTIMIZERS.register("ham-sgd", "SGD and HAM's hyperbolic step, chunk by chunk", PAPER)
class HamSGD(Native, torch.optim.SGD):
    """SGD, and HAM's hyperbolic step with each of its steps: the paper's own setting.

    What `ham` does around `torch.optim.SGD`, on CPUs somewhat faster: both steps of a chunk of
    weights are made while it is in the cache, the first by torch's fused kernel. Same groups, state
    and state dicts. On other devices, and compiled, torch's own SGD is followed by HAM.

    Args:
        params: parameters, named parameters or groups. A group may have ``ham_alpha``,
            ``ham_beta``, ``ham_direction``, ``ham_clamp``; see `ham`.
        lr: learning rate, a float or a 0-d tensor.
        momentum: of `torch.optim.SGD`; so are ``dampening``, ``weight_decay``, ``nesterov`` and
            ``maximize``. With momentum mu the limit of training is that of ``alpha (1 - mu)``.
        alpha: strength of HAM's geometry; 0: none. See `ham` and `suggest_alpha`.
        beta: decay of the weights by HAM; 0: none. With weight_decay, both act.
        weights: what HAM acts on: parameters, or the model; splits groups. None: everything.
        direction: "gradient" or "update".
        clamp: largest size of the exponent; None: no limit.
        foreach: torch's multi-tensor form.
        fused: torch's fused form; None: on CPUs.

    Raises:
        ValueError: an argument is out of range.
        TypeError: a parameter is complex.

    Source:
        Jacobs, Gadhikar, Rubio-Madrigal, Burkholz 2025, arXiv:2506.02630, Algorithm 1, HYP*.
    """

    base_step = staticmethod(unhooked(torch.optim.SGD.step))

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        alpha: float,
        beta: float = 0.0,
        weights: nn.Module | Iterable[Tensor] | None = None,
        direction: str = "gradient",
        clamp: float | None = 5.0,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        options = hyperbolic_options(alpha, beta, direction, clamp)
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            fused=fused,
        )
        self._add_ham(options, weights)

    def _rows(self, group: Group) -> Iterator[tuple[list[Tensor], Fused]]:
        for weight in group["params"]:
            if weight.grad is None:
                continue
            row, state, first = [weight, laid_like(weight.grad, weight)], self.state[weight], False
            if group["momentum"]:
                buffer = state.get("momentum_buffer")
                first = buffer is None
                fresh = torch.empty_like(weight) if buffer is None else laid_like(buffer, weight)
                state["momentum_buffer"] = fresh
                row.append(fresh)
            yield row, partial(_fused_sgd, group, first)


def _fused_sgd(
    group: Group, first: bool, weight: Tensor, gradient: Tensor, *buffer: Tensor
) -> None:
    torch._fused_sgd_(
        [weight],
        [gradient],
        list(buffer),
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=float(group["lr"]),
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=first,
    )
