"""What a run needs around it: one Accelerator, torch's settings, and a directory of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock, Timeout

from featherweight.lab.errors import BadInput
from featherweight.lab.recipe import ExecuteRecipe


@contextmanager
def accelerator(execute: ExecuteRecipe) -> Iterator[Accelerator]:
    """Give the Accelerator of a run; process-wide torch settings are put back after.

    Raises:
        BadInput: the machine lacks the device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if execute.device not in ("auto", "cpu", found.type if found else ""):
        raise BadInput(f"execute.device: this machine has no {execute.device}")
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(execute.threads or threads)
    torch.set_float32_matmul_precision(execute.matmul_precision)
    # Accelerate keeps its settings for the whole process; runs differ in theirs.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    precision = "no" if execute.precision == "fp32" else execute.precision
    try:
        # Told that it is a CPU, Accelerate joins the ranks of a torchrun through gloo.
        on_cpu = execute.device == "cpu" or found is None
        yield Accelerator(mixed_precision=precision, cpu=on_cpu)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)


@contextmanager
def locked(directory: Path, main_process: bool) -> Iterator[None]:
    """Keep other processes out of a run's directory; of several ranks the main one holds the lock.

    Raises:
        BadInput: another process is in it.
    """
    if not main_process:
        yield
        return
    lock = FileLock(directory / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(f"{directory} is in use by another process") from None
    try:
        yield
    finally:
        lock.release()
