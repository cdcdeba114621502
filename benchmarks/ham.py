"""HAM's cost as a ratio to a fused AdamW step.

Twelve matrices of 2048 x 2048 (50 million float32 parameters), gradients at rest: optimizer steps
alone, no forward or backward pass. Every figure is the median over rounds of the ratio to
`torch.optim.AdamW(fused=True)` of the same round. State is what the optimizer keeps, in bytes a
parameter.
"""

from statistics import median

import torch

from benchmarks.timing import alternate, ratios
from featherweight import optim

ROUNDS = 15
MATRICES, SIDE = 12, 2048
COMPILED = ("AdamW", "HamAdamW")  # by torch.compile
HAM = {"alpha": 20.0, "beta": 1e-3}


def measure() -> str:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    tables = []
    for count in sorted({1, threads}):
        torch.set_num_threads(count)
        tables.append(_table(count))
    torch.set_num_threads(threads)
    return "\n\n".join(tables)


def _table(threads: int) -> str:
    weights = [torch.randn(SIDE, SIDE) * 0.02 for _ in range(MATRICES)]
    gradients = [torch.randn(SIDE, SIDE) * 1e-3 for _ in range(MATRICES)]
    makers = {
        "AdamW, fused": lambda p: torch.optim.AdamW(p, fused=True),
        "AdamW": lambda p: torch.optim.AdamW(p),
        "HamAdamW": lambda p: optim.HamAdamW(p, **HAM),
        "HamAdamW, update direction": lambda p: optim.HamAdamW(p, direction="update", **HAM),
        "ham(AdamW, fused)": lambda p: optim.ham(torch.optim.AdamW(p, fused=True), **HAM),
    }
    optimizers = {name: make(_parameters(weights, gradients)) for name, make in makers.items()}
    steps = {name: o.step for name, o in optimizers.items()}
    for name in COMPILED:
        steps[f"{name}, compiled"] = torch.compile(optimizers[name].step)
        optimizers[f"{name}, compiled"] = optimizers[name]
    times = alternate(steps, ROUNDS)
    found = ratios(times, "AdamW, fused")
    rows = [
        "| optimizer | threads | a step | ratio | state, B a parameter |",
        "|---|---|---|---|---|",
    ]
    for name, optimizer in optimizers.items():
        rows.append(
            f"| {name} | {threads} | {1e3 * median(times[name]):.0f} ms | {found[name]:.2f} "
            f"| {_state(optimizer):.1f} |"
        )
    return "\n".join(rows)


def _parameters(weights, gradients):
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient  # shared: no optimizer writes to it
    return parameters


def _state(optimizer):
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors) / (MATRICES * SIDE * SIDE)
