"""A masked model turned sparse, and back, with its optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import unknown, unwrap
from featherweight.sparse.execute.choose import choose_linear, linear_batch, shapes_of
from featherweight.sparse.execute.chwn_norm import chwn_norms_, plain_norms_
from featherweight.sparse.execute.conv import CONV_BACKENDS, SparseConv2d, choose_conv
from featherweight.sparse.execute.eligible import masked_layers
from featherweight.sparse.execute.layer import SparseLayer
from featherweight.sparse.execute.linear import BACKENDS, SparseLinear
from featherweight.sparse.execute.pattern import SparsePattern
from featherweight.sparse.execute.state import (
    Exchange,
    check_state,
    exchange,
    sparse_layers,
    weight_name,
)

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class Pair:
    """A dense layer and the sparse one in its place, or the other way round."""

    name: str
    dense: nn.Module
    sparse: SparseLayer


def to_sparse(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    backend: str | Mapping[str, str] = "auto",
    *,
    optimizer: Optimizer | None = None,
    example: Any = None,
    batch: int = 128,
    exclude: Iterable[str] = (),
) -> nn.Module:
    """Turn a masked model's linear layers and convolutions sparse, in place.

    A layer of which nothing is masked stays as it is. The others become `SparseLinear` and
    `SparseConv2d`: their parameter is ``values``, one for each kept weight, so that gradients and
    optimizer state shrink with the density. Batch norms between sparse convolutions become
    `ChwnBatchNorm2d`. Biases and all other parameters stay the same objects; hooks on modules are
    carried over, hooks on weights are not. Masks need not be held any more: remove `hold` before.

    Args:
        model: eager; convert before `torch.compile` and data-parallel wrappers.
        masks: what is kept, by parameter name; what they mask is dropped, whatever its value.
            None: the zeros of the weights are the mask.
        backend: module name to the name of a backend, of ``BACKENDS`` for linear layers and of
            ``CONV_BACKENDS`` for convolutions; or one name for all layers that have it. "auto",
            also for layers that are left out: what this machine has measured to be fastest.
        optimizer: that trains the model; its parameters and state are converted along.
        example: input of the model, as one tensor or a tuple of arguments, for "auto" to see how
            large a batch each layer gets; it is run once, in evaluation mode.
        batch: rows that "auto" expects a linear layer to get where no example is given: images,
            or tokens of all sequences together.
        exclude: shell-style patterns of parameter names to leave dense.

    Returns:
        The model; a new module only where the model itself is a single layer.

    Raises:
        ValueError: the masks do not fit, a masked layer can't be converted, a backend can't run a
            layer, or the optimizer's state is not elementwise; nothing is touched then.
    """
    made = conversions(
        model,
        masks,
        backend,
        optimizer=optimizer,
        example=example,
        batch=batch,
        exclude=exclude,
    )
    return enter(model, made, optimizer)


def conversions(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    backend: str | Mapping[str, str] = "auto",
    *,
    optimizer: Optimizer | None = None,
    example: Any = None,
    batch: int = 128,
    exclude: Iterable[str] = (),
) -> list[Pair]:
    """Make the sparse layers of a model without putting them in; arguments as of `to_sparse`."""
    _check_wrappers(model)
    chosen = masked_layers(model, masks, exclude)
    _check_names(backend, chosen)
    modules = {name: model.get_submodule(name) for name in chosen}
    if optimizer is not None:
        weights: dict[str, Any] = {weight_name(n): module.weight for n, module in modules.items()}
        check_state(optimizer, weights)
    shapes = shapes_of(model, example, modules.values())
    return [
        _sparse(name, module, chosen[name], backend, shapes.get(module), batch)
        for name, module in modules.items()
    ]


def to_dense(model: nn.Module, *, optimizer: Optimizer | None = None) -> nn.Module:
    """Turn a sparse model dense again, in place: exactly the same weights, zeros elsewhere.

    Args:
        model: with sparse layers, or without.
        optimizer: that trains the model; its parameters and state are converted along, with zero
            state for masked weights.

    Returns:
        The model; a new module only where the model itself is a single layer.

    Raises:
        ValueError: the model is wrapped, or the optimizer's state is not elementwise; nothing is
            touched then.
    """
    _check_wrappers(model)
    layers = sparse_layers(model)
    if optimizer is not None:
        check_state(optimizer, {weight_name(n): layer.values for n, layer in layers.items()})
    made = [Pair(name, layer.to_dense(), layer) for name, layer in layers.items()]
    return leave(model, made, optimizer)


@torch.no_grad()
def enter(model: nn.Module, pairs: Iterable[Pair], optimizer: Optimizer | None) -> nn.Module:
    """Put sparse layers in the places of dense ones, with gradients and optimizer state."""
    pairs = list(pairs)
    exchanges = []
    for pair in pairs:
        weight: nn.Parameter = pair.dense.weight  # type: ignore[assignment]
        gather = pair.sparse.pattern.gather
        if weight.grad is not None:
            pair.sparse.values.grad, weight.grad = gather(weight.grad), None
        exchanges.append(Exchange(pair.name, weight, pair.sparse.values, gather))
    if optimizer is not None:
        exchange(optimizer, exchanges)
    model = _swap(model, {pair.dense: pair.sparse for pair in pairs})
    if any(isinstance(p.sparse, SparseConv2d) and p.sparse.backend == "chwn" for p in pairs):
        chwn_norms_(model)
    return model


@torch.no_grad()
def leave(model: nn.Module, pairs: Iterable[Pair], optimizer: Optimizer | None) -> nn.Module:
    """Put dense layers in the places of sparse ones, with gradients and optimizer state."""
    pairs = list(pairs)
    exchanges = []
    for pair in pairs:
        values, scatter = pair.sparse.values, pair.sparse.pattern.scatter
        weight: nn.Parameter = pair.dense.weight  # type: ignore[assignment]
        weight.grad = None if values.grad is None else scatter(values.grad)
        exchanges.append(Exchange(pair.name, values, weight, scatter))
    if optimizer is not None:
        exchange(optimizer, exchanges)
    return _swap(plain_norms_(model), {pair.sparse: pair.dense for pair in pairs})


def _swap(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> nn.Module:
    for old, new in others.items():
        for hooks in HOOKS:
            setattr(new, hooks, getattr(old, hooks))
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in others and path:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, others[module])
    return others.get(model, model)


def _check_wrappers(model: nn.Module) -> None:
    if unwrap(model) is not model:
        raise ValueError(
            f"model is wrapped in {type(model).__name__}: convert it first, wrap it afterwards"
        )


def _check_names(backend: str | Mapping[str, str], chosen: Mapping[str, Tensor]) -> None:
    if isinstance(backend, str):
        names = {"auto": None, **BACKENDS, **CONV_BACKENDS}
        if backend not in names:
            raise ValueError(unknown("backend", backend, names))
        return
    for name in backend:
        if name not in chosen:
            raise ValueError(unknown("sparse module", name, chosen))


def _sparse(
    name: str,
    module: nn.Module,
    mask: Tensor,
    backend: str | Mapping[str, str],
    shape: torch.Size | None,
    batch: int,
) -> Pair:
    known = CONV_BACKENDS if isinstance(module, nn.Conv2d) else BACKENDS
    if isinstance(backend, str):
        wish = backend if backend in known else "auto"
    else:
        wish = backend.get(name, "auto")
    try:
        if isinstance(module, nn.Conv2d):
            found = choose_conv(module, mask, shape) if wish == "auto" else wish
            return Pair(name, module, SparseConv2d.from_dense(module, mask, found))
        assert isinstance(module, nn.Linear)
        pattern, rows = SparsePattern.from_mask(mask), linear_batch(shape, batch)
        found = choose_linear(pattern, rows, module.weight.dtype) if wish == "auto" else wish
        return Pair(name, module, SparseLinear.from_pattern(module, pattern, found))
    except ValueError as error:
        raise ValueError(f"module {name!r}: {error}") from None


def backends(model: nn.Module) -> dict[str, str]:
    """Return the backend of each sparse layer, by the name of its module.

    ``to_sparse(model, backend=backends(other))`` repeats the choice made for another.
    """
    return {name: layer.backend for name, layer in sparse_layers(model).items()}
