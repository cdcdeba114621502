"""The pictures of federated runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from featherweight.lab.report.canvas import STYLE, Look, Picture, curve, figure, legend, render
from featherweight.lab.report.federated import (
    COSTS,
    FederatedRun,
    Point,
    validation_accuracy,
)
from featherweight.lab.report.federated import curve as points_of
from featherweight.lab.report.federated_table import time_unit
from featherweight.lab.report.text import scaled

Styled = Sequence[tuple[FederatedRun, Look]]
DISTRIBUTION = (
    ("client_p5", "5th percentile"),
    ("client_p50", "median"),
    ("client_worst10", "mean of the worst 10 %"),
)


def draw(runs: Sequence[FederatedRun]) -> tuple[Picture, ...]:
    """Draw every picture for which the runs hold data, in the order of the page."""
    styled = [(run, Look.of(number)) for number, run in enumerate(runs)]
    with matplotlib.rc_context(STYLE):
        return tuple(
            render(plot.name, plot.title, plot.caption, plot.draw(chosen))
            for plot in PLOTS
            if (chosen := [pair for pair in styled if points_of(pair[0], "rounds", plot.value)])
        )


@dataclass(frozen=True)
class Plot:
    """One kind of picture: what it is called, a value it needs, how it is drawn."""

    name: str
    title: str
    caption: str
    value: Callable[[Point], float | None]
    draw: Callable[[Styled], Figure]


def _train_loss(point: Point) -> float | None:
    return point.train_loss


def _named(name: str) -> Callable[[Point], float | None]:
    return lambda point: point.validation.get(name)


def _costs(styled: Styled, value: Callable[[Point], float | None], label: str) -> Figure:
    drawn = figure(5.6)
    panels = drawn.subplots(2, 2, sharey=True).flat
    for axes, (axis, words) in zip(panels, COSTS.items(), strict=True):
        curves = [points_of(run, axis, value) for run, _ in styled]
        size = _cost_axis(axes, axis, words, max(x for points in curves for x in points.x))
        for points, (_, look) in zip(curves, styled, strict=True):
            scaled_points = replace(points, x=tuple(x / size for x in points.x))
            curve(axes, scaled_points, Look(look.colour, "", look.dash))
        axes.set_xlim(left=0)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(label)
    if "accuracy" in label:
        panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    _legend(drawn, styled)
    return drawn


def _cost_axis(axes: Axes, axis: str, words: str, largest: float) -> float:
    """Label an axis of cost; return what costs are divided by on it."""
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=axis == "rounds"))
    if axis == "seconds":
        unit, size = time_unit(largest)
        axes.set_xlabel(f"{words} ({unit})")
        return size
    axes.set_xlabel(words)
    if axis != "rounds":
        unit = "B" if axis == "bytes" else ""
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scaled(value, unit)))
    return 1.0


def _clients(styled: Styled) -> Figure:
    drawn = figure(3.4)
    panels = drawn.subplots(1, len(DISTRIBUTION), sharey=True)
    for axes, (name, words) in zip(panels, DISTRIBUTION, strict=True):
        for run, look in styled:
            curve(axes, points_of(run, "rounds", _named(name)), Look(look.colour, "", look.dash))
        axes.set_title(words)
        axes.set_xlabel("rounds")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None, symbol=" %"))
    panels[0].set_ylabel("validation accuracy")
    _legend(drawn, styled)
    return drawn


def _legend(drawn: Figure, styled: Styled) -> None:
    looks = [Look(look.colour, "", look.dash) for _, look in styled]
    legend(drawn, [run.name for run, _ in styled], looks)


PLOTS = (
    Plot(
        "federated-accuracy",
        "Accuracy against four costs",
        "Pooled validation accuracy after rounds, bytes in both directions, examples whose "
        "gradients were computed, and the estimated time on devices. Which recipe is ahead can "
        "differ from panel to panel. Line: mean over seeds; band: smallest to largest seed.",
        validation_accuracy,
        lambda styled: _costs(styled, validation_accuracy, "validation accuracy"),
    ),
    Plot(
        "federated-loss",
        "Training loss against four costs",
        "Mean loss of the clients over their local steps, since the evaluation before. Line: mean "
        "over seeds; band: smallest to largest seed.",
        _train_loss,
        lambda styled: _costs(styled, _train_loss, "training loss"),
    ),
    Plot(
        "federated-clients",
        "Accuracy of clients",
        "Validation accuracy over clients: low percentile, median, and mean of the worst tenth. "
        "Line: mean over seeds; band: smallest to largest seed.",
        _named("client_p50"),
        _clients,
    ),
)
