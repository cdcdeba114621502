"""Patterns: both orders of the kept entries, against entries listed one by one."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.sparse.execute import SparsePattern
from featherweight.sparse.execute.update import remap
from tests.oracles import execute as oracle

SHAPES = [(1, 1), (5, 7), (7, 1), (1, 9), (4, 3, 2, 2), (0, 3), (3, 0)]


def random_mask(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_orders_list_the_kept_entries(shape, density):
    mask = random_mask(shape, density)
    pattern = SparsePattern.from_mask(mask)
    pairs = oracle.entries(mask)
    by_columns = sorted(range(len(pairs)), key=lambda i: (pairs[i][1], pairs[i][0]))
    assert pattern.col.tolist() == [c for _, c in pairs]
    assert pattern.crow.tolist() == oracle.offsets([r for r, _ in pairs], pattern.rows)
    assert pattern.crow_t.tolist() == oracle.offsets([c for _, c in pairs], pattern.cols)
    assert pattern.perm.tolist() == by_columns
    assert pattern.row_t.tolist() == [pairs[i][0] for i in by_columns]
    assert pattern.flat().tolist() == [r * pattern.cols + c for r, c in pairs]
    assert pattern.nnz == len(pairs)
    assert {t.dtype for t in (pattern.crow, pattern.col, pattern.row_t, pattern.perm)} == {
        torch.int32
    }


@given(st.integers(0, 6), st.integers(1, 6), st.floats(0, 1), st.integers(0, 99))
def test_mask_gather_and_scatter_undo_each_other(rows, cols, density, seed):
    mask = random_mask((rows, cols), density, seed)
    dense = torch.randn(rows, cols) * mask
    pattern = SparsePattern.from_mask(mask)
    assert torch.equal(pattern.mask(), mask)
    assert torch.equal(pattern.scatter(pattern.gather(dense)), dense)
    assert pattern.density == (mask.double().mean().item() if mask.numel() else 1.0)


def test_gather_and_scatter_take_strided_tensors_and_pass_gradients():
    mask = random_mask((4, 6), 0.5)
    pattern = SparsePattern.from_mask(mask)
    dense = torch.randn(6, 4).t().requires_grad_()
    (gradient,) = torch.autograd.grad(pattern.gather(dense).sum(), dense)
    assert torch.equal(gradient, mask.float())
    values = torch.randn(pattern.nnz, requires_grad=True)
    weights = torch.randn(4, 6)
    (gradient,) = torch.autograd.grad((pattern.scatter(values) * weights).sum(), values)
    assert torch.equal(gradient, weights[mask])


def test_bytes_count_what_a_backend_derived():
    pattern = SparsePattern.from_mask(random_mask((8, 8), 0.5))
    own = 4 * (9 + 9 + 3 * pattern.nnz)
    assert pattern.nbytes == own
    pattern.derive("masked", lambda p: (p.flat(),))
    assert pattern.nbytes == own + 8 * pattern.nnz
    assert pattern.derive("masked", lambda p: ())[0].numel() == pattern.nnz  # made once


def test_copies_share_the_pattern_and_pickles_keep_it():
    pattern = SparsePattern.from_mask(random_mask((5, 4), 0.5))
    assert copy.deepcopy([pattern])[0] is pattern
    assert pickle.loads(pickle.dumps(pattern)).same(pattern)
    assert not SparsePattern.from_mask(random_mask((5, 4), 0.5, seed=1)).same(pattern)
    assert not SparsePattern.from_mask(random_mask((4, 5), 0.5)).same(pattern)
    assert not SparsePattern.from_mask(random_mask((5, 4), 0.5).view(5, 2, 2)).same(pattern)


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (torch.ones(2, 2), TypeError, "boolean"),
        (torch.ones(4, dtype=torch.bool), ValueError, "rank 2"),
        (torch.ones(1, dtype=torch.bool).expand(2**16, 2**15), ValueError, "int32"),
    ],
)
def test_what_is_no_mask_is_refused(mask, error, text):
    with pytest.raises(error, match=text):
        SparsePattern.from_mask(mask)


def test_tensors_of_another_shape_are_refused():
    pattern = SparsePattern.from_mask(random_mask((5, 4), 0.5))
    with pytest.raises(ValueError, match="shape"):
        pattern.gather(torch.randn(4, 5))
    with pytest.raises(ValueError, match="values"):
        pattern.scatter(torch.randn(pattern.nnz + 1))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_a_merge_moves_what_is_kept(before_density, after_density, seed):
    before = random_mask((5, 6), before_density, seed)
    after = random_mask((5, 6), after_density, seed + 1000)
    old, new = SparsePattern.from_mask(before), SparsePattern.from_mask(after)
    tensor, start = torch.randn(old.nnz), torch.randn(new.nnz)
    move = remap(old, new)
    assert torch.equal(move(tensor), oracle.moved(tensor, before, after))
    assert torch.equal(move(tensor, start), oracle.moved(tensor, before, after, start))


def test_a_merge_of_two_shapes_is_refused():
    old, new = (SparsePattern.from_mask(random_mask(s, 0.5)) for s in ((2, 3), (3, 2)))
    with pytest.raises(ValueError, match="one shape"):
        remap(old, new)
