"""What ``featherweight ls`` and ``featherweight show`` print."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from featherweight.common import Registry, unknown
from featherweight.depth import ROUTERS
from featherweight.federated import AGGREGATORS, ALGORITHMS, CODECS, PARTITIONS, SAMPLERS
from featherweight.init import INITS
from featherweight.lab import federated_parse
from featherweight.lab.claims import CLAIMS
from featherweight.lab.data import DATA
from featherweight.lab.errors import BadInput
from featherweight.lab.models import MODELS
from featherweight.lab.parse import describe, shipped
from featherweight.optim import OPTIMIZERS
from featherweight.quant import QUANTIZERS, ROTATIONS
from featherweight.sparse import (
    CONSTRUCTIONS,
    CRITERIA,
    DENSITIES,
    DYNAMIC,
    FORMS,
    LOOPS,
    RESETS,
    STRATEGIES,
)

METHODS: dict[str, Registry[Any]] = {
    "criteria": CRITERIA,
    "constructions": CONSTRUCTIONS,
    "loops": LOOPS,
    "dynamic methods": DYNAMIC,
    "forms": FORMS,
    "density rules": DENSITIES,
    "resets": RESETS,
    "cycle strategies": STRATEGIES,
    "initialisations": INITS,
    "optimizers": OPTIMIZERS,
    "routers": ROUTERS,
    "rotations": ROTATIONS,
    "quantisers": QUANTIZERS,
    "codecs": CODECS,
    "federated algorithms": ALGORITHMS,
    "aggregators": AGGREGATORS,
    "partitions": PARTITIONS,
    "samplers": SAMPLERS,
}

FIELDS = {"fields": describe, "federated-fields": federated_parse.describe}
"""What ``show`` prints the keys of recipes under."""


def print_lists(kind: str) -> None:
    """Print the registries of one kind, or all."""
    for title, rows in _lists(kind):
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in ("name", "what", "paper"):
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console().print(table, "")


def _lists(kind: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    if kind in ("all", "methods"):
        for title, registry in METHODS.items():
            yield title, _rows(registry)
    if kind in ("all", "recipes"):
        yield "recipes", [(name, _about(text), "") for name, text in shipped().items()]
        federated = federated_parse.shipped()
        yield "federated recipes", [(name, _about(text), "") for name, text in federated.items()]
    if kind in ("all", "data"):
        yield "data sets", _rows(DATA)
    if kind in ("all", "models"):
        yield "models", _rows(MODELS)
    if kind in ("all", "claims"):
        yield "claims", [(c.name, c.sentence, c.paper) for c in CLAIMS.values()]


def _rows(registry: Registry[Any]) -> list[tuple[str, str, str]]:
    return [(e.name, e.summary, e.paper) for e in registry.values()]


def _about(text: str) -> str:
    """Return what a recipe's opening comment says after the command line."""
    lines = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    return " ".join(lines[1:]).strip()


def print_one(name: str) -> None:
    """Print a recipe's text, a registered method's documentation, or the keys of recipes.

    Raises:
        BadInput: nothing has this name.
    """
    recipe = name.removeprefix("recipes/").removesuffix(".yaml")
    texts = shipped() | federated_parse.shipped()
    if recipe in texts:
        print(texts[recipe], end="")
    elif name in FIELDS:
        for key, default, text in FIELDS[name]():
            print(f"{key}: {default}\n    {text}")
    else:
        print(_documentation(name))


def _documentation(name: str) -> str:
    registries: list[Registry[Any]] = [*METHODS.values(), DATA, MODELS]
    found = [r[name] for r in registries if name in r]
    if not found and name in CLAIMS:
        return str(CLAIMS[name])
    if not found:
        recipes = [*shipped(), *federated_parse.shipped()]
        names = [*recipes, *FIELDS, *(n for r in registries for n in r), *CLAIMS]
        raise BadInput(unknown("name", name, names))
    texts = []
    for entry in found:
        method = entry.method
        signature = f"{entry.name}{inspect.signature(method)}" if callable(method) else entry.name
        texts.append(f"{signature}\n\n{inspect.getdoc(method) or entry.summary}")
    return "\n\n".join(texts)
