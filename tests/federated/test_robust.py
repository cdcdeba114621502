import statistics
from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.federated import robust
from featherweight.federated.algorithms import FedAvg
from featherweight.federated.codecs.identity import Identity
from featherweight.federated.local import Local
from featherweight.federated.robust import AGGREGATORS
from featherweight.federated.sampling import Everyone
from featherweight.federated.simulate import simulate
from tests.federated.networks import SIZES, digits_like, network

HONEST = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ONES = torch.ones(9, dtype=torch.float64)
ROBUST = {
    "median": robust.median,
    "trimmed-mean": partial(robust.trimmed_mean, trim=0.25),
    "krum": partial(robust.krum, byzantine=2),
    "multi-krum": partial(robust.multi_krum, byzantine=2),
    "clipped-mean": partial(robust.clipped_mean, norm=1.0),
    "geometric-median": robust.geometric_median,
}


def test_every_robust_aggregator_is_tried_here():
    assert {"mean", *ROBUST} == set(AGGREGATORS)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_median_is_that_of_each_coordinate(count):
    vectors = HONEST[:count]
    expected = [statistics.median(column) for column in vectors.T.tolist()]
    assert robust.median(vectors, ONES[:count]).tolist() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("trim", "cut"), [(0.0, 0), (0.1, 0), (0.25, 2), (0.34, 3), (0.49, 4)])
def test_trimmed_mean_cuts_the_floor_of_trim_n(trim, cut):
    columns = [sorted(column)[cut : 9 - cut] for column in HONEST.T.tolist()]
    expected = [statistics.fmean(column) for column in columns]
    found = robust.trimmed_mean(HONEST, ONES, trim=trim)
    assert found.tolist() == pytest.approx(expected, rel=1e-13)


def test_trimmed_mean_cuts_29_of_100_at_0_29():
    vectors = torch.arange(100.0)[:, None].square()
    expected = vectors[29:71].mean()
    assert robust.trimmed_mean(vectors, torch.ones(100), trim=0.29).item() == expected


@pytest.mark.parametrize("byzantine", [0, 1, 3])
def test_krum_scores_are_the_least_sums_over_all_choices_of_neighbours(byzantine):
    found = robust.krum_scores(HONEST, byzantine)
    for i, score in enumerate(found.tolist()):
        distances = [float((HONEST[i] - HONEST[j]).square().sum()) for j in range(9) if j != i]
        least = min(sum(chosen) for chosen in combinations(distances, 9 - byzantine - 2))
        assert score == pytest.approx(least, rel=1e-12)
    assert torch.equal(robust.krum(HONEST, ONES, byzantine=byzantine), HONEST[found.argmin()])


def test_multi_krum_of_one_is_krum_and_of_all_the_mean():
    one = robust.multi_krum(HONEST, ONES, byzantine=2, keep=1)
    assert torch.equal(one, robust.krum(HONEST, ONES, byzantine=2))
    every = robust.multi_krum(HONEST, ONES, byzantine=2, keep=9)
    torch.testing.assert_close(every, HONEST.mean(0))
    best = robust.krum_scores(HONEST, 2).argsort()[:5]
    default = robust.multi_krum(HONEST, ONES, byzantine=2)
    torch.testing.assert_close(default, HONEST[best].mean(0))


def test_krum_tells_close_vectors_apart_far_from_zero():
    vectors = 1e4 + 1e-2 * HONEST.float()
    exact = robust.krum_scores(vectors.double(), 2)
    torch.testing.assert_close(robust.krum_scores(vectors, 2).double(), exact, rtol=1e-3, atol=0)


