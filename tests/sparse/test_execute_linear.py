"""One function, many backends: the same forward pass and gradients, whatever the input."""

import copy
import warnings

import pytest
import torch
from torch import nn

from featherweight.sparse.execute import (
    BACKENDS,
    SparseLinear,
    SparsePattern,
    bag,
    compiled,
    csr,
    sparse_linear,
)
from tests.oracles import execute as oracle

CPU = [name for name in BACKENDS if name != "2:4"]
MAJOR = ["csr", "bag", "bag-numba"]  # feature-major


@pytest.fixture(params=CPU)
def backend(request):
    if request.param == "bag-numba":
        pytest.importorskip("numba")
    return request.param


def random_mask(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def problem(shape, density, batch, dtype=torch.float64):
    """Return pattern, values, bias, input and output gradient."""
    mask = random_mask(shape, density)
    pattern = SparsePattern.from_mask(mask)
    tensors = [(pattern.nnz,), (shape[0],), (*batch, shape[1]), (*batch, shape[0])]
    return pattern, *(torch.randn(s, dtype=torch.float64).to(dtype) for s in tensors)


def run(backend, pattern, values, bias, x, gradient):
    """Return output, and gradients of input, values and bias."""
    leaves = [t.detach().requires_grad_() for t in (x, values, bias)]
    y = sparse_linear(leaves[0], leaves[1], pattern, leaves[2], backend)
    return y.detach(), *torch.autograd.grad(y, leaves, gradient)


@pytest.mark.parametrize("batch", [1, 3, 17])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_every_backend_agrees_with_loops(backend, density, batch):
    pattern, values, bias, x, gradient = problem((5, 7), density, (batch,))
    expected = oracle.linear(x, values, pattern.mask(), bias, gradient)
    for found, wanted in zip(
        run(backend, pattern, values, bias, x, gradient), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 9), (3, 0), (2, 3, 4), (40,)])
@pytest.mark.parametrize("shape", [(1, 1), (33, 20), (20, 33)])
def test_inputs_of_any_rank_and_emptiness(backend, shape, batch):
    case = problem(shape, 0.2, batch)
    for found, wanted in zip(run(backend, *case), run("masked", *case), strict=True):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted)


