"""Measured speed-ups: candidates run in turn, round after round, and are compared as ratios.

Running in turn slows both sides of a ratio alike when the machine does something else; the ratio
is the median over the rounds. Data is random with a fixed seed; the global random state of torch
is not touched, and neither are its settings once a measurement is over.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.sparse import SparsePattern, sparse_linear, top_k
from featherweight.sparse.execute.choose import choose_linear

FULL_FP32 = 1e-5  # relative difference to float64 above which a product is no longer full fp32
SPARSITIES = (0.9, 0.95, 0.99)
CALLS = 3  # timed calls in a row, after one that warms up


@dataclass(frozen=True)
class Comparison:
    """How much faster one way of computing is than another on this machine.

    Attributes:
        name: what ``advice`` knows it by.
        what: the candidate, in words.
        against: the baseline, in words.
        ratio: median over the rounds of baseline time / candidate time; above 1 is faster.
        quartiles: lower and upper quartile of the same.
        seconds: median time of one call of the candidate.
        against_seconds: the same of the baseline.
        difference: relative difference of the candidate's result to float64, where it matters.
        sparsity: zero fraction of the matrix, where there is one.
    """

    name: str
    what: str
    against: str
    ratio: float
    quartiles: tuple[float, float]
    seconds: float
    against_seconds: float
    difference: float | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class Candidate:
    """One way of computing, and the global setting under which it runs."""

    name: str
    run: Callable[[], object]
    setting: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)


@contextmanager
def settings_kept() -> Iterator[None]:
    """Put back torch's matmul precision and number of threads at the end, also after an error."""
    backends: Any = torch.backends  # torch builds its members at run time, unseen by mypy
    matmuls = (backends.mkldnn.matmul, backends.cuda.matmul)
    precisions = [matmul.fp32_precision for matmul in matmuls]
    number = torch.get_num_threads()
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say where the per-backend settings were used
        before = None
    try:
        yield
    finally:
        torch.set_num_threads(number)
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for matmul, value in zip(matmuls, precisions, strict=True):
            matmul.fp32_precision = value


@contextmanager
def _precision(name: str) -> Iterator[None]:
    with settings_kept():
        torch.set_float32_matmul_precision(name)
        yield


@contextmanager
def _thread_count(number: int) -> Iterator[None]:
    with settings_kept():
        torch.set_num_threads(number)
        yield


def alternate(
    candidates: Sequence[Candidate], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Time the candidates in turn and return the seconds of one call, one entry a round."""
    times: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for number in range(rounds):
        first = number % len(candidates)
        for candidate in [*candidates[first:], *candidates[:first]]:
            with candidate.setting():
                times[candidate.name].append(_seconds(candidate.run, device))
    return times


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        run()
    _wait(device)
    return (time.perf_counter() - start) / CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    name: str,
    what: str,
    against: str,
    times: Sequence[float],
    baseline: Sequence[float],
    difference: float | None = None,
    sparsity: float | None = None,
) -> Comparison:
    """Reduce paired times, one a round, to a comparison."""
    ratios = [old / new for old, new in zip(baseline, times, strict=True)]
    lower, middle, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    seconds, against_seconds = statistics.median(times), statistics.median(baseline)
    return Comparison(
        name, what, against, middle, (lower, upper), seconds, against_seconds, difference, sparsity
    )


def matmul(device: torch.device, rounds: int) -> list[Comparison]:
    """Compare a matrix product in fp32 at precision "highest" with "medium" and with bf16."""
    size, batch = (1024, 128) if device.type == "cpu" else (4096, 4096)
    left, right = _normal((size, size), device), _normal((size, batch), device)
    product = partial(torch.mm, left, right)
    candidates = [
        Candidate("highest", product, partial(_precision, "highest")),
        Candidate("medium", product, partial(_precision, "medium")),
        Candidate("bf16", product, partial(_bf16, device)),
    ]
    exact = left.double() @ right.double()
    errors = {candidate.name: _difference(candidate, exact) for candidate in candidates}
    times = alternate(candidates, rounds, device)
    found = [
        ("matmul-medium", "fp32 matmul at precision medium", "medium"),
        ("matmul-bf16", "matmul under bf16 autocast", "bf16"),
    ]
    return [
        compare(name, what, "fp32 at highest", times[key], times["highest"], errors[key])
        for name, what, key in found
    ]


def sparse(device: torch.device, rounds: int) -> list[Comparison]:
    """Compare training a truly sparse linear layer, on the CPU, with the fastest dense fp32 way."""
    cpu, size, batch = torch.device("cpu"), 1024, 128
    weight, inputs = _normal((size, size), cpu), _normal((size, batch), cpu).t()
    dense = _linear_step(nn.functional.linear, inputs, weight)
    candidates = [
        Candidate("highest", dense, partial(_precision, "highest")),
        Candidate("medium", dense, partial(_precision, "medium")),
        *(Candidate(str(s), _sparse_step(inputs, weight, s)) for s in SPARSITIES),
    ]
    times = alternate(candidates, rounds, cpu)
    medium = Candidate("medium", partial(torch.mm, inputs, weight), candidates[1].setting)
    full = _difference(medium, inputs.double() @ weight.double()) < FULL_FP32
    faster = statistics.median(times["medium"]) < statistics.median(times["highest"])
    best = "medium" if full and faster else "highest"
    return [
        compare(
            "sparse",
            f"training a truly sparse linear layer, {100 * sparsity:.0f} % zeros",
            f"a dense one, fp32 at {best}",
            times[str(sparsity)],
            times[best],
            sparsity=sparsity,
        )
        for sparsity in SPARSITIES
    ]


def _sparse_step(inputs: Tensor, weight: Tensor, sparsity: float) -> Callable[[], object]:
    pattern = SparsePattern.from_mask(top_k(weight.abs(), round(weight.numel() * (1 - sparsity))))
    backend = choose_linear(pattern, len(inputs), weight.dtype)
    layer = partial(sparse_linear, pattern=pattern, bias=None, backend=backend)
    return _linear_step(layer, inputs, pattern.gather(weight))


def _linear_step(
    layer: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, weight: Tensor
) -> Callable[[], object]:
    """Return a forward and backward pass with both gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (inputs, weight)]
    gradient = torch.ones_like(layer(inputs, weight))
    return lambda: torch.autograd.grad(layer(*leaves), leaves, gradient)


