"""Client and server learning rates tuned together: the grid, its best cells, its edges."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Cell = tuple[int, int]


def half_decades(low: float, high: float) -> list[float]:
    """Return 10 ** x for x = low, low + 1/2, ..., high: the guide's grids.

    Args:
        low: decimal exponent, a multiple of 1/2.
        high: the same, not below ``low``.

    Raises:
        ValueError: an exponent is no multiple of 1/2, or ``high`` is below ``low``.
    """
    if (2 * low) % 1 or (2 * high) % 1 or high < low:
        raise ValueError(f"low and high must be multiples of 1/2 in order, got {low} and {high}")
    return [10 ** (k / 2) for k in range(round(2 * low), round(2 * high) + 1)]


@dataclass(frozen=True, eq=False)
class Grid:
    """Scores of a joint grid; larger is better.

    Attributes:
        client_rates: of the rows, ascending.
        server_rates: of the columns, ascending.
        scores: float64 [rows, columns]; NaN where training failed.
        name: of what was tuned, for titles.
    """

    client_rates: tuple[float, ...]
    server_rates: tuple[float, ...]
    scores: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        shape = (len(self.client_rates), len(self.server_rates))
        if tuple(self.scores.shape) != shape or not all(shape):
            raise ValueError(f"scores must have shape {shape}, got {tuple(self.scores.shape)}")
        for name in ("client_rates", "server_rates"):
            rates = getattr(self, name)
            if sorted(set(rates)) != list(rates) or rates[0] <= 0:
                raise ValueError(f"{name} must be positive and ascending, got {list(rates)}")

    @property
    def ranked(self) -> list[Cell]:
        """Row and column of all cells, best first; failed ones last."""
        order = self.scores.nan_to_num(-math.inf).flatten().argsort(descending=True, stable=True)
        columns = len(self.server_rates)
        return [divmod(int(place), columns) for place in order]

    @property
    def best(self) -> Cell:
        """Row and column of the best cell."""
        return self.ranked[0]

    @property
    def second(self) -> Cell | None:
        """Row and column of the second best; None in a grid of one cell."""
        return self.ranked[1] if self.scores.numel() > 1 else None

    @property
    def score(self) -> float:
        """The best score."""
        return float(self.scores[self.best])

    @property
    def margin(self) -> float:
        """Best score minus second best; NaN without a second."""
        return math.nan if self.second is None else self.score - float(self.scores[self.second])

    @property
    def edges(self) -> tuple[str, ...]:
        """At which ends of the grid the best cell lies; empty: inside. A rate not varied has none.

        A best cell at an edge means that the grid should be extended there.
        """
        row, column = self.best
        found = []
        for name, place, count in (
            ("client", row, len(self.client_rates)),
            ("server", column, len(self.server_rates)),
        ):
            if count > 1 and place in (0, count - 1):
                found.append(f"{'lowest' if place == 0 else 'highest'} {name} rate")
        return tuple(found)

    def span(self, client_rate: float) -> float:
        """Return largest minus smallest score in a row; a failed cell counts as 0.

        Raises:
            ValueError: the grid has no such row.
        """
        near = [math.isclose(rate, client_rate, rel_tol=1e-6) for rate in self.client_rates]
        if not any(near):
            raise ValueError(
                f"client_rate must be one of {list(self.client_rates)}, got {client_rate}"
            )
        row = self.scores[near.index(True)].nan_to_num(0.0)
        return float(row.max() - row.min())

    def best_server_rates(self) -> list[float]:
        """Return the best server rate for each client rate."""
        columns = self.scores.nan_to_num(-math.inf).argmax(1)
        return [self.server_rates[int(column)] for column in columns]

    def __str__(self) -> str:
        row, column = self.best
        edge = f"; at the {' and the '.join(self.edges)}: extend the grid" if self.edges else ""
        lines = [
            "client\\server " + " ".join(f"{rate:>8.3g}" for rate in self.server_rates),
            *(
                f"{rate:>13.3g} " + " ".join(f"{score:>8.3g}" for score in scores.tolist())
                for rate, scores in zip(self.client_rates, self.scores, strict=True)
            ),
            f"best {self.score:.4g} at client rate {self.client_rates[row]:.3g}, server rate "
            f"{self.server_rates[column]:.3g}{edge}",
        ]
        return "\n".join([self.name, *lines] if self.name else lines)

    def plot(self, path: str | Path) -> None:
        """Write a heat map; the best cell is framed, the second best framed thinly.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure = _figure()
        draw(figure.subplots(), self)
        figure.savefig(path)


