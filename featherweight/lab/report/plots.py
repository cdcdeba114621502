"""The pictures of a report, drawn with matplotlib's object API: no window, no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from featherweight.lab.report.canvas import (
    GRID,
    MUTED,
    STYLE,
    Look,
    Picture,
    curve,
    figure,
    legend,
    render,
    wrapped,
)
from featherweight.lab.report.records import Epoch, Run
from featherweight.lab.report.summary import (
    Curve,
    accuracy_against_density,
    epoch_places,
    layer_densities,
    over_epochs,
    sign_flips,
)
from featherweight.lab.report.text import three

Styled = Sequence[tuple[Run, Look]]


@dataclass(frozen=True)
class Plot:
    """One kind of picture: what it is called, which runs hold data for it, how it is drawn."""

    name: str
    title: str
    caption: str
    fits: Callable[[Run], bool]
    draw: Callable[[Styled], Figure]


def draw(runs: Sequence[Run]) -> tuple[Picture, ...]:
    """Draw every picture for which the runs hold data, in the order of the page."""
    styled = [(run, Look.of(number)) for number, run in enumerate(runs)]
    fitting = [(plot, [pair for pair in styled if plot.fits(pair[0])]) for plot in PLOTS]
    with matplotlib.rc_context(STYLE):
        return tuple(
            render(plot.name, plot.title, plot.caption, plot.draw(chosen))
            for plot, chosen in fitting
            if chosen
        )


def _train_loss(epoch: Epoch) -> float | None:
    return epoch.train_loss


def _validation_loss(epoch: Epoch) -> float | None:
    return epoch.validation_loss


def _rate(epoch: Epoch) -> float | None:
    return epoch.learning_rate


def _accuracy(styled: Styled) -> Figure:
    drawn = figure(4.4)
    axes = drawn.subplots()
    curves = [accuracy_against_density(run) for run, _ in styled]
    for points, (_, look) in zip(curves, styled, strict=True):
        curve(axes, points, look)
        if points.x == (1.0,):
            axes.axhline(points.mean[0], color=look.colour, linestyle=":", linewidth=1.2, zorder=1)
    _density_axis(axes, [x for points in curves for x in points.x])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    axes.set_ylabel("test accuracy")
    _legend(drawn, styled, curves)
    return drawn


def _density_axis(axes: Axes, densities: Sequence[float]) -> None:
    low, high = min(densities), max(densities)
    margin = (high / low) ** 0.04 if high > low else 1.5
    axes.set_xscale("log")
    axes.set_xlim(high * margin, low / margin)
    axes.xaxis.set_major_locator(FixedLocator(_density_ticks(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
    axes.set_xlabel("density: fraction of prunable weights kept (log scale)")


def _density_ticks(low: float, high: float) -> list[float]:
    """Choose round densities; over more than four decades only powers of ten."""
    digits = (1.0, 2.0, 5.0) if high / low < 1e4 else (1.0,)
    rounds = [float(f"{digit}e{power}") for power in range(-9, 1) for digit in digits]
    inside = [tick for tick in rounds if low / 1.02 <= tick <= high * 1.02]
    return inside if len(inside) > 1 else sorted({float(f"{low:.3g}"), float(f"{high:.3g}")})


def _loss(styled: Styled) -> Figure:
    drawn, panels = _panels(styled, height=2.3)
    shown: list[float] = []
    for (run, look), axes in zip(styled, panels, strict=True):
        train, validation = over_epochs(run, _train_loss), over_epochs(run, _validation_loss)
        curve(axes, train, Look(look.colour, "", "-"))
        curve(axes, validation, Look(MUTED, "", "-"), linewidth=1.3)
        shown += [*train.mean, *validation.mean]
    _loss_axis(panels, shown)
    handles = [
        Line2D([], [], color=styled[0][1].colour, label="training, in the method's colour"),
        Line2D([], [], color=MUTED, linewidth=1.3, label="validation, in grey"),
    ]
    drawn.legend(handles=handles, loc="outside upper left", ncols=2)
    return drawn


def _loss_axis(panels: Sequence[Axes], shown: Sequence[float]) -> None:
    logarithmic = min(shown) > 0 and max(shown) / min(shown) > 30
    decades = math.log10(max(shown) / min(shown)) if logarithmic else 0
    for axes in panels:
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel("loss (log scale)" if logarithmic else "loss")


def _learning_rate(styled: Styled) -> Figure:
    drawn, panels = _panels(styled, height=1.7)
    for (run, look), axes in zip(styled, panels, strict=True):
        curve(axes, over_epochs(run, _rate), Look(look.colour, "", "-"), linewidth=1.3)
        axes.set_ylim(bottom=0)
        if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
            axes.set_ylabel("learning rate")
    return drawn


def _panels(styled: Styled, height: float) -> tuple[Figure, list[Axes]]:
    """Return one panel a method over the epochs of its whole run, with its levels marked."""
    columns = min(2, len(styled))
    rows = -(-len(styled) // columns)
    drawn = figure(0.5 + rows * (height + 0.75))
    grid = drawn.subplots(rows, columns, sharey=True, squeeze=False)
    panels = [*grid.flat]
    for (run, _), axes in zip(styled, panels, strict=False):
        axes.set_title(wrapped(run.name, 84 // columns), y=1.0, pad=18)
        axes.set_xlabel("epoch of the whole run")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.grid(False, axis="x")
        _mark_levels(axes, [level for level, _ in epoch_places(run)])
    for empty in panels[len(styled) :]:
        empty.remove()
    return drawn, panels[: len(styled)]


def _mark_levels(axes: Axes, levels: Sequence[int]) -> None:
    """Draw a line between levels and their numbers on top; ``levels`` has one entry an epoch."""
    starts = [levels.index(level) + 0.5 for level in dict.fromkeys(levels)]
    axes.set_xlim(0.5, len(levels) + 0.5)
    if len(starts) < 2:
        return
    for start in starts[1:]:
        axes.axvline(start, color=GRID, linewidth=0.8, zorder=0)
    ends = [*starts[1:], len(levels) + 0.5]
    every = -(-len(starts) // 8)
    middles = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
    names = ["warm-up" if level < 0 else str(level) for level in dict.fromkeys(levels)]
    names[0] = f"level {names[0]}" if levels[0] >= 0 else names[0]
    top = axes.secondary_xaxis("top")
    top.set_xticks(middles[::every], names[::every])
    top.tick_params(length=0, labelsize=8, labelcolor=MUTED, pad=1)
    top.spines["top"].set_visible(False)


def _layers(styled: Styled) -> Figure:
    densities = [layer_densities(run) for run, _ in styled]
    names = list(dict.fromkeys(name for layers in densities for name in layers))
    columns = min(3, len(styled))
    rows = -(-len(styled) // columns)
    drawn = figure(rows * (0.9 + 0.2 * len(names)))
    grid = drawn.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for (run, look), layers, axes in zip(styled, densities, grid.flat, strict=False):
        places = [names.index(name) for name in layers]
        bars = axes.barh(places, list(layers.values()), color=look.colour, height=0.72)
        axes.bar_label(bars, [three(value) for value in layers.values()], padding=3, fontsize=8)
        axes.set_title(wrapped(run.name, 78 // columns))
    _layer_axes(grid.flat, names, max(value for layers in densities for value in layers.values()))
    for empty in grid.flat[len(styled) :]:
        empty.remove()
    return drawn


def _layer_axes(panels: Iterable[Axes], names: Sequence[str], largest: float) -> None:
    for axes in panels:
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 1.32 * largest)
        axes.set_xticks(
            [tick for tick in MaxNLocator(4).tick_values(0, largest) if tick <= largest]
        )
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=True)
        axes.set_xlabel("density")


def _flips(styled: Styled) -> Figure:
    drawn = figure(3.6)
    sides = [("start", "since the start"), ("previous", "since the previous level")]
    for axes, (since, words) in zip(
        drawn.subplots(1, 2, sharex=True, sharey=True), sides, strict=True
    ):
        for run, look in styled:
            points = sign_flips(run, since)
            curve(axes, points, look)
        axes.set_title(words)
        axes.set_xlabel("level")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    first = drawn.axes[0]
    first.set_ylim(bottom=-0.03 * first.get_ylim()[1])  # whole markers at zero
    first.set_ylabel("kept weights with another sign")
    _legend(drawn, styled, [sign_flips(run, "start") for run, _ in styled])
    return drawn


def _legend(drawn: Figure, styled: Styled, curves: Sequence[Curve]) -> None:
    looks = [
        look if len(points.x) > 1 else replace(look, dash="none")
        for points, (_, look) in zip(curves, styled, strict=True)
    ]
    legend(drawn, [run.name for run, _ in styled], looks)


PLOTS = (
    Plot(
        "accuracy",
        "Accuracy against density",
        "Test accuracy at the end of each level, dense on the left, sparse on the right. Line or "
        "marker: mean over seeds; band or error bar: smallest to largest seed. The dotted line "
        "carries the accuracy of a method that stays dense across.",
        lambda run: bool(accuracy_against_density(run)),
        _accuracy,
    ),
    Plot(
        "loss",
        "Loss over the whole run",
        "Loss of every epoch through all levels, mean over seeds; band: smallest to largest seed. "
        "A vertical line marks where a level ends and the next begins; levels are numbered on top.",
        lambda run: bool(over_epochs(run, _train_loss) or over_epochs(run, _validation_loss)),
        _loss,
    ),
    Plot(
        "learning-rate",
        "Learning rate over the whole run",
        "Learning rate at the last step of every epoch, through all levels, mean over seeds.",
        lambda run: bool(over_epochs(run, _rate)),
        _learning_rate,
    ),
    Plot(
        "layers",
        "Density of each layer",
        "Kept fraction of each layer's weight at the last level reached, mean over seeds. Methods "
        "that keep every weight are left out.",
        lambda run: any(density < 1 for density in layer_densities(run).values()),
        _layers,
    ),
    Plot(
        "sign-flips",
        "Sign flips",
        "Of the weights kept at the end of a level, the fraction whose sign differs from the start "
        "of the run (left) and from the end of the previous level (right). Mean over seeds; band: "
        "smallest to largest seed.",
        lambda run: bool(sign_flips(run, "start") or sign_flips(run, "previous")),
        _flips,
    ),
)
