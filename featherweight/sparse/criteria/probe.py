"""Run a model on other weights than its own, and leave no trace in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.common import unwrap

Batch = tuple[Tensor, Tensor]
"""Inputs [B, ...] and targets [B, ...]."""

Objective = Callable[[Tensor, Tensor], Tensor]
"""From outputs and targets to the mean loss over the examples, a scalar."""

Tensors = Mapping[str, Tensor]
Forward = Callable[[Tensors, Tensor], Tensor]
Loss = Callable[[Tensors, Batch], Tensor]

_HasStatistics = nn.modules.batchnorm._NormBase  # batch and instance norms


@contextlib.contextmanager
def quiet(model: nn.Module, *, batch_statistics: bool) -> Iterator[Forward]:
    """Give a way to run the model that leaves it, and the random state, as they were.

    Parameters, gradients, buffers, modes and the random state are the same afterwards, whatever
    happens inside. All modules are in evaluation mode, so that dropout does not blur scores.

    Args:
        model: wrapped or not.
        batch_statistics: norms use the statistics of the batch, as in training.

    Yields:
        A function of tensors by name and inputs. The tensors stand for parameters and buffers of
        these names; what is not named is the model's own, buffers as copies. It returns the
        model's output, or its ``logits``.
    """
    model = unwrap(model)
    modes = [(module, module.training) for module in model.modules()]

    def forward(tensors: Tensors, inputs: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return _logits(functional_call(model, {**buffers, **tensors}, (inputs,)))

    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(gpus, device_type="cuda"), torch.enable_grad():
            for module, _ in modes:
                module.training = batch_statistics and isinstance(module, _HasStatistics)
            yield forward
    finally:
        for module, mode in modes:
            module.training = mode


def _logits(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model must return a tensor or an object with .logits, got {type(output).__name__}"
        )
    return output


def loss_of(forward: Forward, objective: Objective) -> Loss:
    """Return the loss as a function of weights and a batch.

    The batch is moved to the device of the first weight, inputs that are floats also to its dtype.
    """

    def loss(weights: Tensors, batch: Batch) -> Tensor:
        inputs, targets = batch
        first = next(iter(weights.values()))
        inputs = inputs.to(first) if inputs.is_floating_point() else inputs.to(first.device)
        value = objective(forward(weights, inputs), targets.to(first.device))
        if value.numel() != 1:
            raise ValueError(f"objective must return one number, got shape {list(value.shape)}")
        return value

    return loss


def check_batches(batches: Sequence[Batch]) -> None:
    """Refuse what is no nonempty sequence of pairs (inputs, targets).

    Raises:
        TypeError: not a sequence, such as a ``DataLoader``, or an element is no pair of tensors.
        ValueError: empty.
    """
    if not isinstance(batches, Sequence):
        kind = type(batches).__name__
        raise TypeError(f"batches must be a list of pairs (inputs, targets), got {kind}")
    if not batches:
        raise ValueError("batches must hold at least one pair (inputs, targets), got none")
    for batch in batches:
        pair = isinstance(batch, Sequence) and len(batch) == 2
        if not pair or not all(isinstance(part, Tensor) for part in batch):
            kind = type(batch).__name__
            raise TypeError(f"each of batches must be a pair of tensors (inputs, targets): {kind}")


def leaves(weights: Tensors) -> dict[str, Tensor]:
    """Return the same values as tensors that gradients can be asked for; memory is shared."""
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def gradient(value: Tensor, weights: Tensors, *, create_graph: bool = False) -> dict[str, Tensor]:
    """Differentiate a scalar; what it does not depend on gets zeros."""
    found = torch.autograd.grad(
        value,
        list(weights.values()),
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(weights, found, strict=True))


def mean_gradient(
    value: Callable[[Batch], Tensor], weights: Tensors, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Differentiate the mean of a scalar over batches, each with the weight of its examples.

    Returns:
        Gradients in float32, or float64 where the weights are.
    """
    examples = sum(len(inputs) for inputs, _ in batches)
    sums = {name: torch.zeros_like(widened(weight)) for name, weight in weights.items()}
    for batch in batches:
        share = len(batch[0]) / examples
        for name, part in gradient(value(batch), weights).items():
            sums[name].add_(part, alpha=share)
    return sums


def widened(tensor: Tensor) -> Tensor:
    """Detach a tensor, in float32 where its dtype is narrower."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
