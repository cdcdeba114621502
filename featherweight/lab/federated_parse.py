"""From YAML and ``key.sub=value`` overrides to a checked `FederatedRecipe`."""

from __future__ import annotations

import hashlib
import json

from featherweight.lab.federated_recipe import FederatedRecipe
from featherweight.lab.recipe_form import Form
from featherweight.lab.report.collect import flatten

# As for other runs: what does not change results. The time model changes no training, only its
# estimate; but the log holds the estimate, so it is part of a run's name.
NEUTRAL = ("name", "seeds", "data.path", "execute.threads", "execute.checkpoint_seconds")


def _check(recipe: FederatedRecipe) -> None:
    if recipe.setting.kind is None:
        raise ValueError("setting.kind: say cross-device or cross-silo")


FORM = Form("federated recipe", FederatedRecipe, "recipes/federated", _check)

shipped, read_text, load, build = FORM.shipped, FORM.read_text, FORM.load, FORM.build
plain, to_yaml, describe = FORM.plain, FORM.to_yaml, FORM.describe


def identity(recipe: FederatedRecipe) -> str:
    """Return a recipe's folder name, ``NAME-HASH``; only non-default values enter the hash."""
    given, default = flatten(plain(recipe)), flatten(plain(FederatedRecipe()))
    neutral = [key for key in NEUTRAL if key != "data.path" or recipe.data.name in _LOCATED]
    values = {
        key: value
        for key, value in given.items()
        if key not in neutral and (key not in default or default[key] != value)
    }
    text = json.dumps(values, sort_keys=True)
    return f"{recipe.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


_LOCATED = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100")  # whose path changes nothing
