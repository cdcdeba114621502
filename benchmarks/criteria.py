"""Pruning at initialisation on ResNet-50 (25.5 million weights): seconds and memory by criterion.

Each row is one call of `sparse.prune` to density 0.1, scores and selection together, in a fresh
process. Memory is the peak above what the process held with the model built. Criteria that look at
data see 8 random images of 64x64 (ProsPr: 8 for each of its 4 batches); SynFlow an input of ones of
that size.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from featherweight import sparse
from featherweight.lab import models

SIZE = (3, 64, 64)
BATCH = 8


def measure() -> str:
    rows = ["| criterion | rounds | seconds | peak memory, MiB |", "|---|---|---|---|"]
    for name, entry in sparse.CRITERIA.items():
        for rounds in sorted({1, entry.defaults.get("iterations", 1)}):
            seconds, mebibytes = _apart(name, rounds)
            rows.append(f"| {name} | {rounds} | {seconds:.2f} | {mebibytes:.0f} |")
    return "\n".join(rows)


def _apart(name, rounds):
    command = [sys.executable, "-m", "benchmarks.criteria", name, str(rounds)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def _here(name, rounds):
    model = models.build("resnet50", classes=1000, shape=SIZE, seed=0, stem="imagenet")
    generator = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.randn(BATCH, *SIZE, generator=generator),
            torch.randint(1000, (BATCH,), generator=generator),
        )
        for _ in range(4 if name == "prospr" else 1)
    ]
    held = _resident()
    started = time.perf_counter()
    sparse.prune(model, name, 0.1, iterations=rounds, batches=batches, generator=generator)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # KiB on Linux
    return seconds, max(0.0, peak - held)


def _resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


if __name__ == "__main__":
    print(json.dumps(_here(sys.argv[1], int(sys.argv[2]))))
