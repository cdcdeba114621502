"""The representation theorem: widths, Monte Carlo bounds, networks that equal their target."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from featherweight.sparse.tickets import (
    MissingConnectionError,
    connection_probability,
    lower_bound,
    represent,
    source_widths,
)


def mlp(*sizes, seed=0, bias=True):
    torch.manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def inputs_in(lower, upper, count, size, seed=1):
    draws = torch.rand(count, size, generator=torch.Generator().manual_seed(seed)).double()
    return lower + (upper - lower) * draws


@pytest.mark.parametrize(
    ("density", "inputs", "delta", "width"),
    [(0.1, 10, 0.1, 43.26), (0.05, 100, 0.1, 133.66), (0.5, 20, 0.05, 8.61)],
)
def test_lower_bound_golden_values_and_inverse(density, inputs, delta, width):
    bound = lower_bound(inputs, density, delta)
    assert bound == pytest.approx(width, abs=0.005)
    assert connection_probability(bound, inputs, density) == pytest.approx(1 - delta, abs=1e-12)


@pytest.mark.parametrize(("density", "inputs", "delta"), [(0.1, 10, 0.1), (0.5, 20, 0.05)])
def test_monte_carlo_brackets_the_lower_bound(density, inputs, delta):
    generator = torch.Generator().manual_seed(0)
    bound = lower_bound(inputs, density, delta)
    below, above = (
        connection_probability(width, inputs, density)
        for width in (math.floor(bound), math.ceil(bound))
    )
    assert below < 1 - delta <= above
    for width, expected in ((math.floor(bound), below), (math.ceil(bound), above)):
        edges = torch.rand(20_000, width, inputs, generator=generator) < density
        frequency = edges.any(1).all(1).double().mean().item()
        deviation = math.sqrt(expected * (1 - expected) / 20_000)
        assert frequency == pytest.approx(expected, abs=4 * deviation)


def test_below_the_bound_building_fails_more_often_than_delta():
    # One hidden layer of the source sees the inputs through a dense first layer of copies.
    target = mlp(10, 1)
    width, delta = 40, 0.1
    assert width < lower_bound(10, 0.1, delta)
    failures = 0
    for seed in range(400):
        try:
            represent(target, [1.0, 0.1], widths=[10 * width, 1], seed=seed)
        except MissingConnectionError:
            failures += 1
    assert failures / 400 == pytest.approx(1 - connection_probability(width, 10, 0.1), abs=0.06)
    assert failures / 400 > delta


def test_source_widths_golden_value():
    assert source_widths([3, 4, 4, 2], 0.3, 0.1) == [387, 108, 68, 2]


def test_source_widths_against_binomial_tail():
    """Oracle: scipy's binomial tail and a linear search."""
    sizes, densities, delta = [3, 5, 2], [0.2, 0.4, 0.6], 0.05
    second = math.ceil(math.log(3 * 2 * 5 / delta) / -math.log(0.4))
    first = math.ceil(math.log(3 * second * 5 * 3 / delta) / -math.log(0.6))
    tries = first
    while stats.binom.cdf(first - 1, tries, 0.2) > delta / (3 * 3):
        tries += 1
    assert source_widths(sizes, densities, delta) == [3 * tries, 5 * second, 2]


