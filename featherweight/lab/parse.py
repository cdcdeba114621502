"""From YAML and ``key.sub=value`` overrides to a checked `Recipe`."""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.lab.recipe import Recipe
from featherweight.lab.recipe_form import Form

FORM = Form("recipe", Recipe, "recipes")

shipped, read_text, build = FORM.shipped, FORM.read_text, FORM.build
plain, to_yaml, describe = FORM.plain, FORM.to_yaml, FORM.describe


def load(recipe: str, overrides: Sequence[str] = ()) -> list[Recipe]:
    """Read a recipe and apply overrides; ``execute=sparse`` is short for its form."""
    return FORM.load(recipe, [_whole(override) for override in overrides])


def _whole(override: str) -> str:
    """Write out ``execute=sparse``, which is short for the form of execution."""
    return f"execute.form={override[8:]}" if override.startswith("execute=") else override
