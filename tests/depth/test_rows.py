"""Choosing, gathering and scattering tokens against loops, and their refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight import depth
from featherweight.depth.rows import as_mask
from tests.oracles import depth as oracle


@given(st.data())
def test_choice_is_that_of_a_loop(data):
    tokens = data.draw(st.integers(1, 9))
    row = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0]), min_size=tokens, max_size=tokens)
    scores = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=3)))
    prefix = data.draw(st.integers(0, tokens))
    count = data.draw(st.integers(max(1, prefix), tokens))
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    valid = torch.tensor([data.draw(flags) for _ in scores])
    found = depth.choose_tokens(scores, count, prefix, valid)
    assert torch.equal(found, oracle.choose(scores, count, prefix, valid))


def test_of_equal_scores_the_lowest_index_goes():
    assert depth.choose_tokens(torch.full((2, 300), 1 / 300), 7).tolist() == [list(range(7))] * 2


def test_choice_takes_no_gradient():
    scores = torch.rand(2, 5, requires_grad=True)
    index = depth.choose_tokens(scores, 2)
    assert not index.requires_grad
    assert index.dtype == torch.int64


def test_padding_is_chosen_last():
    scores = torch.tensor([[9.0, 1.0, 8.0, 0.5]])
    valid = torch.tensor([[False, True, False, True]])
    assert depth.choose_tokens(scores, 2, valid=valid).tolist() == [[1, 3]]
    assert depth.choose_tokens(scores, 3, valid=valid).tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("count", [0, 1, 6])
def test_count_out_of_range(count):
    with pytest.raises(ValueError, match=r"count must lie in \[2, 5\]"):
        depth.choose_tokens(torch.rand(1, 5), count, prefix=2)


@pytest.mark.parametrize(
    ("tokens", "capacity", "prefix", "rounding", "expected"),
    [
        (197, 0.5, 1, "ceil", 99),
        (197, 0.5, 1, "floor", 98),
        (197, 0.125, 1, "ceil", 25),
        (197, 0.125, 1, "floor", 24),
        (197, 0.125, 1, "round", 25),
        (10, 0.3, 0, "ceil", 3),  # 0.3 * 10 is above 3 in floating point
        (10, 0.7, 0, "floor", 7),  # and 0.7 * 10 might be below 7
        (50, 0.01, 4, "ceil", 5),
        (5, 1.0, 1, "floor", 5),
        (1, 0.1, 0, "floor", 1),
    ],
)
def test_number_of_tokens(tokens, capacity, prefix, rounding, expected):
    assert depth.kept_tokens(tokens, capacity, prefix, rounding) == expected


@given(st.integers(2, 900), st.floats(0.001, 1.0), st.integers(0, 1))
def test_number_of_tokens_is_in_range_and_monotone(tokens, capacity, prefix):
    count = depth.kept_tokens(tokens, capacity, prefix)
    assert 1 + prefix <= count <= tokens
    assert count >= depth.kept_tokens(tokens, capacity / 2, prefix)
    assert count >= math.floor(capacity * tokens)


@pytest.mark.parametrize("capacity", [0.0, -0.5, 1.01, math.nan])
def test_capacity_out_of_range(capacity):
    with pytest.raises(ValueError, match=r"capacity is the fraction processed, in \(0, 1\]"):
        depth.kept_tokens(10, capacity)


@pytest.mark.parametrize("capacity", ["0.5", None, True])
def test_capacity_of_wrong_type(capacity):
    with pytest.raises(TypeError, match="capacity must be a number"):
        depth.kept_tokens(10, capacity)


def test_rounding_is_named():
    with pytest.raises(ValueError, match="unknown rounding 'up': one of ceil, floor, round"):
        depth.kept_tokens(10, 0.5, rounding="up")
    with pytest.raises(ValueError, match="tokens must be at least prefix"):
        depth.kept_tokens(2, 0.5, prefix=2)


def test_rows_against_a_loop():
    x = torch.randn(3, 6, 4)
    index = depth.choose_tokens(torch.rand(3, 6), 3)
    rows = depth.take_rows(x, index)
    for b in range(3):
        for place, i in enumerate(index[b]):
            assert torch.equal(rows[b, place], x[b, i])
    new = torch.randn(3, 3, 4)
    out = depth.put_rows(x, index, new)
    mask = as_mask(index, 6)
    assert torch.equal(out[mask], new.flatten(0, 1))
    assert torch.equal(out[~mask], x[~mask])


def test_routed_block_is_the_masked_dense_block_where_selected():
    block = torch.nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=True)
    x = torch.randn(3, 10, 16)
    index = depth.choose_tokens(torch.rand(3, 10), 4)
    mask = as_mask(index, 10)
    dense = block(x, src_key_padding_mask=~mask)
    expected = torch.where(mask[..., None], dense, x)
    found = depth.routed(block, x, index)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(found[~mask], x[~mask])


def test_weight_multiplies_the_update_and_not_the_residual():
    x = torch.randn(2, 5, 3)
    index = torch.tensor([[0, 3], [1, 2]])
    weight = torch.tensor([[0.0, 2.0], [0.5, -1.0]])
    out = depth.routed(lambda rows: rows + 1, x, index, weight)
    expected = x.clone()
    for b in range(2):
        for place in range(2):
            expected[b, index[b, place]] += weight[b, place]
    assert torch.allclose(out, expected)


def test_gradients_of_skipped_and_processed_tokens():
    x = torch.randn(1, 4, 2, requires_grad=True)
    depth.routed(lambda rows: 3 * rows, x, torch.tensor([[1, 2]])).sum().backward()
    assert x.grad[0, :, 0].tolist() == [1.0, 3.0, 3.0, 1.0]
