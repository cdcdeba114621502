"""The selection primitive: exact counts, deterministic ties, scopes, supports."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.sparse import Masks, select, top_k
from tests.oracles.select import slow_top_k


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.data())
def test_top_k_against_sorting(values, data):
    support = data.draw(
        st.one_of(st.none(), st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    )
    room = len(values) if support is None else sum(support)
    keep = data.draw(st.integers(0, room))
    found = top_k(
        torch.tensor(values).float(), keep, None if support is None else torch.tensor(support)
    )
    assert found.tolist() == slow_top_k(values, keep, support)


def test_ties_keep_the_lowest_index():
    assert top_k(torch.ones(2, 3), 4).tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("keep", [-1, 4])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=r"keep must lie in \[0, 3\]"):
        top_k(torch.ones(3), keep)


def test_nan_scores_are_named():
    with pytest.raises(ValueError, match="scores of 'b' hold NaN"):
        select({"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        top_k(torch.tensor([float("nan")]), 1)


def test_infinite_scores_have_an_order():
    scores = torch.tensor([float("inf"), 0.0, -float("inf")])
    assert top_k(scores, 2).tolist() == [True, True, False]


SCORES = {"a": torch.arange(10.0).view(2, 5), "b": torch.arange(10.0, 40.0).view(5, 6)}


def test_global_scope_lets_all_compete():
    assert select(SCORES, 0.5, "global").counts() == {"a": 0, "b": 20}


def test_layer_scope_treats_layers_alike():
    assert select(SCORES, 0.5, "layer").counts() == {"a": 5, "b": 15}
    assert select(SCORES, 0.5, {"a": 2.0, "b": 1.0}).counts() == {"a": 8, "b": 12}


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "balanced"])
def test_support_is_never_left(scope):
    generator = torch.Generator().manual_seed(0)
    support = Masks({n: torch.rand(s.shape, generator=generator) < 0.6 for n, s in SCORES.items()})
    found = select(SCORES, 0.3, scope, support=support)
    assert found <= support
    assert found.nonzeros == 12
    with pytest.raises(ValueError, match="support holds"):
        select(SCORES, 0.95, scope, support=support)


def test_support_of_another_model():
    with pytest.raises(ValueError, match="masks do not fit: they lack 'b'"):
        select(SCORES, 0.3, support=Masks({"a": torch.ones(2, 5).bool()}))


@given(st.floats(0.001, 1.0))
def test_counts_are_exact(density):
    assert select(SCORES, density, "global").nonzeros == round(density * 40)
    assert select(SCORES, density, "layer").nonzeros == round(density * 40)
