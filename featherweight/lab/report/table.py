"""The result table for the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from featherweight.lab.report.summary import Row
from featherweight.lab.report.text import accuracy, count, milliseconds, percent, scaled, three


def table(rows: Sequence[Row]) -> Table:
    """Return a compact table of the rows, a line between methods; the warm-up is left out.

    Args:
        rows: as in ``Report.rows``; pass only those with ``row.last`` for one row a method.
    """
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    result.add_column("method", overflow="fold")
    result.add_column("density", justify="right", no_wrap=True)
    for head in ("test accuracy (n)", "nonzeros", "FLOPs", "bytes", "step"):
        result.add_column(head, justify="right", no_wrap=True)
    shown = [row for row in rows if row.level >= 0]
    for before, row in zip([None, *shown], shown, strict=False):
        if before is not None and before.method != row.method:
            result.add_section()
        first = before is None or before.method != row.method
        result.add_row(Text(row.method if first else ""), *_cells(row))
    return result


def _cells(row: Row) -> list[str]:
    return [
        three(row.density),
        accuracy(row.accuracy, row.deviation, row.seeds),
        count(row.nonzeros),
        percent(row.flops_ratio),
        scaled(row.bytes, "B"),
        milliseconds(row.step_seconds),
    ]
