"""What a client does between two messages: local steps, for many clients at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from featherweight.federated.population import Population
from featherweight.federated.schedules import Rate, check_rate
from featherweight.federated.work import Work, everything

Steps = int | Tensor | Callable[[int, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
State = dict[str, Tensor]

losses_of_classes: Loss = partial(cross_entropy, reduction="none")


class ClientOptimizer(Protocol):
    """An optimizer that acts on each entry by itself, so that a row a client makes no difference.

    Its state begins anew in each round.
    """

    def start(self, weights: Tensor) -> State:
        """Return the state for weights [C, length]; each tensor of it has C rows."""

    def step_(self, weights: Tensor, direction: Tensor, state: State, rate: float) -> None:
        """Move the weights [k, length] of the first k clients along minus the direction."""


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent, as `torch.optim.SGD` does it.

    Written here because it is a line or two, and ``torch.optim`` loads ``torch._dynamo``, which
    takes as long as loading torch.

    Args:
        momentum: decay of the buffer, in [0, 1); 0: none.
        nesterov: looks ahead by the momentum.
        weight_decay: times the weights, added to the gradient.

    Raises:
        ValueError: an argument is out of range.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum:g}")
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov needs momentum above 0, got 0")
        if not self.weight_decay >= 0.0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay:g}")

    def start(self, weights: Tensor) -> State:
        """Return the momentum buffers, zeros, where there is momentum."""
        return {"momentum": torch.zeros_like(weights)} if self.momentum else {}

    def step_(self, weights: Tensor, direction: Tensor, state: State, rate: float) -> None:
        """Move the weights [k, length] of the first k clients along minus the direction."""
        if self.weight_decay:
            direction = direction.add(weights, alpha=self.weight_decay)
        if self.momentum:
            buffer = state["momentum"][: len(weights)]
            buffer.mul_(self.momentum).add_(direction)
            direction = direction.add(buffer, alpha=self.momentum) if self.nesterov else buffer
        weights.sub_(direction, alpha=rate)


@dataclass(frozen=True)
class Adam:
    """Adam of each client, its moments zero at the start of each round.

    Args:
        betas: decay of the two moments, in [0, 1).
        epsilon: added to the root of the second.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Diederik Kingma, Jimmy Ba 2014, arXiv:1412.6980, Algorithm 1.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if not self.epsilon > 0.0:
            raise ValueError(f"epsilon must be above 0, got {self.epsilon:g}")

    def start(self, weights: Tensor) -> State:
        """Return both moments, and the number of steps of each client."""
        zeros = torch.zeros_like(weights)
        return {"first": zeros, "second": zeros.clone(), "steps": weights.new_zeros(len(weights))}

    def step_(self, weights: Tensor, direction: Tensor, state: State, rate: float) -> None:
        """Move the weights [k, length] of the first k clients along minus the direction."""
        first, second = (state[name][: len(weights)] for name in ("first", "second"))
        state["steps"][: len(weights)] += 1
        taken = float(state["steps"][0])  # clients that still train have all taken as many
        first.lerp_(direction, 1 - self.betas[0])
        second.mul_(self.betas[1]).addcmul_(direction, direction, value=1 - self.betas[1])
        root = (second / (1 - self.betas[1] ** taken)).sqrt_().add_(self.epsilon)
        weights.addcdiv_(first, root, value=-rate / (1 - self.betas[0] ** taken))


