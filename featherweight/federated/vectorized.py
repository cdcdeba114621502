"""Gradients of many clients in one forward and one backward pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from featherweight.federated.layout import Layout
from featherweight.federated.local import Loss
from featherweight.federated.stack import stack_of


class Vectorized:
    """A backend that runs the model of all clients side by side.

    The forward pass goes through ``torch.func.vmap``, or batched matrix products where the model is
    a stack of linear layers. The clients' losses don't depend on one another's weights, so ordinary
    autograd of their sum gives each client its own gradient.

    Args:
        model: not changed; a copy is kept.
        loss: one loss an example, see `Local`.

    Attributes:
        how: which of the two, in words.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model = copy.deepcopy(model).train()
        self.loss = loss
        self.layout = Layout.of(model)
        self._stack = stack_of(self.model, self.layout.names)
        self.how = "batched matrix products" if self._stack else "torch.func.vmap"
        self._mapped = vmap(self._one, randomness="different")

    def _one(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        output: Tensor = functional_call(self.model, dict(weights), (inputs,))
        return output

    def __call__(
        self, weights: Tensor, inputs: Tensor, targets: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return losses [k] and gradients [k, length]; see `Backend`."""
        weights = weights.detach().requires_grad_()
        losses = self._losses(self.layout.stacks(weights), inputs, targets, mask)
        (gradients,) = torch.autograd.grad(losses.sum(), weights)
        return losses.detach(), gradients

    def _losses(
        self, stacks: dict[str, Tensor], inputs: Tensor, targets: Tensor, mask: Tensor | None
    ) -> Tensor:
        apply = self._stack or self._mapped
        outputs = apply(stacks, inputs)
        each = self.loss(outputs.flatten(0, 1), targets.flatten(0, 1)).view(inputs.shape[:2])
        return masked_mean(each, mask)


def masked_mean(losses: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over the last axis of the losses inside the mask; 0 where there are none."""
    if mask is None:
        return losses.mean(-1)
    kept = torch.where(mask, losses, 0.0)  # not a product: 0 times infinity is NaN
    return kept.sum(-1) / mask.sum(-1).clamp(min=1)
