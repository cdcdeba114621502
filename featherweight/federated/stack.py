"""A stack of linear layers for many clients at once, by batched matrix products.

The same sums that ``torch.func.vmap`` makes of such a network, with half the overhead; a network of
other layers goes through vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

Apply = Callable[[Mapping[str, Tensor], Tensor], Tensor]  # stacks and inputs [k, b, ...]

ELEMENTWISE: tuple[type[nn.Module], ...] = (
    nn.Identity,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
    nn.Softplus,
)


def stack_of(model: nn.Module, names: tuple[str, ...]) -> Apply | None:
    """Return a function that applies the model of each client, or None for other layers.

    Args:
        model: a Sequential (of Sequentials) of Linear, Flatten() and elementwise activations, or
            one Linear.
        names: the model's trainable parameters; all must be.
    """
    layers: list[Apply] = []
    used: list[str] = []
    for name, module in _leaves("", model):
        layer = _layer(name, module)
        if layer is None or _observed(module):
            return None
        layers.append(layer)
        used += [f"{name}{key}" for key, _ in module.named_parameters()]
    if sorted(used) != sorted(names) or _observed(model):
        return None

    def apply(stacks: Mapping[str, Tensor], values: Tensor) -> Tensor:
        for layer in layers:
            values = layer(stacks, values)
        return values

    return apply


def _leaves(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if type(module) is nn.Sequential and not _observed(module):
        for name, child in module.named_children():
            yield from _leaves(f"{prefix}{name}.", child)
    else:
        yield prefix, module


def _observed(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return any(hooks)


def _layer(name: str, module: nn.Module) -> Apply | None:
    if type(module) is nn.Linear:
        return partial(_linear, f"{name}weight", f"{name}bias" if module.bias is not None else "")
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return lambda stacks, values: values.flatten(2)
    if type(module) in ELEMENTWISE and not getattr(module, "inplace", False):
        return lambda stacks, values: module(values)
    return None


def _linear(weight: str, bias: str, stacks: Mapping[str, Tensor], values: Tensor) -> Tensor:
    flat = values.reshape(len(values), -1, values.shape[-1])
    turned = stacks[weight].transpose(1, 2)
    out = torch.baddbmm(stacks[bias][:, None], flat, turned) if bias else flat.bmm(turned)
    return out.view(*values.shape[:-1], out.shape[-1])
