"""What this machine can do for training: its torch, its devices, measured speed-ups."""

from __future__ import annotations

import os
import platform
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from featherweight.lab import speed
from featherweight.lab.machine import cpu_name
from featherweight.lab.speed import FULL_FP32, Comparison, settings_kept

Measure = Callable[[torch.device, int], list[Comparison]]
WORTHWHILE = 1.15  # smaller ratios are within the noise of a shared machine


@dataclass(frozen=True)
class Machine:
    """What is installed and what it runs on.

    Attributes:
        torch: version and build, as "2.13.0 (CPU build)".
        libraries: those that compute on the CPU, with their versions.
        cores: cores this process may use.
        threads: threads torch uses now.
        devices: accelerators with their memory; empty without one.
        warnings: settings that will slow training down.
    """

    python: str
    torch: str
    libraries: tuple[str, ...]
    cpu: str
    cores: int
    threads: int
    devices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Findings:
    """The machine, what was measured, and what could not be."""

    machine: Machine
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()


def examine(quick: bool = True) -> Findings:
    """Look at the machine and measure; torch's global settings are as before afterwards.

    Measured on the first CUDA device where there is one (sparse products and threads always on the
    CPU). MPS is listed, not measured.

    Args:
        quick: 7 rounds, a few seconds in all; otherwise 31.
    """
    rounds = 7 if quick else 31
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = machine()
    measures: dict[str, Measure] = {
        "matmul": speed.matmul,
        "sparse": speed.sparse,
        "convolution": speed.convolution,
        "threads": partial(speed.threads, cores=found.cores),
        "AdamW": speed.adamw,
    }
    comparisons: list[Comparison] = []
    notes: list[str] = []
    for name, measure in measures.items():
        try:
            with settings_kept(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse .* beta state", UserWarning)
                comparisons += measure(device, rounds)
        except RuntimeError as error:  # a kernel that this build or device lacks
            notes.append(f"{name} not measured: {str(error).splitlines()[0]}")
    return Findings(found, tuple(comparisons), tuple(notes))


def machine() -> Machine:
    """Describe the machine without measuring anything."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    return Machine(
        python=platform.python_version(),
        torch=f"{torch.__version__} ({build} build)",
        libraries=_libraries(),
        cpu=cpu_name(),
        cores=cores or 1,
        threads=torch.get_num_threads(),
        devices=_devices(),
        warnings=thread_warnings(os.environ, cores or 1, torch.get_num_threads(), load),
    )


def thread_warnings(
    environment: Mapping[str, str], cores: int, threads: int, load: float
) -> tuple[str, ...]:
    """Name what is wrong with the use of threads, one line each.

    Args:
        environment: the process's environment variables.
        cores: cores this process may use.
        threads: threads torch uses.
        load: mean number of running processes over the last minute.
    """
    found = []
    wanted = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdigit() and int(wanted) > cores:
        found.append(f"OMP_NUM_THREADS={wanted} exceeds the {cores} cores this process may use")
    elif threads > cores:
        found.append(f"torch uses {threads} threads on {cores} cores")
    if load > cores:
        found.append(
            f"the machine is busy (load {load:.1f} on {cores} cores): ratios are noisy, and one "
            "thread a process may be fastest"
        )
    return tuple(found)


def _libraries() -> tuple[str, ...]:
    text = torch.__config__.show()
    patterns = {"MKL": r"Math Kernel Library Version (\S+?)-", "oneDNN": r"MKL-DNN v(\S+)"}
    versions = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    present = {"MKL": torch.backends.mkl, "oneDNN": torch.backends.mkldnn}
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        *(
            f"{name} {found[1] if (found := versions[name]) else ''}".strip()
            for name, backend in present.items()
            if backend.is_available()
        ),
        f"kernels for {capability}",
    )


def _devices() -> tuple[str, ...]:
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"cuda:{index} {properties.name}, {properties.total_memory / 1e9:.1f} GB")
    return (*names, *(["mps"] if torch.backends.mps.is_available() else []))


def advice(findings: Findings) -> list[str]:
    """Say which recipe setting would use what was measured.

    A ratio counts if it is above 1.15 and at least three quarters of the rounds agree on which
    side is faster.
    """
    lines = [_advice_on(found, findings.machine.cores) for found in findings.comparisons]
    return [line for line in [*lines, _advice_on_sparse(findings)] if line]


def _advice_on(found: Comparison, cores: int) -> str:
    """Return one line, or nothing where no setting is worth it."""
    if found.name == "threads" and found.ratio < 1 / WORTHWHILE and found.quartiles[1] < 1:
        slower = f"{cores} threads are {1 / found.ratio:.1f}x slower than one"
        return f"execute.threads=1: {slower}; other programs may be using the cores"
    if not _worthwhile(found) or found.name not in SETTINGS:
        return ""
    setting = SETTINGS[found.name].format(cores=cores)
    faster = f"{found.ratio:.1f}x faster than {found.against}"
    return f"{setting}: {found.what} is {faster}{_accuracy_of(found)}"


def _worthwhile(found: Comparison) -> bool:
    return found.ratio > WORTHWHILE and found.quartiles[0] > 1


SETTINGS = {
    "matmul-medium": "execute.matmul_precision=medium",
    "matmul-bf16": "execute.precision=bf16",
    "conv-channels-last": "execute.channels_last=true",
    "conv-bf16": "execute.precision=bf16 with execute.channels_last=true",
    "threads": "execute.threads={cores}",
    "adamw-fused": "nothing to set, recipes use it already (fused=True in a loop of your own)",
}


def _accuracy_of(found: Comparison) -> str:
    if found.difference is None:
        return ""
    if found.difference < FULL_FP32:
        return f"; still full fp32 on this chip (relative difference {found.difference:.0e})"
    return f"; reduced precision on this chip (relative difference {found.difference:.0e})"


def _advice_on_sparse(findings: Findings) -> str:
    paying = [c for c in findings.comparisons if c.name == "sparse" and _worthwhile(c)]
    if not paying:
        return ""
    best = max(paying, key=lambda found: found.ratio)
    even = break_even(findings)
    where = "" if even is None else f", break-even near {100 * even:.0f} % zeros"
    return (
        f"execute=sparse: {best.what} is {best.ratio:.1f}x faster than {best.against}{where}; "
        "execute=auto takes it layer by layer where it gains"
    )


def break_even(findings: Findings) -> float | None:
    """Estimate the sparsity from which sparse beats dense: time is taken as linear in density.

    Returns:
        A fraction in [0, 1]; None where fewer than two sparsities were measured or none would do.
    """
    measured = [c for c in findings.comparisons if c.name == "sparse" and c.sparsity is not None]
    if len(measured) < 2:
        return None
    densities = [1 - (c.sparsity or 0.0) for c in measured]
    slope, start = statistics.linear_regression(densities, [c.seconds for c in measured])
    dense = statistics.median(c.against_seconds for c in measured)
    if slope <= 0 or start >= dense:
        return None
    return 1 - min(1.0, (dense - start) / slope)


def render(findings: Findings) -> Group:
    """Return the findings as a picture for the console: machine, ratios, advice."""
    lines = [Text(f"warning: {line}", style="yellow") for line in findings.machine.warnings]
    notes = [Text(line, style="dim") for line in findings.notes]
    found = advice(findings) or ["nothing measured here is worth a setting"]
    bullets = [Text(f"- {line}") for line in found]
    parts: list[RenderableType] = [
        _machine_table(findings.machine),
        *lines,
        _ratio_table(findings.comparisons),
        *notes,
    ]
    return Group(*parts, Text("Advice", style="bold"), *bullets)


def _machine_table(described: Machine) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "Python": described.python,
        "torch": described.torch,
        "libraries": ", ".join(described.libraries),
        "CPU": described.cpu,
        "cores": f"{described.cores} usable, {described.threads} in use",
        "devices": "; ".join(described.devices) or "CPU only",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))  # Text: brackets in a name are no markup
    return table


def _ratio_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("measured", overflow="fold")
    table.add_column("against", overflow="fold")
    for head in ("faster", "middle half", "difference"):
        table.add_column(head, justify="right", no_wrap=True)
    for found in comparisons:
        low, high = found.quartiles
        difference = "" if found.difference is None else f"{found.difference:.0e}"
        ratio, spread = f"{found.ratio:.2f}x", f"{low:.2f} - {high:.2f}"
        table.add_row(Text(found.what), Text(found.against), ratio, spread, difference)
    return table
