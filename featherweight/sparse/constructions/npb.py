"""Node-path balancing: layer by layer, many paths without leaving units unused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from featherweight.common import Generator, as_generator, kept_density, prunable_weights, unwrap
from featherweight.sparse.constructions.balance import kernel_counts
from featherweight.sparse.constructions.graph import layers, neutral_copy, unit_axis, walkable
from featherweight.sparse.constructions.reconnect import reconnect
from featherweight.sparse.constructions.registry import CONSTRUCTIONS
from featherweight.sparse.density import allocate, kept_counts
from featherweight.sparse.density.allocate import Allocation
from featherweight.sparse.flow import _blocks, _unblock
from featherweight.sparse.masks import Masks

PAPER = "Pham et al. 2023, NeurIPS"


@CONSTRUCTIONS.register(
    "npb", "balances units and paths, layer by layer, in closed form", PAPER, needs=("inputs",)
)
def npb(
    model: nn.Module,
    density: float | None = None,
    allocation: Allocation = "erk",
    *,
    inputs: Tensor,
    sparsity: float | None = None,
    alpha: float = 0.01,
    beta: float = 1.0,
    max_kernel: int = 9,
    support: Masks | None = None,
    seed: int | None = None,
    generator: Generator | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> Masks:
    """Choose masks that keep both the used units and the paths through each layer many.

    Goes through the layers in the order of the forward pass. Each one gets its count from the
    allocation and spends it as `kernel_counts` finds best, given the numbers of paths that reach
    its input units through the layers before it; the positions inside a kernel are random. At the
    end, entries on no path from input to output are moved to where they are on one.

    Args:
        model: not touched.
        density: overall kept fraction, in (0, 1]; or give ``sparsity``.
        allocation: density rule, other masks, or densities by layer. The last step can move entries
            from one layer to another where a layer has no place left on a path.
        inputs: example batch; only its shape, dtype and device matter.
        sparsity: ``1 - density``.
        alpha: weight of the used units against the paths, in [0, 1]; 0 ignores units.
        beta: weight of spreading over many kernels of a convolution, >= 0; 0 ignores it.
        max_kernel: most entries that a kernel keeps, >= 1; raised in a layer that must keep more.
        support: masks that the result must stay inside.
        seed, generator: exactly one of the two.
        include, exclude: shell-style parameter name patterns.

    Raises:
        ValueError: a bad argument, or fewer entries on paths than are to be kept.

    Source: Pham et al. 2023, "Towards Data-Agnostic Pruning At Initialization: What Makes a Good
    Sparse Mask?", NeurIPS.
    """
    density = kept_density(density, sparsity)
    generator = as_generator(seed, generator)
    _check(alpha, beta, max_kernel)
    weights = prunable_weights(model, include, exclude)
    shapes = {name: weight.shape for name, weight in weights.items()}
    densities = allocate(shapes, density, allocation)
    total = round(density * sum(weight.numel() for weight in weights.values()))
    if support is not None:
        support.check(weights)
    dense = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    room = walkable(model, inputs, support or dense, weights)
    if total > room.nonzeros:
        raise ValueError(f"{total} weights are to be kept but only {room.nonzeros} lie on a path")
    counts = kept_counts(densities, shapes, total, room)
    balance = _Balance(room, counts, alpha, beta, max_kernel, generator)
    masks = _layer_by_layer(model, inputs, room, balance)
    return reconnect(masks, room, model, inputs, generator)


def _check(alpha: float, beta: float, max_kernel: int) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha:g}")
    if not 0 <= beta < float("inf"):
        raise ValueError(f"beta must be at least 0, got {beta:g}")
    if max_kernel < 1:
        raise ValueError(f"max_kernel must be at least 1, got {max_kernel}")


def _layer_by_layer(model: nn.Module, inputs: Tensor, room: Masks, balance: _Balance) -> Masks:
    """Count paths by sending ones through a copy whose layers become their masks on the way."""
    net, twin = unwrap(model), neutral_copy(model)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    own = layers(net)
    done: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(layer: nn.Module, signals: tuple[Tensor]) -> None:
            if name in room and name not in done:
                done[name] = balance.choose(name, layer, signals[0])
            if name in done:
                _set_weight(layer, done[name])

        return hook

    for key, layer in layers(twin).items():
        _set_weight(layer, torch.ones_like(own[key].weight))
        layer.register_forward_pre_hook(hook_of(names[id(own[key].weight)]))
    with torch.no_grad():
        twin.double()(torch.ones_like(inputs[:1], dtype=torch.float64))
    if missing := [name for name in room if name not in done]:
        raise ValueError(f"{missing[0]!r} takes no part in the forward pass")
    return Masks({name: done[name] for name in room})


def _set_weight(layer: nn.Module, values: Tensor) -> None:
    # A new parameter: the copy shares the old one with the user's model.
    layer._parameters["weight"] = nn.Parameter(values.double(), requires_grad=False)


@dataclass(frozen=True)
class _Balance:
    """The choices of `npb` that all layers share.

    Attributes:
        room: where entries may be kept.
        counts: entries to keep, by weight.
        alpha, beta, max_kernel, generator: as in `npb`.
    """

    room: Masks
    counts: Mapping[str, int]
    alpha: float
    beta: float
    max_kernel: int
    generator: Generator

    def choose(self, name: str, layer: nn.Module, signal: Tensor) -> Tensor:
        """Choose the mask of a layer, given the numbers of paths that arrive at it."""
        block = _blocks(self.room[name].cpu(), layer)
        groups, _, inputs, kernel = block.shape
        paths = signal.movedim(unit_axis(layer), -1).reshape(-1, groups, inputs).sum(0).cpu()
        if not paths.isfinite().all():
            raise ValueError(f"more paths lead to {name!r} than a float64 can count")
        count = self.counts[name]
        table = kernel_counts(
            paths.clamp(min=0),
            self._limits(block.sum(3), count, kernel),
            count,
            alpha=self.alpha,
            beta=self.beta if kernel > 1 else 0.0,
            generator=self.generator,
        )
        keys = torch.rand(block.shape, generator=self.generator).masked_fill(~block, 2.0)
        ranks = keys.argsort(3).argsort(3)
        return _unblock(ranks < table[..., None], self.room[name], layer)

    def _limits(self, room: Tensor, count: int, kernel: int) -> Tensor:
        """Limit each kernel to `max_kernel`, or to the least number above that is enough."""
        for limit in range(min(self.max_kernel, kernel), kernel):
            if int(room.clamp(max=limit).sum()) >= count:
                return room.clamp(max=limit)
        return room
