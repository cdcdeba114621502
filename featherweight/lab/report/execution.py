"""What a run's zeros gained on its machine: three numbers a method, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from featherweight.lab.report.records import Execution, Run
from featherweight.lab.report.text import percent, scaled, three


@dataclass(frozen=True)
class Executed:
    """One method at its last level, over the seeds that are complete.

    Attributes:
        method: display name.
        form: "masked" or "sparse"; both, where seeds differ.
        flops_ratio: operations with zeros skipped over dense ones; None where not counted.
        step_ratio: measured time of the best dense training step over that of the run's own;
            above 1 is faster than dense.
        bytes, dense_bytes: weights, gradients, optimizer state and indices or masks in memory.
    """

    method: str
    form: str
    flops_ratio: float | None
    step_ratio: float
    bytes: float
    dense_bytes: float

    def __str__(self) -> str:
        return (
            f"{self.method}: FLOPs {percent(self.flops_ratio)} of dense; step "
            f"{three(self.step_ratio)}x as fast as the best dense one, measured, {self.form}; "
            f"training holds {scaled(self.bytes, 'B')}, dense {scaled(self.dense_bytes, 'B')}"
        )


def executed(runs: Sequence[Run]) -> tuple[Executed, ...]:
    """Return what was measured, methods in the order given; those that were not are left out."""
    return tuple(_of(run) for run in runs if _known(run))


def _known(run: Run) -> list[Execution]:
    return [seed.execution for seed in run.seeds if seed.execution is not None]


def _of(run: Run) -> Executed:
    known = _known(run)
    last = [seed.levels[-1] for seed in run.seeds if seed.execution is not None and seed.levels]
    flops = [level.flops / level.dense_flops for level in last if level.flops and level.dense_flops]
    return Executed(
        method=run.name,
        form=" and ".join(sorted({e.form for e in known})),
        flops_ratio=fmean(flops) if flops else None,
        step_ratio=median(e.dense_seconds / e.seconds for e in known),
        bytes=fmean(e.bytes for e in known),
        dense_bytes=fmean(e.dense_bytes for e in known),
    )
