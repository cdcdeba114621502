"""Optimizer state between the dense and the sparse form of a model, and what training holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.common import unwrap
from featherweight.sparse.execute.layer import SparseLayer
from featherweight.sparse.execute.pattern import SparsePattern
from featherweight.sparse.hold import _innermost
from featherweight.sparse.masks import Masks

Convert = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Exchange:
    """One parameter of an optimizer that makes room for another.

    Attributes:
        name: for messages.
        old, new: the parameters.
        convert: state tensor of the old one's shape to one of the new one's.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter
    convert: Convert


def check_state(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
    """Refuse an optimizer whose state is not elementwise.

    Args:
        optimizer: wrapped or not.
        parameters: name to parameter; those the optimizer does not train are passed over.

    Raises:
        ValueError: names the state and the parameter.
    """
    state = _innermost(optimizer).state
    for name, parameter in parameters.items():
        for key, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state {key!r} of {name!r} has shape {list(value.shape)}, the "
                    f"weight {list(parameter.shape)}: only elementwise state can be converted"
                )


@torch.no_grad()
def exchange(optimizer: Optimizer, exchanges: Iterable[Exchange]) -> None:
    """Put parameters in the places of others, with their state; the groups' objects stay."""
    optimizer = _innermost(optimizer)
    by_id = {id(item.old): item for item in exchanges}
    for group in optimizer.param_groups:
        places = group["params"]
        places[:] = [by_id[id(p)].new if id(p) in by_id else p for p in places]
    for item in by_id.values():
        if item.old in optimizer.state:
            state = optimizer.state.pop(item.old)
            optimizer.state[item.new] = _converted(state, item.old.shape, item.convert)


def _converted(
    state: Mapping[str, Any], shape: torch.Size | tuple[int, ...], convert: Convert
) -> dict[str, Any]:
    return {
        key: convert(value) if isinstance(value, Tensor) and value.shape == shape else value
        for key, value in state.items()
    }


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Return the sparse layers of a model, each once, by the name of their module."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, SparseLayer)}


def weight_name(module: str) -> str:
    """Return the name that a module's weight has in a state dict."""
    return f"{module}.weight" if module else "weight"


def patterns(model: nn.Module) -> Masks:
    """Return what the sparse layers of a model keep, by the names of their dense weights.

    Raises:
        ValueError: the model has no sparse layer.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(f"{type(unwrap(model)).__name__} has no sparse layer")
    return Masks({weight_name(name): layer.pattern.mask() for name, layer in layers.items()})


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict as its dense form would have it.

    Beside the model's own state dict, which is dense already, it makes a checkpoint that both
    forms of the model load.

    Args:
        model: sparse, partly sparse, or dense.
        optimizer: that trains it.
    """
    dense = {id(layer.values): layer.pattern for layer in sparse_layers(model).values()}
    whole = optimizer.state_dict()
    whole["state"] = dict(whole["state"])
    for index, parameter in _indexed(optimizer):
        pattern = dense.get(id(parameter))
        if pattern is not None and index in whole["state"]:
            state = whole["state"][index]
            whole["state"][index] = _converted(state, (pattern.nnz,), pattern.scatter)
    return whole


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load a state dict of the dense form into the optimizer of a sparse model.

    Load the model's own state before: it can bring another pattern.

    Args:
        model: sparse, partly sparse, or dense.
        optimizer: that trains it.
        state: of `optimizer_state`, or of the dense model's optimizer.

    Raises:
        ValueError: the state is of another model.
    """
    layers = {id(layer.values): layer for layer in sparse_layers(model).values()}
    whole = {**state, "state": dict(state["state"])}
    for index, parameter in _indexed(optimizer):
        layer = layers.get(id(parameter))
        if layer is not None and index in whole["state"]:
            own = whole["state"][index]
            shape = layer.pattern.shape
            whole["state"][index] = _converted(own, shape, layer.pattern.gather)
            check_loaded(whole["state"][index], layer.pattern)
    optimizer.load_state_dict(whole)


def check_loaded(state: Mapping[str, Any], pattern: SparsePattern) -> None:
    """Refuse state that is not of a pattern's values.

    Raises:
        ValueError: names the state.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and value.numel() > 1 and value.shape != (pattern.nnz,):
            raise ValueError(
                f"optimizer state {key!r} has shape {list(value.shape)}, the weight "
                f"{list(pattern.shape)}: it is of another model or not elementwise"
            )


def _indexed(optimizer: Optimizer) -> Iterator[tuple[int, Tensor]]:
    """Number parameters as `Optimizer.state_dict` does."""
    return enumerate(p for group in optimizer.param_groups for p in group["params"])


@dataclass(frozen=True)
class Footprint:
    """Bytes that the training of a model holds between two steps, activations left out.

    Attributes:
        weights: of all parameters.
        gradients: as many, for those that are trained.
        optimizer: state of the optimizer.
        indices: of the patterns of sparse layers.
    """

    weights: int
    gradients: int
    optimizer: int
    indices: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.indices

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "indices", "total")
        return ", ".join(f"{name} {getattr(self, name) / 1e6:.2f} MB" for name in parts)


def footprint(model: nn.Module, optimizer: Optimizer | None = None) -> Footprint:
    """Count the bytes that training holds: weights, gradients, optimizer state, indices.

    Gradients are counted whether they are there at the moment or not. Masks that `hold` keeps are
    not counted.

    Args:
        model: dense or sparse.
        optimizer: after its first step, for before it most have no state; None: none.
    """
    parameters = list(unwrap(model).parameters())
    distinct = {id(layer.pattern): layer.pattern for layer in sparse_layers(model).values()}
    states = [] if optimizer is None else list(_innermost(optimizer).state.values())
    tensors = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    return Footprint(
        weights=sum(p.nbytes for p in parameters),
        gradients=sum(p.nbytes for p in parameters if p.requires_grad),
        optimizer=sum(t.nbytes for t in tensors),
        indices=sum(pattern.nbytes for pattern in distinct.values()),
    )
