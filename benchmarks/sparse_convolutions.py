"""Training steps of truly sparse convolutions against the fastest dense ones.

Forward, backward and fused SGD with momentum, in float32. Dense: oneDNN, contiguous or channels
last; every figure is the median over rounds of the ratio to a dense step of the same round, and
the smaller one of the two layouts'. Sparse: backend "chwn", given contiguous images, so that the
change of layout counts. Stacks are four times convolution 3x3, batch norm, ReLU, with 32 images.
`GOMP_SPINCOUNT=1000` for all, as the command line sets it.
"""

import functools
import os
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import alternate
from featherweight import sparse
from featherweight.lab import models
from featherweight.sparse.execute import to_sparse

ROUNDS = 7
DENSITIES = (0.1, 0.05, 0.01)


def measure() -> str:
    rows = [
        "| network | threads | dense | dense, channels last | density 0.1 | 0.05 | 0.01 |",
        "|---|---|---|---|---|---|---|",
    ]
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, min(2, os.cpu_count() or 1)}):
            torch.set_num_threads(threads)
            rows += [_row(name, threads, *case) for name, case in _cases().items()]
    finally:
        torch.set_num_threads(before)
    return "\n".join(rows)


def _cases():
    stacks = {
        f"stack, {channels} channels, {size}x{size}": (
            functools.partial(_stack, channels),
            torch.randn(32, channels, size, size),
        )
        for channels, size in ((64, 32), (128, 16), (256, 8))
    }
    networks = {
        f"ResNet-20, batch {batch}": (_resnet, torch.randn(batch, 3, 32, 32)) for batch in (64, 128)
    }
    return stacks | networks


def _row(name, threads, make, images):
    last = torch.channels_last
    candidates = {
        "dense": _step(make(), images),
        "last": _step(make().to(memory_format=last), images.to(memory_format=last)),
    }
    for density in DENSITIES:
        model = make()
        sparse.random(model, density, "uniform", seed=0).apply_(model)
        candidates[density] = _step(to_sparse(model, backend="chwn", exclude=["linear*"]), images)
    times = alternate(candidates, ROUNDS)
    cells = [f"{1e3 * median(times[layout]):.0f} ms" for layout in ("dense", "last")]
    cells += [f"{_gain(times, density):.2f}x" for density in DENSITIES]
    return f"| {name} | {threads} | {' | '.join(cells)} |"


def _gain(times, density):
    return min(
        median(a / b for a, b in zip(times[layout], times[density], strict=True))
        for layout in ("dense", "last")
    )


def _stack(channels):
    torch.manual_seed(0)
    layers = [
        module
        for _ in range(4)
        for module in (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )
    ]
    return nn.Sequential(*layers)


def _resnet():
    return models.build("resnet20", classes=10, shape=(3, 32, 32), seed=0)


def _step(model, images):
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, fused=True)
    labels = torch.arange(len(images)) % 10

    def step():
        output = model(images)
        loss = output.square().mean() if output.ndim == 4 else cross_entropy(output, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
