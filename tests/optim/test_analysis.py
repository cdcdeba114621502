"""Measurements of which weights move, on cases whose answer is known."""

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from featherweight.optim import analysis
from featherweight.optim.nanoadam import NanoAdam


def draws(number, seed=0):
    return torch.randn(number, generator=torch.Generator().manual_seed(seed))


# Relation of weights and gradients


def test_large_gradients_on_small_weights_are_found():
    weights = draws(20_000)
    found = analysis.relation(weights, 1 / weights.abs(), permutations=49, seed=0)
    assert found.ratio < 1e-3
    assert found.p_value == 1 / 50
    assert found.rank_correlation == pytest.approx(-1.0)


def test_independent_gradients_give_the_median_over_the_largest():
    weights, gradients = draws(200_000), draws(200_000, 1)
    found = analysis.relation(weights, gradients, top=0.01, seed=0)
    expected = float(weights.abs().median() / weights.abs().max())
    assert found.ratio == pytest.approx(expected, rel=0.1)
    assert sum(found.null) / len(found.null) == pytest.approx(expected, rel=0.1)
    assert 0.02 < found.p_value < 0.98
    assert abs(found.rank_correlation) < 0.01
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(2))
    assert analysis.relation(uniform, gradients, top=0.01, seed=0).ratio == pytest.approx(
        0.5, abs=0.03
    )


def test_the_ratio_on_a_case_by_hand():
    weights = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0]])
    gradients = torch.tensor([[9.0, -8.0, 7.0, 1.0, 0.0]])
    found = analysis.relation(weights, gradients, top=0.4, bottom=0.6, permutations=0, seed=0)
    assert found.ratio == 1.5 / 5.0  # the median of 1 and 2 over the largest of 3, 4, 5
    assert found.null == ()
    assert found.p_value == 1.0


def test_ranks_share_ties_as_scipy_does():
    weights, gradients = draws(500).round(), draws(500, 1).round(decimals=1)
    found = analysis.relation(weights, gradients, permutations=0, seed=0)
    expected = spearmanr(weights.abs(), gradients.abs()).statistic
    assert found.rank_correlation == pytest.approx(expected, abs=1e-12)


def test_the_null_is_that_of_its_seed():
    one, two = draws(1000), draws(1000, 1)
    first = analysis.relation(one, two, seed=3)
    assert first == analysis.relation(one, two, seed=3)
    assert first.null != analysis.relation(one, two, seed=4).null
    assert list(first.null) == sorted(first.null)
    assert len(first.null) == 99


@pytest.mark.parametrize(("options", "message"), [
    ({"top": 0.0}, r"top must lie in \(0, 1\], got 0.0"),
    ({"bottom": 1.5}, "bottom must lie"),
    ({"permutations": -1}, "permutations must be at least 0"),
])  # fmt: skip
def test_bad_options_of_relation(options, message):
    with pytest.raises(ValueError, match=message):
        analysis.relation(draws(10), draws(10), seed=0, **options)


def test_relation_wants_one_shape():
    with pytest.raises(ValueError, match="must have one shape"):
        analysis.relation(draws(10), draws(11), seed=0)
    with pytest.raises(ValueError, match="exactly one of seed= and generator="):
        analysis.relation(draws(10), draws(10))


# Masks over time


def test_history_of_masks():
    parameter = nn.Parameter(torch.arange(1.0, 101.0))
    small = nn.Parameter(torch.ones(3))
    optimizer = NanoAdam([parameter, small], lr=0.0, density=0.1, min_size=10, mask_interval=1)
    history = analysis.MaskHistory(optimizer)
    assert history.ever == 0.0
    for shift in (0, 0, 5, 50):
        with torch.no_grad():
            parameter.copy_((torch.arange(100) - shift) % 100 + 1.0)
        parameter.grad, small.grad = torch.ones(100), torch.ones(3)
        optimizer.step()
        history.look()
    assert history.overlaps == (1.0, 0.5, 0.0)
    assert history.ever == 0.25  # 0..9, 5..14, 50..59


def test_expanded_state_of_what_has_none_is_refused():
    optimizer = NanoAdam([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="has no state"):
        optimizer.expand(optimizer.param_groups[0]["params"][0])


def test_expanded_state_of_what_is_trained_whole():
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = NanoAdam([parameter])
    for _ in range(4):
        parameter.grad = torch.ones(2, 3)
        optimizer.step()
    state = optimizer.expand(parameter)
    assert state["selected"].all()
    assert (state["age"] == 4).all()
    assert torch.equal(state["exp_avg"], optimizer.state[parameter]["exp_avg"])


# Before and after

BEFORE = {"w": torch.tensor([1.0, -2.0, 0.0, 4.0, -5.0]), "n": torch.tensor(3)}
AFTER = {"w": torch.tensor([-1.0, -2.0, 1.0, 0.0, 6.0]), "n": torch.tensor(4)}


def test_touched_weights():
    assert analysis.touched(BEFORE, AFTER) == {"w": 0.8}


def test_flipped_signs():
    assert analysis.sign_flips(BEFORE, AFTER) == {"w": 0.4}


def test_shift_by_size():
    small, medium, large = analysis.shift_by_size(BEFORE, AFTER, 0.2)["w"]
    assert (small, large) == (1.0, 11.0)
    assert medium == pytest.approx((2 + 0 + 4) / 3)
    assert math.isnan(analysis.shift_by_size(BEFORE, AFTER, 0.01)["w"][0])
    with pytest.raises(ValueError, match="fraction must lie"):
        analysis.shift_by_size(BEFORE, AFTER, 0.6)


@pytest.mark.parametrize("measure", [
    analysis.touched, analysis.sign_flips, analysis.shift_by_size
])  # fmt: skip
def test_states_must_fit(measure):
    with pytest.raises(ValueError, match="only one has 'x'"):
        measure(BEFORE, AFTER | {"x": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'w': shape \(5,\) before, \(4,\) after"):
        measure(BEFORE, AFTER | {"w": torch.ones(4)})


def test_forgetting():
    assert analysis.forgetting([[99.66], [96.9, 97.7]]) == pytest.approx(2.76)
    # the best of each earlier task before the last one was learnt
    rows = [[90.0], [92.0, 80.0], [85.0, 82.0, 70.0]]
    assert analysis.forgetting(rows) == pytest.approx(((92 - 85) + (80 - 82)) / 2)
    with pytest.raises(ValueError, match="two tasks or more, got 1"):
        analysis.forgetting([[1.0]])
    with pytest.raises(ValueError, match=r"accuracies\[1\] must hold 2 numbers, got 1"):
        analysis.forgetting([[1.0], [1.0]])


def test_bytes_of_any_optimizer():
    parameter = nn.Parameter(torch.ones(100))
    optimizer = torch.optim.AdamW([parameter])
    assert analysis.state_bytes(optimizer) == 0
    parameter.grad = torch.ones(100)
    optimizer.step()
    assert analysis.state_bytes(optimizer) == 2 * 400 + 4
