"""How long one layer takes on this machine."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.sparse.execute import compiled
from featherweight.sparse.execute.linear import sparse_linear
from featherweight.sparse.execute.pattern import SparsePattern

BUDGET = 0.05  # seconds a candidate, after its first run
LEAST, MOST = 3, 30  # runs of it


def fastest(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the shortest time of each candidate, in seconds, of runs in turn.

    The shortest is what the machine can do when nothing disturbs it.
    """
    best = dict.fromkeys(candidates, float("inf"))
    for call in candidates.values():
        call()  # compiles, fills caches
    spent = dict.fromkeys(candidates, 0.0)
    for turn in range(MOST):
        for name, call in candidates.items():
            if turn < LEAST or spent[name] < BUDGET:
                started = time.perf_counter()
                call()
                seconds = time.perf_counter() - started
                spent[name] += seconds
                best[name] = min(best[name], seconds)
    return best


def linear_seconds(
    mask: Tensor, batch: int, backends: Sequence[str], dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Time a training step of one linear layer: forward and both gradients, no optimizer.

    Args:
        mask: bool, (out, in).
        batch: rows of the input.
        backends: names of ``BACKENDS``.
        dtype: of weights and activations.

    Returns:
        Seconds, by backend.
    """
    generator = torch.Generator().manual_seed(0)
    pattern = SparsePattern.from_mask(mask)
    values = torch.randn(pattern.nnz, generator=generator).to(dtype).requires_grad_()
    x, gradient = _activations(mask.shape, batch, dtype, generator)

    def step(backend: str) -> None:
        x.grad = values.grad = None
        sparse_linear(x, values, pattern, None, backend).backward(gradient)

    return fastest({name: functools.partial(step, name) for name in backends})


def random_mask(shape: Sequence[int], density: float, block: Sequence[int] = ()) -> Tensor:
    """Return a random mask, (out, in), zero outside the first rows and columns of a block."""
    mask = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0)) < density
    if block:
        mask[block[0] :], mask[:, block[1] :] = False, False
    return mask


def dense_seconds(shape: Sequence[int], batch: int) -> float:
    """Time a training step of one dense float32 linear layer, as `linear_seconds` does."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(tuple(shape), generator=generator).requires_grad_()
    x, gradient = _activations(shape, batch, torch.float32, generator)

    def step() -> None:
        x.grad = weight.grad = None
        functional.linear(x, weight).backward(gradient)

    return fastest({"dense": step})["dense"]


def _activations(
    shape: Sequence[int], batch: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return an input and an output gradient, feature-major as between two sparse layers."""
    x = torch.randn(shape[1], batch, generator=generator).to(dtype).t().requires_grad_()
    return x, torch.randn(shape[0], batch, generator=generator).to(dtype).t()


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set torch's float32 matmul precision for a while.

    Args:
        name: "highest", "high" or "medium". On CPUs without matrix units "medium" stays full
            float32 and takes another library, oneDNN, which on AMD is twice as fast.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Gain:
    """What one linear layer gains on this machine; seconds are those of a training step.

    Attributes:
        shape: (out, in).
        density: kept fraction.
        batch: rows of the input.
        dense: seconds of the dense layer as torch computes it by default.
        dense_medium: with float32 matmul precision "medium".
        sparse: seconds of the fastest sparse backend.
        backend: its name.
    """

    shape: tuple[int, int]
    density: float
    batch: int
    dense: float
    dense_medium: float
    sparse: float
    backend: str

    @property
    def gain(self) -> float:
        """How many times as fast as the faster dense step."""
        return min(self.dense, self.dense_medium) / self.sparse

    def __str__(self) -> str:
        return (
            f"{self.shape[0]}x{self.shape[1]}, batch {self.batch}, density {self.density:g}: "
            f"{self.gain:.1f}x ({self.backend}; dense {1e3 * self.dense:.2f} ms, "
            f"medium {1e3 * self.dense_medium:.2f} ms, sparse {1e3 * self.sparse:.2f} ms)"
        )


def machine_gains(
    shapes: Sequence[tuple[int, int]] = ((1024, 1024),),
    densities: Sequence[float] = (0.2, 0.1, 0.05, 0.01),
    batch: int = 128,
) -> list[Gain]:
    """Measure what truly sparse training gains on this machine, with torch's present threads.

    Takes about a second for each shape of a million weights.

    Args:
        shapes: (out, in) of linear layers.
        densities: kept fractions.
        batch: rows of the input.
    """
    names = ["bag", "bag-numba"] if compiled.available() else ["bag"]
    gains = []
    for shape in shapes:
        dense = {}
        for precision in ("highest", "medium"):
            with matmul_precision(precision):
                dense[precision] = dense_seconds(shape, batch)
        for density in densities:
            found = linear_seconds(random_mask(shape, density), batch, names)
            best = min(found, key=found.__getitem__)
            times = (dense["highest"], dense["medium"], found[best])
            gains.append(Gain(shape, density, batch, *times, best))
    return gains


def precision_error(size: int = 512) -> float:
    """Return the relative error that precision "medium" adds to a product on this machine.

    Under 1e-5 it is still float32 and safe to set; near 1e-2 it is bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    with matmul_precision("medium"):
        product = a @ b
    return float((product - exact).norm() / exact.norm())
