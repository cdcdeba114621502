"""STR, soft threshold reparametrisation: each layer learns below which size its weights are zero.

With a trained number s a layer, the layer computes with::

    sign(theta) relu(|theta| - sigmoid(s))        d/ds = -sign(theta) sigmoid'(s) on the nonzeros

A very negative s begins with a threshold of zero. Weight decay pulls s towards 0, where the
threshold is 1/2, the loss pushes back: weight decay sets the density, which is an outcome.

Source: A. Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML
2020, arXiv:2002.03231, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from featherweight.sparse.reparam.fold import (
    Reparametrization,
    attach,
    attachable_weights,
    forms,
    supports_of,
)
from featherweight.sparse.reparam.registry import FORMS


class SoftThreshold(Reparametrization):
    """Shrinks weights by ``sigmoid(s)``, s of shape (), and cuts off at zero."""

    support: Tensor | None

    def __init__(self, s: Tensor, support: Tensor | None) -> None:
        super().__init__()
        self.s = nn.Parameter(s)
        self.register_buffer("support", support)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the shrunk weight, with exact zeros below the threshold and off the support."""
        threshold = self.s.sigmoid()
        live = weight.abs() > threshold
        if self.support is not None:
            live = live & self.support
        return torch.where(live, weight - weight.sign() * threshold, 0)


@FORMS.register(
    "str",
    "soft threshold: each layer learns below which size its weights are zero",
    "Kusupati et al. 2020, arXiv:2002.03231",
)
def soft_threshold(
    model: nn.Module,
    initial: float = -200.0,
    *,
    support: Mapping[str, Tensor] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> None:
    """Put a trained soft threshold on the prunable weights of a model, in place.

    Give the optimizer `featherweight.sparse.reparam.parameter_groups` of the model, or all its
    parameters with weight decay: it must act on the thresholds too.
    `featherweight.sparse.reparam.density` tells the density at any time,
    `featherweight.sparse.reparam.fold` ends it.

    Args:
        model: any module.
        initial: s at the start; finite. -200 for CIFAR, -3200 for the paper's ResNet-50.
        support: weight name to bool mask, for just the weights chosen; None keeps all.
        include: name patterns, see `featherweight.common.prunable_weights`.
        exclude: name patterns to leave out.

    Raises:
        ValueError: a bad argument, or a weight that can't be treated. Nothing is touched then.
    """
    if not math.isfinite(initial):
        raise ValueError(f"initial must be finite, got {initial:g}")
    weights = attachable_weights(model, include, exclude)
    supports = supports_of(weights, support)
    for name, weight in weights.items():
        attach(model, name, SoftThreshold(weight.new_full((), initial), supports[name]))


def thresholds(model: nn.Module) -> dict[str, float]:
    """Return the present threshold ``sigmoid(s)`` of each weight under `soft_threshold`."""
    found = {n: form for n, form in forms(model).items() if isinstance(form, SoftThreshold)}
    if not found:
        raise ValueError(f"{type(model).__name__} is not under soft_threshold")
    return {name: form.s.sigmoid().item() for name, form in found.items()}
