"""Reports of federated runs: accuracy against rounds, bytes, examples and estimated time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.common import atomic_path, write_text
from featherweight.lab.federated_run import RECIPE
from featherweight.lab.report.collect import (
    _read_lines,
    _read_object,
    _read_text,
    _seed_number,
    _with_unique_names,
)
from featherweight.lab.report.records import Run
from featherweight.lab.report.summary import Curve

COSTS: dict[str, str] = {
    "rounds": "rounds",
    "bytes": "bytes, both directions",
    "examples": "examples",
    "seconds": "estimated time on devices",
}
"""The axes of cost: key and what the report calls it."""


@dataclass(frozen=True)
class Point:
    """One line of ``metrics.jsonl``: costs so far, and what the model was worth then."""

    rounds: int
    bytes_up: int
    bytes_down: int
    examples: int
    seconds: float
    train_loss: float | None
    validation: Mapping[str, float | None]

    @property
    def bytes(self) -> int:
        """Bytes in both directions."""
        return self.bytes_up + self.bytes_down

    def cost(self, axis: str) -> float:
        """Return the cost on one of `COSTS`."""
        return float(getattr(self, axis))


@dataclass(frozen=True)
class FederatedSeed:
    """Everything that one seed of a federated recipe has written so far."""

    path: Path
    number: int
    environment: Mapping[str, Any]
    points: tuple[Point, ...]
    result: Mapping[str, Any]
    partition: Mapping[str, Any]

    @property
    def complete(self) -> bool:
        """Whether the run has come to its end."""
        return bool(self.result.get("complete", False))


@dataclass(frozen=True)
class FederatedRun:
    """One federated recipe with its seeds, ascending; names are unique within a report."""

    path: Path
    name: str
    recipe: Mapping[str, Any]
    recipe_text: str
    seeds: tuple[FederatedSeed, ...]


@dataclass(frozen=True)
class FederatedReport:
    """What `write` has written.

    Attributes:
        html: the page.
        pictures: PNG files next to it.
        runs: what it shows.
    """

    html: Path
    pictures: tuple[Path, ...]
    runs: tuple[FederatedRun, ...]


def collect(paths: Sequence[Path]) -> tuple[FederatedRun, ...]:
    """Read the federated runs that ``paths`` name, in the order given.

    Args:
        paths: identity directories, seed directories, or folders that hold identity directories
            at any depth.

    Raises:
        ValueError: nothing was found, or a file is damaged; the line says which and where.
    """
    found: dict[Path, set[Path]] = {}
    for path in (Path(path).resolve() for path in paths):
        if _seed_number(path) is not None and (path.parent / RECIPE).is_file():
            found.setdefault(path.parent, set()).add(path)
            continue
        for identity in sorted(recipe.parent for recipe in path.rglob(RECIPE)):
            seeds = {child for child in identity.iterdir() if _seed_number(child) is not None}
            found.setdefault(identity, set()).update(seeds)
    if not found:
        names = ", ".join(str(path) for path in paths) or "no path given"
        raise ValueError(f"no federated run found (a folder with {RECIPE}) in: {names}")
    plain = [_recipe(path) for path in found]
    named = _with_unique_names(plain)
    return tuple(
        FederatedRun(run.path, run.name, run.recipe, run.recipe_text, _seeds(found[run.path]))
        for run in named
    )


def _recipe(path: Path) -> Run:
    from featherweight.lab.federated_parse import build, plain
    from featherweight.lab.recipe_form import read_yaml

    text = _read_text(path / RECIPE)
    try:
        recipe = plain(build(read_yaml(text), origin=str(path / RECIPE)))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / RECIPE}: no federated recipe: {error}") from None
    return Run(path, str(recipe["name"]), recipe, text, ())


def _seeds(paths: set[Path]) -> tuple[FederatedSeed, ...]:
    return tuple(sorted(map(_seed, paths), key=lambda seed: seed.number))


def _seed(path: Path) -> FederatedSeed:
    result = _read_object(path / "result.json")
    points = _read_lines(path / "metrics.jsonl", _point, bool(result.get("complete", False)))
    return FederatedSeed(
        path=path,
        number=int(path.name.removeprefix("seed-")),
        environment=_read_object(path / "environment.json"),
        points=tuple(points),
        result=result,
        partition=_read_object(path / "partition.json"),
    )


def _point(line: dict[str, Any]) -> Point:
    prefix = "validation_"
    return Point(
        rounds=int(line["rounds"]),
        bytes_up=int(line["bytes_up"]),
        bytes_down=int(line["bytes_down"]),
        examples=int(line["examples"]),
        seconds=float(line["seconds"]),
        train_loss=None if line["train_loss"] is None else float(line["train_loss"]),
        validation={k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)},
    )


def curve(run: FederatedRun, axis: str, value: Callable[[Point], float | None]) -> Curve:
    """Return mean, smallest and largest value over the seeds, at the mean cost so far.

    Args:
        run: whose evaluations.
        axis: of cost, one of `COSTS`.
        value: of an evaluation; None where it has none. Evaluations that not every seed has
            reached yet are left out.
    """
    rows = []
    for points in zip(*(seed.points for seed in run.seeds if seed.points), strict=False):
        values = [found for point in points if (found := value(point)) is not None]
        if len(values) == len(points):
            cost = sum(point.cost(axis) for point in points) / len(points)
            rows.append((cost, sum(values) / len(values), min(values), max(values)))
    x, mean, low, high = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Curve(x, mean, low, high)


def validation_accuracy(point: Point) -> float | None:
    """Return the pooled validation accuracy."""
    return point.validation.get("accuracy")


def cost_to_reach(run: FederatedRun, accuracy: float, axis: str) -> float | None:
    """Return the mean cost over seeds of the first evaluation at or above an accuracy.

    Args:
        run: whose evaluations.
        accuracy: on validation, fraction of 1.
        axis: of cost, one of `COSTS`.

    Returns:
        None if a seed has not reached it.
    """
    costs = []
    for seed in run.seeds:
        reached = (p for p in seed.points if (validation_accuracy(p) or 0.0) >= accuracy)
        first = next(reached, None)
        if first is None:
            return None
        costs.append(first.cost(axis))
    return sum(costs) / len(costs) if costs else None


def targets(runs: Sequence[FederatedRun]) -> list[float]:
    """Choose accuracies that tell runs apart: parts of the best mean that any run has reached."""
    bests = [max(curve(run, "rounds", validation_accuracy).mean, default=0.0) for run in runs]
    best = max(bests, default=0.0)
    return [round(part * best, 3) for part in (0.8, 0.9, 0.95, 0.99)] if best > 0 else []


def write(paths: Sequence[Path], out: Path) -> FederatedReport:
    """Write ``federated.html`` and one PNG a picture; the same runs give the same bytes.

    Args:
        paths: as of `collect`; unfinished runs are shown as far as they have come.
        out: the folder to write into; made if it isn't there.

    Raises:
        ValueError: no run was found, or a file of a run is damaged.
        OSError: ``out`` can't be written.
    """
    from featherweight.lab.report.federated_page import page  # matplotlib: late on purpose
    from featherweight.lab.report.federated_plots import draw

    found = collect(paths)
    pictures = draw(found)
    files = tuple(out / f"{picture.name}.png" for picture in pictures)
    for path, picture in zip(files, pictures, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_bytes(picture.png)
    html = out / "federated.html"
    write_text(html, page(found, pictures))
    return FederatedReport(html, files, found)
