"""Which backend a layer gets when the user leaves it to the machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from featherweight.sparse.execute import compiled, cost, shrunk
from featherweight.sparse.execute.pattern import SparsePattern
from featherweight.sparse.execute.probe import linear_seconds, random_mask

Shapes = Mapping[nn.Module, torch.Size]

MARGIN = 0.95  # of the masked time: what is not clearly faster is not worth a change
SHRUNK = 0.75  # of the weight's entries: where the block of living rows and columns is no larger


def choose_linear(pattern: SparsePattern, batch: int, dtype: torch.dtype) -> str:
    """Return the backend that trains a linear layer fastest on this machine.

    Backends are timed on random patterns of the same kind, the first time such a layer comes; the
    times are kept in a file, see `cost.path`. "masked" unless another is clearly faster.

    Args:
        pattern: of the layer; not on the CPU: "masked".
        batch: rows of its input.
        dtype: of its weight; other than float32: "masked", but for float64.
    """
    if pattern.device.type != "cpu" or dtype not in compiled.DTYPES:
        return "masked"
    times = _times(pattern.shape, pattern.density, batch, dtype)
    rows, cols = shrunk.living(pattern)
    if 0 < rows * cols <= SHRUNK * pattern.rows * pattern.cols:
        density = pattern.nnz / (rows * cols)
        times = {**times, **_times(pattern.shape, density, batch, dtype, (rows, cols))}
    best = min(times, key=times.__getitem__)
    return best if times[best] < MARGIN * times["masked"] else "masked"


def _times(
    shape: Sequence[int],
    density: float,
    batch: int,
    dtype: torch.dtype,
    block: Sequence[int] = (),
) -> dict[str, float]:
    """Return what backends cost, for a block of living rows and columns also "shrunk"."""
    shape = [min(size, cost.LARGEST) for size in shape]
    block = [min(size, cost.LARGEST) for size in block]
    rough = min(1.0, cost.rounded(density, 3))
    batch = int(min(cost.rounded(batch, 1), cost.LARGEST_BATCH))
    names = ["masked", "bag", *(["bag-numba"] if compiled.available() else [])]
    within = f" within {block[0]}x{block[1]}" if block else ""
    return cost.seconds(
        f"linear {shape[0]}x{shape[1]}, batch {batch}, density {rough:.3g}{within}, {dtype}",
        lambda: linear_seconds(
            random_mask(shape, rough, block),
            batch,
            [*names, *(["shrunk"] if block else [])],
            dtype,
        ),
    )


def shapes_of(model: nn.Module, example: Any, modules: Iterable[nn.Module]) -> Shapes:
    """Return the input shape that modules get when the model runs an example.

    Args:
        model: run once without gradients, in evaluation mode.
        example: one tensor or a tuple of arguments; None: nothing is run.
        modules: to watch.
    """
    shapes: dict[nn.Module, torch.Size] = {}
    if example is None:
        return shapes

    def watch(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        shapes[module] = arguments[0].shape

    handles = [module.register_forward_pre_hook(watch) for module in modules]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return shapes


def linear_batch(shape: torch.Size | None, batch: int) -> int:
    """Return the rows of a linear layer's input: all axes but the last, or the default."""
    return batch if shape is None else max(1, shape[:-1].numel())
