"""Grids of learning rates: best and second best, edges, budgets, heat maps."""

import math

import pytest
import torch

from featherweight.federated.tuning import Grid, budgets, grid, half_decades, winners

RATES = (0.01, 0.1, 1.0)


def bowl(client, server):
    """Return a score that is best at client rate 0.1 and server rate 0.1."""
    return 1 - (math.log10(client) + 1) ** 2 / 10 - (math.log10(server) + 1) ** 2 / 20


def test_half_decades():
    assert half_decades(-1, 0.5) == pytest.approx([0.1, 0.1**0.5, 1.0, 10**0.5])
    assert half_decades(0, 0) == [1.0]
    for bad in ((-1, -2), (0, 0.3)):
        with pytest.raises(ValueError, match="multiples of 1/2 in order"):
            half_decades(*bad)


class TestGrid:
    def test_best_and_second(self):
        found = grid(bowl, RATES, (0.001, 0.1, 1.0))
        assert (found.best, found.second) == ((1, 1), (1, 2))
        assert found.score == 1
        assert found.margin == pytest.approx(1 / 20)
        assert found.edges == ()
        assert found.best_server_rates() == [0.1, 0.1, 0.1]

    @pytest.mark.parametrize(
        ("clients", "servers", "edges"),
        [
            ((0.1, 1.0), RATES, ("lowest client rate",)),
            ((0.01, 0.1), RATES, ("highest client rate",)),
            (RATES, (0.1, 1.0), ("lowest server rate",)),
            ((0.1, 1.0), (0.01, 0.1), ("lowest client rate", "highest server rate")),
            ((0.1,), (0.1,), ()),
        ],
    )
    def test_edges(self, clients, servers, edges):
        found = grid(bowl, clients, servers)
        assert found.edges == edges
        assert ("extend the grid" in str(found)) == bool(edges)

    def test_failed_cells_are_last(self):
        scores = {(0.01, 0.1): 0.5, (0.1, 0.1): math.nan, (1.0, 0.1): math.inf}
        found = grid(lambda c, s: scores[c, s], RATES, (0.1,))
        assert found.best == (0, 0)
        assert found.scores.isnan().sum() == 2
        assert found.span(0.1) == 0.0
        assert found.span(0.01) == 0.0

    def test_span_of_a_row(self):
        found = grid(bowl, RATES, (0.001, 0.1, 1.0))
        assert found.span(0.01) == pytest.approx(0.2)
        with pytest.raises(ValueError, match=r"client_rate must be one of .*got 0.5"):
            found.span(0.5)

    def test_one_cell(self):
        found = grid(bowl, (0.1,), (0.1,))
        assert found.second is None
        assert math.isnan(found.margin)

    def test_ties_go_to_the_first(self):
        assert grid(lambda c, s: 0.5, RATES, RATES).ranked[:4] == [(0, 0), (0, 1), (0, 2), (1, 0)]

    @pytest.mark.parametrize(
        ("clients", "servers", "words"),
        [
            ((0.1, 0.01, 1.0), RATES, "client_rates must be positive and ascending"),
            (RATES, (0.1, 0.1, 1.0), "server_rates must be positive and ascending"),
            ((-1.0, 0.0, 1.0), RATES, "client_rates must be positive"),
            (RATES, (0.1, 1.0), r"scores must have shape \(3, 2\)"),
            ((), RATES, "scores must have shape"),
        ],
    )
    def test_refuses(self, clients, servers, words):
        with pytest.raises(ValueError, match=words):
            Grid(clients, servers, torch.zeros(3, 3))

    def test_prints_and_draws(self, tmp_path):
        found = grid(lambda c, s: math.nan if c == s else bowl(c, s), RATES, RATES, "fedavg")
        assert str(found).splitlines()[0] == "fedavg"
        assert len(str(found).splitlines()) == 2 + 3 + 1
        found.plot(tmp_path / "grid.png")
        assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"


class TestBudgets:
    def test_each_budget_has_its_grid_from_one_training_a_cell(self):
        trained = []

        def curve(client, server):
            trained.append((client, server))
            # The large rate is fast and ends low.
            return [min(client * round, 2 - client) for round in range(1, 101)]

        found = budgets(curve, (0.1, 1.0), (1.0,), (2, 100), name="fedavg")
        assert len(trained) == 2
        assert found[2].best == (1, 0)
        assert found[100].best == (0, 0)
        assert found[2].name == "fedavg 2 rounds"

    def test_window(self):
        found = budgets(lambda c, s: [0.0, 1.0, 2.0, 6.0], (0.1,), (1.0,), (3, 4), window=2)
        assert [found[3].score, found[4].score] == [1.5, 4.0]

    @pytest.mark.parametrize(
        ("rounds", "window", "words"),
        [
            ((5,), 1, "at most the 4 of a curve"),
            ((1, 4), 2, "at least window=2"),
            ((3,), 0, ">= 1"),
        ],
    )
    def test_refuses(self, rounds, window, words):
        with pytest.raises(ValueError, match=words):
            budgets(lambda c, s: [0.0] * 4, (0.1,), (1.0,), rounds, window=window)

    def test_winners_may_change(self):
        early, late = (grid(lambda c, s, v=v: v, (0.1,), (1.0,)) for v in (0.4, 0.9))
        steady = grid(lambda c, s: 0.6, (0.1,), (1.0,))
        tuned = {"slow": {10: early, 100: late}, "fast": {10: steady, 100: steady}}
        assert winners(tuned) == {10: ["fast", "slow"], 100: ["slow", "fast"]}
        assert winners({}) == {}
