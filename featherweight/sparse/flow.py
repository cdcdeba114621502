"""Does signal pass? Units without edges, paths from input to output, and their repair."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, unwrap
from featherweight.sparse.masks import Masks


@dataclass(frozen=True)
class Health:
    """What is wrong with masks; empty tables mean nothing is.

    Attributes:
        empty: tensors that keep nothing.
        no_input: number of output units without a kept in-edge, by tensor.
        no_output: number of input units without a kept out-edge, by tensor.
        stranded: number of kept entries on no path from input to output, by tensor; None where
            no example input was given.
    """

    empty: tuple[str, ...]
    no_input: dict[str, int]
    no_output: dict[str, int]
    stranded: dict[str, int] | None = None

    @property
    def ok(self) -> bool:
        """Whether every unit has edges on both sides and every kept entry lies on a path."""
        return not (self.empty or self.no_input or self.no_output or self.stranded)

    def __str__(self) -> str:
        lines = [f"{name}: keeps nothing" for name in self.empty]
        lines += [f"{n}: {c} units without a kept in-edge" for n, c in self.no_input.items()]
        lines += [f"{n}: {c} inputs without a kept out-edge" for n, c in self.no_output.items()]
        lines += [f"{n}: {c} entries on no path" for n, c in (self.stranded or {}).items()]
        return "\n".join(lines) or "healthy"


def health(masks: Masks, model: nn.Module, inputs: Tensor | None = None) -> Health:
    """Look for empty layers, units without edges, and entries on no input-output path.

    Args:
        masks: the masks to look at.
        model: the model they belong to (for groups and transposed convolutions).
        inputs: one example batch; where given, paths are followed through the model's own forward
            pass, residual sums and pooling included. Needs a model in which a larger input never
            makes a signal vanish (ReLU networks with batch norm are such).

    Raises:
        ValueError: the masks do not fit the model.
    """
    modules = _modules(model, masks)
    degrees = {name: _degrees(_blocks(masks[name], modules[name])) for name in masks}
    dead_in = {name: int((ins == 0).sum()) for name, (ins, _) in degrees.items()}
    dead_out = {name: int((outs == 0).sum()) for name, (_, outs) in degrees.items()}
    stranded = None
    if inputs is not None:
        live = on_path(masks, model, inputs)
        stranded = {name: count for name, count in (masks - live).counts().items() if count}
    return Health(
        tuple(name for name, count in masks.counts().items() if count == 0),
        {name: count for name, count in dead_in.items() if count},
        {name: count for name, count in dead_out.items() if count},
        stranded,
    )


def on_path(masks: Masks, model: nn.Module, inputs: Tensor) -> Masks:
    """Return the kept entries that lie on a path from the input to the output.

    Sends ones through the model with every kept weight set to one and batch norms set to the
    identity, cutting each layer's output to {0, 1} so that nothing overflows, and follows the
    gradient back in the same way: an entry is on a path if both signals reach it.

    Args:
        masks: masks of the model.
        model: left exactly as found.
        inputs: example batch; only its shape and device matter.
    """
    net = unwrap(model)
    weights = masks.weights(net)
    training = {module: module.training for module in net.modules()}
    state = {n: t.detach().clone() for n, t in [*net.named_parameters(), *net.named_buffers()]}
    required = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: _binary(out))
        for module in {id(m): m for m in _modules(net, masks).values()}.values()
    ]
    hooks += [
        module.register_forward_hook(_pool_by_average)
        for module in net.modules()
        if isinstance(module, tuple(_AVERAGES))
    ]
    try:
        net.eval()
        _set_ones(net, masks)
        leaves = [weight.requires_grad_(True) for weight in weights.values()]
        with torch.enable_grad():
            total = net(torch.ones_like(inputs[:1])).sum()
            found = torch.autograd.grad(total, leaves, allow_unused=True)
        live = {
            name: masks[name] & (gradient.to(masks[name].device) > 0)
            if gradient is not None
            else torch.zeros_like(masks[name])
            for name, gradient in zip(weights, found, strict=True)
        }
    finally:
        for hook in hooks:
            hook.remove()
        _restore(net, state, required, training)
    return Masks(live)


@torch.no_grad()
def _set_ones(net: nn.Module, masks: Masks) -> None:
    for name, parameter in net.named_parameters():
        parameter.copy_(masks[name] if name in masks else _identity(name, parameter))
    for module in net.modules():
        if _is_norm(module):
            for key, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
                tensor = getattr(module, key, None)
                if tensor is not None:
                    tensor.fill_(value)


def _identity(name: str, parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if name.endswith("bias") else torch.ones_like(parameter)


@torch.no_grad()
def _restore(
    net: nn.Module,
    state: dict[str, Tensor],
    required: dict[str, bool],
    training: dict[nn.Module, bool],
) -> None:
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        tensor.copy_(state[name])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(required[name])
    for module, mode in training.items():
        module.training = mode


_AVERAGES = {
    nn.MaxPool1d: nn.functional.avg_pool1d,
    nn.MaxPool2d: nn.functional.avg_pool2d,
    nn.MaxPool3d: nn.functional.avg_pool3d,
}


def _pool_by_average(module: Any, inputs: tuple[Tensor], _: Tensor) -> Tensor:
    """Let the gradient reach every entry of a window; max pooling would pick one of the equals."""
    average = next(f for kind, f in _AVERAGES.items() if isinstance(module, kind))
    return average(inputs[0], module.kernel_size, module.stride, module.padding, module.ceil_mode)


def _binary(signal: Tensor) -> Tensor:
    cut: Tensor = _Binary.apply(signal)  # type: ignore[no-untyped-call]
    return cut


class _Binary(torch.autograd.Function):
    """Cut a nonnegative signal to {0, 1}, forward and backward."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor) -> Tensor:
        return (signal > 0).to(signal.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient > 0).to(gradient.dtype)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm))


