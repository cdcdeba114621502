"""Clients with quadratic losses ``(x - c)' A (x - c) / 2``, with known fixed points."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.federated.local import Local
from featherweight.federated.population import Population


class Quadratic(nn.Module):
    """The loss of each example ``[A | c]`` at the weights."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        away = self.x - inputs[..., -1]
        return ((inputs[..., :-1] @ away[..., None])[..., 0] * away).sum(-1) / 2


def outputs_are_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs


@dataclass(frozen=True, eq=False)
class Quadratics:
    """One quadratic a client: ``a`` [M, p, p], ``c`` [M, p]; a client holds it ``sizes`` times."""

    a: Tensor
    c: Tensor
    sizes: Tensor

    @staticmethod
    def draw(clients: int = 5, dimension: int = 4, seed: int = 0, unequal: bool = True):
        generator = torch.Generator().manual_seed(seed)
        shape = (clients, dimension, dimension)
        turns = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
        values = 0.6 + torch.rand(clients, dimension, generator=generator, dtype=torch.float64)
        a = turns @ torch.diag_embed(values) @ turns.mT
        c = torch.randn(clients, dimension, generator=generator, dtype=torch.float64)
        sizes = torch.arange(1, clients + 1) if unequal else torch.ones(clients, dtype=torch.int64)
        return Quadratics(a, c, sizes)

    @property
    def shares(self) -> Tensor:
        return self.sizes.double() / self.sizes.sum()

    @property
    def population(self) -> Population:
        examples = torch.cat([self.a, self.c[..., None]], 2).repeat_interleave(self.sizes, 0)
        clients = torch.arange(len(examples)).split(self.sizes.tolist())
        return Population(examples, torch.zeros(len(examples), dtype=torch.int64), clients)

    @property
    def model(self) -> Quadratic:
        return Quadratic(self.a.shape[1])

    def local(self, **options) -> Local:
        return Local(**{"learning_rate": 0.1, "loss": outputs_are_losses, **options})

    def gradients(self, x: Tensor) -> Tensor:
        """Return each client's gradient at x, [M, p]."""
        return (self.a @ (x - self.c)[..., None])[..., 0]

    def balance(self, matrices: Tensor) -> Tensor:
        """Return x with ``sum_i p_i M_i (x - c_i) = 0``."""
        left = torch.einsum("i,ijk->jk", self.shares, matrices)
        right = torch.einsum("i,ijk,ik->j", self.shares, matrices, self.c)
        return torch.linalg.solve(left, right)

    @property
    def optimum(self) -> Tensor:
        return self.balance(self.a)

    def contraction(self, steps: Tensor, rate: float, mu: float = 0.0) -> Tensor:
        """Return ``Q_i = I - (I - rate (A_i + mu I))^steps_i``, [M, p, p]."""
        identity = torch.eye(self.a.shape[1], dtype=torch.float64)
        powers = [
            torch.linalg.matrix_power(identity - rate * (a + mu * identity), int(count))
            for a, count in zip(self.a, steps, strict=True)
        ]
        return identity - torch.stack(powers)
