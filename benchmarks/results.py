"""Regenerate docs/results/ from training runs: ``python -m benchmarks.results [--data PATH]``.

Runs that are complete are used again, so that an interrupted regeneration goes on where it stopped.
"""

import argparse
import re
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import cifar, methods
from benchmarks.provenance import provenance
from featherweight.common import write_text
from featherweight.lab import report
from featherweight.lab.claims import CLAIMS, Outcome
from featherweight.lab.claims.claim import Settings
from featherweight.lab.launch import launch, tasks
from featherweight.lab.parse import load
from featherweight.lab.report.text import accuracy, count, percent, scaled, three

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
RUNS = ROOT / "runs" / "results"
DIGITS = ("dense-digits", "random-digits", "imp-digits", "lrr-digits")
PAGES = ("digits", "methods", "claims", "cifar10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="folder of CIFAR-10; without it CIFAR is left out"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", choices=PAGES, help="one page")
    parser.add_argument(
        "--claims",
        nargs="+",
        metavar="NAME",
        help="claims to test; what the page says of others is kept. Without it: all",
    )
    arguments = parser.parse_args()
    console = Console()
    if arguments.only in (None, "digits"):
        put_into_readme(digits_page(arguments.jobs, console))
    if arguments.only in (None, "methods"):
        methods.write_page(RESULTS / "methods.md", RUNS / "methods", arguments.jobs, console)
    if arguments.only in (None, "claims"):
        settings = Settings(RUNS / "claims", arguments.jobs, "mini", None, console)
        claims_page(settings, arguments.claims)
    if arguments.data is not None and arguments.only in (None, "cifar10"):
        out = RUNS / "cifar10"
        cifar.write_page(RESULTS / "cifar10.md", arguments.data, out, arguments.jobs, console)


def digits_page(jobs: int, console: Console) -> str:
    """Run the recipes of the demo, write their page and picture, and return the table."""
    found = [recipe for base in DIGITS for recipe in load(base)]
    directories = launch(tasks(found), RUNS / "digits", jobs, console)
    written = report.write(directories, RUNS / "digits" / "report")
    table = markdown(written.rows)
    picture = next(p for p in written.pictures if "accuracy" in p.name)
    (RESULTS / "digits-accuracy.png").write_bytes(picture.read_bytes())
    hours = sum(_seconds(d) for d in directories) / 3600
    text = (
        "# Digits\n\n"
        f"Recipes: {', '.join(f'`{r}`' for r in DIGITS)}. Test accuracy is mean ± standard "
        "deviation over seeds, with their number in brackets; the test set is looked at once a "
        "level, after its last epoch, and nothing is chosen by it.\n\n"
        f"![test accuracy against density](digits-accuracy.png)\n\n{table}\n"
        f"{provenance()} {hours:.2f} process-hours of training, two runs at a time. "
        "Regenerate: `make results`.\n"
    )
    write_text(RESULTS / "digits.md", text)
    return table


def _seconds(directory: Path) -> float:
    import json

    return float(json.loads((directory / "result.json").read_text())["seconds"])


def markdown(rows: Sequence[report.Row]) -> str:
    """Lay rows out as a Markdown table."""
    lines = [
        "| method | density | test accuracy (seeds) | kept weights | FLOPs | packed file |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.level < 0:
            continue
        cells = [row.method, three(row.density), accuracy(row.accuracy, row.deviation, row.seeds)]
        cells += [count(row.nonzeros), percent(row.flops_ratio), scaled(row.bytes, "B")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def put_into_readme(table: str) -> None:
    """Replace the README's demo table by the last level of each method."""
    path = ROOT / "README.md"
    rows = table.splitlines()
    last = {row.split("|")[1]: row for row in rows[2:]}
    text = "\n".join([*rows[:2], *last.values()])
    marks = "<!-- demo table: written by `make results` -->", "<!-- end -->"
    pattern = re.compile(f"{re.escape(marks[0])}.*{re.escape(marks[1])}", re.DOTALL)
    replaced = pattern.sub(f"{marks[0]}\n\n{text}\n\n{marks[1]}", path.read_text(encoding="utf-8"))
    write_text(path, replaced)


def claims_page(settings: Settings, names: Sequence[str] | None) -> None:
    """Test claims and write the page of all that were tested."""
    tested = list(CLAIMS.values()) if names is None else CLAIMS.find(names)
    page = RESULTS / "claims.md"
    kept = {} if names is None else _rows(page.read_text("utf-8"))
    blocks = [
        "# Claims\n\nRegenerate: `make results`, or one by `featherweight claims run NAME`.\n"
    ]
    for claim in tested:
        started = time.perf_counter()
        kept[claim.name] = _row(claim.test(settings))
        print(f"{claim.name}: {time.perf_counter() - started:.0f} s", flush=True)
    for paper in dict.fromkeys(claim.paper for claim in CLAIMS.values()):
        claims = [claim.name for claim in CLAIMS.values() if claim.paper == paper]
        if rows := [kept[name] for name in claims if name in kept]:
            head = "| claim | effect | 95 % interval | seeds | verdict |\n|---|---|---|---|---|"
            blocks += [f"## {paper}\n", head, *rows, ""]
    blocks.append(provenance() + "\n")
    write_text(page, "\n".join(blocks))


def _rows(page: str) -> dict[str, str]:
    """Return the rows of the page by the names of their claims."""
    return {
        row[1]: row[0] for row in re.finditer(r"^\| \*\*([\w.-]+)\*\*: .*$", page, re.MULTILINE)
    }


def _row(outcome: Outcome) -> str:
    low, high = outcome.interval
    claim = outcome.claim
    return (
        f"| **{claim.name}**: {claim.sentence} *Effect: {claim.measured}.* | {outcome.effect:+.1f} "
        f"| {low:+.1f} .. {high:+.1f} | {len(outcome.effects)} | {outcome.verdict} |"
    )


if __name__ == "__main__":
    main()
