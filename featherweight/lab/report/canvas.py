"""The pictures' common ground: fonts, colours, legends, and the two forms a picture is kept in.

Each picture comes as a PNG for papers and slides and as an SVG for the page. In the SVG every
colour is a CSS variable, so that the page decides between light and dark.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from featherweight.lab.report.summary import Curve

INK, MUTED, GRID, PAPER = "#1f2328", "#656d76", "#e1e4e8", "#ffffff"
# Okabe and Ito (2008), "Color universal design", without black and the yellow that paper swallows.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^DvPX"
Dash = Literal["-", "--", "-.", ":", "none"]
DASHES: tuple[Dash, ...] = ("-", "--", "-.")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--method-{number}" for number, colour in enumerate(PALETTE)
}
WIDTH = 8.0  # inches; the page shows it about 1.6 times larger

STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "figure.facecolor": PAPER,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "path",
    "svg.hashsalt": "featherweight",
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


@dataclass(frozen=True)
class Picture:
    """One picture in both forms, with the words that go with it."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


@dataclass(frozen=True)
class Look:
    """How one method is drawn in every picture; fixed by its place among the methods."""

    colour: str
    marker: str
    dash: Dash

    @classmethod
    def of(cls, number: int) -> Look:
        """Return the look of the method at this place."""
        dash = DASHES[number // len(PALETTE) % len(DASHES)]
        return cls(PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)], dash)


def render(name: str, title: str, caption: str, drawn: Figure) -> Picture:
    """Render a figure to both forms; equal figures give equal bytes."""
    png, svg = io.BytesIO(), io.StringIO()
    drawn.savefig(png, format="png", dpi=160, metadata={"Software": None})
    drawn.savefig(svg, format="svg")
    return Picture(name, title, caption, png.getvalue(), _inline(svg.getvalue(), name, title))


def _inline(svg: str, name: str, title: str) -> str:
    """Fit an SVG into a page: no date, own ids, the page's sizes and its variables as colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()


def figure(height: float) -> Figure:
    """Return an empty figure of the common width and a height in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    return Figure(figsize=(WIDTH, height), layout=layout)


def curve(axes: Axes, points: Curve, look: Look, linewidth: float = 1.8) -> None:
    """Draw the mean as a line, and smallest to largest as a band; of one point, an error bar."""
    if len(points.x) == 1:
        _error_bar(axes, points, look)
        return
    axes.plot(
        points.x,
        points.mean,
        color=look.colour,
        marker=look.marker,
        linestyle=look.dash,
        linewidth=linewidth,
        zorder=3,
    )
    if points.low != points.high:
        axes.fill_between(
            points.x, points.low, points.high, color=look.colour, alpha=0.22, linewidth=0
        )


def _error_bar(axes: Axes, points: Curve, look: Look) -> None:
    axes.errorbar(
        points.x,
        points.mean,
        yerr=[
            [max(0.0, points.mean[0] - points.low[0])],
            [max(0.0, points.high[0] - points.mean[0])],
        ],
        color=look.colour,
        fmt=look.marker or "o",
        capsize=3 if points.low != points.high else 0,
        zorder=3,
    )


def legend(drawn: Figure, names: Sequence[str], looks: Sequence[Look]) -> None:
    """Put the methods' names above the axes, as many in a row as fit."""
    handles = [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            linestyle=look.dash,
            label=wrapped(name, 80),
        )
        for name, look in zip(names, looks, strict=True)
    ]
    longest = max(min(len(name), 80) for name in names)
    columns = max(1, min(len(names), 96 // (longest + 8)))
    drawn.legend(handles=handles, loc="outside upper left", ncols=columns)


def wrapped(name: str, width: int) -> str:
    """Break a long name into lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(name, width)) or name
