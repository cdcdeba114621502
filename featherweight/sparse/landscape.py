"""The loss between solutions: how high the barrier on the straight line is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from featherweight.common import unwrap

Recalibration = Iterable[Any] | Callable[[nn.Module], object]
"""Batches to take batch-norm statistics from, or a function that sets them in place."""


@dataclass(frozen=True)
class Barrier:
    """The loss along the straight line between two solutions.

    Attributes:
        alphas: positions, 0 at the first solution, 1 at the second.
        losses: loss at each.
    """

    alphas: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def height(self) -> float:
        """How far the loss rises over the straight line between its ends; 0: no barrier."""
        first, last = self.losses[0], self.losses[-1]
        return max(
            loss - ((1 - alpha) * first + alpha * last)
            for alpha, loss in zip(self.alphas, self.losses, strict=True)
        )


def error_barrier(
    model: nn.Module,
    first: Mapping[str, Tensor],
    second: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], float],
    *,
    points: int | Sequence[float] = 11,
    recalibrate: Recalibration | None = None,
) -> Barrier:
    """Measure the loss on the way from one solution to another of the same network.

    ``height = max_a L(w_a) - ((1 - a) L(w_0) + a L(w_1))`` with ``w_a = (1 - a) w_0 + a w_1``.

    Args:
        model: carries the weights in between, in evaluation mode; afterwards it is as before.
        first, second: state dicts of the model, such as `featherweight.sparse.snapshot` takes at
            the ends of two cycles; of masked weights the zeros are interpolated too.
        evaluate: the loss, or the error, of a model; lower is better.
        points: how many equally spaced positions, ends included; or the positions in order, from
            0 to 1.
        recalibrate: None interpolates the statistics of batch norm like weights, as the papers'
            code does. Batches (a list or a ``DataLoader``, of inputs or of tuples that begin with
            them) re-estimate the statistics at every position, the ends included, which is more
            faithful: interpolated statistics can make a barrier where there is none. A function
            does it in its own way. Integer buffers are those of ``first``.

    Returns:
        Positions and losses, with the ``height``.

    Raises:
        ValueError: a state that does not fit, or bad points.
        TypeError: batches that can be gone through only once.

    Source: Frankle et al. 2020, arXiv:1912.05671; used between cycles in Gadhikar, Nelaturu &
        Burkholz 2024, arXiv:2406.02773.
    """
    net = unwrap(model)
    for name, state in {"first": first, "second": second}.items():
        _check_state(net, name, state)
    alphas = _positions(points)
    if isinstance(recalibrate, Iterator):
        raise TypeError("recalibrate must be batches that can be gone through again, got a stream")
    losses = []
    with _preserved(net):
        for alpha in alphas:
            _interpolate_(net, first, second, alpha)
            if callable(recalibrate):
                recalibrate(model)
            elif recalibrate is not None:
                update_bn(recalibrate, net, _device(net))
            net.eval()
            losses.append(float(evaluate(model)))
    return Barrier(alphas, tuple(losses))


def _positions(points: int | Sequence[float]) -> tuple[float, ...]:
    if isinstance(points, int):
        if points < 2:
            raise ValueError(f"points must be at least 2, got {points}")
        return tuple(i / (points - 1) for i in range(points))
    alphas = tuple(float(alpha) for alpha in points)
    if len(alphas) < 2 or alphas[0] != 0 or alphas[-1] != 1 or list(alphas) != sorted(alphas):
        raise ValueError(f"points must rise from 0 to 1, got {list(points)}")
    return alphas


def _check_state(net: nn.Module, argument: str, state: Mapping[str, Tensor]) -> None:
    own = net.state_dict()
    if odd := sorted(set(own) ^ set(state)):
        raise ValueError(f"{argument} does not fit: {odd[0]!r} is only in it or in the model")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{argument} does not fit: {name!r} has shape {list(state[name].shape)}, the "
                f"model's {list(tensor.shape)}"
            )


@torch.no_grad()
def _interpolate_(
    net: nn.Module, first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float
) -> None:
    for name, tensor in net.state_dict().items():
        value = first[name].to(tensor)
        if tensor.is_floating_point():
            value = value.lerp(second[name].to(tensor), alpha)
        tensor.copy_(value)


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


@contextlib.contextmanager
def _preserved(net: nn.Module) -> Iterator[None]:
    """Put parameters, buffers, modes and norm momenta back, whatever happens inside."""
    tensors = [*net.parameters(), *net.buffers()]
    saved = [tensor.detach().clone() for tensor in tensors]
    modes = [(module, module.training) for module in net.modules()]
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    momenta = [norm.momentum for norm in norms]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, saved, strict=True):
                tensor.copy_(value)
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
