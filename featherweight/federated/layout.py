"""A model as one flat vector, and back."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where each trainable parameter of a model lies in its flat vector.

    Attributes:
        names: of the parameters that require a gradient, in the model's order; a tied one once.
        shapes: of these.
        sizes: numbers of entries of these.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]

    @property
    def length(self) -> int:
        """Number of entries of the vector."""
        return sum(self.sizes)

    @staticmethod
    def of(model: nn.Module) -> Layout:
        """Return the layout of a model.

        Raises:
            ValueError: nothing is trainable.
            TypeError: the trainable parameters differ in dtype or device.
        """
        weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        if not weights:
            raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient")
        kinds = {(w.dtype, w.device) for w in weights.values()}
        if len(kinds) > 1:
            raise TypeError(
                f"parameters must share one dtype and device, got {sorted(map(str, kinds))}"
            )
        shapes = tuple(tuple(w.shape) for w in weights.values())
        return Layout(tuple(weights), shapes, tuple(prod(shape) for shape in shapes))

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters of a model that the vector stands for."""
        return [model.get_parameter(name) for name in self.names]

    def read(self, model: nn.Module) -> Tensor:
        """Copy a model's weights into a vector."""
        return torch.cat([w.detach().reshape(-1) for w in self.parameters(model)])

    def write_(self, model: nn.Module, vector: Tensor) -> None:
        """Copy a vector into a model's weights."""
        parts = vector.split(self.sizes)
        with torch.no_grad():
            for weight, part in zip(self.parameters(model), parts, strict=True):
                weight.copy_(part.view(weight.shape))

    def stacks(self, vectors: Tensor) -> dict[str, Tensor]:
        """View vectors [C, length] as one stack [C, *shape] for each parameter."""
        parts = vectors.split(self.sizes, dim=1)
        named = zip(self.names, self.shapes, parts, strict=True)
        return {name: part.view(-1, *shape) for name, shape, part in named}


def buffers(model: nn.Module) -> list[Tensor]:
    """Return the model's floating-point buffers, such as batch norm's running statistics."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def read_buffers(model: nn.Module) -> Tensor:
    """Copy the floating-point buffers into one vector; empty where there are none."""
    found = [buffer.reshape(-1) for buffer in buffers(model)]
    return torch.cat(found) if found else torch.zeros(0)


def write_buffers_(model: nn.Module, vector: Tensor) -> None:
    """Copy a vector into the floating-point buffers."""
    found = buffers(model)
    with torch.no_grad():
        for buffer, part in zip(found, vector.split([b.numel() for b in found]), strict=True):
            buffer.copy_(part.view(buffer.shape))
