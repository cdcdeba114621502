"""Runs of hundredths of a second, ways to kill them, and what it means that two are the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.lab.parse import build
from featherweight.lab.recipe import Recipe
from featherweight.lab.runs import Update, run, run_directory
from featherweight.sparse import Masks

TINY = [
    ("data.limit", 120),
    ("model.options.width", 12),
    ("fit.length", "2ep"),
    ("fit.batch_size", 32),
    ("execute.device", "cpu"),
    ("execute.checkpoint_seconds", 0),
]
"""Four steps an epoch; a level takes some hundredths of a second."""


def tiny(**changes: object) -> Recipe:
    """Make a recipe; ``sparse__method`` stands for ``sparse.method``."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return build({"name": "tiny"}, [*TINY, *pairs])


VIT: dict[str, object] = {
    "model__name": "vit",
    "model__options": {"patch": 2, "width": 16, "depth": 4, "heads": 2},
    "fit__optimizer": "adamw",
    "fit__learning_rate": 0.003,
}

METHODS: dict[str, dict[str, object]] = {
    "dense": {},
    "random": {"sparse__method": "random", "sparse__density": 0.3, "sparse__allocation": "erk"},
    "lrr": {"sparse__method": "lrr", "sparse__levels": 2, "sparse__per_level": 0.5},
    "imp": {"sparse__method": "imp", "sparse__levels": 2, "sparse__per_level": 0.5},
    "wr": {"sparse__method": "wr", "sparse__levels": 2, "sparse__rewind": "1ep"},
    "lrr, warm-up of three epochs": {
        "sparse__method": "lrr",
        "sparse__levels": 1,
        "sparse__rewind": "11it",
    },
    "lrr, random criterion": {
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__criterion": "random",
    },
    "lrr, shuffled magnitudes": {
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__reset": ["shuffled-magnitudes", "norms"],
    },
    "lrr, adamw, state carried": {
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__optimizer_state": "carry",
        "fit__optimizer": "adamw",
        "fit__learning_rate": 0.003,
    },
    "lrr, adamw, state rewound": {
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__rewind": "1ep",
        "sparse__optimizer_state": "rewind",
        "fit__optimizer": "adamw",
        "fit__learning_rate": 0.003,
    },
    "lrr, length in steps, augmented, clipped": {
        "sparse__method": "lrr",
        "sparse__levels": 1,
        "fit__length": "9it",
        "fit__clip": 0.5,
        "fit__label_smoothing": 0.1,
        "data__augment": "crop-flip",
    },
    "lrr, densities by level, inside a support": {
        "sparse__method": "lrr",
        "sparse__densities": [0.5, 0.3, 0.2],
        "sparse__support__method": "synflow",
        "sparse__support__density": 0.5,
    },
    "snip": {"sparse__method": "snip", "sparse__density": 0.3, "sparse__iterations": 2},
    "lrr, by snip": {
        "sparse__method": "lrr",
        "sparse__levels": 1,
        "sparse__criterion": "snip",
        "sparse__iterations": 2,
    },
    "npb": {"sparse__method": "npb", "sparse__density": 0.3},
    "lrr, 2:4": {
        "sparse__method": "lrr",
        "sparse__per_level": 0.5,
        "sparse__density": 0.25,
        "sparse__structure": "2:4",
    },
    "cyclic": {
        "sparse__method": "cyclic",
        "sparse__density": 0.3,
        "sparse__options": {"cycles": 3, "strategy": "linear-increase"},
    },
    "sculpt": {
        "sparse__method": "sculpt",
        "sparse__density": 0.2,
        "sparse__support__density": 0.5,
        "sparse__options": {"cycles": 2},
    },
    "set": {"sparse__method": "set", "sparse__density": 0.3, "sparse__options": {"interval": 3}},
    "rigl": {"sparse__method": "rigl", "sparse__density": 0.3, "sparse__options": {"interval": 3}},
    "mest-ems": {
        "sparse__method": "mest-ems",
        "sparse__density": 0.3,
        "sparse__options": {"interval": 3},
    },
    "granet": {
        "sparse__method": "granet",
        "sparse__density": 0.2,
        "sparse__support__density": 0.6,
        "sparse__options": {"interval": 2},
    },
    "gmp": {"sparse__method": "gmp", "sparse__density": 0.2, "sparse__options": {"interval": 2}},
    "gmp, 2:4": {
        "sparse__method": "gmp",
        "sparse__density": 0.3,
        "sparse__structure": "2:4",
        "sparse__options": {"interval": 2},
    },
    "acdc, adamw": {
        "fit__length": "6ep",
        "sparse__method": "acdc",
        "sparse__density": 0.2,
        "fit__optimizer": "adamw",
        "fit__learning_rate": 0.003,
    },
    "lrr, truly sparse": {
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__per_level": 0.7,
        "sparse__optimizer_state": "carry",
        "fit__optimizer": "adamw",
        "fit__learning_rate": 0.003,
        "execute__form": "sparse",
    },
    "rigl, truly sparse": {
        "sparse__method": "rigl",
        "sparse__density": 0.2,
        "sparse__options": {"interval": 3},
        "execute__form": "sparse",
    },
    "str": {"sparse__method": "str", "sparse__options": {"initial": -2.0}},
    "continuous": {"sparse__method": "continuous"},
    "edge-popup": {"sparse__method": "edge-popup", "sparse__density": 0.5},
    "sign-in, factors": {"sparse__method": "sign-in", "sparse__support__density": 0.5},
    "lrr, sign-in": {
        "sparse__method": "lrr",
        "sparse__levels": 1,
        "fit__optimizer": "sign-in",
        "fit__rescale": "3it",
    },
    "rigl, sign-in": {
        "sparse__method": "rigl",
        "sparse__density": 0.3,
        "sparse__options": {"interval": 3},
        "fit__optimizer": "sign-in",
    },
    "rigl, ham-sgd": {
        "sparse__method": "rigl",
        "sparse__density": 0.3,
        "sparse__options": {"interval": 3},
        "fit__optimizer": "ham-sgd",
        "fit__options": {"alpha": 5.0, "beta": 1e-3},
    },
    "lrr, ham-adamw": {
        "sparse__method": "lrr",
        "sparse__levels": 1,
        "fit__optimizer": "ham-adamw",
        "fit__options": {"alpha": 5.0},
        "fit__learning_rate": 0.003,
    },
    "nanoadam": {
        "fit__optimizer": "nanoadam",
        "fit__options": {"density": 0.2, "mask_interval": 3, "min_size": 100},
        "fit__learning_rate": 0.01,
    },
    "lrr, nanoadam, state carried": {
        "sparse__method": "lrr",
        "sparse__levels": 1,
        "sparse__optimizer_state": "carry",
        "fit__optimizer": "nanoadam",
        "fit__options": {"mask_interval": 3, "skip_zeros": True, "min_size": 100},
        "fit__learning_rate": 0.01,
    },
    "a-mod, queries drawn at random": VIT
    | {"depth__method": "a-mod", "depth__options": {"queries": 4}},
    "mod, auxiliary loss": VIT
    | {"depth__method": "mod", "depth__options": {"auxiliary": "predictor"}},
    "lrr, random tokens": VIT
    | {"depth__method": "random-tokens", "sparse__method": "lrr", "sparse__levels": 1},
    "convolutions, channels last, bf16": {
        "model__name": "resnet20",
        "model__options": {"width": 2},
        "data__limit": 40,
        "sparse__method": "imp",
        "sparse__levels": 1,
        "execute__channels_last": True,
        "execute__precision": "bf16",
    },
    "convolutions, channels last, adamw, state rewound": {
        "model__name": "resnet20",
        "model__options": {"width": 2},
        "data__limit": 40,
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__rewind": "2ep",
        "sparse__optimizer_state": "rewind",
        "fit__length": "1ep",
        "fit__optimizer": "adamw",
        "execute__channels_last": True,
    },
}


