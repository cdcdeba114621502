"""Which weights NanoAdam selects: exactly the smallest, whatever the ties."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.optim.selection import SAMPLE, count, smallest
from tests.optim.test_nanoadam import nano, train, weight
from tests.oracles.nanoadam import smallest as smallest_oracle

# Selection


@given(
    st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 1e-40]), min_size=1),
    st.sampled_from(["0.01", "0.1", "0.07", "0.3", "0.5", "1"]),
    st.sampled_from([None, 1, 3, 7, 1000]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_selection_is_the_sorted_one_with_many_ties(values, density, chunk, skip_zeros, dtype):
    weights = torch.tensor(values, dtype=dtype)
    found = smallest(weights, float(density), chunk, skip_zeros)
    expected = smallest_oracle(weights.tolist(), density, chunk, skip_zeros)
    assert found.tolist() == sorted(expected)


def test_counts_are_ceilings_of_the_decimal():
    assert [count(100, 0.07), count(1000, 0.1), count(7, 0.1), count(1, 0.01)] == [7, 100, 1, 1]
    assert count(0, 0.5) == 0
    assert count(10, 1.0) == 10


@pytest.mark.parametrize("make", [
    lambda n: torch.randn(n),
    lambda n: torch.randn(n).round(),  # more ties than the sample suggests
    lambda n: torch.zeros(n),
    lambda n: torch.linspace(0, 1, n),  # the sample lies in order
    lambda n: torch.cat([torch.ones(n - 5000), torch.zeros(5000)]),
])  # fmt: skip
def test_large_tensors_are_selected_exactly_whatever_the_sample_says(make):
    weights = make(5 * SAMPLE + 3)
    for density in (0.001, 0.1, 0.9):
        found = smallest(weights, density)
        keep = count(len(weights), density)
        expected = weights.abs().sort(stable=True).indices[:keep].sort().values
        assert torch.equal(found, expected)


def test_a_sample_that_misleads_costs_time_alone(monkeypatch):
    weights = torch.ones(5 * SAMPLE + 3)
    stride = len(weights) // SAMPLE | 1
    weights[::stride] = 1e-3  # what the sample sees is smaller than all else
    keep = count(len(weights), 0.5)
    expected = weights.sort(stable=True).indices[:keep].sort().values
    assert torch.equal(smallest(weights, 0.5), expected)


def test_nan_is_selected_last():
    weights = torch.tensor([math.nan, math.inf, 3.0, -math.nan, -1.0])
    assert smallest(weights, 0.4).tolist() == [2, 4]
    assert smallest(weights, 0.6).tolist() == [1, 2, 4]
    assert smallest(weights, 0.8).tolist() == [0, 1, 2, 4]


def test_selected_are_no_larger_than_the_others_in_each_chunk():
    parameter = weight(50, 41)
    optimizer = nano(parameter, density=0.1, chunk=500, lr=0.0)
    train(parameter, optimizer, 1)
    mask = optimizer.expand(parameter)["selected"].flatten()
    for part, chosen in zip(parameter.detach().flatten().split(500), mask.split(500), strict=True):
        assert chosen.sum() == math.ceil(0.1 * len(part))
        assert part[chosen].abs().max() <= part[~chosen].abs().min()


def test_permuting_entries_permutes_the_selection():
    weights = torch.randn(1000)
    shuffle = torch.randperm(1000)
    mask = torch.zeros(1000, dtype=torch.bool)
    mask[smallest(weights, 0.1)] = True
    permuted = torch.zeros(1000, dtype=torch.bool)
    permuted[smallest(weights[shuffle], 0.1)] = True
    assert torch.equal(permuted, mask[shuffle])
