"""Keep Sign-In's beta up: split the weights afresh now and then, in both of its forms.

Source: A. Gadhikar, T. Jacobs, C. Zhou and R. Burkholz, NeurIPS 2025, arXiv:2504.12801. The
transports of optimizer state are derived here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from featherweight.common import unknown
from featherweight.sparse.hold import _innermost, elementwise_state
from featherweight.sparse.reparam.fold import Site, after_each_step
from featherweight.sparse.reparam.registry import FORMS
from featherweight.sparse.reparam.sign_in import checked_betas, sign_in, sign_in_sites, split
from featherweight.sparse.reparam.sign_in_sgd import SignInSGD

State = Literal["keep", "transport", "zero"]
STATES = ("keep", "transport", "zero")

# How often a gradient is a factor of what an optimizer stores under a name.
POWERS = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


@torch.no_grad()
def rescale(
    model: nn.Module,
    beta: float | Mapping[str, float] | None = None,
    optimizer: Optimizer | None = None,
    state: State = "keep",
) -> None:
    """Split all weights under Sign-In afresh: beta is as new, the weights stay, in place.

    Decay of the factors outside the support is undone too.

    Args:
        model: a model under `sign_in`.
        beta: None: the one each weight began with; otherwise also the one of later calls.
        optimizer: that trains the factors; needed unless ``state`` is "keep".
        state: of the optimizer. "keep" leaves it. "zero" empties what it has an entry a weight of.
            "transport" makes momentum and Adam's moments those of the same gradients under the new
            factors, which is exact where the old factors changed slowly.

    Raises:
        ValueError: a bad argument, no weight under `sign_in`, or a state that can't be
            transported. Nothing is touched then.
    """
    if state not in STATES:
        raise ValueError(unknown("state", state, STATES))
    if state != "keep" and optimizer is None:
        raise ValueError(f"state {state!r} needs optimizer=")
    sites = sign_in_sites(model)
    old = {name: form.beta for name, (_, form) in sites.items()}
    chosen = checked_betas(sites, old if beta is None else beta)
    inner = None if optimizer is None or state == "keep" else _innermost(optimizer)
    if inner is not None and state == "transport":
        _check_transport(inner, [site for site, _ in sites.values()])
    for name, (site, form) in sites.items():
        form.beta = chosen[name]
        m, w = site.originals
        fresh = split(site.final(), chosen[name])
        if inner is not None:
            _treat_state(inner, m, m / fresh[0] if state == "transport" else None)
            _treat_state(inner, w, fresh[0] / m if state == "transport" else None)
        m.copy_(fresh[0])
        w.copy_(fresh[1])


def _check_transport(optimizer: Optimizer, sites: Iterable[Site]) -> None:
    for factor in (factor for site in sites for factor in site.originals):
        for key in elementwise_state(factor, optimizer.state.get(factor, {})):
            if key not in POWERS:
                raise ValueError(
                    f"state {key!r} of {type(optimizer).__name__} can't be transported: one of "
                    f"{', '.join(POWERS)} can; use state='keep' or 'zero'"
                )


def _treat_state(optimizer: Optimizer, factor: Tensor, scale: Tensor | None) -> None:
    """Multiply a factor's state by the scale of its gradients; None empties it."""
    for key, value in elementwise_state(factor, optimizer.state.get(factor, {})).items():
        if scale is None:
            value.zero_()
        else:
            # Where a factor met zero nothing can be transported, and the state starts anew.
            value.mul_(scale.pow(POWERS[key]).nan_to_num(0, 0, 0))


def rescale_every(
    model: nn.Module,
    optimizer: Optimizer,
    steps: int,
    *,
    every: int | None = None,
    until: float = 0.75,
    state: State = "keep",
    start: int = 0,
) -> RemovableHandle:
    """Rescale now and then from here on: after every so many steps of an optimizer.

    Args:
        model: under `featherweight.sparse.reparam.sign_in`; or any, under a `SignInSGD`.
        optimizer: that trains it.
        steps: optimizer steps of the whole training, at least 1.
        every: steps between; None: a tenth of the training. The paper's interval isn't known.
        until: fraction of the training after which beta is left alone, in [0, 1].
        state: see `featherweight.sparse.reparam.rescale`; `SignInSGD` has nothing to transport.
        start: steps taken already, for a training that goes on.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        ValueError: an argument out of range.
    """
    every = max(1, steps // 10) if every is None else every
    if min(steps, every) < 1 or start < 0 or not 0 <= until <= 1:
        raise ValueError(
            f"steps and every must be at least 1, start at least 0, until in [0, 1]; got "
            f"{steps=}, {every=}, {start=}, {until=}"
        )
    inner = _innermost(optimizer)

    def act(taken: int) -> None:
        if taken % every == 0 and taken <= until * steps:
            if isinstance(inner, SignInSGD):
                inner.rescale()
            else:
                rescale(model, optimizer=inner, state=state)

    return after_each_step(optimizer, act, start)


FORMS.register(
    "sign-in",
    "a weight is a product of two factors, which lets it change its sign",
    "Gadhikar et al. 2025, arXiv:2504.12801",
    defaults={"follow": rescale_every},
)(sign_in)
