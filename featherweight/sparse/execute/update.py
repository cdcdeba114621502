"""New patterns for a sparse model, and the dense gradients that growth asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from featherweight.sparse.execute.layer import SparseLayer
from featherweight.sparse.execute.pattern import SparsePattern
from featherweight.sparse.execute.state import check_state, sparse_layers, weight_name
from featherweight.sparse.hold import _innermost


def remap(old: SparsePattern, new: SparsePattern) -> Callable[..., Tensor]:
    """Return the map from tensors (nnz,) of one pattern to those of another.

    One sorted merge finds where each new entry stood; the map can be used for any number of
    tensors. It takes the tensor, and optionally start values (nnz,) of the new pattern for the
    entries that have grown, which are zero without.

    Args:
        old, new: of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if old.shape != new.shape:
        raise ValueError(f"patterns must have one shape, got {old.shape} and {new.shape}")
    before, after = old.flat(), new.flat()
    place = torch.searchsorted(before, after).clamp_(max=max(0, old.nnz - 1))
    kept = before[place] == after if old.nnz else torch.zeros_like(after, dtype=torch.bool)

    def move(tensor: Tensor, start: Tensor | None = None) -> Tensor:
        fresh = tensor.new_zeros(new.nnz) if start is None else start.to(tensor)
        return torch.where(kept, tensor[place], fresh) if old.nnz else fresh

    return move


@torch.no_grad()
def update_pattern(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    optimizer: Optimizer | None = None,
    grown: Mapping[str, Tensor] | None = None,
) -> None:
    """Put other masks in force in a sparse model, in place.

    Kept entries keep their value, their gradient and their optimizer state, bit for bit; grown
    ones start with zero state, as in the field's dynamic methods, and with weight zero or the
    value given; dropped ones are gone. The parameters stay the same objects. Costs about as much
    as building the patterns anew, 20 ms for a million entries at density 0.1.

    Args:
        model: with sparse layers.
        masks: name of a sparse layer's dense weight to its new bool mask. Layers that are not
            named stay as they are.
        optimizer: that trains the model; None: it has none yet.
        grown: start values by the same names, dense.

    Raises:
        ValueError: a name or shape does not fit, or the optimizer's state is not elementwise;
            nothing is changed then.
        TypeError: a mask is not bool.
    """
    layers = {weight_name(name): layer for name, layer in sparse_layers(model).items()}
    for name in [*masks, *(grown or {})]:
        if name not in layers or name not in masks:
            raise ValueError(f"{name!r} is the weight of no sparse layer that gets a mask")
    for name, dense in [*masks.items(), *(grown or {}).items()]:
        if tuple(dense.shape) != layers[name].pattern.shape:
            raise ValueError(
                f"{name!r} has shape {list(layers[name].pattern.shape)}, got {list(dense.shape)}"
            )
    if optimizer is not None:
        check_state(optimizer, {name: layers[name].values for name in masks})
    fresh = {n: SparsePattern.from_mask(m.to(layers[n].values.device)) for n, m in masks.items()}
    for name, pattern in fresh.items():
        if not pattern.same(layers[name].pattern):
            _update(layers[name], pattern, optimizer, (grown or {}).get(name))


def _update(
    layer: SparseLayer,
    pattern: SparsePattern,
    optimizer: Optimizer | None,
    grown: Tensor | None,
) -> None:
    values, gradient = layer.values, layer.values.grad
    move = remap(layer.pattern, pattern)
    state = {} if optimizer is None else _innermost(optimizer).state.get(values, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == values.shape:
            state[key] = move(value)
    start = None if grown is None else pattern.gather(grown.to(values.device))
    layer.set_pattern(pattern, move(values, start))
    values.grad = None if gradient is None else move(gradient)


@contextlib.contextmanager
def dense_gradients(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the dense gradients of sparse weights while a backward pass runs.

    For growth by gradient. Forward and backward inside run through dense weights, so use it for
    the step at which masks change alone::

        with sparse.dense_gradients(model) as gradients:
            loss(model(inputs)).backward()

    Args:
        model: with sparse layers, eager.

    Yields:
        Name of each dense weight to its gradient, (out, in, ...), filled as backward goes; summed
        over several passes. The values' own gradients accumulate as always.
    """
    layers = sparse_layers(model)
    gradients: dict[str, Tensor] = {}
    for name, layer in layers.items():
        layer.on_weight = _recorder(weight_name(name), gradients)
    try:
        yield gradients
    finally:
        for layer in layers.values():
            layer.on_weight = None


def _recorder(name: str, gradients: dict[str, Tensor]) -> Callable[[Tensor], None]:
    def add(gradient: Tensor) -> None:
        gradients[name] = gradients[name] + gradient if name in gradients else gradient.detach()

    def on_weight(weight: Tensor) -> None:
        if weight.requires_grad:
            weight.register_hook(add)

    return on_weight
