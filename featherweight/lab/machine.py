"""What a run ran on: recorded in every run directory."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from featherweight.version import __version__


def environment(
    device: torch.device | str, precision: str, matmul_precision: str
) -> dict[str, Any]:
    """Describe versions, processor, threads, device and number formats."""
    return {
        "featherweight": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name() if "cuda" in str(device) else "",
        "precision": precision,
        "matmul_precision": matmul_precision,
    }


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
