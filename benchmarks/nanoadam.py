"""NanoAdam's step against AdamW(fused=True): 50 million parameters in 12 tensors, no model.

Steps are amortised: each round times one refresh of the mask and some steps after three refreshes,
when entries of several ages are mixed, and charges a step with a hundredth of a refresh (a mask
interval of 100). Every figure is the median over rounds of the ratio to AdamW's step of the same
round, with the ratio of the fastest rounds in brackets. "numba" is left out where numba is not
installed. Peak memory is that of nine training steps of twelve Linear(2048, 2048), with a refresh
of the mask in the fifth and the ninth, as growth of the resident memory of a fresh process. What
the first step of a process loads and compiles is not counted.
"""

import json
import subprocess
import sys
import textwrap
import time
from statistics import median

import torch

from featherweight.optim import compiled
from featherweight.optim.analysis import state_bytes
from featherweight.optim.nanoadam import NanoAdam

TENSORS, SHAPE = 12, (2048, 2048)
ROUNDS, STEPS, INTERVAL = 9, 3, 100


def measure() -> str:
    backends = ["torch", *(["numba"] if compiled.available() else [])]
    rows = [
        "| threads | weight decay | density | backend | step | step and refresh | state |",
        "|---|---|---|---|---|---|---|",
    ]
    threads = torch.get_num_threads()
    for number in sorted({1, threads}):
        torch.set_num_threads(number)
        for decay in (0.0, 0.01):
            rows += _rows(number, decay, backends)
    torch.set_num_threads(threads)
    return "\n".join(rows) + "\n\n" + _peaks()


def _rows(threads, decay, backends):
    adamw = _optimizer(torch.optim.AdamW, decay, fused=True)
    nano = {
        (density, backend): _optimizer(
            NanoAdam, decay, density=density, backend=backend, mask_interval=INTERVAL
        )
        for density in (0.1, 0.01)
        for backend in backends
    }
    for optimizer in nano.values():
        for _ in range(3):
            _drift(optimizer)
            _refresh(optimizer)
    times = {key: ([], []) for key in ("adamw", *nano)}
    for _ in range(ROUNDS):
        times["adamw"][0].append(_time(adamw.step, STEPS))
        for key, optimizer in nano.items():
            _drift(optimizer)
            times[key][1].append(_refresh(optimizer))
            times[key][0].append(_time(optimizer.step, STEPS))
    base = times["adamw"][0]
    for (density, backend), (steps, refreshes) in [(k, times[k]) for k in nano]:
        whole = [s + r / INTERVAL for s, r in zip(steps, refreshes, strict=True)]
        share = state_bytes(nano[density, backend]) / state_bytes(adamw)
        yield (
            f"| {threads} | {decay} | {density} | {backend} | {_ratio(steps, base)} "
            f"| {_ratio(whole, base)} | {100 * share:.2f} % |"
        )


def _optimizer(kind, decay, **options):
    generator = torch.Generator().manual_seed(0)
    weights = [
        torch.nn.Parameter(0.02 * torch.randn(SHAPE, generator=generator)) for _ in range(TENSORS)
    ]
    for weight in weights:
        weight.grad = torch.randn(SHAPE, generator=generator)
    optimizer = kind(weights, 1e-4, weight_decay=decay, **options)
    optimizer.step()
    return optimizer


@torch.no_grad()
def _drift(optimizer):
    """Move the weights as some training would, so that a refresh exchanges entries."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.add_(torch.randn_like(weight), alpha=3e-4)


def _refresh(optimizer):
    """Time what a step with a refresh takes more than one without."""
    for state in optimizer.state.values():
        state["step"] += -state["step"] % INTERVAL
    return max(0.0, _time(optimizer.step, 1) - _time(optimizer.step, 1))


def _time(call, times):
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def _ratio(own, base):
    middle = median(a / b for a, b in zip(own, base, strict=True))
    return f"{middle:.2f} ({min(own) / min(base):.2f})"


PEAK = """
    import json, resource, sys
    import torch
    from torch import nn
    from featherweight.optim.during_backward import update_during_backward
    from featherweight.optim.nanoadam import NanoAdam

    def resident():
        lines = open("/proc/self/status").read().splitlines()
        return {l.split(":")[0]: int(l.split()[1]) for l in lines if l.startswith("Vm")}

    kind = sys.argv[1]
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))
    if kind == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    else:
        optimizer = NanoAdam(model.parameters(), 1e-4, density=0.1, mask_interval=4)
    if kind.endswith("backward"):
        update_during_backward(optimizer)
    inputs = torch.randn(64, 2048)
    small = nn.Parameter(torch.randn(128, 128))  # loads what a first step loads
    small.grad = torch.randn(128, 128)
    type(optimizer)([small], 1e-4).step()
    before = resident()["VmRSS"]
    for _ in range(9):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(json.dumps((resident()["VmHWM"] - before) * 1024))
"""


def _peaks():
    names = ("AdamW", "NanoAdam", "NanoAdam, update during backward")
    rows = ["| optimizer | peak memory above the weights | below AdamW's | AdamW's state |"]
    rows += ["|---|---|---|---|"]
    peaks = {name: _peak(name) for name in names}
    state = 2 * 4 * 12 * 2048**2
    for name, peak in peaks.items():
        sizes = (peak, peaks["AdamW"] - peak, state)
        rows.append(f"| {name} | {' | '.join(f'{size / 2**20:.0f} MiB' for size in sizes)} |")
    return "\n".join(rows)


def _peak(name):
    command = [sys.executable, "-c", textwrap.dedent(PEAK), name]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
