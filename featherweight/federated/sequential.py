"""Gradients of one client after the other, for models that can't run side by side."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from featherweight.federated.layout import Layout, read_buffers, write_buffers_
from featherweight.federated.local import Loss


class Sequential:
    """A backend that runs an ordinary model, client by client, without padding.

    Args:
        model: not changed; a copy is trained.
        loss: one loss an example, see `Local`.
    """

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        self.model = copy.deepcopy(model).train()
        self.loss = loss
        self.layout = Layout.of(model)
        self._weights = self.layout.parameters(self.model)

    def __call__(
        self, weights: Tensor, inputs: Tensor, targets: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return losses [k] and gradients [k, length]; see `Backend`."""
        rows = range(len(weights))
        kept = [slice(None) if mask is None else mask[row] for row in rows]
        found = [self._one(weights[i], inputs[i][kept[i]], targets[i][kept[i]]) for i in rows]
        return torch.stack([loss for loss, _ in found]), torch.stack([grad for _, grad in found])

    def _one(self, weights: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not len(inputs):
            return weights.new_zeros(()), torch.zeros_like(weights)
        self.layout.write_(self.model, weights)
        each = self.loss(self.model(inputs), targets)
        if each.shape != (len(inputs),):
            raise ValueError(
                f"loss must return one loss an example, [{len(inputs)}], got shape "
                f"{[*each.shape]}; cross_entropy needs reduction='none'"
            )
        loss = each.mean()
        gradients = torch.autograd.grad(loss, self._weights, allow_unused=True)
        parts = [
            torch.zeros_like(weight) if gradient is None else gradient
            for weight, gradient in zip(self._weights, gradients, strict=True)
        ]
        return loss.detach(), torch.cat([part.reshape(-1) for part in parts])

    def begin(self, buffers: Tensor) -> None:
        """Give the next client the server's buffers."""
        write_buffers_(self.model, buffers)

    def buffers(self) -> Tensor:
        """Return the buffers as the last client left them."""
        return read_buffers(self.model)
