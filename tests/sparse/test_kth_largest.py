"""The fast selection of one rank, against a full sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.sparse.kth_largest import SAMPLE, kth_largest

MANY = 20 * SAMPLE


def by_sorting(values, k):
    return values.sort(descending=True).values[k - 1]


def shapes_of_values(n, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, generator=generator)
    misleading = normal.clone()
    misleading[:: n // SAMPLE | 1] = 100  # just what the sample sees
    return {
        "normal": normal,
        "sorted": normal.sort().values,
        "ties": normal.round(),
        "constant": torch.ones(n),
        "infinite": torch.where(normal > 0, normal, -torch.inf),
        "both infinities": torch.where(normal.abs() > 1, torch.inf * normal.sign(), normal),
        "misleading": misleading,
        "whole numbers": (1000 * normal).long(),
        "half": normal.bfloat16(),
    }


@pytest.mark.parametrize("kind", list(shapes_of_values(1, 0)))
@pytest.mark.parametrize("n", [1, 7, 16 * SAMPLE, MANY + 1])
def test_equals_a_full_sort(kind, n):
    values = shapes_of_values(n, 0)[kind]
    for k in sorted({1, 2, n // 1000, n // 30, n // 4, n // 2, n - n // 30, n - 1, n}):
        if 1 <= k <= n:
            assert kth_largest(values, k) == by_sorting(values, k)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), levels=st.integers(1, 50))
def test_any_rank_of_values_with_many_ties(seed, share, levels):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(levels, (MANY,), generator=generator).double()
    k = 1 + round(share * (MANY - 1))
    assert kth_largest(values, k) == by_sorting(values, k)
