"""Mime and MimeLite.

Sai Praneeth Karimireddy, Martin Jaggi, Satyen Kale, Mehryar Mohri, Sashank Reddi, Sebastian Stich,
Ananda Theertha Suresh 2020, arXiv:2008.03606.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from featherweight.federated.algorithms.base import Algorithm, Federation, Summary, plain_sgd
from featherweight.federated.algorithms.registry import ALGORITHMS
from featherweight.federated.local import ClientOptimizer, Correction, Local, State
from featherweight.federated.schedules import Rate
from featherweight.federated.server import ServerSgd
from featherweight.federated.work import Work

PAPER = "Karimireddy et al. 2020, arXiv:2008.03606"


@dataclass(frozen=True, eq=False)
class Frozen:
    """SGD with a momentum that the server sets and local steps leave alone.

    Attributes:
        momentum: the server's, [length].
        beta: its share in a step; the gradient's is ``1 - beta``.
    """

    momentum: Tensor
    beta: float

    def start(self, weights: Tensor) -> State:
        """Return no state: nothing changes from step to step."""
        return {}

    def step_(self, weights: Tensor, direction: Tensor, state: State, rate: float) -> None:
        """Move the weights along momentum and direction."""
        if self.beta:
            weights.sub_(self.momentum, alpha=rate * self.beta)
        weights.sub_(direction, alpha=rate * (1 - self.beta))


class _Mimicking(Algorithm):
    private: ClassVar[bool] = False

    def __init__(self, momentum: float, server_rate: Rate) -> None:
        super().__init__(ServerSgd(server_rate))
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum:g}")
        self.beta = momentum

    def start(self, federation: Federation) -> None:
        """Set the momentum to zero."""
        sgd = plain_sgd("mime", federation.local)
        if sgd.weight_decay:
            raise ValueError(f"mime needs clients without weight_decay, got {sgd.weight_decay:g}")
        self.momentum, self.gradient = federation.zeros(), federation.zeros()

    def begin(self, gradient: Tensor) -> None:
        """Learn the mean of the cohort's full gradients."""
        self.gradient = gradient

    def optimizer(self, local: Local) -> ClientOptimizer:
        """Return SGD with the server's momentum."""
        return Frozen(self.momentum, self.beta)

    def finish(self, weights: Tensor, means: Mapping[str, Tensor], summary: Summary) -> Tensor:
        """Return the server's new weights, and move the momentum."""
        self.momentum = self.beta * self.momentum + (1 - self.beta) * self.gradient
        return super().finish(weights, means, summary)

    def state_dict(self) -> dict[str, Any]:
        """Return the momentum."""
        return {**super().state_dict(), "momentum": self.momentum.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the momentum."""
        super().load_state_dict(state)
        self.momentum = state["momentum"].clone()


@ALGORITHMS.register("mime", "local steps mimic those of a server with all data", PAPER)
class Mime(_Mimicking):
    """Local steps along ``g(y) - g(x) + c`` on one batch, with the server's momentum.

    ``c`` is the mean of the cohort's gradients over all their examples at x, which clients send
    before they train; it also moves the momentum.

    Args:
        momentum: in [0, 1); 0: SGD.
        server_rate: the server's learning rate.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Karimireddy et al. 2020, arXiv:2008.03606, Algorithm 1.
    """

    def __init__(self, momentum: float = 0.0, server_rate: Rate = 1.0) -> None:
        super().__init__(momentum, server_rate)
        self.sends_gradient = True
        self.uplink, self.downlink = 2, 3 if momentum else 2

    def correction(self, work: Work) -> Correction:
        """Return the mean gradient, in the place of the client's own at x."""
        return Correction(offset=self.gradient, anchored=True)


@ALGORITHMS.register("mime-lite", "Mime without its control variate", PAPER)
class MimeLite(_Mimicking):
    """Local steps along the plain gradient, with the server's momentum.

    Args:
        momentum: in [0, 1); 0: `FedAvg`, which needs no gradients sent.
        server_rate: the server's learning rate.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Karimireddy et al. 2020, arXiv:2008.03606, Algorithm 1, without line 9's correction.
    """

    def __init__(self, momentum: float = 0.9, server_rate: Rate = 1.0) -> None:
        super().__init__(momentum, server_rate)
        self.sends_gradient = momentum > 0.0
        self.uplink = self.downlink = 2 if momentum else 1