@dataclass(frozen=True)
class Repair:
    """What `repair` did.

    Attributes:
        masks: the repaired masks, with as many kept entries as before.
        repaired: number of units that got a missing edge, by tensor.
        moved: number of edges that came from another layer, by tensor that gained them.
    """

    masks: Masks
    repaired: dict[str, int]
    moved: dict[str, int] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Number of repaired units over all tensors."""
        return sum(self.repaired.values())


def repair(
    masks: Masks,
    model: nn.Module,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
) -> Repair:
    """Give every unit an in-edge and an out-edge, moving edges so that their number stays.

    Missing edges are added at random, one edge serving an input and an output unit where it can;
    then as many randomly chosen edges go whose both ends keep another one. A layer with too few
    edges for its units takes the lacking ones from the layers with the most to spare.

    Args:
        masks: masks of the model; not changed.
        model: for groups and transposed convolutions; not touched.
        seed, generator: exactly one of the two.

    Returns:
        The new masks and how many units were repaired; masks without dead units come back equal.

    Raises:
        ValueError: the masks do not fit, or keep fewer edges in all than the units need.

    Source: the density-preserving rewiring of Gadhikar, Mukherjee & Burkholz 2023,
    arXiv:2210.02412.
    """
    generator = as_generator(seed, generator)
    modules = _modules(model, masks)
    blocks = {name: _blocks(masks[name], modules[name]).cpu() for name in masks}
    counts = masks.counts()
    target = _edges_after_repair(blocks, counts)
    result: dict[str, Tensor] = {}
    repaired: dict[str, int] = {}
    for name, block in blocks.items():
        block = block.clone()
        count = sum(_add_edges(group, generator) for group in block)
        _drop_edges(block, int(block.sum()) - target[name], generator)
        _fill_edges(block, target[name] - int(block.sum()), generator)
        if count:
            repaired[name] = count
        result[name] = _unblock(block, masks[name], modules[name])
    moved = {n: target[n] - counts[n] for n in masks if target[n] > counts[n]}
    return Repair(Masks(result), repaired, moved)


def _edges_after_repair(blocks: dict[str, Tensor], counts: dict[str, int]) -> dict[str, int]:
    """Tell how many edges each layer has after repair: its own number, or what its units need."""
    least = {name: block.shape[0] * max(block.shape[1:3]) for name, block in blocks.items()}
    if sum(least.values()) > sum(counts.values()):
        raise ValueError(
            f"{sum(counts.values())} kept entries are too few: the units need {sum(least.values())}"
        )
    target = {name: max(counts[name], least[name]) for name in blocks}
    while surplus := sum(target.values()) - sum(counts.values()):
        name = max(target, key=lambda n: target[n] - least[n])
        second = sorted(target[n] - least[n] for n in target)[-2] if len(target) > 1 else 0
        spare = target[name] - least[name]
        target[name] -= min(surplus, max(1, spare - second))
    return target


def _add_edges(group: Tensor, generator: Generator) -> int:
    """Connect the unconnected units of one group [outputs, inputs, kernel] in place; count them."""
    ins, outs = _degrees(group[None])
    lonely_out = (ins[0] == 0).nonzero().flatten().tolist()
    lonely_in = (outs[0] == 0).nonzero().flatten().tolist()
    for k in range(max(len(lonely_out), len(lonely_in))):
        out = lonely_out[k] if k < len(lonely_out) else _draw(group.shape[0], generator)
        into = lonely_in[k] if k < len(lonely_in) else _draw(group.shape[1], generator)
        group[out, into, _draw(group.shape[2], generator)] = True
    return len(lonely_out) + len(lonely_in)


def _drop_edges(block: Tensor, count: int, generator: Generator) -> None:
    """Remove ``count`` edges in place, none of them some unit's last."""
    if count <= 0:
        return
    ins, outs = _degrees(block)
    edges = block.nonzero()
    for index in torch.randperm(len(edges), generator=generator).tolist():
        if count == 0:
            return
        group, out, into, kernel = edges[index].tolist()
        if ins[group, out] > 1 and outs[group, into] > 1:
            block[group, out, into, kernel] = False
            ins[group, out] -= 1
            outs[group, into] -= 1
            count -= 1
    for _ in range(count):
        _merge_stars(block, generator)


