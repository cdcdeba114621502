"""MkDocs hook: tables written from the code, and a build that fails on what is not documented.

``<!-- generated: NAME -->`` in a page is replaced by what ``GENERATED[NAME]`` returns. The build
stops if a public name has no docstring or is on no reference page, or if no page explains a
registered method.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import tyro
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

from featherweight.common import Registry, unknown
from featherweight.depth import ROUTERS
from featherweight.federated import ALGORITHMS, CODECS
from featherweight.init import INITS
from featherweight.lab import cli
from featherweight.lab.claims import CLAIMS
from featherweight.lab.data import DATA
from featherweight.lab.listing import _about
from featherweight.lab.models import MODELS
from featherweight.lab.models.build import option_names
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

DOCS = Path(__file__).resolve().parent

ROOMS = (
    "featherweight.depth",
    "featherweight.federated",
    "featherweight.federated.algorithms",
    "featherweight.federated.codecs",
    "featherweight.federated.partition",
    "featherweight.federated.sampling",
    "featherweight.init",
    "featherweight.quant",
    "featherweight.optim",
    "featherweight.optim.implicit_bias",
    "featherweight.sparse",
    "featherweight.sparse.constructions",
    "featherweight.sparse.criteria",
    "featherweight.sparse.density",
    "featherweight.sparse.dynamic",
    "featherweight.sparse.execute",
    "featherweight.sparse.gradual",
    "featherweight.sparse.curvature",
    "featherweight.sparse.landscape",
    "featherweight.sparse.loops",
    "featherweight.sparse.reparam",
    "featherweight.sparse.structure",
    "featherweight.sparse.tickets",
    "featherweight.lab.data",
    "featherweight.lab.models",
    "featherweight.lab.claims",
    "featherweight.lab.report",
    "featherweight.lab.neuron",
    "featherweight.lab.sign_toy",
    "featherweight.common",
)

KINDS: dict[str, Registry[Any]] = {
    "criterion": CRITERIA,
    "construction": CONSTRUCTIONS,
    "density rule": DENSITIES,
    "loop": LOOPS,
    "dynamic": DYNAMIC,
    "form": FORMS,
    "initialisation": INITS,
    "optimizer": OPTIMIZERS,
    "quantiser": QUANTIZERS,
    "rotation": ROTATIONS,
    "router": ROUTERS,
    "federated algorithm": ALGORITHMS,
    "codec": CODECS,
}

DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
MARKER = re.compile(r"<!-- generated: ([\w-]+) -->")
ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")


def public_names(module: ModuleType) -> dict[str, Any]:
    """Return the names a module offers: those of ``__all__``, or else what it defines itself."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return {name: getattr(module, name) for name in listed}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
        and (inspect.isclass(value) or inspect.isroutine(value))
    }


def documented(pages: Iterable[str]) -> list[Any]:
    """Return the objects that reference pages show by ``::: dotted.name``.

    Where a function has the name of its module, ``package.name`` shows the module: the function is
    ``package.name.name``. The first is left out here, so that the build says what is missing.
    """
    found: list[Any] = []
    for name in (name for page in pages for name in DIRECTIVE.findall(page)):
        value = pkgutil.resolve_name(name)
        if not isinstance(value, ModuleType):
            found.append(value)
        elif _attribute(name) is value:
            found += public_names(value).values()
    return found


def _attribute(name: str) -> Any:
    package, _, last = name.rpartition(".")
    return getattr(importlib.import_module(package), last)


def problems(module: ModuleType, shown: Iterable[Any]) -> list[str]:
    """Name what a module offers without a docstring, or without a place in the reference."""
    places = {id(value) for value in shown}
    found = []
    for name, value in public_names(module).items():
        path = f"{module.__name__}.{name}"
        found += [f"{part} has no docstring" for part in _silent(path, value)]
        if id(value) not in places and not isinstance(value, ModuleType):
            found.append(f"{path} is on no reference page")
    return found


def _silent(path: str, value: Any) -> Iterator[str]:
    if not (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value)):
        return
    if not (value.__doc__ or "").strip():
        yield path
    if inspect.isclass(value):
        for name, member in vars(value).items():
            method = getattr(member, "__func__", member)
            is_method = inspect.isfunction(method) or isinstance(member, property)
            if is_method and not name.startswith("_") and not (method.__doc__ or "").strip():
                yield f"{path}.{name}"


def home(name: str, pages: Mapping[str, str]) -> str | None:
    """Return a link to where a method is explained: its page, or a section of another's."""
    if f"{name}.md" in pages:
        return f"{name}.md"
    heading = re.compile(rf"^##+ {re.escape(name)}$", re.MULTILINE)
    return next((f"{page}#{name}" for page, text in pages.items() if heading.search(text)), None)


def homeless(names: Iterable[str], pages: Mapping[str, str]) -> list[str]:
    """Name the methods that no page explains."""
    text = "method {0!r} has no page methods/{0}.md and no section '## {0}' on another"
    return [text.format(name) for name in names if home(name, pages) is None]


def method_pages() -> dict[str, str]:
    """Read the pages of ``docs/methods``: file name to text."""
    return {path.name: path.read_text("utf-8") for path in sorted(DOCS.glob("methods/*.md"))}


