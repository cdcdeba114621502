"""What ``featherweight claims`` prints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from featherweight.lab.claims.claim import CLAIMS, Outcome, Scale, Settings
from featherweight.lab.errors import BadInput


def list_claims() -> None:
    """Print every paper with its claims."""
    console = Console()
    for paper in dict.fromkeys(claim.paper for claim in CLAIMS.values()):
        console.print(f"[bold]{paper}[/bold]", highlight=False)
        for claim in CLAIMS.values():
            if claim.paper == paper:
                console.print(f"  {claim.name}\n      {claim.sentence}", highlight=False)


def run_claims(
    names: Sequence[str], out: Path, jobs: int, scale: Scale, data: Path | None
) -> list[Outcome]:
    """Test claims and print the verdicts.

    Args:
        names: claims, arXiv ids of papers, or "all".
        out: folder of the runs; finished ones are used again.
        jobs: runs at a time.
        scale: "mini" or "paper".
        data: folder of the data set for the paper's scale.

    Raises:
        BadInput: no or an unknown name, or the paper's scale without data.
    """
    if not names:
        raise BadInput("name claims to run, or `all`; `featherweight claims` lists them")
    if scale == "paper" and data is None:
        raise BadInput("--scale paper needs --data, the folder of CIFAR-10")
    try:
        chosen = CLAIMS.find(names)
    except ValueError as error:
        raise BadInput(str(error)) from None
    console = Console()
    settings = Settings(out, jobs, scale, data, console)
    outcomes, seconds = [], []
    for claim in chosen:
        started = time.perf_counter()
        outcomes.append(claim.test(settings))
        seconds.append(time.perf_counter() - started)
    console.print(verdicts(outcomes, seconds))
    return outcomes


def verdicts(outcomes: Sequence[Outcome], seconds: Sequence[float]) -> Table:
    """Lay outcomes out as a table."""
    table = Table(title="verdicts", title_justify="left")
    for column in ("claim", "effect", "95 % interval", "seeds", "cost", "verdict"):
        table.add_column(column, overflow="fold")
    for outcome, cost in zip(outcomes, seconds, strict=True):
        low, high = outcome.interval
        table.add_row(
            f"{outcome.claim.name}\n[dim]{outcome.claim.measured}[/dim]",
            f"{outcome.effect:+.1f}",
            f"{low:+.1f} .. {high:+.1f}",
            str(len(outcome.effects)),
            f"{cost:.0f} s",
            outcome.verdict,
        )
    return table
