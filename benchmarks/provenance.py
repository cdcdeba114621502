"""What every page of results says about where its numbers come from."""

from datetime import UTC, datetime

import torch

from featherweight import __version__
from featherweight.lab.machine import cpu_name


def provenance() -> str:
    """Name processor, cores, versions and day."""
    day = datetime.now(UTC).date().isoformat()
    threads = torch.get_num_threads()
    return (
        f"Measured on {cpu_name()} with {threads} threads, torch {torch.__version__}, "
        f"featherweight {__version__}, {day}."
    )