def test_rows_and_columns_without_entries(backend):
    mask = random_mask((30, 40), 0.2)
    mask[::2], mask[:, 3:20] = False, False
    pattern = SparsePattern.from_mask(mask)
    _, _, bias, x, gradient = problem((30, 40), 0.2, (19,))
    values = torch.randn(pattern.nnz, dtype=torch.float64)
    y, of_x, *_ = found = run(backend, pattern, values, bias, x, gradient)
    assert torch.equal(y[:, ::2], bias[::2].expand(19, 15))
    assert (of_x[:, 3:20] == 0).all()
    dense = pattern.scatter(values)
    torch.testing.assert_close(y, x @ dense.t() + bias)
    torch.testing.assert_close(found[1], gradient @ dense)
    torch.testing.assert_close(found[2], (gradient.t() @ x)[mask])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_lower_precisions(backend, dtype, tolerance):
    case = problem((24, 32), 0.2, (20,))
    exact = run("masked", *case)
    low = run(backend, case[0], *(t.to(dtype) for t in case[1:]))
    for found, wanted in zip(low, exact, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("strides", ["transposed", "expanded", "sliced", "permuted"])
def test_inputs_of_any_strides(backend, strides):
    pattern, values, bias, x, gradient = problem((8, 6), 0.4, (20,))
    wide = torch.randn(20, 12, dtype=torch.float64)
    x = {
        "transposed": x.t().contiguous().t(),
        "expanded": x[:1].expand(20, 6),
        "sliced": wide[:, ::2],
        "permuted": torch.randn(4, 6, 5, dtype=torch.float64).transpose(1, 2),
    }[strides]
    gradient = gradient.reshape(*x.shape[:-1], 8)
    gradient = gradient.transpose(0, -1).contiguous().transpose(0, -1)
    case = (pattern, values, bias, x, gradient)
    for found, wanted in zip(run(backend, *case), run("masked", *case), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("backend", MAJOR)
def test_activations_stay_feature_major_from_layer_to_layer(backend):
    if backend == "bag-numba":
        pytest.importorskip("numba")
    pattern, values, bias, x, _ = problem((8, 8), 0.5, (20,))
    y = sparse_linear(x, values, pattern, bias, backend)
    assert y.stride() == (1, 20)
    hidden = torch.relu(y)
    assert hidden.t().is_contiguous()  # so that the next layer copies nothing
    assert sparse_linear(hidden.view(4, 5, 8), values, pattern, bias, backend).stride() == (
        5,
        1,
        20,
    )


@pytest.mark.parametrize("batch", [3, 17])
def test_gradients_of_first_and_second_order(backend, batch):
    pattern, values, bias, x, _ = problem((3, 4), 0.5, (batch,))
    leaves = [t.requires_grad_() for t in (x, values, bias)]

    def function(x, values, bias):
        return sparse_linear(x, values, pattern, bias, backend)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_gradients_that_are_asked_for(backend, wanted):
    pattern, values, bias, x, gradient = problem((6, 8), 0.5, (20,))
    everything = run(backend, pattern, values, bias, x, gradient)[1:]
    leaves = [x.detach(), values.detach(), bias.detach()]
    for index in wanted:
        leaves[index].requires_grad_()
    y = sparse_linear(leaves[0], leaves[1], pattern, leaves[2], backend)
    found = torch.autograd.grad(y, [leaves[i] for i in wanted], gradient)
    for index, got in zip(wanted, found, strict=True):
        torch.testing.assert_close(got, everything[index])


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_the_number_of_threads_changes_no_bit(backend, batch, monkeypatch):
    monkeypatch.setattr(compiled, "WORTH", 1)
    case = problem((300, 200), 0.1, (batch,), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(backend, *case))
    finally:
        torch.set_num_threads(before)
    if backend in MAJOR:  # dense products are torch's own
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


def test_threads_share_all_rows(monkeypatch):
    pytest.importorskip("numba")
    crow = torch.tensor([0, 0, 9, 9, 10, 30, 30]).int().numpy()
    for threads in (1, 2, 3, 8):
        pieces = compiled._pieces(crow, threads)
        assert [row for a, b in pieces for row in range(a, b)] == list(range(6))


def test_errors_of_other_threads_are_raised():
    def fail():
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        compiled.spread([lambda: None, fail])


def test_csr_warns_nobody():
    csr._silence.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("csr", *problem((4, 5), 0.5, (3,)))


def test_under_autocast_sparse_backends_keep_the_dtype_of_the_values():
    pattern, values, bias, x, _ = problem((8, 8), 0.5, (20,), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse_linear(x, values, pattern, bias, "masked").dtype == torch.bfloat16
        y = sparse_linear(x.bfloat16(), values, pattern, bias, "bag")
        assert y.dtype == torch.float32
        exact = x.bfloat16().float() @ pattern.scatter(values).float().t()
    torch.testing.assert_close(y, exact.float() + bias, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"backend": "bags"}, "did you mean 'bag'"),
        ({"backend": "2:4"}, "'2:4' can't run this layer: it needs a CUDA device"),
        ({"x": torch.randn(3, 4)}, r"x must be \(..., 5\), got \(3, 4\)"),
    ],
)
def test_what_cannot_run_is_refused(change, text):
    pattern, values, bias, x, _ = problem((4, 5), 0.5, (3,))
    arguments = {"x": x, "values": values, "pattern": pattern, "bias": bias, **change}
    with pytest.raises(ValueError, match=text):
        sparse_linear(**arguments)