class Killed(BaseException):
    """Stands for kill -9: nothing in the package may catch it."""


def killer(epoch: int):
    """Return a listener that dies in the given epoch of its process: logged, not saved."""
    seen = [0]

    def listen(update: Update) -> None:
        assert not update.warning, update.text
        seen[0] += 1
        if seen[0] == epoch:
            raise Killed

    return listen


def run_until_killed(recipe: Recipe, folder: Path, epoch: int) -> bool:
    """Run; tell whether it was killed before its end."""
    try:
        run(recipe, 0, folder, killer(epoch))
    except Killed:
        return True
    return False


def content(directory: Path) -> dict[str, bytes]:
    """Return all that a run leaves but wall-clock times, by relative name."""
    timed = ("timing.jsonl", "result.json", "environment.json", "lock")
    files = [p for p in directory.rglob("*") if p.is_file() and p.name not in timed]
    return {
        str(p.relative_to(directory)): exact(p) for p in files if p.parent.name != "tensorboard"
    }


def exact(path: Path) -> bytes:
    """Return a file's bytes; of masks what they hold: safetensors orders its metadata at random."""
    if path.name != "masks.safetensors":
        return path.read_bytes()
    return b"".join(n.encode() + m.numpy().tobytes() for n, m in Masks.load(path).items())


def assert_same_run(one: Path, other: Path) -> None:
    first, second = content(one), content(other)
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []
    timed = {"seconds": 0, "execution": None}
    results = [json.loads((d / "result.json").read_text()) | timed for d in (one, other)]
    assert results[0] == results[1]
    stages = [[(t["stage"], t["epoch"]) for t in rows(d, "timing")] for d in (one, other)]
    assert stages[0] == stages[1]


def rows(directory: Path, log: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"{log}.jsonl").read_text().splitlines()]


def interrupted(folder: Path, name: str = "lrr", epoch: int = 4) -> tuple[Recipe, Path]:
    """Leave a run that has two checkpoints."""
    recipe = tiny(**METHODS[name])
    with pytest.raises(Killed):
        run(recipe, 0, folder, killer(epoch))
    directory = run_directory(folder, recipe, 0)
    assert len(list((directory / "checkpoints").glob("[0-9]*.json"))) == 2
    return recipe, directory


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
