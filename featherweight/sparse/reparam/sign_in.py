"""Sign-In: a weight is trained as the product of two factors, which lets it change its sign.

A weight theta becomes ``m w`` with ``m^2 - w^2 = beta``, and descent on both factors is::

    d theta / dt = -sqrt(beta^2 + 4 theta^2)  dL/d theta        sqrt(...) = m^2 + w^2

At theta = 0, where plain products slow down and keep their sign, the speed is beta. Noise and
weight decay shrink beta, so it is put back now and then, with theta unchanged (`rescale`). This
file is the parametrised form, with two tensors a weight; `featherweight.sparse.reparam.SignInSGD`
does the same with one.

Source: A. Gadhikar, T. Jacobs, C. Zhou and R. Burkholz, "Sign-In to the Lottery: Reparameterizing
Sparse Training From Scratch", NeurIPS 2025, arXiv:2504.12801. The transports are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from featherweight.common import prunable_weights, unknown
from featherweight.sparse.hold import _innermost
from featherweight.sparse.reparam.fold import (
    Reparametrization,
    Site,
    attach,
    attachable_weights,
    attached,
    inside,
    supports_of,
)

Decay = Literal["factors", "product", "none"]
DECAYS = ("factors", "product", "none")


def metric(theta: Tensor, beta: float) -> Tensor:
    """Return ``sqrt(beta^2 + 4 theta^2) = m^2 + w^2``, the speed of a weight; theta's shape."""
    return torch.hypot(2 * theta, theta.new_tensor(beta))


def split(theta: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Return the factors ``(m, w)`` with ``m w = theta``, ``m^2 - w^2 = beta`` and ``m >= 0``.

    ``w`` is a quotient, as its own root formula cancels near zero.

    Args:
        theta: weights of any shape.
        beta: at least 0. With 0 the factors are equal in size and descent keeps the sign.
    """
    m = ((beta + metric(theta, beta)) / 2).sqrt()
    return m, theta / m.clamp_min(torch.finfo(m.dtype).tiny)


def merge(m: Tensor, w: Tensor) -> Tensor:
    """Return the weight of two factors, ``m w``; undoes `split`."""
    return m * w


class SignIn(Reparametrization):
    """The weight ``m w`` on a support; both factors have the weight's shape."""

    support: Tensor | None

    def __init__(self, beta: float, support: Tensor | None, decay: Decay) -> None:
        super().__init__()
        self.beta = beta
        self.decay = decay
        self.decays_originals = decay == "factors"
        self.register_buffer("support", support)

    def forward(self, m: Tensor, w: Tensor) -> Tensor:
        """Return the weight, with exact zeros outside the support."""
        return inside(merge(m, w), self.support)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return fresh factors of a weight; outside the support they are those of zero."""
        return split(inside(weight, self.support), self.beta)


def sign_in(
    model: nn.Module,
    beta: float | Mapping[str, float] = 1.0,
    *,
    support: Mapping[str, Tensor] | None = None,
    decay: Decay = "factors",
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> None:
    """Train the prunable weights of a model as products of two factors, in place.

    The function of the model stays what it is, but for weights outside the support, which become
    zero. Make the optimizer afterwards; `featherweight.sparse.reparam.fold` ends it.

    Args:
        model: any module.
        beta: ``m^2 - w^2`` at the start, at least 0; one number or one by weight name.
        support: weight name to bool mask, for just the weights chosen; None keeps all. Outside it
            weights and gradients of the factors are exactly zero.
        decay: what weight decay acts on. "factors": the optimizer's own, on m and w, an L1-like
            pull on the weight. "product": see `decay_product`. "none". The choice is carried out by
            `featherweight.sparse.reparam.parameter_groups`.
        include: name patterns, see `featherweight.common.prunable_weights`.
        exclude: name patterns to leave out.

    Raises:
        ValueError: a bad argument, or a weight that can't be treated. Nothing is touched then.
    """
    if decay not in DECAYS:
        raise ValueError(unknown("decay", decay, DECAYS))
    weights = attachable_weights(model, include, exclude)
    chosen = checked_betas(weights, beta)
    supports = supports_of(weights, support)
    for name in weights:
        attach(model, name, SignIn(chosen[name], supports[name], decay))


def checked_betas(weights: Iterable[str], beta: float | Mapping[str, float]) -> dict[str, float]:
    """Return a beta for each name.

    Raises:
        ValueError: a name has none, or one is not a finite number of at least 0.
    """
    chosen: dict[str, float] = {}
    for name in weights:
        if isinstance(beta, Mapping) and name not in beta:
            raise ValueError(f"beta lacks {name!r}")
        value = beta[name] if isinstance(beta, Mapping) else beta
        if not 0 <= value < math.inf:
            raise ValueError(f"beta must be finite and at least 0, got {value:g} for {name!r}")
        chosen[name] = float(value)
    return chosen


def beta_schedule(
    model: nn.Module,
    output: float = 1.0,
    input: float = 0.5,
    *,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> dict[str, float]:
    """Return a beta for each prunable weight, falling geometrically towards the input.

    Theory wants a larger beta on the outer of two layers; in practice 1 everywhere works as well.

    Args:
        model: its weights are taken in the order in which it registers them, input first.
        output: beta of the last weight, over 0.
        input: beta of the first, over 0.
        include: name patterns, see `featherweight.common.prunable_weights`.
        exclude: name patterns to leave out.
    """
    if min(output, input) <= 0:
        raise ValueError(f"output and input must be over 0, got {output:g} and {input:g}")
    names = list(prunable_weights(model, include, exclude))
    depths = torch.linspace(0, 1, len(names), dtype=torch.float64).tolist()
    if len(names) == 1:
        depths = [1.0]
    return {n: input * (output / input) ** d for n, d in zip(names, depths, strict=True)}


def decay_product(model: nn.Module, optimizer: Optimizer, weight_decay: float) -> RemovableHandle:
    """Add the gradient of ``weight_decay / 2 * theta^2`` to those of the factors before each step.

    This is weight decay of the plain weight, as other methods have it. It is for steps without a
    closure.

    Args:
        model: a model under ``sign_in(..., decay="product")``.
        optimizer: that trains the factors.
        weight_decay: at least 0.

    Returns:
        A handle whose ``remove()`` ends it.
    """
    sites = sign_in_sites(model)
    for name, (_, form) in sites.items():
        if form.decay != "product":
            raise ValueError(f"{name!r} has decay {form.decay!r}; sign_in with 'product'")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay:g}")

    @torch.no_grad()
    def add(*hooked: object) -> None:
        for site, _ in sites.values():
            m, w = site.originals
            theta = site.final()
            for factor, other in ((m, w), (w, m)):
                if factor.grad is not None:
                    factor.grad.addcmul_(other, theta, value=weight_decay)

    return _innermost(optimizer).register_step_pre_hook(add)


def sign_in_sites(model: nn.Module) -> dict[str, tuple[Site, SignIn]]:
    """Return the weights under Sign-In: name -> where its form is, and the form.

    Raises:
        ValueError: there is none.
    """
    sites: dict[str, tuple[Site, SignIn]] = {}
    for name, site in attached(model).items():
        if isinstance(site.form, SignIn):
            sites[name] = site, site.form
    if not sites:
        raise ValueError(f"{type(model).__name__} is not under sign_in")
    return sites
