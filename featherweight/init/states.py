"""What a model computes on its way: the places that can be measured, and their tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from featherweight.common import unwrap
from featherweight.init.structure import structure
from featherweight.init.trace import Node, Recorder, output_of, quiet, trace

CHUNK = 256  # directions that pass together

State = str | nn.Module
"""A place in a model: a submodule, or its name; what it returns is the state."""


@dataclass(frozen=True)
class Places:
    """Places of a model by name, in the order it reaches them.

    Attributes:
        model: unwrapped.
        named: name and node of each.
        recognised: whether they are the states of a residual or plain ReLU network.
    """

    model: nn.Module
    named: tuple[tuple[str, Node], ...]
    recognised: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name for name, _ in self.named)

    def run(self, x: Tensor) -> list[Tensor]:
        """Run the model in evaluation mode; return copies of the tensors at the places."""
        seen: dict[int, Tensor] = {}
        wanted = {node.index for _, node in self.named}

        def keep(node: Node, tensor: Tensor) -> None:
            if node.index in wanted:
                seen[node.index] = tensor.clone()

        with quiet(self.model), Recorder(self.model, x, keep):
            self.model(x)
        return [seen[node.index] for _, node in self.named]


def places(model: nn.Module, x: Tensor) -> Places:
    """Find the states of a model: behind each block, or behind each layer if it has none.

    In a residual or plain ReLU network they lie behind the ReLU of the first layer, of every block,
    and of every plain layer. In any other model they are what each linear layer and convolution
    returns.

    Args:
        model: wrapped or not.
        x: inputs [B, ...].
    """
    model = unwrap(model)
    traced = trace(model, x)
    try:
        return Places(model, structure(model, traced).states, True)
    except ValueError:
        layers = [node for node in traced.nodes if node.kind in ("conv", "linear")]
        return Places(model, tuple((node.owner, node) for node in layers), False)


def place(model: nn.Module, x: Tensor, state: State | None) -> Places:
    """Find one place: a named one, or the last state before pooling, or else the output.

    Args:
        model: wrapped or not.
        x: inputs [B, ...].
        state: a submodule or its name; None: the last state of a residual or plain ReLU network,
            the output of any other model.

    Raises:
        ValueError: the submodule is not there, or it doesn't run.
    """
    model = unwrap(model)
    if state is None:
        found = places(model, x)
        if found.recognised:
            return Places(model, found.named[-1:], True)
        return Places(model, (("output", trace(model, x).output),), False)
    name, module = _submodule(model, state)
    caught: list[Node] = []
    with quiet(model), torch.no_grad(), Recorder(model, x) as recorder:

        def catch(_module: nn.Module, _inputs: Any, output: Any) -> None:
            caught.append(recorder.node_of(output_of(output)))

        hook = module.register_forward_hook(catch)
        try:
            model(x)
        finally:
            hook.remove()
    if len(caught) != 1:
        raise ValueError(f"state {name!r} must run once in a pass, it runs {len(caught)} times")
    return Places(model, ((name, caught[0]),), False)


def _submodule(model: nn.Module, state: State) -> tuple[str, nn.Module]:
    names = {module: name for name, module in model.named_modules()}
    if isinstance(state, nn.Module):
        if state not in names:
            raise ValueError(f"state must be a submodule of the model, got {type(state).__name__}")
        return names[state], state
    try:
        return state, model.get_submodule(state)
    except AttributeError:
        raise ValueError(f"state {state!r} is no submodule of {type(model).__name__}") from None


def forward_products(found: Places, x: Tensor, directions: Tensor) -> list[Tensor]:
    """Multiply the Jacobians of all places with directions, by forward-mode differentiation.

    Args:
        found: N places.
        x: one input [1, ...].
        directions: [k, *x.shape[1:]].

    Returns:
        N tensors [k, size of the place].
    """
    count = len(directions)
    repeated = x.detach().expand(count, *x.shape[1:]).contiguous()
    # Fused attention has no forward mode.
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        with warnings.catch_warnings():  # torch's own, when forward mode is first used
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            dual = forward_ad.make_dual(repeated, directions)
        tensors = found.run(dual)
        tangents = [forward_ad.unpack_dual(tensor).tangent for tensor in tensors]
        return [
            (torch.zeros_like(tensor) if tangent is None else tangent).flatten(1).clone()
            for tensor, tangent in zip(tensors, tangents, strict=True)
        ]


def backward_product(found: Places, x: Tensor, vectors: Tensor) -> Tensor:
    """Multiply the transposed Jacobian of the first place with vectors.

    Args:
        found: places, of which the first is taken.
        x: one input [1, ...].
        vectors: [k, size of the place].

    Returns:
        [k, size of x].
    """
    repeated = x.detach().expand(len(vectors), *x.shape[1:]).contiguous().requires_grad_()
    with torch.enable_grad():
        state = found.run(repeated)[0]
        (product,) = torch.autograd.grad(state, repeated, vectors.view_as(state))
    return product.flatten(1)


def jacobian(found: Places, x: Tensor) -> list[Tensor]:
    """Return the Jacobians of all places at one input, N tensors [outputs, inputs].

    Args:
        found: N places.
        x: one input [1, ...].
    """
    directions = torch.eye(width(x.shape), dtype=x.dtype, device=x.device)
    parts = [
        forward_products(found, x, chunk.view(len(chunk), *x.shape[1:]))
        for chunk in directions.split(CHUNK)
    ]
    return [torch.cat(part).mT for part in zip(*parts, strict=True)]


def check_inputs(x: Tensor, least: int = 1) -> None:
    """Refuse what is no batch of inputs.

    Raises:
        ValueError: fewer than ``least`` examples, or no floats.
    """
    if x.ndim < 2 or len(x) < least or not x.is_floating_point():
        raise ValueError(
            f"x must be floats [B, ...] with B >= {least}, got {x.dtype} {list(x.shape)}"
        )


def width(shape: Sequence[int]) -> int:
    """Return the number of entries of one example of a batch of this shape."""
    return torch.Size(shape[1:]).numel()
