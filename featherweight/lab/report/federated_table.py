"""The table of federated runs, for the console and the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from featherweight.lab.report.federated import FederatedRun, FederatedSeed
from featherweight.lab.report.text import MISSING, accuracy, count, percent, scaled, three

Column = tuple[str, str, Callable[[FederatedRun], str]]


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit that an estimated time is told in, and its seconds."""
    units = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0}
    return next(((n, u) for n, u in units.items() if seconds >= 2 * u), ("minutes", 60.0))


def estimated(seconds: float | None) -> str:
    """Write an estimated time: ``10.2 minutes``, ``3.50 days``."""
    if seconds is None:
        return MISSING
    unit, size = time_unit(seconds)
    return f"{three(seconds / size)} {unit}"


def over_seeds(run: FederatedRun, value: Callable[[FederatedSeed], float | None]) -> list[float]:
    """Return a value of each complete seed that has it."""
    found = [value(seed) for seed in run.seeds if seed.complete]
    return [one for one in found if one is not None]


def _tested(name: str) -> Callable[[FederatedRun], str]:
    def write(run: FederatedRun) -> str:
        return _spread(over_seeds(run, lambda seed: _part("test")(seed).get(name)))

    return write


def _spread(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return accuracy(statistics.fmean(values), deviation, len(values))


def _validated(run: FederatedRun) -> str:
    return _spread(over_seeds(run, lambda seed: _part("validation")(seed).get("accuracy")))


def _lowest(run: FederatedRun) -> str:
    """Write the test accuracy of the worst tenth of the clients, or that on validation."""
    for part in (_part("test"), _part("validation")):
        values = over_seeds(run, lambda seed, part=part: part(seed).get("client_worst10"))  # type: ignore[misc]
        if values:
            return percent(statistics.fmean(values))
    return MISSING


def _part(name: str) -> Callable[[FederatedSeed], Mapping[str, Any]]:
    return lambda seed: seed.result.get(name, {})


def mean_cost(run: FederatedRun, axis: str) -> float | None:
    """Return the mean cost so far over seeds; None before the first evaluation."""
    costs = [seed.points[-1].cost(axis) for seed in run.seeds if seed.points]
    return statistics.fmean(costs) if costs else None


COLUMNS: tuple[Column, ...] = (
    ("rounds", "Rounds so far", lambda run: count(mean_cost(run, "rounds"))),
    ("validation (n)", "Pooled accuracy on what was held out, after the last round", _validated),
    ("test (n)", "Pooled accuracy on the test images", _tested("accuracy")),
    ("worst 10 %", "Mean accuracy of the worst tenth of the clients", _lowest),
    ("up", "Bytes from clients", lambda run: scaled(mean_cost(run, "bytes_up"), "B")),
    ("down", "Bytes to clients", lambda run: scaled(mean_cost(run, "bytes_down"), "B")),
    ("examples", "Gradients computed", lambda run: scaled(mean_cost(run, "examples"))),
    ("time", "Estimated time on devices", lambda run: estimated(mean_cost(run, "seconds"))),
)


def table(runs: Sequence[FederatedRun]) -> Table:
    """Return a compact table for the console, one line a recipe."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    result.add_column("recipe", overflow="fold")
    for head, _, _ in COLUMNS:
        result.add_column(head, justify="right", no_wrap=True)
    for run in runs:
        result.add_row(Text(run.name), *(write(run) for _, _, write in COLUMNS))
    return result
