"""Reports of runs: one self-contained page, its pictures, and a table for the console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from featherweight.common import atomic_path, write_text
from featherweight.lab.report.collect import collect
from featherweight.lab.report.execution import Executed, executed
from featherweight.lab.report.matched import Matched, matched
from featherweight.lab.report.records import Run
from featherweight.lab.report.summary import Row, summarise
from featherweight.lab.report.table import table

__all__ = [
    "Executed",
    "Matched",
    "Report",
    "Row",
    "Run",
    "collect",
    "executed",
    "matched",
    "summarise",
    "table",
    "write",
]


@dataclass(frozen=True)
class Report:
    """What ``write`` has written.

    Attributes:
        html: the page.
        pictures: PNG files next to it, in the order of the page.
        rows: one a method and level, for ``table``.
        matched: one for each cyclic method, beside its control.
        executed: one for each method whose execution was measured.
    """

    html: Path
    pictures: tuple[Path, ...]
    rows: tuple[Row, ...]
    matched: tuple[Matched, ...] = ()
    executed: tuple[Executed, ...] = ()


def write(runs: Sequence[Path], out: Path) -> Report:
    """Write ``report.html`` and one PNG a picture into a folder; the same runs give the same bytes.

    Args:
        runs: identity directories, seed directories, or folders that hold identity directories
            at any depth; unfinished runs are reported as far as they have come.
        out: the folder to write into; made if it isn't there.

    Raises:
        ValueError: no run was found, or a file of a run is damaged.
        OSError: ``out`` can't be written.
    """
    from featherweight.lab.report.page import page  # these two import matplotlib: late on purpose
    from featherweight.lab.report.plots import draw

    found = collect(runs)
    rows, pictures, pairs = summarise(found), draw(found), matched(found)
    measured = executed(found)
    paths = tuple(out / f"{picture.name}.png" for picture in pictures)
    for path, picture in zip(paths, pictures, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_bytes(picture.png)
    html = out / "report.html"
    write_text(html, page(found, rows, pictures, pairs, measured))
    return Report(html, paths, rows, pairs, measured)
