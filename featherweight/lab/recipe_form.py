"""YAML text and ``key.sub=value`` overrides to checked trees of dataclasses; one-line errors."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from featherweight.common import unknown
from featherweight.lab.duration import Duration
from featherweight.lab.errors import BadInput

Tree = TypeVar("Tree")


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


class Form(Generic[Tree]):
    """How one kind of recipe is found, read, checked and written.

    Args:
        kind: what error messages call it.
        tree: its dataclass; all fields have defaults.
        folder: of the package's own recipes, beside this module.
        check: raises ValueError, with the key's path, for what the types don't say.
    """

    def __init__(
        self,
        kind: str,
        tree: type[Tree],
        folder: str,
        check: Callable[[Tree], None] = lambda tree: None,
    ) -> None:
        self._kind, self._tree, self._folder, self._check = kind, tree, folder, check
        self._adapter: TypeAdapter[Tree] = TypeAdapter(tree)

    def shipped(self) -> dict[str, str]:
        """Return the recipes that come with the package: name to YAML text."""
        folder = resources.files("featherweight.lab") / self._folder
        found = [file for file in folder.iterdir() if file.name.endswith(".yaml")]
        files = sorted(found, key=lambda file: file.name)
        return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files}

    def read_text(self, recipe: str) -> tuple[str, str]:
        """Find a recipe by path or name.

        Args:
            recipe: a file; or the name of a shipped recipe, also written as its path in the
                package, such as ``recipes/NAME.yaml``.

        Returns:
            The recipe's name and its YAML text.

        Raises:
            BadInput: there is neither such a file nor such a recipe, or it cannot be read.
        """
        path = Path(recipe)
        try:
            if path.is_file():
                return path.stem, path.read_text(encoding="utf-8")
        except OSError as error:
            raise BadInput(f"cannot read recipe {recipe}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise BadInput(f"cannot read recipe {recipe}: it is no UTF-8 text") from None
        name, texts = path.name.removesuffix(".yaml"), self.shipped()
        if str(path) in (name, f"{name}.yaml", f"{self._folder}/{name}.yaml") and name in texts:
            return name, texts[name]
        raise BadInput(unknown(self._kind, recipe, texts) + ", or a YAML file")

    def load(self, recipe: str, overrides: Sequence[str] = ()) -> list[Tree]:
        """Read a recipe and apply overrides.

        Args:
            recipe: path or shipped name.
            overrides: ``key.sub=value``; several values separated by commas make several recipes.

        Returns:
            One recipe for each combination of swept values, usually just one.

        Raises:
            BadInput: names the key's path, the value, and what is allowed.
        """
        name, text = self.read_text(recipe)
        try:
            tree = read_yaml(text)
        except ValueError as error:
            raise BadInput(f"{recipe}: not YAML: {error}") from None
        tree = {} if tree is None else tree
        if not isinstance(tree, dict):
            raise BadInput(f"{recipe}: a recipe is a mapping, got {type(tree).__name__}")
        tree.setdefault("name", name)
        return [
            self.build(tree, changes, origin=recipe)
            for changes in itertools.product(*map(_values, overrides))
        ]

    def build(
        self,
        tree: Mapping[str, Any],
        changes: Sequence[tuple[str, Any]] = (),
        origin: str = "recipe",
    ) -> Tree:
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
            recipe = self._adapter.validate_python(merged)
            checked = dict(_leaves(self.plain(recipe)))
            for path, value in given.items():  # pydantic takes true for 1
                if isinstance(value, bool) and not isinstance(checked.get(path), bool):
                    raise ValueError(f"{path}: true and false are allowed for switches only")
            self._check(recipe)
        except ValidationError as error:
            raise BadInput(_line(f"{origin}: {_first(error, self._tree())}")) from None
        except RecursionError:
            raise BadInput(f"{origin}: nested too deeply, or inside itself") from None
        except ValueError as error:
            raise BadInput(_line(f"{origin}: {error}")) from None
        return recipe

    def plain(self, recipe: Tree) -> dict[str, Any]:
        """Return a recipe as nested plain values, all fields included."""
        tree: dict[str, Any] = self._adapter.dump_python(recipe, mode="json")
        return tree

    def to_yaml(self, recipe: Tree) -> str:
        """Write a recipe as YAML, all fields included."""
        tree = self.plain(recipe)
        text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        return text

    def describe(self) -> Iterator[tuple[str, str, str]]:
        """Walk over all keys of a recipe: dotted path, default value, description."""
        yield from _describe(self._tree(), "")


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


def _values(override: str) -> list[tuple[str, Any]]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput(f"override {override!r} is not of the form key.sub=value")
    texts = text.split(",") if not text.startswith(("[", "{", '"', "'")) else [text]
    try:
        return [(key, read_yaml(part)) for part in texts]
    except ValueError:
        raise BadInput(f"override {override!r:.80}: the value is not YAML") from None


def read_yaml(text: str) -> Any:
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


def _first(error: ValidationError, default: Any) -> str:
    errors = error.errors(include_url=False)
    first = errors[0]
    path = ".".join(str(part) for part in first["loc"])
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    if first["type"] == "unexpected_keyword_argument":
        *parents, key = first["loc"]
        return f"unknown key {path!r}: {_allowed(default, parents, str(key))}{more}"
    message = first["msg"].removeprefix("Value error, ")
    got = "" if isinstance(first["input"], Mapping) else f", got {first['input']!r:.80}"
    return f"{path}: {message}{got}{more}"


def _allowed(node: Any, parents: Sequence[int | str], key: str) -> str:
    for parent in parents:
        node = getattr(node, str(parent))
    return unknown("key", key, [item.name for item in fields(node)]).partition(": ")[2]
