"""Which units of which layers are joined: the paths a signal can take through a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from featherweight.common import PRUNABLE_MODULES, unwrap
from featherweight.sparse.flow import on_path
from featherweight.sparse.masks import Masks

Layer = nn.Linear | nn.modules.conv._ConvNd
"""A layer with units on both sides."""


@dataclass
class Call:
    """One use of one linear or convolution layer in the forward pass.

    Attributes:
        weight: name of the layer's weight.
        module: the layer itself.
        inputs: number of its input units (features or channels).
        outputs: number of its output units.
        sources: place of an earlier call to int64 [inputs]: the output unit of that call which
            each input unit reads, through sums, norms and reshapes; -1 where it reads none.
        entry: bool [inputs], the units that read the input of the model.
        exit: bool [outputs], the units that the output of the model reads.
    """

    weight: str
    module: Layer
    inputs: int
    outputs: int
    sources: dict[int, Tensor] = field(default_factory=dict)
    entry: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    exit: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))


def unit_graph(model: nn.Module, inputs: Tensor) -> list[Call]:
    """Find out which units are joined, in the order of the forward pass.

    Runs the model's own forward pass with layers that emit given signals instead of computing, and
    looks where these arrive. To tell the units of a layer apart, each emits the bits of its number.

    Args:
        model: not touched.
        inputs: example batch; only its shape, dtype and device matter.

    Raises:
        ValueError: an input unit reads several units of one layer, or something that is no unit,
            such as an attention or a constant; or the output is no tensor.
    """
    probe = _Probe(model, inputs)
    calls = probe.calls
    seen, out = probe.run({}, torch.zeros_like(probe.example))
    readers = [*(repr(call.weight) for call in calls), "the output"]
    for name, alive in zip(readers, [*seen, out], strict=True):
        if alive.any():
            raise ValueError(f"paths can't be followed: {name} reads a constant signal")
    seen, _ = probe.run({}, torch.ones_like(probe.example))
    for call, alive in zip(calls, seen, strict=True):
        call.entry = alive.any(0)
    for place, call in enumerate(calls):
        seen, out = probe.run({place: _bits(call.outputs)}, torch.zeros_like(probe.example))
        for reader, alive in zip(calls, seen, strict=True):
            if alive.any():
                reader.sources[place] = _numbers(alive, call.weight, repr(reader.weight))
        read = _numbers(out, call.weight, "the output")
        call.exit = torch.zeros(call.outputs, dtype=torch.bool)
        call.exit[read[read >= 0]] = True
    return calls


def _bits(units: int) -> Tensor:
    """Return for each unit the bits of its number and their complements, bool [2 bits, units]."""
    places = torch.arange(max(1, (units - 1).bit_length()))
    bits = (torch.arange(units)[None] >> places[:, None]) & 1
    return torch.cat([bits, 1 - bits]).bool()


def _numbers(alive: Tensor, source: str, reader: str) -> Tensor:
    """Decode what arrived, bool [2 bits, units]: the number of the one unit read, -1 for none."""
    ones, zeros = alive.chunk(2)
    joined = alive.any(0)
    if (ones == zeros)[:, joined].any():
        raise ValueError(
            f"paths can't be followed: between {source!r} and {reader} the model mixes units"
        )
    numbers = (ones.long() << torch.arange(len(ones))[:, None]).sum(0)
    return numbers.masked_fill(~joined, -1)


def neutral_copy(model: nn.Module) -> nn.Module:
    """Copy a model so that nothing but its linear and convolution layers scales a signal.

    The copy shares the weights of those layers and is meant for running, not for training: it is
    in evaluation mode, norms pass on what they get, biases are zero, other parameters one.
    """
    net = unwrap(model)
    shared = {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]}
    twin = copy.deepcopy(net, dict[int, Any](shared)).eval()
    for module in twin.modules():
        if isinstance(module, _NORMS):
            module.forward = lambda signal, *_: signal  # type: ignore[method-assign]
        for name, parameter in module._parameters.items():
            weighs = name == "weight" and isinstance(module, PRUNABLE_MODULES)
            if parameter is not None and not weighs:
                value = torch.zeros_like if name.endswith("bias") else torch.ones_like
                module._parameters[name] = nn.Parameter(value(parameter), requires_grad=False)
    return twin


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def layers(net: nn.Module) -> dict[str, Layer]:
    """Find the linear and convolution layers: weight name to each module that uses it.

    A weight tied between layers has one name; the keys are those of the modules' own weights.
    """
    found = {}
    for prefix, module in net.named_modules():
        if isinstance(module, PRUNABLE_MODULES) and module._parameters.get("weight") is not None:
            found[f"{prefix}.weight" if prefix else "weight"] = cast("Layer", module)
    return found


def walkable(
    model: nn.Module, inputs: Tensor, allowed: Mapping[str, Tensor], names: Iterable[str]
) -> Masks:
    """Return the entries that lie on a path from input to output inside what is allowed.

    Args:
        model: left as found.
        inputs: example batch.
        allowed: bool tensors by name; other weights count as dense.
        names: the weights that a method is to mask.

    Raises:
        ValueError: a name is that of no linear or convolution weight.
    """
    net = unwrap(model)
    owned = weight_layers(net)
    for name in names:
        if name not in owned:
            raise ValueError(f"{name!r} is not the weight of a linear or convolution layer")
    return on_path(Masks(allowed), net, inputs)


def weight_layers(net: nn.Module) -> dict[str, Layer]:
    """Map the name of each linear or convolution weight to a layer that uses it."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    return {names[id(module.weight)]: module for module in layers(net).values()}