def convolution(device: torch.device, rounds: int) -> list[Comparison]:
    """Compare a 3x3 convolution, forward and backward: NCHW, channels last, and that in bf16."""
    channels, batch = (64, 32) if device.type == "cpu" else (128, 256)
    weight = _normal((channels, channels, 3, 3), device)
    inputs = _normal((batch, channels, 16, 16), device)
    step, step_last = _convolution_step(weight, inputs), _convolution_step(weight, inputs, True)
    candidates = [
        Candidate("nchw", step),
        Candidate("last", step_last),
        Candidate("bf16", step_last, partial(_bf16, device)),
    ]
    times = alternate(candidates, rounds, device)
    words = "3x3 convolution in channels last"
    return [
        compare("conv-channels-last", words, "NCHW", times["last"], times["nchw"]),
        compare("conv-bf16", f"{words} under bf16 autocast", "fp32", times["bf16"], times["last"]),
    ]


def threads(device: torch.device, rounds: int, cores: int) -> list[Comparison]:
    """Compare all cores with one thread on a matrix product on the CPU."""
    if cores < 2:
        return []
    cpu = torch.device("cpu")
    product = partial(torch.mm, _normal((1024, 1024), cpu), _normal((1024, 128), cpu))
    candidates = [
        Candidate("one", product, partial(_thread_count, 1)),
        Candidate("all", product, partial(_thread_count, cores)),
    ]
    times = alternate(candidates, rounds, cpu)
    return [
        compare("threads", f"matmul on {cores} threads", "1 thread", times["all"], times["one"])
    ]


def adamw(device: torch.device, rounds: int) -> list[Comparison]:
    """Compare a fused AdamW step with a foreach step, over 16 matrices of 256 x 256."""
    candidates = [
        Candidate("foreach", _adamw_step(device, foreach=True)),
        Candidate("fused", _adamw_step(device, fused=True)),
    ]
    times = alternate(candidates, rounds, device)
    return [compare("adamw-fused", "fused AdamW step", "foreach", times["fused"], times["foreach"])]


def _adamw_step(
    device: torch.device, foreach: bool | None = None, fused: bool | None = None
) -> Callable[[], object]:
    parameters = [nn.Parameter(_normal((256, 256), device)) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 0.01)
    return torch.optim.AdamW(parameters, foreach=foreach, fused=fused).step


def _convolution_step(
    weight: Tensor, inputs: Tensor, channels_last: bool = False
) -> Callable[[], object]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    leaves = [tensor.to(memory_format=layout).requires_grad_() for tensor in (inputs, weight)]

    def step() -> object:
        output = nn.functional.conv2d(leaves[0], leaves[1], padding=1)
        return torch.autograd.grad(output.sum(), leaves)

    return step


def _bf16(device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16)


def _difference(candidate: Candidate, exact: Tensor) -> float:
    """Return the Frobenius norm of the error over that of the exact result."""
    with candidate.setting():
        result = candidate.run()
    assert isinstance(result, Tensor)
    return float((result.double() - exact).norm() / exact.norm())


def _normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