def _merge_stars(block: Tensor, generator: Generator) -> None:
    """Save one edge where every edge is some unit's last.

    The graph is then a forest of stars. A leaf of a star around an output unit and a leaf of a
    star around an input unit are cut off and joined to each other: two edges become one.
    """
    ins, outs = _degrees(block)
    for group in range(block.shape[0]):
        hubs_out = (ins[group] > 1).nonzero().flatten()
        hubs_in = (outs[group] > 1).nonzero().flatten()
        if len(hubs_out) and len(hubs_in):
            hub_out = hubs_out[_draw(len(hubs_out), generator)]
            hub_in = hubs_in[_draw(len(hubs_in), generator)]
            leaf_in, kernel_a = block[group, hub_out].nonzero()[0].tolist()
            leaf_out, kernel_b = block[group, :, hub_in].nonzero()[0].tolist()
            block[group, hub_out, leaf_in, kernel_a] = False
            block[group, leaf_out, hub_in, kernel_b] = False
            block[group, leaf_out, leaf_in, kernel_a] = True
            return


def _fill_edges(block: Tensor, count: int, generator: Generator) -> None:
    """Add ``count`` edges in place at random free positions."""
    if count > 0:
        free = (~block).flatten().nonzero().flatten()
        block.view(-1)[free[torch.randperm(len(free), generator=generator)[:count]]] = True


def _draw(below: int, generator: Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _degrees(block: Tensor) -> tuple[Tensor, Tensor]:
    """Count kept edges: in-degree of output units [G, O] and out-degree of input units [G, I]."""
    return block.sum((2, 3)), block.sum((1, 3))


def _modules(model: nn.Module, masks: Masks) -> dict[str, nn.Module]:
    masks.check(model)
    owners: dict[str, nn.Module] = dict(_parameter_owners(unwrap(model)))
    return {name: owners[name] for name in masks}


def _parameter_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for prefix, module in model.named_modules():
        for name in module._parameters:
            yield (f"{prefix}.{name}" if prefix else name), module


def _blocks(mask: Tensor, module: nn.Module) -> Tensor:
    """View a mask as [groups, outputs, inputs, kernel], the counts being those of one group."""
    groups = int(getattr(module, "groups", 1))
    flat = mask.reshape(mask.shape[0], mask.shape[1] if mask.dim() > 1 else 1, -1)
    block = flat.reshape(groups, flat.shape[0] // groups, *flat.shape[1:])
    return block.transpose(1, 2) if _transposed(module) else block


def _unblock(block: Tensor, mask: Tensor, module: nn.Module) -> Tensor:
    block = block.transpose(1, 2) if _transposed(module) else block
    return block.reshape(mask.shape).to(mask.device)


def _transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "transposed", False))