def test_numba_is_asked_for_by_the_name_of_its_extra(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    pattern, values, bias, x, _ = problem((4, 5), 0.5, (3,))
    with pytest.raises(ValueError, match=r"featherweight\[optim\]"):
        sparse_linear(x, values, pattern, bias, "bag-numba")


class TestLayer:
    def layer(self, backend="bag"):
        return SparseLinear.from_dense(nn.Linear(8, 6), random_mask((6, 8), 0.4), backend)

    def test_it_computes_what_the_dense_layer_does(self, backend):
        layer = self.layer(backend)
        x = torch.randn(20, 8)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        assert torch.equal(layer.weight, layer.to_dense().weight)

    def test_it_says_what_it_is(self):
        assert "in_features=8, out_features=6, bias=True, density=0.4792, backend='bag'" in repr(
            self.layer()
        )

    def test_copies_train_on_their_own(self):
        layer = self.layer()
        twin = copy.deepcopy(layer)
        twin(torch.randn(4, 8)).sum().backward()
        assert layer.values.grad is None
        assert twin.pattern is layer.pattern

    def test_dtypes_and_devices_move_values_and_pattern(self):
        layer = self.layer().double()
        assert layer(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64
        assert layer.pattern.col.dtype == torch.int32
        moved = layer.to("meta")
        assert moved.pattern.device.type == "meta"
        assert moved.backend == "masked"  # the only one that runs everywhere

    @pytest.mark.parametrize("pattern", ["rank", "values"])
    def test_parts_that_do_not_fit_are_refused(self, pattern):
        shape = (4, 2, 2) if pattern == "rank" else (4, 4)
        found = SparsePattern.from_mask(random_mask(shape, 0.5))
        size = found.nnz + (pattern == "values")
        with pytest.raises(ValueError, match=r"pattern must be|values must be"):
            SparseLinear(found, torch.randn(size))

    def test_frozen_weights_stay_frozen(self):
        dense = nn.Linear(8, 6).requires_grad_(False).eval()
        layer = SparseLinear.from_dense(dense, random_mask((6, 8), 0.4))
        assert not layer.values.requires_grad
        assert not layer.to_dense().weight.requires_grad
        assert not layer.training


@pytest.mark.parametrize("batch", [bag.SLAB, 2 * bag.SLAB + 3])
def test_tables_larger_than_the_cache_are_cut_into_slabs(batch, monkeypatch):
    case = problem((70, 90), 0.9, (batch,))
    whole = run("bag", *case)
    monkeypatch.setattr(bag, "CACHE", 0)
    calls = []
    monkeypatch.setattr(bag, "_bag", lambda *a, inner=bag._bag: calls.append(a[3]) or inner(*a))
    for found, wanted in zip(run("bag", *case), whole, strict=True):
        torch.testing.assert_close(found, wanted)
    widths = [len(table.t()) for table in calls]
    assert widths == 2 * ([bag.SLAB] if batch == bag.SLAB else [bag.SLAB, bag.SLAB, 3])


@pytest.mark.parametrize(
    ("batch", "small"), [(bag.SMALL_BATCH - 1, True), (bag.SMALL_BATCH, False)]
)
def test_small_batches_go_to_torch_s_own_product(batch, small, monkeypatch):
    pattern, values, bias, x, _ = problem((6, 7), 0.5, (batch,))
    calls = []
    monkeypatch.setattr(
        csr, "multiply", lambda *a, inner=csr.multiply: calls.append(a) or inner(*a)
    )
    sparse_linear(x, values, pattern, bias, "bag")
    assert bool(calls) == small


@pytest.mark.parametrize("batch", [3, 17])
def test_second_derivatives_are_those_of_the_dense_layer(backend, batch):
    """`gradgradcheck` passes over first derivatives that can't be differentiated."""
    pattern, values, bias, x, _ = problem((6, 7), 0.5, (batch,))

    def second(name):
        leaves = [t.detach().requires_grad_() for t in (x, values, bias)]
        y = sparse_linear(leaves[0], leaves[1], pattern, leaves[2], name)
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        assert all(gradient.requires_grad for gradient in first)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    for found, wanted in zip(second(backend), second("masked"), strict=True):
        torch.testing.assert_close(found, wanted)
