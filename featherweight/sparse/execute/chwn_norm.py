"""Batch norm that is fast where the batch is innermost."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from featherweight.sparse.execute import compiled
from featherweight.sparse.execute.chwn import empty_chwn, is_chwn, to_chwn
from featherweight.sparse.execute.conv_products import cut, thread_count


class ChwnBatchNorm2d(nn.BatchNorm2d):
    """A `torch.nn.BatchNorm2d` with a compiled kernel for inputs whose batch is innermost.

    Same arguments, same state dict, same running statistics. Inputs of another layout, device or
    dtype, and traced ones, are treated by torch.

    Attributes:
        relu: whether a ReLU is applied to the result, in the same pass; see `chwn_norms_`.
    """

    relu = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to itself, with the strides of the input."""
        if not self._takes(x):
            return functional.relu(super().forward(x)) if self.relu else super().forward(x)
        mean, variance, own = self.running_mean, self.running_var, False
        if self.training or mean is None or variance is None:
            mean, variance, own = *x.new_empty(2, x.shape[1]).unbind(), True
        arguments = (x, self.weight, self.bias, mean, variance, self.eps, self.relu, own)
        y: Tensor = _Norm.apply(*arguments)  # type: ignore[no-untyped-call]
        if self.training and self.track_running_stats:
            self._follow(mean, variance, x.numel() // x.shape[1])
        return y

    def _takes(self, x: Tensor) -> bool:
        own = [t for t in (self.weight, self.running_mean) if t is not None]
        return (
            not torch.compiler.is_compiling()
            and compiled.available()
            and x.device.type == "cpu"
            and x.dtype in compiled.DTYPES
            and all(t.dtype == x.dtype for t in own)
            and x.ndim == 4
            and x.shape[1] == self.num_features
            and x.numel() > x.shape[1]
            and is_chwn(x)
        )

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, entries: int) -> None:
        """Update the running statistics, the variance by its unbiased estimate."""
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if factor is None:
                factor = 1.0 / float(self.num_batches_tracked)
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean, factor or 0.0)
            self.running_var.lerp_(variance * (entries / (entries - 1)), factor or 0.0)


class AppliedReLU(nn.ReLU):
    """A ReLU that the norm before it has applied already."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        return x


def chwn_norms_(model: nn.Module) -> nn.Module:
    """Make the batch norms of a model fast where the batch is innermost, in place.

    Modules stay the same objects under the same names, only their class changes; subclasses of
    `torch.nn.BatchNorm2d` are left alone. In an `nn.Sequential` a ReLU right behind a norm is
    computed in the same pass, unless one of the two is used elsewhere too or has hooks.

    Args:
        model: eager, with `SparseConv2d` or without.

    Returns:
        The model.
    """
    for norm, relu in _followed(model):
        norm.__class__, relu.__class__ = ChwnBatchNorm2d, AppliedReLU
        norm.relu = True  # type: ignore[assignment]
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = ChwnBatchNorm2d
    return model


def plain_norms_(model: nn.Module) -> nn.Module:
    """Undo `chwn_norms_`, in place; returns the model."""
    for module in model.modules():
        if type(module) is ChwnBatchNorm2d:
            module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
            module.__dict__.pop("relu", None)
        elif type(module) is AppliedReLU:
            module.__class__ = nn.ReLU  # type: ignore[assignment]
    return model


def _followed(model: nn.Module) -> list[tuple[nn.BatchNorm2d, nn.ReLU]]:
    """Return the pairs of a norm and the ReLU that is computed with it."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    chains = [list(m) for m in model.modules() if type(m) is nn.Sequential]
    return [
        (norm, relu)
        for chain in chains
        for norm, relu in itertools.pairwise(chain)
        if type(norm) is nn.BatchNorm2d
        and type(relu) is nn.ReLU
        and all(places[id(m)] == 1 and not _hooked(m) for m in (norm, relu))
    ]


def _hooked(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        relu: bool,
        training: bool,
    ) -> Tensor:
        out = empty_chwn(x, x.shape)
        arrays = [_matrix(x), _matrix(out), *_affine(x, weight, bias)]
        _spread(
            "train" if training else "evaluate", x, *arrays, eps, relu, mean.numpy(),
            variance.numpy(),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, variance)
        ctx.options = (eps, relu, training)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            found = _differentiable(ctx, gradient)
        else:
            found = _gradients(ctx, to_chwn(gradient))
        return *found, None, None, None, None, None


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, variance = ctx.saved_tensors
    eps, relu, training = ctx.options
    of_x = empty_chwn(x, x.shape)
    of_weight, of_bias = x.new_empty(2, x.shape[1]).unbind()
    arrays = [_matrix(x), _matrix(gradient), *_affine(x, weight, bias)]
    outputs = (_matrix(of_x), of_weight.numpy(), of_bias.numpy())
    moments = (mean.numpy(), variance.numpy())
    _spread("backward", x, *arrays, eps, relu, *moments, training, *outputs)
    affine = (None, None) if weight is None else (of_weight, of_bias)
    return of_x, *affine


def _differentiable(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return gradients by torch's functions, which can be differentiated again."""
    x, weight, bias, mean, variance = ctx.saved_tensors
    eps, relu, training = ctx.options
    mean, variance = (None, None) if training else (mean, variance)
    y = functional.batch_norm(x, mean, variance, weight, bias, training, 0.0, eps)
    y = functional.relu(y) if relu else y
    wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
    inputs = [(x, weight, bias)[i] for i in wanted]
    found = torch.autograd.grad(y, inputs, gradient, create_graph=True)
    by_place = dict(zip(wanted, found, strict=True))
    return tuple(by_place.get(i) for i in range(3))


def _matrix(x: Tensor) -> Any:
    return x.detach().permute(1, 2, 3, 0).view(x.shape[1], -1).numpy()


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Any, Any]:
    scale = x.new_ones(x.shape[1]) if weight is None else weight.detach()
    shift = x.new_zeros(x.shape[1]) if bias is None else bias.detach()
    return scale.numpy(), shift.numpy()


def _spread(name: str, x: Tensor, *arguments: Any) -> None:
    """Run a kernel on the channels, shared among threads."""
    kernel = getattr(importlib.import_module("featherweight.sparse.execute.chwn_kernels"), name)
    calls = [
        functools.partial(kernel, *arguments, *part)
        for part in cut(x.shape[1], thread_count(8 * x.numel()))
    ]
    compiled.spread(calls)