@dataclass(frozen=True)
class Local:
    """A client's work in a round.

    Args:
        learning_rate: a number above 0, or a function of the round; see `schedules`.
        epochs: passes over the client's examples. Give this or ``steps``.
        steps: local steps instead: a number, a number for each client of the population (int64,
            [clients]), or a function of (round, cohort [M]) to numbers [M].
        batch_size: examples a step; None: all of the client.
        optimizer: of the clients, begun anew in each round.
        loss: of (outputs [n, ...], targets [n]) to one loss an example, [n].

    Raises:
        ValueError: an argument is out of range, or both epochs and steps are given, or neither.
    """

    learning_rate: Rate = 0.1
    epochs: int | None = None
    steps: Steps | None = None
    batch_size: int | None = None
    optimizer: ClientOptimizer = field(default_factory=Sgd)
    loss: Loss = losses_of_classes

    def __post_init__(self) -> None:
        check_rate("learning_rate", self.learning_rate)
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs= and steps=")
        for name in ("epochs", "steps", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def steps_of(self, round: int, cohort: Tensor, population: Population) -> Tensor:
        """Return the number of local steps of each client of a cohort, int64, [M].

        Raises:
            ValueError: ``steps`` does not give one number above 0 for each.
        """
        if self.epochs is not None:
            sizes = population.sizes[cohort]
            return self.epochs * (-(-sizes // self.batch_size) if self.batch_size else sizes**0)
        if isinstance(self.steps, int):
            return torch.full_like(cohort, self.steps)
        if isinstance(self.steps, Tensor):
            _expect(self.steps, len(population), "a client of the population")
            return self.steps[cohort]
        assert self.steps is not None
        found = self.steps(round, cohort)
        _expect(found, len(cohort), "a client of the cohort")
        return found


def _expect(steps: Tensor, count: int, what: str) -> None:
    if steps.shape != (count,) or steps.dtype != torch.int64:
        raise ValueError(f"steps must hold one int64 {what}, got {steps.dtype} {[*steps.shape]}")
    if count and int(steps.min()) < 1:
        raise ValueError(f"steps must be at least 1, got {int(steps.min())}")


class Backend(Protocol):
    """Computes the gradients of many clients."""

    def __call__(
        self, weights: Tensor, inputs: Tensor, targets: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean losses [k] and their gradients [k, length] at weights [k, length].

        ``inputs`` is [k, b, ...], ``targets`` [k, b, ...]; examples outside ``mask`` [k, b] count
        for nothing.
        """


@dataclass(frozen=True, eq=False)
class Correction:
    """What an algorithm adds to the gradient: ``g - anchor + offset + proximal (y - x)``.

    Attributes:
        offset: [length] for all or [C, length] for each client; None: nothing.
        proximal: coefficient of the distance from the server's weights x.
        anchored: subtract the gradient at x on the same batch.
    """

    offset: Tensor | None = None
    proximal: float = 0.0
    anchored: bool = False

    def add_(self, direction: Tensor, weights: Tensor, start: Tensor) -> None:
        """Add offset and proximal term to the directions [k, length]."""
        if self.offset is not None:
            direction += self.offset if self.offset.dim() == 1 else self.offset[: len(direction)]
        if self.proximal:
            direction.add_(weights - start, alpha=self.proximal)


@dataclass(frozen=True, eq=False)
class Trained:
    """What local steps gave; rows as in the `Work`.

    Attributes:
        work: who and how much.
        delta: weights after minus weights before, [C, length].
        losses: mean loss over the steps, [C].
        first: loss of the first step, [C].
        rate: learning rate of the steps.
    """

    work: Work
    delta: Tensor
    losses: Tensor
    first: Tensor
    rate: float


def train(
    backend: Backend,
    work: Work,
    start: Tensor,
    correction: Correction,
    optimizer: ClientOptimizer,
    rate: float,
) -> Trained:
    """Take each client's local steps from the server's weights.

    Args:
        backend: computes gradients.
        work: clients and their batches.
        start: the server's weights, [length].
        correction: of the gradients.
        optimizer: of the clients.
        rate: learning rate.
    """
    weights = start.expand(len(work.clients), -1).clone()
    state, total, first = optimizer.start(weights), start.new_zeros(len(weights)), start
    batch: tuple[Tensor, Tensor, Tensor | None] | None = None
    for step, rows in enumerate(work.active):
        if batch is None or work.orders is not None or rows < len(batch[0]):
            batch = gather(work, start.device, *work.batch(step, rows))
        current = weights[:rows]
        losses, direction = backend(current, *batch)
        if correction.anchored:
            direction -= backend(start.expand(rows, -1), *batch)[1]
        correction.add_(direction, current, start)
        optimizer.step_(current, direction, state, rate)
        total[:rows] += losses
        first = losses if step == 0 else first
    losses = total / work.steps.to(start.device)
    return Trained(work, weights.sub_(start), losses, first, rate)


def gather(
    work: Work, device: torch.device, indices: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fetch the inputs [k, b, ...] and targets [k, b, ...] of a batch."""
    source = work.population
    inputs, targets = (
        values[indices.to(values.device)].to(device) for values in (source.inputs, source.targets)
    )
    return inputs, targets, None if mask is None else mask.to(device)


def full_gradients(backend: Backend, work: Work, start: Tensor, width: int) -> Tensor:
    """Return each client's gradient over all its examples at the server's weights, [C, length].

    Args:
        backend: computes gradients.
        work: the clients.
        start: the server's weights, [length].
        width: most examples of a client at a time.
    """
    weights = start.expand(len(work.clients), -1)
    total = torch.zeros_like(weights)
    for indices, inside in everything(work, width):
        part = inside.sum(1).to(total) / work.sizes.to(total)
        gradient = backend(weights, *gather(work, start.device, indices, inside))[1]
        total += part[:, None] * gradient
    return total
