"""Sparse training on CIFAR-10 at two densities, at a size that two CPU cores finish."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console

from benchmarks.provenance import provenance
from featherweight.common import write_text
from featherweight.lab.claims.claim import levels
from featherweight.lab.control import with_controls
from featherweight.lab.launch import launch, tasks
from featherweight.lab.parse import load
from featherweight.lab.recipe import Recipe
from featherweight.lab.runs import run_directory
from featherweight.lab.statistics import interval

DENSITIES = (0.1, 0.02)
LOOPS = ("lrr", "imp")
ONCE = ("random", "sign-in", "snip", "synflow", "rigl")
SCULPT = {0.1: 0.2, 0.02: 0.05}
"""Final density to the density of the mask that the cycles train."""


@dataclass(frozen=True)
class Row:
    """One method at one density, over its seeds."""

    method: str
    density: float
    epochs: int
    accuracies: tuple[float, ...]

    def __str__(self) -> str:
        values = [100 * value for value in self.accuracies]
        low, high = interval(values)
        return (
            f"| {self.method} | {self.density:g} | {self.epochs} | {fmean(values):.1f} ± "
            f"{stdev(values):.1f} | {low:.1f} .. {high:.1f} | {len(values)} |"
        )


def write_page(path: Path, data: Path, out: Path, jobs: int, console: Console) -> None:
    """Train what is missing and write the page."""
    recipes = list(_recipes([f"data.path={data}"]))
    directories = launch(tasks(recipes), out, jobs, console)
    rows = [row for recipe in recipes for row in _rows(recipe, out)]
    rows.sort(key=lambda row: (-row.density, row.epochs, -fmean(row.accuracies)))
    hours = sum(json.loads((d / "result.json").read_text())["seconds"] for d in directories) / 3600
    lines = [
        "# CIFAR-10\n",
        "ResNet-20 on 5400 of the 50,000 training images, a training is 4 epochs: far from what "
        "the network can reach, and the same for all. Test accuracy in %, mean ± standard "
        "deviation over seeds, with its 95 % confidence interval; the test set is looked at once, "
        "after the last epoch of a training, and nothing is chosen by it. *Epochs* is the whole "
        "training that leads to a row: compare rows of equal epochs. Recipes: "
        f"{', '.join(f'`{name}-cifar10-mini`' for name in (*LOOPS, *ONCE, 'sculpt'))}; "
        "`sculpt-one-schedule` is SCULPT's control, a random mask trained as long in a single "
        "schedule.\n",
        "| method | density | epochs | test accuracy | 95 % interval | seeds |",
        "|---|---|---|---|---|---|",
        *map(str, rows),
        f"\n{provenance()} {hours:.2f} process-hours of training, two runs at a time. "
        "Regenerate: `make results DATA=PATH`.\n",
    ]
    write_text(path, "\n".join(lines))


def _recipes(common: list[str]) -> Iterator[Recipe]:
    for name in LOOPS:
        yield from load(f"{name}-cifar10-mini", common)
    for density in DENSITIES:
        for name in ONCE:
            yield from load(f"{name}-cifar10-mini", [*common, f"sparse.density={density}"])
        start = f"sparse.support.density={SCULPT[density]}"
        sculpt = load("sculpt-cifar10-mini", [*common, f"sparse.density={density}", start])
        yield from with_controls(sculpt)


def _rows(recipe: Recipe, out: Path) -> Iterator[Row]:
    runs = [run_directory(out, recipe, seed) for seed in recipe.seeds]
    ends = [levels(run) for run in runs]
    for index, level in enumerate(ends[0]):
        if round(level["density"], 4) in DENSITIES:
            yield Row(
                recipe.name.replace("-cifar10-mini", ""),
                round(level["density"], 4),
                _epochs(runs[0], level["level"]),
                tuple(end[index]["test_accuracy"] for end in ends),
            )


def _epochs(run: Path, level: int) -> int:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["level"] <= level for line in lines)
