"""Density rules: golden values of the published formulas, exactness, defining properties."""

import itertools
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.sparse import DENSITIES, Masks, allocate, kept_counts
from featherweight.sparse.density import balanced_sequential, erk, waterfill
from tests.oracles.shapes import shapes

NETS = ["resnet20", "resnet18", "vgg16"]
SIZES = {"resnet20": (270_896, 22), "resnet18": (11_164_352, 21), "vgg16": (14_715_584, 14)}

# net, asked density, then what the published formulas really keep
GOLDEN = [
    ("resnet20", 0.5, 0.42059, 0.33145, 0.45205, 11, 16),
    ("resnet20", 0.1, 0.09674, 0.09221, 0.09712, 2, 3),
    ("resnet18", 0.5, 0.38862, 0.26593, 0.42058, 14, 17),
    ("resnet18", 0.1, 0.09161, 0.07939, 0.09319, 4, 8),
    ("resnet18", 0.05, 0.04709, 0.04420, 0.04762, 3, 3),
    ("resnet18", 0.01, 0.00990, 0.00966, 0.00995, 1, 2),
    ("vgg16", 0.5, 0.44558, 0.32376, 0.43160, 6, 8),
    ("vgg16", 0.1, 0.09350, 0.07941, 0.09091, 2, 4),
    ("vgg16", 0.01, 0.00974, 0.00904, 0.00955, 1, 2),
]
ROOTS = [
    ("resnet20", 0.1, 0.8516399),
    ("resnet20", 0.01, 0.6120857),
    ("resnet18", 0.1, 0.8620409),
    ("resnet18", 0.01, 0.6983803),
    ("vgg16", 0.1, 0.7837427),
    ("vgg16", 0.01, 0.5761842),
]


def overall(net, densities):
    sizes = {name: prod(shape) for name, shape in shapes(net).items()}
    return sum(densities[name] * size for name, size in sizes.items()) / sum(sizes.values())


@pytest.mark.parametrize("net", NETS)
def test_networks_have_the_published_sizes(net):
    found = shapes(net)
    assert (sum(map(prod, found.values())), len(found)) == SIZES[net]


@pytest.mark.parametrize(("net", "asked", "erk", "balanced", "sequential", "_d", "_e"), GOLDEN)
def test_legacy_formulas_miss_as_published(net, asked, erk, balanced, sequential, _d, _e):
    assert overall(net, allocate(shapes(net), asked, "erk", legacy=True)) == pytest.approx(
        erk, abs=5.1e-6
    )
    assert overall(net, allocate(shapes(net), asked, "balanced", legacy=True)) == pytest.approx(
        balanced, abs=5.1e-6
    )
    assert overall(net, balanced_sequential(shapes(net), asked)) == pytest.approx(
        sequential, abs=5.1e-6
    )


@pytest.mark.parametrize(("net", "asked", "_a", "_b", "_c", "erk", "balanced"), GOLDEN)
def test_number_of_dense_layers(net, asked, _a, _b, _c, erk, balanced):
    for rule, dense in (("erk", erk), ("balanced", balanced)):
        found = allocate(shapes(net), asked, rule)
        assert sum(density >= 1 - 1e-12 for density in found.values()) == dense


@pytest.mark.parametrize(("net", "asked", "root"), ROOTS)
def test_pyramidal_root(net, asked, root):
    found = list(allocate(shapes(net), asked, "pyramidal").values())
    assert found[0] == pytest.approx(root, abs=1e-7)
    for before, after in itertools.pairwise(found):
        assert after / before == pytest.approx(found[0], rel=1e-12)


def test_vgg_densities_layer_by_layer():
    erk = [1, 0.67022, 0.49516, 0.32761, 0.24383, 0.16193, 0.16193, 0.12098, *[0.08049] * 5, 1]
    balanced = [1, 1, 1, 0.91832, 0.45916, 0.22958, 0.22958, 0.11479, *[0.0574] * 5, 1]
    for rule, golden in (("erk", erk), ("balanced", balanced)):
        found = list(allocate(shapes("vgg16"), 0.1, rule).values())
        assert found == pytest.approx(golden, abs=6e-6)


@pytest.mark.parametrize("rule", list(DENSITIES))
@given(density=st.floats(1e-3, 1.0), data=st.data())
def test_every_rule_meets_the_density(rule, density, data):
    dims = st.tuples(st.integers(1, 40), st.integers(1, 40))
    found = {f"l{i}": s for i, s in enumerate(data.draw(st.lists(dims, min_size=1, max_size=6)))}
    densities = allocate(found, density, rule)
    size = sum(map(prod, found.values()))
    assert all(0 <= d <= 1 for d in densities.values())
    assert sum(d * prod(found[n]) for n, d in densities.items()) == pytest.approx(
        density * size, abs=1e-9 * size
    )
    counts = kept_counts(densities, found, round(density * size))
    assert sum(counts.values()) == round(density * size)
    for name, count in counts.items():
        assert abs(count - densities[name] * prod(found[name])) <= 1


