"""From YAML and ``key.sub=value`` overrides to a checked `Recipe`, with one-line errors."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from featherweight.common import unknown
from featherweight.lab.duration import Duration
from featherweight.lab.errors import BadInput
from featherweight.lab.recipe import Recipe

_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


class _Loader(yaml.SafeLoader):
    """Reads YAML without Python objects."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back as the same values."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Quote Unicode's own line breaks, which YAML would fold into a blank."""
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _class in (_Loader, _Dumper):
    # A folder may be called 2024-01-31.
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
        for first, rules in _class.yaml_implicit_resolvers.items()
    }
    # YAML 1.1 takes 1e-4 and 1.5e3 for text; people mean numbers.
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )


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
        tree = _parse(text)
    except ValueError as error:
        raise BadInput(f"{recipe}: not YAML: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise BadInput(f"{recipe}: a recipe is a mapping, got {type(tree).__name__}")
    tree.setdefault("name", name)
    return [
        build(tree, changes, origin=recipe)
        for changes in itertools.product(*map(_values, map(_whole, overrides)))
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
    try:
        merged = _copy(tree)
        for key, value in changes:
            _put(merged, key, value)
        given = dict(_leaves(merged))
        recipe = _ADAPTER.validate_python(merged)
    except ValidationError as error:
        raise BadInput(_line(f"{origin}: {_first(error)}")) from None
    except RecursionError:
        raise BadInput(f"{origin}: nested too deeply, or inside itself") from None
    except ValueError as error:
        raise BadInput(_line(f"{origin}: {error}")) from None
    checked = dict(_leaves(plain(recipe)))
    for path, value in given.items():  # pydantic takes true for 1
        if isinstance(value, bool) and not isinstance(checked.get(path), bool):
            raise BadInput(f"{origin}: {path}: true and false are allowed for switches only")
    return recipe


def plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as nested plain values, all fields included."""
    tree: dict[str, Any] = _ADAPTER.dump_python(recipe, mode="json")
    return tree


def to_yaml(recipe: Recipe) -> str:
    """Write a recipe as YAML, all fields included."""
    text: str = yaml.dump(plain(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


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
            text = next((t for t in texts if t), "") + _choices(get_args(hints[item.name])[0])
            yield f"{prefix}{item.name}", "null" if value is None else str(value), text


def _choices(hint: Any) -> str:
    """List the words that a key can take, where the type says them all."""
    return f" ({', '.join(get_args(hint))})" if get_origin(hint) is Literal else ""


_LEAVES = ("length",)


def _whole(override: str) -> str:
    """Write out ``execute=sparse``, which is short for the form of execution."""
    return f"execute.form={override[8:]}" if override.startswith("execute=") else override


def _values(override: str) -> list[tuple[str, Any]]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput(f"override {override!r} is not of the form key.sub=value")
    texts = text.split(",") if not text.startswith(("[", "{", '"', "'")) else [text]
    try:
        return [(key, _parse(part)) for part in texts]
    except ValueError:
        raise BadInput(f"override {override!r:.80}: the value is not YAML") from None


def _parse(text: str) -> Any:
    """Read YAML; all that can go wrong is a one-line ValueError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: such as 0x_
        raise ValueError(_line(str(error))) from None


def _line(text: str) -> str:
    return " ".join(text.split())


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Walk over the values that are no mapping and no list, refusing what JSON cannot hold."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not isinstance(key, str):
                raise ValueError(f"{path or 'recipe'}: keys must be text, got {key!r}")
            yield from _leaves(value, f"{path}.{key}".removeprefix("."))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{path}.{index}")
    elif isinstance(node, float) and not math.isfinite(node):
        raise ValueError(f"{path}: must be finite, got {node}")
    elif not isinstance(node, (str, int, float, Duration, type(None))):
        raise ValueError(f"{path}: must be text, a number, a list or a mapping, got {node!r}")
    else:
        yield path, node


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
    got = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r:.80}"
    return f"{path}: {message}{got}{more}"


def _allowed(parents: Sequence[int | str], key: str) -> str:
    node: Any = Recipe()
    for parent in parents:
        node = getattr(node, str(parent))
    return unknown("key", key, [item.name for item in fields(node)]).partition(": ")[2]
