"""Pictures of the measures, with matplotlib's object API: no window, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.common import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from featherweight.init.isometry import IsometryReport
    from featherweight.init.signal import SignalReport
    from featherweight.init.spectrum import Spectrum


def finish(figure: Figure, path: str | Path | None) -> Figure:
    """Write a figure where a path is given, in one step; return it."""
    if path is not None:
        with atomic_path(Path(path)) as temporary:
            figure.savefig(temporary, format=Path(path).suffix[1:] or "png")
    return figure


def draw_spectrum(spectrum: Spectrum) -> Figure:
    """Draw singular values in falling order, one line an example."""
    (axes,), figure = _panels(1)
    if spectrum.values is None:
        axes.axhline(spectrum.largest, color="C0", label="largest")
        axes.axhline(spectrum.mean_square**0.5, color="C1", label="root mean square")
        axes.legend()
    for values in () if spectrum.values is None else spectrum.values.tolist():
        axes.plot(range(1, len(values) + 1), values, color="C0", linewidth=1)
    axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="number", ylabel="singular value", title=f"input to {spectrum.state}")
    return figure


def draw_isometry(report: IsometryReport) -> Figure:
    """Draw largest, root mean square and smallest singular value over depth."""
    (axes,), figure = _panels(1)
    depth = range(len(report))
    _line(axes, depth, [s.largest for s in report], "largest")
    _line(axes, depth, [s.mean_square**0.5 for s in report], "root mean square")
    if all(s.smallest is not None for s in report):
        _line(axes, depth, [s.smallest or 0.0 for s in report], "smallest")
    axes.set(xlabel="state", ylabel="singular value", yscale="log")
    axes.legend()
    return figure


def draw_signal(report: SignalReport) -> Figure:
    """Draw norms, cosines and gradient norms over depth."""
    panels, figure = _panels(3)
    depth = range(len(report))
    _line(panels[0], depth, [row.norm for row in report], "norm")
    panels[0].set(ylabel="norm of the state / of the input", yscale="log")
    _line(panels[1], depth, [row.cosine for row in report], "states")
    paired = [(place, row.pair_cosine) for place, row in enumerate(report)]
    known = [(place, value) for place, value in paired if value is not None]
    if known:
        _line(panels[1], [place for place, _ in known], [value for _, value in known], "pairs")
    panels[1].set(ylabel="cosine of two inputs", ylim=(-1.05, 1.05))
    panels[1].legend()
    _line(panels[2], depth, [row.gradient for row in report], "gradient")
    panels[2].set(ylabel="norm of the gradient", yscale="log")
    for panel in panels:
        panel.set(xlabel="state")
    return figure


def _panels(count: int) -> tuple[Sequence[Axes], Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'featherweight[lab]'") from error
    figure = Figure(figsize=(4.5 * count, 3.4), layout="constrained")
    return figure.subplots(1, count, squeeze=False)[0], figure


def _line(axes: Axes, depth: Sequence[int], values: Sequence[float], label: str) -> None:
    axes.plot(depth, values, marker=".", linewidth=1, label=label)
