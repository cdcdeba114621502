"""The page of federated runs as one HTML file: no script, no font and no picture from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from featherweight.lab.report.canvas import Picture
from featherweight.lab.report.federated import (
    COSTS,
    FederatedRun,
    cost_to_reach,
    targets,
)
from featherweight.lab.report.federated_table import COLUMNS, estimated
from featherweight.lab.report.page import (
    _DOCUMENT,
    _distinct,
    _figure,
    _plural,
    _section,
    _style,
)
from featherweight.lab.report.text import MISSING, count, percent, scaled

NOTES = (
    "Bytes are those of the messages as they would travel, headers of the codec included; what a "
    "network adds is not counted. A model sent down counts for every client of the cohort.",
    "The estimated time is the field guide's model (Wang et al. 2021, arXiv:2107.06917, equations "
    "9 and 10): communication at the recipe's bandwidths, then the slowest client, then the "
    "server. It is no measurement.",
    "Pooled accuracy counts examples; means and percentiles over clients count people. n is the "
    "number of seeds that have come to their end; ± is the sample standard deviation over them.",
)

WRITE: dict[str, Callable[[float | None], str]] = {
    "rounds": count,
    "bytes": lambda value: scaled(value, "B"),
    "examples": scaled,
    "seconds": estimated,
}


def page(runs: Sequence[FederatedRun], pictures: Sequence[Picture]) -> str:
    """Return the whole HTML document; the same input gives the same bytes."""
    body = [
        _headline(runs),
        _incomplete(runs),
        _section("Result", "Each recipe after its last round.", _results(runs)),
        *(_figure(picture) for picture in pictures),
        _reach(runs),
        _settings(runs),
        _divisions(runs),
        _machines(runs),
        _recipes(runs),
        f'<footer><h2>How to read this</h2><ul class="notes">{_items(NOTES)}</ul></footer>',
    ]
    title = escape(_title(runs))
    return _DOCUMENT.format(title=title, style=_style(), body="\n".join(filter(None, body)))


def _title(runs: Sequence[FederatedRun]) -> str:
    data = _distinct(str(run.recipe["data"]["name"]) for run in runs)
    return f"Federated training on {', '.join(data)}"


def _headline(runs: Sequence[FederatedRun]) -> str:
    seeds = [seed for run in runs for seed in run.seeds]
    facts = [
        _plural(len(runs), "recipe"),
        f"{_plural(len(seeds), 'run')}, {sum(seed.complete for seed in seeds)} complete",
    ]
    return (
        f'<header><p class="brand">Featherweight report</p><h1>{escape(_title(runs))}</h1>'
        f'<ul class="facts">{_items(facts)}</ul></header>'
    )


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _incomplete(runs: Sequence[FederatedRun]) -> str:
    lines = [
        f"{run.name}, seed {seed.number}: "
        f"{seed.points[-1].rounds if seed.points else 0} of {run.recipe['rounds']} rounds"
        for run in runs
        for seed in run.seeds
        if not seed.complete
    ]
    lines += [f"{run.name}: no seed has started" for run in runs if not run.seeds]
    if not lines:
        return ""
    items = _items(lines)
    return f'<section class="warning"><h2>Not complete yet</h2><ul>{items}</ul></section>'


def _results(runs: Sequence[FederatedRun]) -> str:
    heads = [(head, meaning) for head, meaning, _ in COLUMNS]
    return _table("recipe", heads, [(run.name, [w(run) for _, _, w in COLUMNS]) for run in runs])


def _table(
    first: str, heads: Sequence[tuple[str, str]], rows: Iterable[tuple[str, Sequence[str]]]
) -> str:
    head = "".join(
        f'<th scope="col" title="{escape(meaning)}">{escape(name)}</th>' for name, meaning in heads
    )
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(cell).replace(' ', '&nbsp;')}</td>" for cell in cells)
        + "</tr>"
        for name, cells in rows
    )
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="table"><table><thead><tr>'
        f'<th scope="col">{first}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _reach(runs: Sequence[FederatedRun]) -> str:
    """Tell what each recipe pays for accuracies that all can be asked for."""
    wanted = targets(runs)
    if not wanted:
        return ""
    parts = []
    for axis, words in COSTS.items():
        rows = [
            (run.name, [WRITE[axis](cost_to_reach(run, target, axis)) for target in wanted])
            for run in runs
        ]
        heads = [(percent(target), "Validation accuracy") for target in wanted]
        parts.append(f"<h3>{escape(words.capitalize())}</h3>{_table('recipe', heads, rows)}")
    text = (
        "Mean over seeds at the first evaluation at or above an accuracy; "
        f"{MISSING}: a seed has not reached it."
    )
    return _section("What an accuracy costs", text, "".join(parts))


def _settings(runs: Sequence[FederatedRun]) -> str:
    parts = []
    for run in runs:
        setting = run.recipe["setting"]
        words = f"{run.name}: {setting['kind']}, tuned on {setting['tuned_on']}"
        found = {
            f"{one['level']}: {one['text']}"
            for seed in run.seeds
            for one in seed.result.get("findings", [])
        }
        parts.append(f"<p>{escape(words)}</p><ul>{_items(sorted(found))}</ul>")
    words = "What each recipe says of its setting, and what follows from that."
    return _section("Setting", words, "".join(parts))


def _divisions(runs: Sequence[FederatedRun]) -> str:
    lines = [
        f"{run.name}, seed {seed.number}: {seed.partition['summary']}; "
        f"hash {str(seed.partition['hash'])[:12]}"
        for run in runs
        for seed in run.seeds
        if {"summary", "hash"} <= set(seed.partition)
    ]
    text = "Runs of one hash have the same clients."
    return _section("Clients", text, f"<ul>{_items(lines)}</ul>") if lines else ""


def _machines(runs: Sequence[FederatedRun]) -> str:
    cards: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in runs:
        for seed in run.seeds:
            facts = {k: str(v) for k, v in seed.environment.items() if k != "started"}
            cards.setdefault(tuple(facts.items()), []).append(run.name)
    parts = [
        f"<p>{escape('; '.join(_distinct(names)))}</p><dl>"
        + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts)
        + "</dl>"
        for facts, names in cards.items()
        if facts
    ]
    return _section("Machine", "", "".join(parts)) if parts else ""


def _recipes(runs: Sequence[FederatedRun]) -> str:
    details = "".join(
        f"<details><summary>{escape(run.name)} <code>{escape(run.path.name)}</code>"
        f"</summary><pre>{escape(run.recipe_text.strip())}</pre></details>"
        for run in runs
    )
    return _section("Recipes", "Every setting, defaults included.", details)