def test_density_one_needs_no_extra_width():
    assert source_widths([3, 4, 2], 1.0, 0.1) == [3, 4, 2]
    assert lower_bound(10, 1.0, 0.1) == 0
    target = mlp(3, 4, 2)
    x = inputs_in(-1, 1, 100, 3)
    built = represent(target, 1.0, seed=0)
    assert all(mask.all() for mask in built.masks.values())
    torch.testing.assert_close(built.source(x), target(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_source_equals_target_and_respects_its_masks(seed):
    target = mlp(3, 4, 4, 2, seed=seed)
    x = inputs_in(-1, 1, 500, 3)
    built = represent(target, 0.3, delta=0.1, seed=seed)
    assert [m.out_features for m in built.source[::2]] == built.widths == [387, 108, 68, 2]
    torch.testing.assert_close(built.source(x), target(x), rtol=0, atol=1e-12)
    weights = dict(built.source.named_parameters())
    assert set(built.masks) == {name for name in weights if name.endswith("weight")}
    for name, mask in built.masks.items():
        assert mask.dtype == torch.bool
        assert not weights[name][~mask].any()
        deviation = 5 * math.sqrt(0.3 * 0.7 / mask.numel())
        assert mask.double().mean().item() == pytest.approx(0.3, abs=deviation)


def test_domain_bounds_and_targets_without_bias():
    target = mlp(2, 3, 1, bias=False)
    x = inputs_in(-5, 20, 500, 2)
    inside = represent(target, [0.5, 0.4, 0.3], lower=-5.0, seed=0).source
    torch.testing.assert_close(inside(x), target(x), rtol=0, atol=1e-12)
    outside = represent(target, [0.5, 0.4, 0.3], lower=-1.0, seed=0).source
    assert (outside(x) - target(x)).abs().max() > 1e-3


def test_a_single_linear_layer_and_zero_weights_need_fewer_edges():
    target = mlp(4, 3)
    with torch.no_grad():
        target[0].weight.zero_()
    x = inputs_in(-1, 1, 20, 4)
    # Nothing is to be connected, so the thinnest source does.
    built = represent(target, [1.0, 1e-6], widths=[4, 3], seed=0)
    torch.testing.assert_close(built.source(x), target(x), rtol=0, atol=1e-12)


def test_failure_names_the_missing_connection():
    target = mlp(3, 4, 2)
    with pytest.raises(MissingConnectionError, match="source layer") as caught:
        represent(target, [1.0, 1e-9, 1.0], widths=[3, 4, 2], seed=0)
    assert (caught.value.layer, caught.value.unit, caught.value.input) == (2, 0, 0)
    with torch.no_grad():  # zero weights need no edge
        target[0].weight[0] = 0
        target[0].weight[1, :2] = 0
    with pytest.raises(MissingConnectionError) as caught:
        represent(target, [1.0, 1e-9, 1.0], widths=[3, 4, 2], seed=0)
    assert (caught.value.layer, caught.value.unit, caught.value.input) == (2, 1, 2)
    with pytest.raises(MissingConnectionError) as caught:
        represent(target, [1.0, 1.0, 1e-9], widths=[3, 4, 2], seed=0)
    assert caught.value.layer == 3


def test_failure_rate_stays_below_delta():
    target, delta, failures = mlp(2, 2, 1), 0.5, 0
    for seed in range(100):
        try:
            represent(target, 0.5, delta=delta, seed=seed)
        except MissingConnectionError:
            failures += 1
    assert failures <= delta * 100


def test_same_seed_same_network():
    target = mlp(2, 3, 1)
    first, again, other = (represent(target, 0.5, seed=s) for s in (3, 3, 4))
    generator = torch.Generator().manual_seed(3)
    drawn = represent(target, 0.5, generator=generator)
    for name, mask in first.masks.items():
        assert torch.equal(mask, again.masks[name])
        assert torch.equal(mask, drawn.masks[name])
    assert not all(torch.equal(m, other.masks[n]) for n, m in first.masks.items())


@given(st.floats().filter(lambda p: not 0 < p <= 1))
@settings(max_examples=30, deadline=None)
def test_bad_densities_are_refused(density):
    target = mlp(2, 1)
    calls = [
        lambda: connection_probability(3, 2, density),
        lambda: lower_bound(2, density, 0.1),
        lambda: source_widths([2, 1], density, 0.1),
        lambda: represent(target, density, seed=0),
        lambda: represent(target, [0.5, density], widths=[2, 1], seed=0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="density"):
            call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": [0.5, 0.5]}, "density must be 3 numbers"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"lower": math.inf}, "lower"),
        ({"widths": [2, 3]}, "widths"),
        ({"widths": [3, 3, 1]}, "widths"),
        ({"widths": [0, 3, 1]}, "widths"),
        ({"widths": [2, 3, 2]}, "widths"),
        ({"target": nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))}, "target"),
        ({"target": nn.Sequential(nn.Linear(2, 3), nn.ReLU())}, "target"),
        ({"target": nn.Sequential()}, "target"),
        ({"seed": None}, "seed"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"target": mlp(2, 3, 1), "density": 0.5, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        represent(**arguments)


def test_bad_theory_arguments_are_refused():
    with pytest.raises(ValueError, match="inputs"):
        lower_bound(0, 0.5, 0.1)
    with pytest.raises(ValueError, match="delta"):
        lower_bound(3, 0.5, 1.5)
    for sizes in ([3], [], [3, 0]):
        with pytest.raises(ValueError, match="target_widths"):
            source_widths(sizes, 0.5, 0.1)
