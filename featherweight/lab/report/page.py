"""The report as one HTML file: no script, no font and no picture from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib.resources import files
from itertools import groupby

from featherweight.lab.report.canvas import Picture
from featherweight.lab.report.execution import Executed
from featherweight.lab.report.matched import Matched
from featherweight.lab.report.records import Run, Seed
from featherweight.lab.report.summary import Row
from featherweight.lab.report.text import (
    MISSING,
    accuracy,
    count,
    duration,
    milliseconds,
    percent,
    scaled,
    three,
)

Column = tuple[str, str, Callable[[Row], str]]

COLUMNS: tuple[Column, ...] = (
    ("level", "Level of the pruning loop", lambda row: stage_name(row)),
    ("density", "Kept fraction of the prunable weights", lambda row: three(row.density)),
    (
        "test accuracy (n)",
        "Mean ± sample standard deviation over n seeds",
        lambda row: accuracy(row.accuracy, row.deviation, row.seeds),
    ),
    ("kept", "Non-zeros among the prunable weights", lambda row: count(row.nonzeros)),
    ("parameters", "All parameters, pruned or not", lambda row: count(row.parameters)),
    ("non-zeros", "Parameters that are not masked", lambda row: count(row.all_nonzeros)),
    (
        "FLOPs",
        "Operations of one forward pass of one sample, zeros skipped",
        lambda row: scaled(row.flops),
    ),
    ("of dense", "The same as a fraction of dense", lambda row: percent(row.flops_ratio)),
    ("step", "Median time of one training step", lambda row: milliseconds(row.step_seconds)),
    ("packed", "Bytes on disk, masks packed", lambda row: scaled(row.bytes, "B")),
    ("dense file", "Bytes on disk, dense", lambda row: scaled(row.dense_bytes, "B")),
)

FOOTNOTES = (
    "Masked training executes dense kernels: masked weights are multiplied as zeros, so the step "
    "time does not fall with the density unless a run says otherwise. FLOPs and packed bytes say "
    "what a sparse executor and a sparse file would need, not what this run spent.",
    "n is the number of seeds that have finished a level; ± is the sample standard deviation over "
    "them and is left out for n = 1. Density counts prunable weights only; biases and norms are "
    "always kept.",
)


def page(
    runs: Sequence[Run],
    rows: Sequence[Row],
    pictures: Sequence[Picture],
    matched: Sequence[Matched] = (),
    executed: Sequence[Executed] = (),
) -> str:
    """Return the whole HTML document; the same input gives the same bytes."""
    last = [row for row in rows if row.last]
    body = [
        _headline(runs),
        _incomplete(runs),
        _section("Result", "Each method at the last level it has reached.", _table(last)),
        _executed(executed),
        _matched(matched),
        *(_figure(picture) for picture in pictures),
    ]
    if len(rows) > len(last):
        body.append(_section("Every level", "", _table(rows)))
    body += [_machines(runs), _recipes(runs), _notes()]
    return _DOCUMENT.format(title=escape(_title(runs)), style=_style(), body="\n".join(body))


_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _style() -> str:
    return files("featherweight.lab.report").joinpath("style.css").read_text(encoding="utf-8")


def stage_name(row: Row) -> str:
    """Return the level's number, or "warm-up"."""
    return str(row.level) if row.level >= 0 else "warm-up"


def _title(runs: Sequence[Run]) -> str:
    models = _distinct(_name_of(run, "model") for run in runs)
    data = _distinct(_name_of(run, "data") for run in runs)
    if not models or not data:
        return "Featherweight report"
    return f"{', '.join(models)} on {', '.join(data)}"


def _name_of(run: Run, key: str) -> str:
    value = run.recipe.get(key)
    return str(value.get("name") or "") if isinstance(value, dict) else str(value or "")


def _distinct(words: Iterable[str]) -> list[str]:
    return [word for word in dict.fromkeys(words) if word]


def _headline(runs: Sequence[Run]) -> str:
    seeds = [seed for run in runs for seed in run.seeds]
    complete = sum(seed.complete for seed in seeds)
    facts = [
        _plural(len(runs), "method"),
        f"{_plural(len(seeds), 'run')}, {complete} complete",
        *_when(seeds),
        *([f"{duration(total)} of training"] if (total := _seconds(seeds)) else []),
        *_distinct(_machine_line(seed) for seed in seeds)[:1],
    ]
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return (
        f'<header><p class="brand">Featherweight report</p><h1>{escape(_title(runs))}</h1>'
        f'<ul class="facts">{items}</ul></header>'
    )


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _seconds(seeds: Sequence[Seed]) -> float:
    return sum(seed.seconds or 0.0 for seed in seeds)


