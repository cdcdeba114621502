"""Subset sums a second, and a network of 397,510 weights built by masking a random one.

Times are of one thread. The network is 784-500-10, in a source of 30 million parameters with 24
candidates for each weight; a published construction of this size, with a commercial solver of
mixed-integer programs on 36 cores, took 77,266 s (Pensia et al. 2020, arXiv:2006.07990).
"""

import time
from statistics import median

import torch
from torch import nn

from benchmarks.timing import alternate
from featherweight.sparse import tickets

ROUNDS = 5
PROBLEMS = {12: 20_000, 16: 8_000, 20: 2_000, 24: 400}


def measure() -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return "\n".join([*solver(), "", *construction()])
    finally:
        torch.set_num_threads(threads)


def solver() -> list[str]:
    problems = {n: (_uniform(count, n), _uniform(count)) for n, count in PROBLEMS.items()}
    calls = {
        f"{n}, {name}": lambda pair=pair, options=options: tickets.subset_sum(*pair, **options)
        for n, pair in problems.items()
        for name, options in (("nearest", {}), ("smallest within 0.01", {"tolerance": 0.01}))
    }
    times = alternate(calls, ROUNDS)
    rows = ["| candidates, subset | problems a second |", "|---|---|"]
    for name, own in times.items():
        count = PROBLEMS[int(name.partition(",")[0])]
        rows.append(f"| {name} | {count / median(own):,.0f} |")
    return rows


def construction() -> list[str]:
    torch.manual_seed(0)
    target = nn.Sequential(nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 10))
    target.requires_grad_(False)
    source = tickets.source_for(target, "2L", 24, seed=0)
    inputs = torch.rand(500, 784)
    rows = ["| construction | seconds | kept | largest error | bound | outputs up to |"]
    rows.append("|---|---|---|---|---|---|")
    scale = float(target(inputs).abs().max())
    for name, tolerance in (("nearest", None), ("smallest within 0.0005", 0.0005)):
        started = time.perf_counter()
        ticket = tickets.approximate(target, source, nonnegative=True, tolerance=tolerance)
        seconds = time.perf_counter() - started
        rows.append(
            f"| {name} | {seconds:.0f} | {ticket.masks.nonzeros:,} | {ticket.error(inputs):.1e} | "
            f"{ticket.bound(inputs):.1e} | {scale:.2f} |"
        )
    return rows


def _uniform(*shape):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