def all_problems() -> list[str]:
    """Return everything that would stop the build."""
    shown = documented(path.read_text("utf-8") for path in DOCS.glob("reference/*.md"))
    modules = [importlib.import_module(name) for name in ROOMS]
    methods = [name for registry in KINDS.values() for name in registry]
    missing = homeless(methods, method_pages())
    return [line for module in modules for line in problems(module, shown)] + missing


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; arXiv ids become links."""
    cells = [list(head), *(list(row) for row in rows)]
    cells.insert(1, ["---"] * len(cells[0]))
    lines = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", "\n".join(lines))


def _registry(registry: Registry[Any]) -> str:
    rows = [(f"`{entry.name}`", entry.summary, entry.paper) for entry in registry.values()]
    return table(("name", "what", "paper"), rows)


def _methods() -> str:
    pages = method_pages()
    rows = [
        (f"[`{entry.name}`]({home(entry.name, pages)})", kind, entry.summary, entry.paper)
        for kind, registry in KINDS.items()
        for entry in registry.values()
    ]
    return table(("method", "kind", "what", "paper"), rows)


def _resets() -> str:
    rows = [(f"`{e.name}`", inspect.getdoc(e.method) or e.summary) for e in RESETS.values()]
    return table(("reset", "effect after each pruning"), rows)


def _data() -> str:
    rows = [
        (f"`{e.name}`", e.summary, "yes" if "path" in e.needs else "no", e.paper)
        for e in DATA.values()
    ]
    return table(("name", "what", "needs `data.path`", "source"), rows)


def _models() -> str:
    rows = []
    for entry in MODELS.values():
        parameters = inspect.signature(entry.method).parameters
        options = [f"`{name}={parameters[name].default!r}`" for name in option_names(entry.method)]
        rows.append((f"`{entry.name}`", entry.summary, ", ".join(options), entry.paper))
    return table(("name", "what", "options and defaults", "source"), rows)


def _fields() -> str:
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, default, text in describe():
        section = sections.setdefault(key.rpartition(".")[0], [])
        section.append((f"`{key}`", f"`{default}`", text))
    return "\n\n".join(
        f"### {f'`{name}`' if name else 'the recipe itself'}\n\n"
        + table(("key", "default", "meaning"), rows)
        for name, rows in sections.items()
    )


def _recipes() -> str:
    rows = [(f"`{name}`", _about(text)) for name, text in shipped().items()]
    return table(("recipe", "what it does"), rows)


def _claims() -> str:
    parts = []
    for paper, claims in groupby(CLAIMS.values(), key=lambda claim: claim.paper):
        rows = [
            (f"`{c.name}`", c.sentence, c.measured, _interval(c.region, c.scale)) for c in claims
        ]
        parts.append(f"### {paper}\n\n{table(('claim', 'sentence', 'effect', 'holds in'), rows)}")
    return "\n\n".join(parts)


def _interval(region: tuple[float, float], scale: float) -> str:
    low, high = (f"{scale * end:g}".replace("inf", "∞") for end in region)
    return f"({low}, {high})"


def _help() -> str:
    commands = [name for name, value in vars(cli).items() if hasattr(value, "execute")]
    parts = []
    for name in (command.lower() for command in commands):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            tyro.cli(cli.Command, prog="featherweight", args=[name, "--help"])
        text = "\n".join(line.rstrip() for line in output.getvalue().strip().splitlines())
        parts.append(f"## featherweight {name}\n\n```text\n{text}\n```")
    return "\n\n".join(parts)


GENERATED: dict[str, Callable[[], str]] = {
    "methods": _methods,
    "densities": lambda: _registry(DENSITIES),
    "loops": lambda: _registry(LOOPS),
    "strategies": lambda: _registry(STRATEGIES),
    "resets": _resets,
    "data": _data,
    "models": _models,
    "fields": _fields,
    "recipes": _recipes,
    "claims": _claims,
    "help": _help,
}


def filled(markdown: str) -> str:
    """Replace the markers of a page by what the code says.

    Raises:
        ValueError: a marker is unknown.
    """

    def fill(found: re.Match[str]) -> str:
        if found[1] not in GENERATED:
            raise ValueError(unknown("generated part", found[1], GENERATED))
        return GENERATED[found[1]]()

    return MARKER.sub(fill, markdown)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of results, which are written by a command, to the navigation."""
    os.environ["COLUMNS"] = "88"  # width of the command line's help
    results = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob("results/*.md"))
    results.sort(key=lambda name: not name.endswith("index.md"))
    log = [{"Log": "log.md"}] if (DOCS / "log.md").is_file() else []
    if config.nav and (results or log):
        config.nav = [*config.nav, {"Results": [*results, *log]}]
    return config


def on_pre_build(config: MkDocsConfig) -> None:
    """Stop the build if something is not documented."""
    if found := all_problems():
        raise PluginError("not documented:\n  " + "\n  ".join(found))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the generated parts, and drop the mark of runnable blocks, which is for the tests."""
    try:
        markdown = filled(markdown)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from None
    return re.sub(r"^(`{3,}\w+) runnable$", r"\1", markdown, flags=re.MULTILINE)


def on_page_content(html: str, **_: Any) -> str:
    """Write ``text::`` before a literal block, as docstrings have it, with one colon."""
    return re.sub(r"::</p>(\s*<(?:pre|div))", r":</p>\1", html)
