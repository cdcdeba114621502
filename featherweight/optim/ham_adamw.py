"""AdamW with HAM built in.

HAM: Tom Jacobs, Advait Gadhikar, Celia Rubio-Madrigal, Rebekka Burkholz 2025, arXiv:2506.02630.
AdamW: Ilya Loshchilov, Frank Hutter 2019, arXiv:1711.05101.
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

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@OPTIMIZERS.register("ham-adamw", "AdamW and HAM's hyperbolic step, chunk by chunk", PAPER)
class HamAdamW(Native, torch.optim.AdamW):
    """AdamW, and HAM's hyperbolic step with each of its steps.

    What `ham` does around `torch.optim.AdamW`, on CPUs somewhat faster: both steps of a chunk of
    weights are made while it is in the cache, the first by torch's fused kernel. Same groups, state
    and state dicts. On other devices, and compiled, torch's own AdamW is followed by HAM.

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

    Raises:
        ValueError: an argument is out of range.
        TypeError: a parameter is complex.

    Source:
        Jacobs, Gadhikar, Rubio-Madrigal, Burkholz 2025, arXiv:2506.02630, Algorithm 1, HYP*.
    """

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
    ) -> None:
        options = hyperbolic_options(alpha, beta, direction, clamp)
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