@pytest.mark.parametrize("rule", list(DENSITIES))
def test_density_one_is_dense(rule):
    assert set(allocate(shapes("resnet20"), 1.0, rule).values()) == {1.0}


@pytest.mark.parametrize("rule", list(DENSITIES))
@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_densities_outside_are_refused(rule, density):
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\]"):
        allocate(shapes("resnet20"), density, rule)


def test_erk_keeps_proportions_below_saturation():
    found, doubled = (allocate(shapes("vgg16"), d, "erk") for d in (0.001, 0.002))
    for name in found:
        assert doubled[name] == pytest.approx(2 * found[name], rel=1e-9)
    found = allocate(shapes("vgg16"), 0.1, "erk")
    ratios = {n: found[n] * prod(s) / sum(s) for n, s in shapes("vgg16").items() if found[n] < 1}
    assert max(ratios.values()) == pytest.approx(min(ratios.values()), rel=1e-12)


def test_erk_of_power_zero_is_uniform():
    found = erk(shapes("resnet20"), 0.1, power=0.0)
    assert list(found.values()) == pytest.approx([0.1] * 22, rel=1e-12)


def test_balanced_layers_keep_the_same_number():
    found = shapes("resnet18")
    counts = kept_counts(allocate(found, 0.1, "balanced"), found)
    open_layers = {n: c for n, c in counts.items() if c < prod(found[n])}
    assert max(open_layers.values()) - min(open_layers.values()) <= 1
    assert all(prod(found[n]) <= max(open_layers.values()) for n in counts if n not in open_layers)


def test_er_ignores_the_kernel():
    kernel = {"a": (8, 4, 3, 3), "b": (4, 8)}
    found = allocate(kernel, 0.1, "er")
    assert found["a"] == pytest.approx(found["b"])  # 12/32 both
    assert allocate(kernel, 0.1, "erk")["a"] < allocate(kernel, 0.1, "erk")["b"]


def test_profile_of_other_masks():
    shape = {"a": (10, 10), "b": (10, 10)}
    other = Masks({"a": torch.ones(10, 10).bool(), "b": torch.eye(10).bool()})
    assert allocate(shape, 0.11, other) == pytest.approx({"a": 0.2, "b": 0.02})
    assert allocate(shape, 0.75, other) == pytest.approx({"a": 1.0, "b": 0.5})  # clipped, handed on
    assert allocate(shape, 0.1, {"a": 3.0, "b": 1.0}) == pytest.approx({"a": 0.15, "b": 0.05})


@given(st.data())
def test_waterfill_against_bisection(data):
    n = data.draw(st.integers(1, 6))
    positive = st.floats(1e-3, 1e3)
    priorities = {i: data.draw(positive) for i in range(n)}
    capacities = {i: data.draw(positive) for i in range(n)}
    budget = data.draw(st.floats(0, 1)) * sum(capacities.values())
    low, high = 0.0, 1e6
    for _ in range(200):
        scale = (low + high) / 2
        total = sum(c * min(1, scale * priorities[i]) for i, c in capacities.items())
        low, high = (scale, high) if total < budget else (low, scale)
    oracle = {i: c * min(1, high * priorities[i]) for i, c in capacities.items()}
    found = waterfill(priorities, capacities, budget)
    assert found == pytest.approx(oracle, rel=1e-6, abs=1e-9 * sum(capacities.values()))


def test_waterfill_refuses():
    with pytest.raises(ValueError, match="budget"):
        waterfill({"a": 1.0}, {"a": 2.0}, 3.0)
    with pytest.raises(ValueError, match="negative"):
        waterfill({"a": -1.0}, {"a": 2.0}, 1.0)


def test_support_too_small_passes_the_surplus_on():
    shape = {"a": (10, 10), "b": (10, 10)}
    support = {"a": torch.eye(10).bool(), "b": torch.ones(10, 10).bool()}
    assert kept_counts({"a": 0.5, "b": 0.25}, shape, support=support) == {"a": 10, "b": 65}
    with pytest.raises(ValueError, match="support holds 110"):
        kept_counts({"a": 0.5, "b": 0.9}, shape, support=support)


def test_the_largest_remainders_are_rounded_up():
    shape = {"a": (10,), "b": (10,), "c": (10,)}
    assert kept_counts({"a": 0.24, "b": 0.26, "c": 0.2}, shape, 7) == {"a": 2, "b": 3, "c": 2}
    assert kept_counts({"a": 0.25, "b": 0.25, "c": 0.2}, shape, 7) == {"a": 3, "b": 2, "c": 2}


def test_unknown_rule_and_names():
    with pytest.raises(ValueError, match=r"unknown density rule 'erkk': did you mean 'erk'\?"):
        allocate(shapes("vgg16"), 0.1, "erkk")
    with pytest.raises(ValueError, match="'c' is only in one"):
        allocate({"a": (2, 2)}, 0.5, {"a": 1.0, "c": 1.0})
