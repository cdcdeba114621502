"""The mini-benchmark: every method that trains once, on digits, at three densities, five seeds."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean

from rich.console import Console

from benchmarks.provenance import provenance
from featherweight.common import write_text
from featherweight.lab.claims.claim import levels
from featherweight.lab.launch import launch, tasks
from featherweight.lab.parse import load
from featherweight.lab.recipe import Recipe
from featherweight.lab.runs import run_directory
from featherweight.lab.statistics import interval

DENSITIES = (0.02, 0.01, 0.005)
COMMON = ["data.validation=0", "fit.length=20ep", "seeds=[0,1,2,3,4]"]
ERK = "sparse.allocation=erk"
OFTEN = "sparse.options.interval=15"

METHODS: Mapping[str, list[str]] = {
    "random, uniform": ["sparse.method=random", "sparse.allocation=uniform"],
    "random, ERK": ["sparse.method=random", ERK],
    "random, ERK, Sign-In": ["sparse.method=random", ERK, "fit.optimizer=sign-in"],
    "magnitude at initialisation": ["sparse.method=magnitude", "sparse.allocation=global"],
    "SNIP": ["sparse.method=snip", "sparse.allocation=global"],
    "SNIP in 20 steps": [
        "sparse.method=snip",
        "sparse.allocation=global",
        "sparse.iterations=20",
    ],
    "GraSP": ["sparse.method=grasp", "sparse.allocation=global"],
    "SynFlow in one step": [
        "sparse.method=synflow",
        "sparse.allocation=global",
        "sparse.iterations=1",
    ],
    "SynFlow": ["sparse.method=synflow", "sparse.allocation=global"],
    "ProsPr": ["sparse.method=prospr", "sparse.allocation=global"],
    "PHEW": ["sparse.method=phew", "sparse.allocation=null"],
    "NPB, ERK": ["sparse.method=npb", ERK],
    "SET": ["sparse.method=set", ERK, OFTEN],
    "RigL": ["sparse.method=rigl", ERK, OFTEN],
    "MEST, EM": ["sparse.method=mest-em", ERK, OFTEN],
    "MEST, EM&S": ["sparse.method=mest-ems", ERK, OFTEN],
    "GraNet": ["sparse.method=granet", ERK, OFTEN],
    "GMP": ["sparse.method=gmp", "sparse.allocation=global", OFTEN],
    "GMP, ERK": ["sparse.method=gmp", ERK, OFTEN],
    "AC/DC": ["sparse.method=acdc", "sparse.allocation=global"],
    "AC/DC, ERK": ["sparse.method=acdc", ERK],
}


def write_page(path: Path, out: Path, jobs: int, console: Console) -> None:
    """Train what is missing and write the page."""
    recipes = {
        (method, density): recipe
        for method, changes in METHODS.items()
        for density in DENSITIES
        for recipe in load("random-digits", [*COMMON, *changes, f"sparse.density={density}"])
    }
    launch(tasks(list(recipes.values())), out, jobs, console)
    lines = [
        "# Methods that train once\n",
        "Digits, MLP 64-300-300-10 with batch norm, 20 epochs, the settings of the recipe "
        "`random-digits`. Test accuracy in %, mean over five seeds ± half of its 95 % confidence "
        "interval; the test set is looked at once, after the last epoch. The last column is the "
        f"number of weights in each layer at density {DENSITIES[0]}, mean over seeds. Dynamic and "
        "gradual methods change masks every 15 of 460 steps. Nothing is tuned: all methods train "
        "with the same learning rate.\n",
        f"| method | {' | '.join(f'{density:g}' for density in DENSITIES)} | weights by layer |",
        "|---" * (len(DENSITIES) + 2) + "|",
    ]
    lines += _rows(recipes, out)
    lines.append(f"\n{provenance()} Regenerate: `make results`.\n")
    write_text(path, "\n".join(lines))


def _rows(recipes: Mapping[tuple[str, float], Recipe], out: Path) -> Iterator[str]:
    for method in METHODS:
        cells = [_accuracy(recipes[method, density], out) for density in DENSITIES]
        counts = _layers(recipes[method, DENSITIES[0]], out)
        yield f"| {method} | {' | '.join(cells)} | {', '.join(f'{n:.0f}' for n in counts)} |"


def _last(recipe: Recipe, out: Path) -> list[dict]:
    return [levels(run_directory(out, recipe, seed))[-1] for seed in recipe.seeds]


def _accuracy(recipe: Recipe, out: Path) -> str:
    values = [100 * level["test_accuracy"] for level in _last(recipe, out)]
    low, high = interval(values)
    return f"{fmean(values):.1f} ± {(high - low) / 2:.1f}"


def _layers(recipe: Recipe, out: Path) -> list[float]:
    found = _last(recipe, out)
    return [
        fmean(level["layers"][index]["nonzeros"] for level in found)
        for index in range(len(found[0]["layers"]))
    ]
