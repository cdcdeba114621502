"""The name of a run's folder: a readable name and a short hash of non-default values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from featherweight.lab.parse import plain
from featherweight.lab.recipe import Recipe

# Where data lies, how many seeds there are and how often progress is saved do not change results;
# the number of threads changes their rounding, so an interrupted run goes on with what it had.
NEUTRAL = ("name", "seeds", "data.path", "execute.threads", "execute.checkpoint_seconds")
PATH_IS_DATA = ("hf", "image-folder")  # the path says which images, not where the known ones lie


def identity(recipe: Recipe) -> str:
    """Return a recipe's folder name, ``NAME-HASH``.

    Only values that differ from the defaults enter the hash, so that a new field with a neutral
    default leaves old names as they are.
    """
    text = json.dumps(distinctive(recipe), sort_keys=True)
    return f"{recipe.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def distinctive(recipe: Recipe) -> dict[str, Any]:
    """Return the values that make a recipe what it is: dotted key to non-default value."""
    given, default = _flat(plain(recipe)), _flat(plain(Recipe()))
    for key in ("sparse.masks_from", "sparse.couple.run", "depth.from_run"):
        if given[key] is not None:  # the other run's own name says all, wherever it lies
            given[key] = Path(given[key]).name
    neutral = [k for k in NEUTRAL if k != "data.path" or recipe.data.name not in PATH_IS_DATA]
    return {
        key: value
        for key, value in given.items()
        if key not in neutral and (key not in default or default[key] != value)
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
