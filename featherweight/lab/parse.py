"""From YAML and ``key.sub=value`` overrides to a checked `Recipe`, with one-line errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from featherweight.common import unknown
from featherweight.lab.errors import BadInput
from featherweight.lab.recipe import Recipe

_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def shipped() -> dict[str, str]:
    """Return the recipes that come with the package: name to YAML text."""
    folder = resources.files("featherweight.lab") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8") for file in files}


def read_text(recipe: str) -> tuple[str, str]:
    """Find a recipe by path or name.

    Args:
        recipe: a file; or the name of a shipped recipe, also written ``recipes/NAME.yaml``.

    Returns:
        The recipe's name and its YAML text.

    Raises:
        BadInput: there is neither such a file nor such a shipped recipe.
    """
    path = Path(recipe)
    if path.is_file():
        return path.stem, path.read_text(encoding="utf-8")
    name = path.name.removesuffix(".yaml")
    if str(path) in (name, f"{name}.yaml", f"recipes/{name}.yaml") and name in shipped():
        return name, shipped()[name]
    raise BadInput(unknown("recipe", recipe, shipped()) + ", or a YAML file")


def load(recipe: str, overrides: Sequence[str] = ()) -> list[Recipe]:
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
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise BadInput(f"{recipe}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise BadInput(f"{recipe}: a recipe is a mapping, got {type(tree).__name__}")
    tree.setdefault("name", name)
    return [
        build(tree, changes, origin=recipe)
        for changes in itertools.product(*map(_values, overrides))
    ]


def build(
    tree: Mapping[str, Any], changes: Sequence[tuple[str, Any]] = (), origin: str = "recipe"
) -> Recipe:
    """Check a nested mapping and make a recipe of it.

    Args:
        tree: as read from YAML.
        changes: dotted key and value pairs that go over it.
        origin: what error messages call it.

    Raises:
        BadInput: the first thing wrong, on one line.
    """
    merged = _copy(tree)
    for key, value in changes:
        _put(merged, key, value)
    try:
        return _ADAPTER.validate_python(merged)
    except ValidationError as error:
        raise BadInput(f"{origin}: {_first(error)}") from None


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as nested plain values, all fields included."""
    tree: dict[str, Any] = _ADAPTER.dump_python(recipe, mode="json")
    return tree


def to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML, all fields included."""
    return yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True)


def describe() -> Iterator[tuple[str, str, str]]:
    """Walk over all keys of a recipe: dotted path, default value, description."""
    yield from _describe(Recipe(), "")


def _describe(node: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    hints = get_type_hints(type(node), include_extras=True)
    for item in fields(node):
        value = getattr(node, item.name)
        if is_dataclass(value) and item.name not in _LEAVES:
            yield from _describe(value, f"{prefix}{item.name}.")
        else:
            texts = [getattr(a, "description", None) for a in get_args(hints[item.name])[1:]]
            text = next((t for t in texts if t), "")
            yield f"{prefix}{item.name}", "null" if value is None else str(value), text


_LEAVES = ("length",)


def _values(override: str) -> list[tuple[str, Any]]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput(f"override {override!r} is not of the form key.sub=value")
    texts = text.split(",") if not text.startswith(("[", "{", '"', "'")) else [text]
    try:
        return [(key, yaml.safe_load(part)) for part in texts]
    except yaml.YAMLError:
        raise BadInput(f"override {override!r}: the value is not YAML") from None


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise BadInput(f"{key}: {parent!r} holds a value, not further keys")
    tree[last] = value


def _first(error: ValidationError) -> str:
    errors = error.errors(include_url=False)
    first = errors[0]
    path = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "unexpected_keyword_argument":
        *parents, key = first["loc"]
        return f"unknown key {path!r}: {_allowed(parents, str(key))}{more}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{path}: {message}, got {first['input']!r}{more}"


def _allowed(parents: Sequence[int | str], key: str) -> str:
    node: Any = Recipe()
    for parent in parents:
        node = getattr(node, str(parent))
    return unknown("key", key, [item.name for item in fields(node)]).partition(": ")[2]
