"""FedNova.

Jianyu Wang, Qinghua Liu, Hao Liang, Gauri Joshi, Vincent Poor 2020, arXiv:2007.07481.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from featherweight.federated.algorithms.base import (
    UPDATE,
    Algorithm,
    Federation,
    Summary,
    plain_sgd,
)
from featherweight.federated.algorithms.registry import ALGORITHMS
from featherweight.federated.local import Correction, Sgd, Trained
from featherweight.federated.schedules import Rate
from featherweight.federated.server import ServerSgd
from featherweight.federated.work import Work


def normalizers(steps: Tensor, optimizer: Sgd, rate: float, mu: float) -> Tensor:
    """Return the sum of the weights with which a client's gradients enter its update, |a_i|_1.

    Found by taking the steps on a number whose gradient is one: for plain SGD the number of steps,
    for momentum r the sum over k of ``(1 - r^(steps - k)) / (1 - r)``, for the proximal term the
    sum of ``(1 - rate mu)^k``.

    Args:
        steps: of each client, int64, [n].
        optimizer: of the clients; its weight decay is part of the gradient.
        rate: learning rate.
        mu: strength of the proximal term.

    Returns:
        float64, [n].
    """
    plain = Sgd(optimizer.momentum, optimizer.nesterov)
    place = torch.zeros(1, 1, dtype=torch.float64)
    state, table = plain.start(place), [0.0]
    for _ in range(int(steps.max())):
        plain.step_(place, 1.0 + mu * place, state, rate)
        table.append(-float(place) / rate)
    return torch.tensor(table, dtype=torch.float64)[steps]


@ALGORITHMS.register(
    "fednova",
    "updates are normalised by the local work behind them",
    "Wang et al. 2020, arXiv:2007.07481",
)
class FedNova(Algorithm):
    """Clients send ``(y_i - x) / |a_i|_1``; the server moves by their mean times the mean |a_i|_1.

    So clients that take more steps don't pull the optimum towards their own.

    Args:
        mu: strength of a proximal term as in `FedProx`; 0: none.
        server_rate: the server's learning rate.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Wang et al. 2020, arXiv:2007.07481, section 4.
    """

    private: ClassVar[bool] = False  # the server learns numbers of steps

    def __init__(self, mu: float = 0.0, server_rate: Rate = 1.0) -> None:
        super().__init__(ServerSgd(server_rate))
        if not 0.0 <= mu < float("inf"):
            raise ValueError(f"mu must be a finite number of at least 0, got {mu:g}")
        self.mu = mu

    def start(self, federation: Federation) -> None:
        """Learn the clients' optimizer."""
        self._sgd = plain_sgd("fednova", federation.local, momentum=True)

    def correction(self, work: Work) -> Correction:
        """Return the pull towards the server's weights."""
        return Correction(proximal=self.mu)

    def messages(self, trained: Trained, gradients: Tensor | None) -> dict[str, Tensor]:
        """Return the normalised updates."""
        norms = normalizers(trained.work.steps, self._sgd, trained.rate, self.mu)
        return {UPDATE: trained.delta / norms.to(trained.delta)[:, None]}

    def finish(self, weights: Tensor, means: Mapping[str, Tensor], summary: Summary) -> Tensor:
        """Return the server's new weights."""
        norms = normalizers(summary.steps, self._sgd, summary.rate, self.mu)
        effective = float((norms * summary.weights).sum() / summary.weights.sum())
        return self.server.step(weights, effective * means[UPDATE], summary.round)
