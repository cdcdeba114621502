"""What a construction returns: the masked network, and how far it can be from its target."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.sparse.masks import Masks
from featherweight.sparse.tickets.layers import layers


@dataclass(frozen=True)
class LayerErrors:
    """How well one target layer was built, in R rows: its neurons, or several copies of each.

    Attributes:
        errors: float64 (R, inputs + 1), distance of each weight and bias (last) from the target's.
        spread: float64 (R, inputs + 1), how much of an input's own error a row can take over.
        gain: what the ticket computes here, in units of the target.
        problems: number of subset sums solved.
        out_of_range: number of those whose candidates did not reach their target.
    """

    errors: Tensor
    spread: Tensor
    gain: float
    problems: int
    out_of_range: int


@dataclass(frozen=True)
class Ticket:
    """A subnetwork of a random source that computes a target: ``target(x) ~ scale * network(x)``.

    Attributes:
        network: the source with exact zeros outside the masks; kept entries are the source's.
        masks: of all its parameters, biases too.
        scale: what its output is to be multiplied by.
        layers: the errors of each target layer.
        target: a copy of the network it stands for.
    """

    network: nn.Sequential
    masks: Masks
    scale: float
    layers: tuple[LayerErrors, ...]
    target: nn.Sequential

    @torch.no_grad()
    def error(self, inputs: Tensor) -> float:
        """Return the largest difference of any output on a sample, inputs (N, n_0)."""
        found = self.scale * self.network(inputs.to(next(self.network.parameters())))
        wanted = self.target(inputs.to(next(self.target.parameters())))
        return float((found.double() - wanted.to(found.device).double()).abs().max())

    @torch.no_grad()
    def bound(self, inputs: Tensor | None = None, radius: float = 1.0) -> float:
        """Return what `error` can't exceed, up to rounding.

        With E the errors of weights and biases, B_i the largest size of input i of a layer, and W
        the target's weights, ``e_0 = 0`` and
        ``e_l = max_j [ sum_i E_ji (B_i + e_{l-1}) + E_j + sum_i |W_ji| e_{l-1} ]``. Where a hidden
        neuron has copies with errors of their own ("L+1"), the sum of the sizes of the summands of
        W_ji takes the place of ``E_ji + |W_ji|``, and the constant has an error too.

        Args:
            inputs: (N, n_0): the bound is for these. None: for all x in the cube of ``radius``.
            radius: the largest ``|x_i|``, where no inputs are given.
        """
        sizes = self._sizes(inputs, radius)
        error = 0.0
        for layer, size in zip(self.layers, sizes, strict=True):
            error = float((layer.errors @ size + layer.spread.sum(1) * error).max())
        return error

    def _sizes(self, inputs: Tensor | None, radius: float) -> list[Tensor]:
        """Return the largest size of each layer's inputs and of the constant, (inputs + 1,)."""
        found = layers(self.target)
        one = torch.ones(1, dtype=torch.float64)
        if inputs is None:
            box = torch.full((1, found[0].weight.shape[1]), radius).double()
        else:
            box = inputs.detach().to("cpu", torch.float64)
        sizes = []
        for layer in found:
            sizes.append(torch.cat([box.abs().amax(0), one]))
            if inputs is None:
                box = box.abs() @ layer.weight.abs().T + layer.bias.abs()
            else:
                box = (box @ layer.weight.T + layer.bias).relu()
        return sizes
