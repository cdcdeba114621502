"""From YAML and ``key.sub=value`` overrides to a checked `FederatedRecipe`."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from featherweight.common import unknown
from featherweight.lab.errors import BadInput
from featherweight.lab.federated_recipe import FederatedRecipe
from featherweight.lab.parse import (
    _copy,
    _describe,
    _Dumper,
    _first,
    _leaves,
    _line,
    _parse,
    _put,
    _values,
)
from featherweight.lab.report.collect import flatten

_ADAPTER: TypeAdapter[FederatedRecipe] = TypeAdapter(FederatedRecipe)

# As for other runs: what does not change results. The time model changes no training, only its
# estimate; but the log holds the estimate, so it is part of a run's name.
NEUTRAL = ("name", "seeds", "data.path", "execute.threads", "execute.checkpoint_seconds")


def shipped() -> dict[str, str]:
    """Return the federated recipes that come with the package: name to YAML text."""
    folder = resources.files("featherweight.lab") / "recipes" / "federated"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}


def read_text(recipe: str) -> tuple[str, str]:
    """Find a federated recipe by path or shipped name; return its name and its YAML text.

    Raises:
        BadInput: there is neither such a file nor such a shipped recipe, or it cannot be read.
    """
    path = Path(recipe)
    try:
        if path.is_file():
            return path.stem, path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read recipe {recipe}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadInput(f"cannot read recipe {recipe}: it is no UTF-8 text") from None
    name = recipe.removesuffix(".yaml")
    if name in shipped():
        return name, shipped()[name]
    raise BadInput(unknown("federated recipe", recipe, shipped()) + ", or a YAML file")


def load(recipe: str, overrides: Sequence[str] = ()) -> list[FederatedRecipe]:
    """Read a recipe and apply overrides.

    Args:
        recipe: path or shipped name.
        overrides: ``key.sub=value``; several values separated by commas make several recipes.

    Returns:
        One recipe for each combination of swept values, usually just one.

    Raises:
        BadInput: names the key's path, the value, and what is allowed.
    """
    name, text = read_text(recipe)
    try:
        tree = _parse(text)
    except ValueError as error:
        raise BadInput(f"{recipe}: not YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise BadInput(f"{recipe}: a recipe is a mapping, got {type(tree).__name__}")
    tree.setdefault("name", name)
    return [build(tree, c, recipe) for c in itertools.product(*map(_values, overrides))]


def build(
    tree: Mapping[str, Any], changes: Sequence[tuple[str, Any]] = (), origin: str = "recipe"
) -> FederatedRecipe:
    """Check a nested mapping and make a recipe of it.

    Args:
        tree: as read from YAML.
        changes: dotted key and value pairs that go over it.
        origin: what error messages call it.

    Raises:
        BadInput: the first thing wrong, on one line.
    """
    try:
        merged = _copy(tree)
        for key, value in changes:
            _put(merged, key, value)
        given = dict(_leaves(merged))
        recipe = _ADAPTER.validate_python(merged)
    except ValidationError as error:
        raise BadInput(_line(f"{origin}: {_explain(error)}")) from None
    except RecursionError:
        raise BadInput(f"{origin}: nested too deeply, or inside itself") from None
    except ValueError as error:
        raise BadInput(_line(f"{origin}: {error}")) from None
    checked = dict(_leaves(plain(recipe)))
    for path, value in given.items():  # pydantic takes true for 1
        if isinstance(value, bool) and not isinstance(checked.get(path), bool):
            raise BadInput(f"{origin}: {path}: true and false are allowed for switches only")
    if recipe.setting.kind is None:
        raise BadInput(f"{origin}: setting.kind: say cross-device or cross-silo")
    return recipe


def plain(recipe: FederatedRecipe) -> dict[str, Any]:
    """Return a recipe as nested plain values, all fields included."""
    tree: dict[str, Any] = _ADAPTER.dump_python(recipe, mode="json")
    return tree


def to_yaml(recipe: FederatedRecipe) -> str:
    """Write a recipe as YAML, all fields included."""
    text: str = yaml.dump(plain(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def describe() -> Iterator[tuple[str, str, str]]:
    """Walk over all keys of a federated recipe: dotted path, default value, description."""
    yield from _describe(FederatedRecipe(), "")


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


def _explain(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    if first["type"] != "unexpected_keyword_argument":
        return _first(error)
    *parents, key = first["loc"]
    node: Any = FederatedRecipe()
    for parent in parents:
        node = getattr(node, str(parent))
    allowed = unknown("key", key, [item.name for item in fields(node)]).partition(": ")[2]
    return f"unknown key {'.'.join(map(str, first['loc']))!r}: {allowed}"