def test_clipped_mean_scales_long_vectors_alone():
    norms = HONEST.norm(dim=1)
    bound = float(norms.median())
    expected = sum(v * min(1.0, bound / n) for v, n in zip(HONEST, norms.tolist(), strict=True)) / 9
    torch.testing.assert_close(robust.clipped_mean(HONEST, ONES, norm=bound), expected)
    kept = robust.clip_to(HONEST, bound)[norms <= bound]
    assert torch.equal(kept, HONEST[norms <= bound])
    infinite = robust.clipped_mean(HONEST, ONES, norm=float("inf"))
    torch.testing.assert_close(infinite, HONEST.mean(0))


def test_geometric_median_has_unit_pulls_that_cancel():
    weights = torch.arange(1.0, 10.0).double()
    found = robust.geometric_median(HONEST, weights, iterations=2000)
    away = HONEST - found
    pull = (weights[:, None] * away / away.norm(dim=1, keepdim=True)).sum(0)
    assert pull.norm() < 1e-6 * weights.sum()


def test_mean_is_weighted():
    weights = torch.tensor([1.0, 3.0])
    found = robust.mean(torch.tensor([[0.0], [4.0]]), weights)
    assert found.item() == 3.0


@pytest.mark.parametrize("name", ROBUST)
@given(scale=st.floats(-1e9, 1e9), order=st.permutations(range(9)))
@settings(max_examples=25, deadline=None)
def test_two_liars_of_nine_move_it_no_farther_than_the_honest_spread(name, scale, order):
    vectors = HONEST.clone()
    vectors[:2] = scale
    found = ROBUST[name](vectors, ONES)
    assert (found - HONEST[2:].mean(0)).norm() < 3 * HONEST.norm(dim=1).max()
    torch.testing.assert_close(
        ROBUST[name](vectors[list(order)], ONES), found, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("name", ROBUST)
@given(weights=st.lists(st.floats(0.1, 1e6), min_size=9, max_size=9))
@settings(max_examples=10, deadline=None)
def test_counting_aggregators_ignore_the_weights_that_clients_claim(name, weights):
    claimed = torch.tensor(weights, dtype=torch.float64)
    if name not in ("clipped-mean", "geometric-median"):
        assert torch.equal(ROBUST[name](HONEST, claimed), ROBUST[name](HONEST, ONES))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (partial(robust.trimmed_mean, trim=0.5), r"trim must lie in \[0, 0.5\), got 0.5"),
        (partial(robust.trimmed_mean, trim=-0.1), "trim"),
        (partial(robust.krum, byzantine=4), "got 4 with n = 9 clients"),
        (partial(robust.krum, byzantine=-1), "byzantine"),
        (partial(robust.multi_krum, keep=0), "keep must lie in"),
        (partial(robust.multi_krum, keep=10), "keep must lie in"),
        (partial(robust.clipped_mean, norm=0.0), "norm must be above 0, got 0"),
        (partial(robust.geometric_median, iterations=0), "iterations"),
        (partial(robust.geometric_median, smoothing=0.0), "smoothing"),
    ],
)
def test_refuses_a_bad_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call(HONEST, ONES)


def poisoned(aggregator, codec=None):
    """Run rounds in which two of six clients have inputs of another scale."""
    population = digits_like()
    for client in population.clients[:2]:
        population.inputs[client] *= -30
    simulation = simulate(
        network(),
        population,
        FedAvg(),
        sampler=Everyone(len(SIZES)),
        local=Local(steps=3, learning_rate=0.1),
        aggregator=aggregator,
        codec=codec,
        weighting="uniform",
    )
    for _ in simulation.rounds(3):
        pass
    return simulation.weights


def test_simulation_aggregates_by_name_and_by_function_with_and_without_codec():
    assert torch.equal(poisoned("mean"), poisoned(None))
    by_name = poisoned("median")
    assert torch.equal(by_name, poisoned(robust.median))
    assert torch.equal(by_name, poisoned("median", Identity()))
    assert (by_name - poisoned(None)).norm() > 0.1
    with pytest.raises(ValueError, match="unknown aggregator 'medain': did you mean 'median'"):
        poisoned("medain")
