"""The subset-sum solver: exact, equivariant, and as good as the theory says."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.sparse.tickets import expected_error, subset_sum
from tests.oracles.subset_sum import best, smallest_within

METHODS = ["auto", "enumerate", "meet"]


def uniform(*shape, seed=0, low=-1.0):
    draws = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return low + (1 - low) * draws


def sums(candidates, found):
    return (candidates.double() * found.masks).sum(1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 3, 6, 9, 10])
def test_optimum_of_all_subsets(method, count):
    """Oracle: every subset, in exact fractions."""
    candidates, targets = uniform(12, count), 2 * uniform(12, seed=1)
    found = subset_sum(candidates, targets, method)
    for row, target, error in zip(candidates.tolist(), targets.tolist(), found.errors, strict=True):
        assert float(error) == pytest.approx(best(row, target)[0], abs=1e-12)
    assert found.masks.shape == candidates.shape
    assert found.masks.dtype == torch.bool
    assert torch.equal(found.errors, (sums(candidates, found) - targets).abs())


@pytest.mark.parametrize("count", [13, 14])
def test_methods_agree_where_brute_force_is_slow(count):
    candidates, targets = uniform(50, count), uniform(50, seed=1)
    listed, met = (subset_sum(candidates, targets, m) for m in ("enumerate", "meet"))
    torch.testing.assert_close(listed.errors, met.errors, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("tolerance", "max_size"), [(0.05, None), (0.0, None), (0.3, 2), (None, 3)]
)
def test_smallest_subsets_and_largest_sizes(method, tolerance, max_size):
    """Oracle: subsets by rising size, in exact fractions."""
    candidates, targets = uniform(25, 9), uniform(25, seed=1)
    found = subset_sum(candidates, targets, method, tolerance=tolerance, max_size=max_size)
    sizes = range(10 if max_size is None else max_size + 1)
    for k, (row, target) in enumerate(zip(candidates.tolist(), targets.tolist(), strict=True)):
        if tolerance is None:
            error, size = best(row, target, sizes)
        else:
            error, size = smallest_within(row, target, tolerance, sizes)
        assert float(found.errors[k]) == pytest.approx(error, abs=1e-12)
        assert int(found.masks[k].sum()) == size


def test_ties_go_to_the_fewer_members_within_a_tolerance():
    found = subset_sum(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([4.0]), tolerance=0.0)
    assert found.masks.tolist() == [[False, False, False, True]]


def test_more_candidates_never_hurt():
    candidates, targets = uniform(40, 14), 3 * uniform(40, seed=1)
    errors = [subset_sum(candidates[:, :n], targets).errors for n in range(15)]
    assert torch.equal(errors[0], targets.abs())
    for fewer, more in itertools.pairwise(errors):
        assert (more <= fewer + 1e-12).all()
    assert errors[-1].median() < 1e-3 * errors[1].median()


@pytest.mark.parametrize("factor", [2.0**-40, -1.0, 0.3, 2.0**30])
def test_scaling_a_problem_scales_its_solution(factor):
    candidates, targets = uniform(100, 11), uniform(100, seed=1)
    found, scaled = (subset_sum(f * candidates, f * targets) for f in (1.0, factor))
    assert torch.equal(found.masks, scaled.masks)
    torch.testing.assert_close(scaled.errors, abs(factor) * found.errors, rtol=1e-9, atol=1e-16)
    assert torch.equal(found.in_range, scaled.in_range)


def test_a_solution_depends_on_nothing_but_its_own_numbers():
    candidates, targets = uniform(3000, 10), uniform(3000, seed=1)
    together = subset_sum(candidates, targets)
    for k in (0, 1, 1500, 2999):
        alone = subset_sum(candidates[k : k + 1], targets[k : k + 1])
        assert torch.equal(alone.masks[0], together.masks[k])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(subset_sum(candidates[:, order], targets).masks, together.masks[:, order])
    assert torch.equal(subset_sum(candidates, targets).masks, together.masks)


def test_a_target_that_is_a_sub_sum_is_hit():
    candidates, chosen = uniform(50, 12), uniform(50, 12, seed=1) > 0
    found = subset_sum(candidates, (candidates * chosen).sum(1))
    assert found.errors.max() < 1e-14
    assert torch.equal(found.masks, chosen)


def test_zeros_are_no_candidates():
    candidates = uniform(30, 8)
    padded = torch.zeros(30, 20, dtype=torch.float64)
    places = torch.tensor([1, 2, 3, 5, 8, 13, 17, 19])
    padded[:, places] = candidates
    targets = uniform(30, seed=1)
    plain, spread = subset_sum(candidates, targets), subset_sum(padded, targets)
    assert torch.equal(spread.masks[:, places], plain.masks)
    assert spread.masks.sum() == plain.masks.sum()


def test_degenerate_sizes():
    nothing = subset_sum(torch.zeros(3, 0), torch.tensor([0.0, 1.0, -2.0]))
    assert nothing.masks.shape == (3, 0)
    assert nothing.errors.tolist() == [0.0, 1.0, 2.0]
    assert nothing.in_range.tolist() == [True, False, False]
    empty = subset_sum(torch.zeros(0, 5), torch.zeros(0))
    assert empty.masks.shape == (0, 5)
    assert empty.errors.shape == (0,)


def test_range():
    candidates = torch.tensor([[1.0, 2.0, -0.5]] * 6)
    targets = torch.tensor([3.0, 3.01, -0.5, -0.51, 0.0, 100.0])
    found = subset_sum(candidates, targets)
    assert found.in_range.tolist() == [True, False, True, False, True, False]
    assert found.masks[-1].tolist() == [True, True, False]


@pytest.mark.parametrize("law", ["uniform", "products of uniforms", "products of normals"])
@pytest.mark.parametrize("count", [8, 10, 12, 14])
def test_median_error_follows_the_law(law, count):
    """Near the mean of the sums the median is ln 2 times the predicted mean."""
    generator = torch.Generator().manual_seed(count)
    shape = (2, 3000, count)
    if law == "products of normals":
        candidates, moment = torch.randn(shape, generator=generator).double().prod(0), 1.0
    else:
        draws = 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1
        candidates = draws[0] if law == "uniform" else draws.prod(0)
        moment = 1 / 3 if law == "uniform" else 1 / 9
    targets = 2 * torch.rand(3000, generator=generator).double() - 1
    median = float(subset_sum(candidates, targets).errors.median())
    predicted = expected_error(count, moment)
    assert predicted / 3 < median < 3 * predicted
    centred = float(subset_sum(candidates, candidates.sum(1) / 2 + 0.1 * targets).errors.median())
    assert centred == pytest.approx(math.log(2) * predicted, rel=0.25)


def test_sparse_candidates_are_as_good_as_their_number():
    """With candidates that exist with probability p, success depends on n p."""

    def success(count, density):
        alive = uniform(6000, count, seed=count) < 2 * density - 1
        found = subset_sum(uniform(6000, count, seed=1) * alive, uniform(6000, seed=2))
        return float((found.errors <= 0.05).double().mean())

    curves = {size: [success(int(size / p), p) for p in (1.0, 0.5, 0.25)] for size in (2, 4, 6)}
    for dense, *sparse in curves.values():
        assert all(abs(value - dense) < 0.15 for value in sparse)
    assert curves[2][0] + 0.2 < curves[4][0] < curves[6][0] - 0.1


def test_more_candidates_than_are_searched():
    candidates = uniform(200, 60)
    reach = candidates.clamp(min=0).sum(1)
    for share in (-0.3, 0.3, 0.6):
        found = subset_sum(candidates, share * reach, exact=16)
        assert found.errors.median() < 1e-4
        assert found.errors.max() < 1e-3
    beyond = subset_sum(candidates, reach + 1, exact=8)
    assert torch.equal(beyond.masks, candidates > 0)
    assert not beyond.in_range.any()
    few = subset_sum(candidates, candidates.new_zeros(200), exact=8, tolerance=0.05)
    assert few.masks.sum(1).double().mean() < 8


def test_single_precision_is_solved_in_double():
    candidates, targets = uniform(50, 12).float(), uniform(50, seed=1).float()
    found = subset_sum(candidates, targets)
    assert found.errors.dtype == torch.float64
    assert torch.equal(found.masks, subset_sum(candidates.double(), targets.double()).masks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "guess"}, "unknown method 'guess'"),
        ({"targets": torch.zeros(3)}, r"candidates must be \(T, n\)"),
        ({"candidates": torch.zeros(2)}, r"candidates must be \(T, n\)"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"max_size": -1}, "max_size"),
        ({"exact": 0}, "exact"),
        ({"exact": 33}, "exact"),
        ({"max_size": 2, "exact": 3}, "max_size needs rows of at most exact=3"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"candidates": torch.ones(2, 4), "targets": torch.zeros(2)} | change
    with pytest.raises(ValueError, match=message):
        subset_sum(**arguments)


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_numbers_that_are_none_are_refused(value, place):
    candidates, targets = torch.ones(1, 4), torch.ones(1)
    (targets if place == 4 else candidates[0])[place % 4] = value
    with pytest.raises(ValueError, match="finite"):
        subset_sum(candidates, targets)