def grid(
    score: Callable[[float, float], float],
    client_rates: Sequence[float],
    server_rates: Sequence[float],
    name: str = "",
) -> Grid:
    """Score every pair of rates.

    Args:
        score: of (client rate, server rate); NaN or inf: training failed.
        client_rates: of the rows, ascending.
        server_rates: of the columns, ascending.
        name: of what is tuned.
    """
    table = [[float(score(client, server)) for server in server_rates] for client in client_rates]
    scores = torch.tensor(table, dtype=torch.float64)
    failed = scores.where(scores.isfinite(), math.nan)
    return Grid(tuple(client_rates), tuple(server_rates), failed, name)


def budgets(
    curve: Callable[[float, float], Sequence[float]],
    client_rates: Sequence[float],
    server_rates: Sequence[float],
    rounds: Sequence[int],
    *,
    window: int = 1,
    name: str = "",
) -> dict[int, Grid]:
    """Tune for several budgets of rounds from one training a cell.

    Args:
        curve: of (client rate, server rate) to the score after each round, from the first.
        client_rates: of the rows, ascending.
        server_rates: of the columns, ascending.
        rounds: budgets, each at most the length of the curves and at least ``window``.
        window: the score for a budget is the mean over so many last rounds of it.
        name: of what is tuned.

    Returns:
        For each budget its grid: the best rates for little communication need not be those for
        much.

    Raises:
        ValueError: a curve is shorter than a budget, or a budget than the window.
    """
    if window < 1 or min(rounds) < window:
        raise ValueError(f"rounds must be at least window={window} >= 1, got {list(rounds)}")
    table = {(c, s): list(curve(c, s)) for c in client_rates for s in server_rates}
    shortest = min(map(len, table.values()))
    if shortest < max(rounds):
        raise ValueError(f"rounds must be at most the {shortest} of a curve, got {max(rounds)}")

    def at(budget: int) -> Callable[[float, float], float]:
        return lambda c, s: sum(table[c, s][budget - window : budget]) / window

    return {
        budget: grid(at(budget), client_rates, server_rates, f"{name} {budget} rounds".strip())
        for budget in rounds
    }


def winners(tuned: Mapping[str, Mapping[int, Grid]]) -> dict[int, list[str]]:
    """Rank methods at each budget, each at its own best rates.

    Args:
        tuned: method to budget to grid, as of `budgets`.

    Returns:
        Budget to names, best first. Where the order changes between budgets, there is no answer to
        which method is best.
    """
    common = set.intersection(*(set(grids) for grids in tuned.values())) if tuned else set()
    return {
        budget: sorted(tuned, key=lambda name: -tuned[name][budget].score)
        for budget in sorted(common)
    }


def draw(axes: Any, grid: Grid, colours: str = "viridis") -> None:
    """Draw a heat map on matplotlib axes; scores are shown as they are, with two decimals.

    Args:
        axes: to draw on.
        grid: what.
        colours: name of a colour map.
    """
    image = axes.imshow(grid.scores.numpy(), cmap=colours, origin="lower", aspect="auto")
    middle = sum(image.get_clim()) / 2
    for row in range(len(grid.client_rates)):
        for column in range(len(grid.server_rates)):
            value = float(grid.scores[row, column])
            ink = "black" if value > middle else "white"
            text = "–" if math.isnan(value) else f"{value:.2f}"
            ink = "black" if math.isnan(value) else ink
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8)
    for cell, width in ((grid.best, 2.5), (grid.second, 1.0)):
        if cell is not None:
            corner = (cell[1] - 0.5, cell[0] - 0.5)
            axes.add_patch(_rectangle(corner, width))
    axes.set_xticks(range(len(grid.server_rates)), [f"{r:.3g}" for r in grid.server_rates])
    axes.set_yticks(range(len(grid.client_rates)), [f"{r:.3g}" for r in grid.client_rates])
    axes.set_xlabel("server learning rate")
    axes.set_ylabel("client learning rate")
    axes.set_title(grid.name + (" (best at an edge)" if grid.edges else ""))
    axes.grid(False)


def _rectangle(corner: tuple[float, float], width: float) -> Any:
    patches = importlib.import_module("matplotlib.patches")
    return patches.Rectangle(corner, 1, 1, fill=False, edgecolor="#d55e00", linewidth=width)


def _figure() -> Any:
    try:
        module = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'featherweight[lab]'") from error
    return module.Figure(figsize=(6, 4.5), layout="constrained")
