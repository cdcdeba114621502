"""The graph of a model as one forward pass runs it, whatever its classes and attributes are called.

Every call of a torch function is recorded while an input passes, so that order and skips are those
of the execution, in-place operations included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from featherweight.common import unwrap

KINDS = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "conv"),
    "linear": "linear",
    "batch_norm": "norm",
    **dict.fromkeys(("relu", "relu_"), "relu"),
    **dict.fromkeys(("add", "add_"), "add"),
    **dict.fromkeys(("mul", "mul_"), "mul"),
    **dict.fromkeys(("flatten", "view", "reshape", "squeeze"), "reshape"),
    **dict.fromkeys(("dropout", "dropout2d", "dropout3d", "contiguous", "clone"), "identity"),
    **dict.fromkeys(
        ("mean", *(f"{kind}avg_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3))), "pool"
    ),
    **dict.fromkeys(
        (f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3)), "maxpool"
    ),
}


@dataclass(frozen=True, eq=False)
class Node:
    """One recorded call that made a tensor from tensors that depend on the input.

    Attributes:
        kind: "input", "conv", "linear", "norm", "relu", "add" (of two tensors), "shift" (by a
            parameter), "scale" (by a parameter), "pool", "maxpool", "reshape", "identity", or the
            name of another torch function.
        inputs: the nodes it was made from.
        shape: of the tensor it made.
        owner: the module of the weight, or the parameter of a shift or scale; else empty.
        index: its place in the recording.
    """

    kind: str
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    owner: str
    index: int

    @property
    def nearest(self) -> str:
        """The layer or parameter at this place, or the last one before it; empty at the input."""
        node = self
        while not node.owner and node.inputs:
            node = node.inputs[0]
        return node.owner

    @property
    def near(self) -> str:
        """How to name the place in an error."""
        return f"layer {self.nearest!r}" if self.nearest else "the input"


class Recorder(TorchFunctionMode):
    """Records, while it is active, what becomes of an input.

    Args:
        model: names the owners of weights.
        x: the input.
        visit: called with each node and its tensor, before anything can change that in place.

    Attributes:
        nodes: the calls in the order they were made; the input is the first.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, visit: Callable[[Node, Tensor], None] | None = None
    ) -> None:
        super().__init__()
        self._model = model
        self._owners = _owners(model)
        self._latest: dict[int, Node] = {}
        self.nodes: list[Node] = []
        self._visit = visit
        self._alive: list[Tensor] = []  # so that no id is given twice
        self._add("input", (), "", x)

    def node_of(self, tensor: Tensor) -> Node:
        """Return the last call that returned this tensor.

        Raises:
            ValueError: it does not depend on the input.
        """
        if id(tensor) not in self._latest:
            raise ValueError("the output of the model does not depend on its input")
        return self._latest[id(tensor)]

    def _add(self, kind: str, inputs: tuple[Node, ...], owner: str, tensor: Tensor) -> None:
        node = Node(kind, inputs, tuple(tensor.shape), owner, len(self.nodes))
        self.nodes.append(node)
        self._alive.append(tensor)
        self._latest[id(tensor)] = node
        if self._visit is not None:
            self._visit(node, tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the function and record it."""
        kwargs = dict(kwargs or {})
        given = list(_tensors([*args, *kwargs.values()]))
        inputs = tuple(self._latest[id(t)] for t in given if id(t) in self._latest)
        result = func(*args, **kwargs)
        if inputs:
            kind, owner = self._meaning(getattr(func, "__name__", str(func)), given, kwargs)
            for tensor in _tensors([result]):
                self._add(kind, self._unpadded(kind, owner, inputs), owner, tensor)
        return result

    def _meaning(
        self, name: str, given: list[Tensor], kwargs: Mapping[str, Any]
    ) -> tuple[str, str]:
        kind = KINDS.get(name, name)
        constants = [t for t in given if id(t) not in self._latest]
        owners = [self._owners[id(t)] for t in constants if id(t) in self._owners]
        if kind in ("conv", "linear"):
            owners = [self._owners[id(t)] for t in given[1:2] if id(t) in self._owners]
        if kind in ("conv", "linear", "norm"):
            return (kind, owners[0][0]) if owners else (f"{kind} with a computed weight", "")
        if kind in ("add", "mul"):
            return _sum_or_product(kind, len(given) - len(constants), owners, kwargs)
        return kind, ""

    def _unpadded(self, kind: str, owner: str, inputs: tuple[Node, ...]) -> tuple[Node, ...]:
        """Skip the padding that a convolution with another padding mode does beforehand."""
        if kind != "conv" or inputs[0].kind != "pad":
            return inputs
        mode = getattr(self._model.get_submodule(owner), "padding_mode", "zeros")
        return inputs if mode == "zeros" else inputs[0].inputs


def _sum_or_product(
    kind: str, tracked: int, owners: list[tuple[str, str]], kwargs: Mapping[str, Any]
) -> tuple[str, str]:
    if kind == "add" and kwargs.get("alpha", 1) != 1:
        return "weighted add", ""
    if tracked == 2:
        return ("add", "") if kind == "add" else ("product of two states", "")
    if owners:
        module, parameter = owners[0]
        owner = f"{module}.{parameter}" if module else parameter
        return ("shift" if kind == "add" else "scale"), owner
    return f"{kind} of a constant", ""


@dataclass(frozen=True)
class Trace:
    """How one input passes through a model.

    Attributes:
        nodes: the recorded calls, in order.
        output: the node of the model's output.
    """

    nodes: tuple[Node, ...]
    output: Node

    def depths(self) -> dict[Node, int]:
        """Count the layers with weights on the longest way from the input to each node."""
        depths: dict[Node, int] = {}
        for node in self.nodes:
            before = max((depths[given] for given in node.inputs), default=0)
            depths[node] = before + (node.kind in ("conv", "linear"))
        return depths


def trace(model: nn.Module, example: Tensor | None = None) -> Trace:
    """Record one forward pass in evaluation mode; the model is left as it was.

    Args:
        model: wrapped or not; compiled models run eagerly.
        example: inputs [B, ...]; None: zeros of a shape guessed from the first layer.

    Raises:
        ValueError: the guessed input does not pass, or the output does not depend on the input.
    """
    model = unwrap(model)
    x = guess_example(model) if example is None else example
    try:
        with quiet(model), torch.no_grad(), Recorder(model, x) as recorder:
            output = output_of(model(x))
    except (RuntimeError, ValueError, TypeError) as error:
        if example is not None:
            raise
        shape, reason = list(x.shape), " ".join(str(error).split())[:200]
        raise ValueError(f"give example=, an input: one of shape {shape} fails: {reason}") from None
    return Trace(tuple(recorder.nodes), recorder.node_of(output))


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode, uncompiled, and give each its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def output_of(output: Any) -> Tensor:
    """Take the tensor out of a model's output: itself, its ``logits``, or the first of a tuple.

    Raises:
        TypeError: there is no tensor.
    """
    output = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        output = output.get("logits", next(iter(output.values()), None))
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return a tensor or logits, got {type(output).__name__}")
    return output


SIDE = 32  # pixels of a guessed image


def guess_example(model: nn.Module) -> Tensor:
    """Return two inputs of zeros as the first convolution or linear layer of a model wants them.

    Raises:
        ValueError: there is no such layer.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            shape = (2, module.in_channels, *[SIDE] * (module.weight.ndim - 2))
            return torch.zeros(shape, dtype=module.weight.dtype, device=module.weight.device)
        if isinstance(module, nn.Linear):
            return torch.zeros(2, module.in_features).to(module.weight)
    raise ValueError("the model has no linear layer and no convolution to guess an input from")


def _owners(model: nn.Module) -> dict[int, tuple[str, str]]:
    owners: dict[int, tuple[str, str]] = {}
    for name, module in model.named_modules():
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners.setdefault(id(tensor), (name, own))
    return owners


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
