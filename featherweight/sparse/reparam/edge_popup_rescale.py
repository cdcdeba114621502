"""Parameter scaling under edge-popup: fit the output's scale, which masks alone can't reach.

ReLU networks are homogeneous: with ``c^L = lambda``, multiplying the weights of layer l by c and
its bias by c^l multiplies the output by lambda exactly. A scalar fit after each epoch (Algorithm 1
of the source) leaves to the masks only what masks can do.

Source: J. Fischer, A. Gadhikar and R. Burkholz, arXiv:2110.11150, Lemma 3.1 and Algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from featherweight.common import PRUNABLE_MODULES, unwrap
from featherweight.sparse.reparam.edge_popup import EdgePopup

Fit = Callable[[Tensor, Tensor], float]
"""``fit(outputs, targets)``: the factor that the outputs should be multiplied by."""

SMALLEST = 1e-6
HOMOGENEOUS: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)


def fit_squares(outputs: Tensor, targets: Tensor) -> float:
    """Return the factor of least squared error, ``<outputs, targets> / <outputs, outputs>``.

    Args:
        outputs: any shape.
        targets: the same shape.
    """
    _same(outputs, targets)
    energy = float(outputs.double().square().sum())
    return float((outputs.double() * targets.double()).sum()) / energy if energy else 1.0


def fit_cross_entropy(outputs: Tensor, labels: Tensor, limit: float = 10.0) -> float:
    """Return the factor of least cross-entropy in [0, limit].

    The loss is convex in the factor f: its slope, ``mean(<softmax(f z), z> - z_label)``, rises, and
    its root is found by bisection. Without a limit there is none where every label is right.

    Args:
        outputs: logits z, (N, classes).
        labels: long (N,).
        limit: largest factor, positive.
    """
    logits = outputs.double()
    right = logits.gather(1, labels[:, None])[:, 0]
    low, high = 0.0, float(limit)
    for _ in range(60):
        factor = (low + high) / 2
        slope = float(((factor * logits).softmax(1) * logits).sum(1).sub(right).mean())
        low, high = (low, factor) if slope > 0 else (factor, high)
    return (low + high) / 2


def fit_by_descent(
    loss: Callable[[Tensor, Tensor], Tensor], steps: int = 20, rate: float = 0.1
) -> Fit:
    """Return a fit that takes a few steps of gradient descent from 1: less eager on small batches.

    Args:
        loss: ``loss(outputs, targets)``, a scalar.
        steps: of descent, at least 1.
        rate: learning rate, positive.
    """
    if steps < 1 or not rate > 0:
        raise ValueError(f"need steps >= 1 and rate > 0, got {steps=}, {rate=}")

    def fit(outputs: Tensor, targets: Tensor) -> float:
        factor = torch.ones((), dtype=torch.float64, device=outputs.device, requires_grad=True)
        for _ in range(steps):
            with torch.enable_grad():
                value = loss(factor * outputs.detach().double(), targets)
            (slope,) = torch.autograd.grad(value, factor)
            factor = (factor.detach() - rate * slope).requires_grad_()
        return float(factor.detach())

    return fit


@torch.no_grad()
def scale_output_(model: nn.Sequential, factor: float) -> None:
    """Multiply the output of a network exactly by a factor, spread over its layers, in place.

    With L linear and convolution layers and ``c = factor^(1 / L)``, weights are multiplied by c and
    biases by ``c^l``, in layer l.

    Args:
        model: a Sequential, also nested, of linear and convolution layers and functions that
            commute with positive factors: ReLU and its kin, pooling, Flatten, Dropout. Under
            `edge_popup` or not.
        factor: positive.

    Raises:
        ValueError: another factor or model, norms among others: they would undo the scale. In a
            residual network use `scale_last_layer_`. Nothing is touched then.
    """
    _check_factor(factor)
    layers = [_stored(module) for module in _chain(model)]
    if len({id(weight) for weight, _ in layers}) != len(layers) or not layers:
        raise ValueError("model must have one or more layers, each in one place")
    step = factor ** (1 / len(layers))
    for index, (weight, bias) in enumerate(layers, 1):
        weight.mul_(step)
        if bias is not None:
            bias.mul_(step**index)


@torch.no_grad()
def scale_last_layer_(model: nn.Module, factor: float) -> None:
    """Multiply the last linear or convolution layer that a model registers, bias and all, in place.

    This multiplies the output wherever that layer is the output layer and nothing follows it.

    Args:
        model: any module.
        factor: positive.

    Raises:
        ValueError: another factor, or no such layer. Nothing is touched then.
    """
    _check_factor(factor)
    layers = [m for m in unwrap(model).modules() if isinstance(m, PRUNABLE_MODULES)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer")
    for value in _stored(layers[-1]):
        if value is not None:
            value.mul_(factor)


@torch.no_grad()
def scale_to_fit_(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    fit: Fit = fit_squares,
    *,
    scale: Callable[[Any, float], None] = scale_output_,
    optimizer: Optimizer | None = None,
) -> float:
    """Scale the frozen parameters of a model so that its outputs fit best, in place.

    Do so after each epoch of training scores, on as many examples as are at hand.

    Args:
        model: as ``scale`` allows; it is run in the mode it is in.
        inputs: a batch for the model.
        targets: what ``fit`` compares its outputs with.
        fit: `fit_squares`, `fit_cross_entropy`, or `fit_by_descent` of any loss. A result that is
            not above 1e-6, or not finite, counts as 1.
        scale: `scale_output_` or `scale_last_layer_`.
        optimizer: its learning rates are divided by the factor, as the scores' gradients grow
            with it. None: leave that to the caller.

    Returns:
        The factor by which outputs have grown.

    Raises:
        ValueError: as ``fit`` and ``scale``. Nothing is touched then.
    """
    factor = fit(model(inputs), targets)
    factor = factor if SMALLEST < factor < math.inf else 1.0
    scale(unwrap(model), factor)
    for group in optimizer.param_groups if optimizer is not None else []:
        group["lr"] = group["lr"] / factor
    return factor


def _chain(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a nested Sequential in order, after checking what is between them."""
    if not isinstance(model, nn.Sequential):
        raise ValueError(f"model must be a Sequential, got {type(model).__name__}")
    for name, module in model._modules.items():
        if isinstance(module, nn.Sequential):
            yield from _chain(module)
        elif isinstance(module, PRUNABLE_MODULES):
            yield module
        elif not isinstance(module, HOMOGENEOUS):
            raise ValueError(f"module {name!r}, a {type(module).__name__}, does not keep the scale")


def _stored(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return the parameters that weight and bias are computed from."""
    weight = _original(module, "weight")
    if weight is None:
        raise ValueError(f"{type(module).__name__} has no weight of its own")
    return weight, _original(module, "bias")


def _original(module: Any, name: str) -> Tensor | None:
    if not parametrize.is_parametrized(module, name):
        parameter: Tensor | None = module._parameters.get(name)
        return parameter
    chain = module.parametrizations[name]
    if not all(isinstance(form, EdgePopup) for form in chain):
        raise ValueError(f"{name} of {type(module).__name__} is under another form than edge_popup")
    original: Tensor = chain.original
    return original


def _check_factor(factor: float) -> None:
    if not 0 < factor < math.inf:
        raise ValueError(f"factor must be positive and finite, got {factor}")


def _same(outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        raise ValueError(
            f"outputs and targets must have one shape: {outputs.shape}, {targets.shape}"
        )
