"""Continuous sparsification: a soft mask on each weight that hardens as training goes on.

Each weight has a score s, and the layer computes with::

    w * sigmoid(T s) / sigmoid(s_0)        T from 1 to 200 over a round, exponentially

s begins at s_0, so that the mask begins at 1. The loss gets a penalty ``lambda * sum(mask)``; at
the end a weight is kept where s > 0. Several rounds make a ticket: between them s <- min(T s, s_0)
and T <- 1, so that what a round has removed stays removed, and the weights may be rewound.

Source: P. Savarese, H. Silva and M. Maire, "Winning the Lottery with Continuous Sparsification",
NeurIPS 2020, arXiv:1912.04427, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from featherweight.common import unwrap
from featherweight.sparse.reparam.fold import (
    Reparametrization,
    after_each_step,
    attach,
    attachable_weights,
    forms,
    inside,
    supports_of,
)
from featherweight.sparse.reparam.registry import FORMS

FINAL = 200.0
LIMIT = 80.0  # sigmoid(-LIMIT) is still a normal float32


class Continuous(Reparametrization):
    """A soft mask on a support; scores have the weight's shape, the temperature the shape ()."""

    decays_own = False
    support: Tensor | None
    temperature: Tensor

    def __init__(self, scores: Tensor, initial: float, support: Tensor | None) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)
        self.initial = initial
        self.scale = 1 + math.exp(-initial)  # 1 / sigmoid(initial)
        self.register_buffer("temperature", scores.new_ones(()))
        self.register_buffer("support", support)

    def mask(self) -> Tensor:
        """Return the soft mask, in [0, 1 / sigmoid(s_0)], of the weight's shape."""
        return inside(self.scale * (self.temperature * self.scores).sigmoid(), self.support)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the softly masked weight."""
        return weight * self.mask()

    def final(self, *originals: Tensor) -> Tensor:
        """Return the weight under the mask of endless temperature, exact zeros where s <= 0."""
        (weight,) = originals
        return torch.where(self.scores > 0, inside(self.scale * weight, self.support), 0)


def anneal(
    model: nn.Module, optimizer: Optimizer, steps: int, *, final: float = FINAL, start: int = 0
) -> RemovableHandle:
    """Raise the temperature from here on: ``final**(t / (steps - 1))`` at step t, counted from 0.

    Args:
        model: under `continuous_sparsification`.
        optimizer: that trains it.
        steps: optimizer steps of one round, at least 1.
        final: temperature of the last step, at least 1.
        start: steps taken already, for a round that goes on.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: an argument out of range, or a model under another form.
    """
    if steps < 1 or start < 0 or not 1 <= final < math.inf:
        raise ValueError(
            "steps must be at least 1, start at least 0, final finite and at least 1; got "
            f"{steps=}, {start=}, {final=}"
        )
    found = continuous_forms(model)

    @torch.no_grad()
    def heat(taken: int) -> None:
        fraction = min(taken / max(steps - 1, 1), 1.0)
        for form in found.values():
            form.temperature.fill_(final**fraction)

    heat(start)
    return after_each_step(optimizer, heat, start)


@FORMS.register(
    "continuous",
    "continuous sparsification: soft masks that harden as training goes on",
    "Savarese et al. 2020, arXiv:1912.04427",
    defaults={"follow": anneal},
)
def continuous_sparsification(
    model: nn.Module,
    initial: float = 0.0,
    *,
    support: Mapping[str, Tensor] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> None:
    """Put a soft mask with trained scores on the prunable weights of a model, in place.

    Give the optimizer `featherweight.sparse.reparam.parameter_groups` of the model, as weight decay
    must not act on the scores, let `anneal` raise the temperature, and add `mask_penalty` to the
    loss. `featherweight.sparse.reparam.fold` ends it: it leaves ``w / sigmoid(s_0)`` where s > 0,
    the limit of what was computed with, and exact zeros elsewhere.

    Args:
        model: any module.
        initial: s_0; the paper uses 0, -0.1 for fewer and 0.1 for more weights. Within 80 of zero.
        support: weight name to bool mask, for just the weights chosen; None keeps all.
        include: name patterns, see `featherweight.common.prunable_weights`.
        exclude: name patterns to leave out.

    Raises:
        ValueError: a bad argument, or a weight that can't be treated. Nothing is touched then.
    """
    if not abs(initial) <= LIMIT:
        raise ValueError(f"initial must lie in [-{LIMIT:g}, {LIMIT:g}], got {initial:g}")
    weights = attachable_weights(model, include, exclude)
    supports = supports_of(weights, support)
    for name, weight in weights.items():
        scores = torch.full_like(weight, initial)
        attach(model, name, Continuous(scores.detach(), initial, supports[name]))


def mask_penalty(model: nn.Module) -> Tensor:
    """Return the sum of all soft masks, shape (), to be added to the loss; times a small factor.

    The paper's factor is 1e-8.
    """
    sums = [form.mask().sum() for form in continuous_forms(model).values()]
    return torch.stack([value.to(sums[0]) for value in sums]).sum()


@torch.no_grad()
def end_round(model: nn.Module, rewind: Mapping[str, Tensor] | None = None) -> None:
    """Go into the next round, in place: ``s <- min(T s, s_0)``, ``T <- 1``.

    Args:
        model: under `continuous_sparsification`.
        rewind: a snapshot of the model under this form, such as `featherweight.sparse.snapshot`
            makes early in the first round; all but the masks goes back to it. None rewinds nothing.

    Raises:
        RuntimeError: the snapshot is of another model; torch names what differs.
    """
    found = continuous_forms(model)
    if rewind is not None:
        _rewind(unwrap(model), rewind)
    for form in found.values():
        form.scores.mul_(form.temperature).clamp_(max=form.initial)
        form.temperature.fill_(1)


def _rewind(model: nn.Module, rewind: Mapping[str, Tensor]) -> None:
    own = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, Continuous)
        for name in module.state_dict()
    }
    model.load_state_dict({**rewind, **{k: v for k, v in model.state_dict().items() if k in own}})


def continuous_forms(model: nn.Module) -> dict[str, Continuous]:
    """Return the forms of `continuous_sparsification` on a model: weight name -> form.

    Raises:
        ValueError: there is none.
    """
    found = {n: form for n, form in forms(model).items() if isinstance(form, Continuous)}
    if not found:
        raise ValueError(f"{type(model).__name__} is not under continuous_sparsification")
    return found
