"""Which backend a model can use, and why."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from featherweight.common import unknown
from featherweight.federated.local import Backend, Loss
from featherweight.federated.population import Population
from featherweight.federated.sequential import Sequential
from featherweight.federated.vectorized import Vectorized

BACKENDS = ("auto", "vectorized", "sequential")


class Choice(NamedTuple):
    """A backend and the reason for it.

    Attributes:
        backend: computes gradients.
        name: "vectorized" or "sequential".
        reason: one line.
    """

    backend: Backend
    name: str
    reason: str


def choose(model: nn.Module, loss: Loss, population: Population, backend: str) -> Choice:
    """Return the backend for a model: side by side where it can, and as asked otherwise.

    Both are tried on two examples, so that a model or a loss that doesn't fit is refused at once.

    Raises:
        ValueError: ``backend`` is unknown, or "vectorized" and the model can't.
    """
    if backend not in BACKENDS:
        raise ValueError(unknown("backend", backend, BACKENDS))
    if backend == "sequential":
        return _sequential(model, loss, population, "asked for")
    obstacle = _obstacle(model)
    if not obstacle:
        vectorized = Vectorized(model, loss)
        obstacle = _trial(vectorized, model, population)
        if not obstacle:
            return Choice(vectorized, "vectorized", vectorized.how)
    if backend == "vectorized":
        raise ValueError(f"backend='vectorized' can't run {type(model).__name__}: {obstacle}")
    return _sequential(model, loss, population, obstacle)


def _obstacle(model: nn.Module) -> str:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{name or 'it'} is a {type(module).__name__}, which mixes a batch's examples"
    return ""


def _sequential(model: nn.Module, loss: Loss, population: Population, reason: str) -> Choice:
    backend = Sequential(model, loss)
    _try(backend, model, population, 1)
    return Choice(backend, "sequential", reason)


def _trial(backend: Backend, model: nn.Module, population: Population) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # vmap warns where it falls back to a slow loop
            _try(backend, model, population, 2)
    except Exception as error:  # whatever a user's model may raise under vmap
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def _try(backend: Backend, model: nn.Module, population: Population, clients: int) -> None:
    weight = next(w for w in model.parameters() if w.requires_grad)
    length = sum(w.numel() for w in model.parameters() if w.requires_grad)
    inputs, targets = (
        torch.stack([values[:2].to(weight.device)] * clients) for values in population.client(0)
    )
    with seeded(0):
        backend(weight.new_zeros(clients, length), inputs, targets, None)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's global generator, which dropout draws from, start from a seed; then restore it.

    Devices' generators are left alone.
    """
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use a number of threads inside an operation, then restore it; None: as it is.

    On small matrices a second thread costs many times what it saves where cores are shared.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
