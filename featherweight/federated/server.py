"""Server optimizers: how the mean of the clients' updates moves the server's weights.

Each takes the mean update as minus a gradient. They are a few lines of arithmetic once a round;
``torch.optim`` has another bias correction, no Yogi, and loads ``torch._dynamo``, which takes as
long as loading torch.

Sashank Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett, Keith Rush, Jakub Konečný, Sanjiv
Kumar, Brendan McMahan 2020, arXiv:2003.00295.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from featherweight.common import unknown
from featherweight.federated.schedules import Rate, check_rate, rate_at

Correct = Literal["none", "adam", "keras"]
CORRECTIONS = ("none", "adam", "keras")


class ServerOptimizer(Protocol):
    """Moves the server's weights."""

    rate: Rate

    def step(self, weights: Tensor, update: Tensor, round: int) -> Tensor:
        """Return the new weights."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the state."""


class Stateful:
    """Keeps named tensors between rounds."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the state."""
        return {name: value.clone() for name, value in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state, copied."""
        self.state = {name: value.clone() for name, value in state.items()}


class ServerSgd(Stateful):
    """``m = momentum m + update``; ``x = x + rate m``, as `torch.optim.SGD` without dampening.

    Args:
        rate: the server's learning rate; 1 and no momentum: plain averaging.
        momentum: in [0, 1).

    Raises:
        ValueError: an argument is out of range.

    Source:
        Tzu-Ming Harry Hsu, Hang Qi, Matthew Brown 2019, arXiv:1909.06335 (FedAvgM).
    """

    def __init__(self, rate: Rate = 1.0, momentum: float = 0.0) -> None:
        super().__init__()
        check_rate("server_rate", rate)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum:g}")
        self.rate, self.momentum = rate, momentum

    def step(self, weights: Tensor, update: Tensor, round: int) -> Tensor:
        """Return the new weights."""
        if self.momentum:
            buffer = self.state.get("momentum", torch.zeros_like(update))
            self.state["momentum"] = update = buffer * self.momentum + update
        return weights + rate_at(self.rate, round) * update


def adagrad(second: Tensor, square: Tensor, beta: float) -> Tensor:
    """Return the sum of squares so far."""
    return second + square


def adam(second: Tensor, square: Tensor, beta: float) -> Tensor:
    """Return the decaying mean of squares."""
    return beta * second + (1 - beta) * square


def yogi(second: Tensor, square: Tensor, beta: float) -> Tensor:
    """Return Yogi's second moment, which moves by the square's size alone, up or down."""
    return second - (1 - beta) * square * torch.sign(second - square)


class Adaptive(Stateful):
    """``m = b1 m + (1 - b1) update``; ``v`` by a rule; ``x = x + rate m / (sqrt(v) + epsilon)``.

    Args:
        rule: of the second moment: `adagrad`, `adam` or `yogi`.
        rate: the server's learning rate.
        betas: decay of the two moments, in [0, 1).
        epsilon: added to the root, above 0: how far the method is from plain averaging.
        initial: what the second moment starts from, at least 0.
        bias_correction: "none", as the paper; "adam": both moments are divided by
            ``1 - beta ** t``, t from 1, as `torch.optim.Adam`; "keras": the ratio of these factors
            multiplies the step, so that epsilon is not divided.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Reddi et al. 2020, arXiv:2003.00295, Algorithm 2.
    """

    def __init__(
        self,
        rule: Callable[[Tensor, Tensor, float], Tensor],
        rate: Rate,
        betas: tuple[float, float],
        epsilon: float,
        initial: float = 0.0,
        bias_correction: Correct = "none",
    ) -> None:
        super().__init__()
        check_rate("server_rate", rate)
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if not epsilon > 0.0 or not initial >= 0.0:
            raise ValueError(
                f"epsilon must be above 0 and initial at least 0, got {epsilon:g}, {initial:g}"
            )
        if bias_correction not in CORRECTIONS:
            raise ValueError(unknown("bias_correction", bias_correction, CORRECTIONS))
        self.rule, self.rate, self.betas, self.epsilon = rule, rate, betas, epsilon
        self.initial, self.bias_correction = initial, bias_correction

    def step(self, weights: Tensor, update: Tensor, round: int) -> Tensor:
        """Return the new weights."""
        first = self.state.get("first", torch.zeros_like(update))
        second = self.state.get("second", torch.full_like(update, self.initial))
        steps = int(self.state.get("steps", torch.tensor(0))) + 1
        first = self.betas[0] * first + (1 - self.betas[0]) * update
        second = self.rule(second, update.square(), self.betas[1])
        self.state = {"first": first, "second": second, "steps": torch.tensor(steps)}
        scale, divisor = self._correction(steps)
        root = (second / divisor).sqrt() + self.epsilon
        return weights + rate_at(self.rate, round) * scale * first / root

    def _correction(self, steps: int) -> tuple[float, float]:
        first, second = (1 - beta**steps for beta in self.betas)
        if self.bias_correction == "adam":
            return 1 / first, second
        return (second**0.5 / first if self.bias_correction == "keras" else 1.0), 1.0