class _Probe:
    """A copy of a model whose layers emit given signals instead of computing.

    Args:
        model: not touched.
        inputs: example batch.

    Attributes:
        calls: the uses of its layers in forward order.
        example: one example.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        net = unwrap(model)
        self.example = inputs[:1]
        self.net = neutral_copy(net)
        self.calls: list[Call] = []
        self._shapes: list[torch.Size] = []
        self._seen: list[Tensor] = []
        self._emit: dict[int, Tensor] = {}
        self._batch = 1
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        twins = layers(self.net)
        for own, module in layers(net).items():
            twin = twins[own]
            twin.register_forward_hook(self._record(names[id(module.weight)], module))
        with torch.no_grad():
            self.net(self.example)
        for twin in twins.values():
            twin._forward_hooks.clear()
            twin.forward = self._stub(twin)  # type: ignore[method-assign]

    def run(self, emit: dict[int, Tensor], example: Tensor) -> tuple[list[Tensor], Tensor]:
        """Send signals; return what arrived at every call, bool [batch, units], and at the end."""
        self._emit, self._seen = emit, []
        self._batch = max([len(signal) for signal in emit.values()], default=1)
        with torch.no_grad():
            out = self.net(example.expand(self._batch, *example.shape[1:]))
        if not isinstance(out, Tensor):
            raise ValueError(f"the model must return a tensor, got {type(out).__name__}")
        if len(self._seen) != len(self.calls):
            raise ValueError("paths can't be followed: the forward pass depends on its values")
        return self._seen, (out != 0).reshape(self._batch, -1).cpu()

    def _record(self, name: str, module: Layer) -> Callable[..., None]:
        def hook(twin: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            axis = unit_axis(twin)
            self.calls.append(Call(name, module, inputs[0].shape[axis], output.shape[axis]))
            self._shapes.append(output.shape)

        return hook

    def _stub(self, twin: nn.Module) -> Callable[[Tensor], Tensor]:
        axis = unit_axis(twin)

        def forward(signal: Tensor) -> Tensor:
            place = len(self._seen)
            units = signal.movedim(axis, -1)
            self._seen.append((units != 0).reshape(self._batch, -1, units.shape[-1]).any(1).cpu())
            shape = self._shapes[place]
            rows = signal.shape[0]
            out = signal.new_zeros(rows, *shape[1:])
            if place in self._emit:
                sent = self._emit[place].to(out).repeat_interleave(rows // self._batch, 0)
                shaped = sent.reshape(rows, *[1] * (out.dim() - 2), -1).movedim(-1, axis)
                out = out + shaped
            return out

        return forward


def unit_axis(module: nn.Module) -> int:
    """Return the dimension of a layer's input and output that counts its units."""
    return -1 if isinstance(module, nn.Linear) else 1