def _when(seeds: Sequence[Seed]) -> list[str]:
    days = sorted(_distinct(str(seed.environment.get("started") or "")[:10] for seed in seeds))
    return [f"{days[0]} to {days[-1]}" if len(days) > 1 else days[0]] if days else []


def _machine_line(seed: Seed) -> str:
    environment = seed.environment
    threads = environment.get("threads")
    words = [environment.get("cpu"), environment.get("device"), environment.get("precision")]
    parts = [str(word) for word in words if word]
    return ", ".join([*parts, *([_plural(int(threads), "thread")] if threads else [])])


def _incomplete(runs: Sequence[Run]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for run in runs for line in incomplete(run))
    if not items:
        return ""
    return f'<section class="warning"><h2>Not complete yet</h2><ul>{items}</ul></section>'


def incomplete(run: Run) -> list[str]:
    """Say of each seed that has not come to its end how far it is."""
    lines = [
        f"{run.name}, seed {seed.number}: incomplete; {_plural(len(seed.levels), 'finished stage')}"
        f", {_plural(len(seed.epochs), 'epoch')}"
        for seed in run.seeds
        if not seed.complete
    ]
    return lines if run.seeds else [f"{run.name}: no seed has started"]


def _matched(pairs: Sequence[Matched]) -> str:
    if not pairs:
        return ""
    words = "Cycles train longer; the control trains as long, in one learning-rate schedule."
    items = "".join(f"<li>{escape(str(pair))}</li>" for pair in pairs)
    return _section("Cycles at equal epochs", words, f"<ul>{items}</ul>")


def _executed(found: Sequence[Executed]) -> str:
    if not found:
        return ""
    words = (
        "At the last level: operations, and what this machine measured. The dense step has the "
        "same optimizer, fused, under the faster of torch's float32 matmul precisions."
    )
    items = "".join(f"<li>{escape(str(line))}</li>" for line in found)
    return _section("What the zeros gained", words, f"<ul>{items}</ul>")


def _section(title: str, words: str, content: str) -> str:
    paragraph = f"<p>{escape(words)}</p>" if words else ""
    return f"<section><h2>{escape(title)}</h2>{paragraph}{content}</section>"


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return "<p>No level is finished yet.</p>"
    heads = "".join(
        f'<th scope="col" title="{escape(meaning)}">{escape(head)}</th>'
        for head, meaning, _ in COLUMNS
    )
    groups = "".join(
        _group(method, list(group)) for method, group in groupby(rows, key=lambda row: row.method)
    )
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="table"><table><thead><tr>'
        f'<th scope="col">method</th>{heads}</tr></thead>{groups}</table></div>'
    )


def _group(method: str, rows: Sequence[Row]) -> str:
    head = f'<th scope="rowgroup" rowspan="{len(rows)}">{escape(method)}</th>'
    lines = [
        "".join(f"<td>{escape(write(row)).replace(' ', '&nbsp;')}</td>" for _, _, write in COLUMNS)
        for row in rows
    ]
    return f"<tbody><tr>{head}{'</tr><tr>'.join(lines)}</tr></tbody>"


def _figure(picture: Picture) -> str:
    return (
        f'<section><h2>{escape(picture.title)}</h2><figure><div class="wide" tabindex="0" '
        f'role="region" aria-label="{escape(picture.title)}">{picture.svg}</div>'
        f"<figcaption>{escape(picture.caption)} <span>File: {escape(picture.name)}.png</span>"
        "</figcaption></figure></section>"
    )


def _machines(runs: Sequence[Run]) -> str:
    """List every distinct environment with the methods that ran in it."""
    users: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for run in runs:
        for seed in run.seeds:
            facts = {key: str(value) for key, value in seed.environment.items()}
            facts.pop("started", None)
            users.setdefault(tuple(facts.items()), []).append(run.name)
    cards = "".join(_machine(facts, _distinct(names)) for facts, names in users.items() if facts)
    return _section("Machine", "", cards) if cards else ""


def _machine(facts: Sequence[tuple[str, str]], names: Sequence[str]) -> str:
    entries = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts)
    return f"<p>{escape('; '.join(names))}</p><dl>{entries}</dl>"


def _recipes(runs: Sequence[Run]) -> str:
    details = "".join(
        f"<details><summary>{escape(run.name)} <code>{escape(run.path.name or MISSING)}</code>"
        f"</summary><pre>{escape(run.recipe_text.strip())}</pre></details>"
        for run in runs
    )
    return _section("Recipes", "Every setting, defaults included.", details)


def _notes() -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in FOOTNOTES)
    return f'<footer><h2>How to read this</h2><ul class="notes">{items}</ul></footer>'
