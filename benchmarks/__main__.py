"""Run all benchmarks, or those named, and write their tables to docs/results/."""

import os
import sys
from pathlib import Path

from featherweight.__main__ import SPIN

os.environ.update(SPIN)  # as the command line sets it, before torch is loaded

from benchmarks import (
    codecs,
    criteria,
    depth,
    dynamic,
    federated,
    ham,
    hold,
    nanoadam,
    select,
    sign_in,
    sparse_convolutions,
    sparse_execution,
    tickets,
)
from benchmarks.provenance import provenance
from featherweight.common import write_text

MODULES = (
    criteria,
    select,
    hold,
    dynamic,
    sign_in,
    tickets,
    ham,
    nanoadam,
    depth,
    sparse_execution,
    sparse_convolutions,
    codecs,
    federated,
)


def main() -> None:
    folder = Path(__file__).resolve().parent.parent / "docs" / "results"
    for module in MODULES:
        name = module.__name__.rpartition(".")[2]
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        print(f"{name}: {module.__doc__.splitlines()[0]}", flush=True)
        table = module.measure()
        print(table, "\n", flush=True)
        head = f"# Benchmark: {name}\n\n{module.__doc__.strip()}\n\nRegenerate: `make bench`. "
        write_text(folder / f"bench-{name}.md", f"{head}{provenance()}\n\n{table}\n")


if __name__ == "__main__":
    main()
