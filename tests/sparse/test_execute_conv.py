"""The sparse convolution as a function: exact against the definition and against torch."""

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from featherweight.sparse.execute.chwn import is_chwn, to_chwn
from featherweight.sparse.execute.conv_function import chwn_conv2d, masked_conv2d
from featherweight.sparse.execute.conv_geometry import Axis, Convolution, runs, tables
from featherweight.sparse.execute.pattern import SparsePattern
from tests.oracles import conv as oracle

pytest.importorskip("numba")

# batch, inputs, outputs, size, kernel, stride, padding, density
CASES = {
    "3x3": (16, 4, 8, (8, 8), (3, 3), (1, 1), (1, 1), 0.3),
    "wide batch": (130, 3, 2, (4, 3), (3, 3), (1, 1), (1, 1), 0.5),
    "batch 1": (1, 3, 4, (9, 33), (3, 3), (1, 1), (1, 1), 0.3),
    "no padding": (5, 3, 4, (7, 6), (3, 3), (1, 1), (0, 0), 0.3),
    "padding beyond the kernel": (2, 3, 4, (5, 5), (3, 3), (1, 1), (4, 3), 0.5),
    "stride 2": (5, 3, 4, (9, 7), (3, 3), (2, 2), (1, 1), 0.5),
    "stride 2, even size": (32, 3, 4, (8, 8), (3, 3), (2, 2), (1, 1), 0.5),
    "stride 3 and 2": (3, 2, 3, (11, 8), (5, 3), (3, 2), (2, 0), 0.4),
    "stride beyond the kernel": (2, 3, 4, (9, 9), (1, 2), (4, 3), (0, 0), 0.5),
    "1x1": (20, 8, 4, (6, 5), (1, 1), (1, 1), (0, 0), 0.3),
    "1x1, stride 2": (20, 8, 4, (6, 5), (1, 1), (2, 2), (0, 0), 0.3),
    "7x7": (4, 2, 3, (12, 10), (7, 7), (2, 2), (3, 3), 0.2),
    "even kernel": (3, 3, 4, (6, 7), (2, 4), (1, 1), (1, 2), 0.4),
    "one pixel": (4, 6, 5, (1, 1), (3, 3), (1, 1), (1, 1), 0.5),
    "nothing kept": (3, 4, 4, (6, 6), (3, 3), (1, 1), (1, 1), 0.0),
    "all kept": (3, 4, 4, (6, 6), (3, 3), (1, 1), (1, 1), 1.0),
}


def problem(batch, inputs, outputs, size, kernel, stride, padding, density, dtype=torch.float64):
    mask = torch.rand(outputs, inputs, *kernel) < density
    pattern = SparsePattern.from_mask(mask)
    values = torch.randn(pattern.nnz, dtype=dtype, requires_grad=True)
    bias = torch.randn(outputs, dtype=dtype, requires_grad=True)
    x = torch.randn(batch, inputs, *size, dtype=dtype, requires_grad=True)
    return x, values, bias, pattern, Convolution(kernel, stride, padding)


def results(x, values, bias, pattern, form, conv2d=chwn_conv2d):
    """Output and gradients of input, values and bias, under a fixed gradient of the output."""
    y = conv2d(x, values, pattern, bias, form)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    inputs = [x, values] if bias is None else [x, values, bias]
    return y.detach(), *torch.autograd.grad(y, inputs, gradient)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients_are_those_of_the_dense_convolution(case):
    x, values, bias, pattern, form = problem(*case)
    weight = pattern.scatter(values)
    y = F.conv2d(x, weight, bias, form.stride, form.padding)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    expected = (y, *torch.autograd.grad(y, (x, values, bias), gradient))
    for found, wanted in zip(results(x, values, bias, pattern, form), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["stride 3 and 2", "padding beyond the kernel", "1x1, stride 2"])
def test_definition(name):
    x, values, _, pattern, form = problem(*CASES[name])
    y = chwn_conv2d(x, values, pattern, None, form)
    gradient = torch.randn_like(y)
    of_x, of_values = torch.autograd.grad(y, (x, values), gradient)
    arrays = (x.detach().numpy(), pattern.scatter(values.detach()).numpy())
    expected = oracle.conv2d(*arrays, form.stride, form.padding)
    assert np.allclose(y.detach().numpy(), expected, atol=1e-12)
    both = oracle.conv2d_gradients(*arrays, gradient.numpy(), form.stride, form.padding)
    assert np.allclose(of_x.numpy(), both[0], atol=1e-12)
    assert np.allclose(of_values.numpy(), pattern.gather(torch.from_numpy(both[1])), atol=1e-12)


@pytest.mark.parametrize("name", ["3x3", "wide batch", "batch 1", "stride 2", "7x7"])
def test_single_precision(name):
    x, values, bias, pattern, form = problem(*CASES[name], dtype=torch.float32)
    found = results(x, values, bias, pattern, form)
    doubles = [t.detach().double().requires_grad_() for t in (x, values, bias)]
    expected = results(*doubles, pattern, form, masked_conv2d)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 2e-6 * max(1.0, float(b.abs().max()))


def layouts(x):
    doubled = torch.stack([x, x], 4).flatten(3)[..., ::2]  # every second entry of its memory
    return {
        "contiguous": x.contiguous(),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "batch innermost": to_chwn(x),
        "gaps": doubled,
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": x[:1].expand_as(x),
    }


@pytest.mark.parametrize("name", layouts(torch.zeros(2, 2, 2, 2)))
@pytest.mark.parametrize("case", ["3x3", "stride 2"])
def test_layouts_of_the_input(name, case):
    x, values, bias, pattern, form = problem(*CASES[case])
    x = layouts(x.detach())[name].requires_grad_()
    y, *gradients = results(x, values, bias, pattern, form)
    assert is_chwn(y)
    expected = results(x, values, bias, pattern, form, masked_conv2d)
    for found, wanted in zip((y, *gradients), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "gaps", "expanded"])
def test_layouts_of_the_gradient(layout):
    x, values, bias, pattern, form = problem(*CASES["3x3"])
    y = chwn_conv2d(x, values, pattern, bias, form)
    gradient = layouts(torch.randn_like(y))[layout]
    found = torch.autograd.grad(y, (x, values, bias), gradient)
    dense = masked_conv2d(x, values, pattern, bias, form)
    expected = torch.autograd.grad(dense, (x, values, bias), gradient)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, expected, strict=True))


def test_empty_filters_and_unused_channels():
    mask = torch.zeros(4, 3, 3, 3, dtype=torch.bool)
    mask[1, 2] = True
    pattern, form = SparsePattern.from_mask(mask), Convolution((3, 3), (1, 1), (1, 1))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    y, of_x, _ = results(x, values, None, pattern, form)
    assert torch.equal(y[:, [0, 2, 3]], torch.zeros(2, 3, 5, 5, dtype=torch.float64))
    assert torch.equal(of_x[:, :2], torch.zeros(2, 2, 5, 5, dtype=torch.float64))
    assert y[:, 1].abs().min() > 0


@pytest.mark.parametrize("name", ["3x3", "stride 2", "1x1, stride 2"])
def test_gradcheck(name):
    x, values, bias, pattern, form = problem(*CASES[name])
    x = x.detach()[:3, :, :4, :5].requires_grad_()

    def call(x, values, bias):
        return chwn_conv2d(x, values, pattern, bias, form)

    assert torch.autograd.gradcheck(call, (x, values, bias))
    assert torch.autograd.gradgradcheck(call, (x, values, bias))
    y = call(x, values, bias).square().sum()
    graph = torch.autograd.grad(y, (x, values, bias), create_graph=True)
    for a, b in zip(graph, torch.autograd.grad(y, (x, values, bias)), strict=True):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize("name", ["3x3", "wide batch", "stride 2, even size", "one pixel"])
def test_same_bits_for_any_number_of_threads(name, monkeypatch):
    products = importlib.import_module("featherweight.sparse.execute.conv_products")
    monkeypatch.setattr(products, "SMALL", 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            found.append(results(*problem(*CASES[name], dtype=torch.float32)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_many_weights_are_summed_in_pieces(monkeypatch):
    products = importlib.import_module("featherweight.sparse.execute.conv_products")
    arguments = problem(*CASES["3x3"])
    whole = results(*arguments)
    monkeypatch.setattr(products, "PIECE", 3)
    assert all(torch.equal(a, b) for a, b in zip(whole, results(*arguments), strict=True))


def test_gradients_that_are_not_wanted_are_not_computed(monkeypatch):
    function = importlib.import_module("featherweight.sparse.execute.conv_function")
    x, values, _, pattern, form = problem(*CASES["3x3"])
    y = chwn_conv2d(x.detach(), values, pattern, None, form).sum()
    monkeypatch.setattr(function, "convolve", None)
    y.backward()
    assert values.grad is not None


def test_results_may_be_changed_in_place():
    x, values, bias, pattern, form = problem(*CASES["3x3"])
    found = []
    for conv2d in (chwn_conv2d, masked_conv2d):
        y = conv2d(x, values, pattern, bias, form)
        y += 1
        y = y.relu_()
        found.append(torch.autograd.grad(y.square().sum(), (x, values, bias)))
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(*found, strict=True))


def test_not_a_number_reaches_only_what_it_touches():
    x, values, bias, pattern, form = problem(*CASES["all kept"])
    x = x.detach()
    x[0, 0, 0, 0] = float("nan")
    y = chwn_conv2d(x, values, pattern, bias, form)
    assert torch.equal(y.isnan(), masked_conv2d(x, values, pattern, bias, form).isnan())


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.float(),  # dtype of the values is another
        lambda x: x[:, :2],  # too few channels
        lambda x: x[:, :, :1, :1],  # smaller than the kernel without padding
    ],
    ids=["dtype", "channels", "size"],
)
def test_errors_are_those_of_torch(change):
    x, values, _, pattern, form = problem(*CASES["no padding"])
    with pytest.raises(RuntimeError) as expected:
        masked_conv2d(change(x.detach()), values, pattern, None, form)
    with pytest.raises(RuntimeError) as found:
        chwn_conv2d(change(x.detach()), values, pattern, None, form)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("batch", "dtype"), [((), torch.float64), ((0,), torch.float64), ((2,), torch.bfloat16)]
)
def test_other_inputs_go_through_the_dense_weight(batch, dtype):
    pattern = SparsePattern.from_mask(torch.rand(3, 2, 3, 3) < 0.5)
    form, values = Convolution((3, 3), (1, 1), (1, 1)), torch.randn(pattern.nnz, dtype=dtype)
    x = torch.randn(*batch, 2, 5, 5, dtype=dtype)
    found = chwn_conv2d(x, values, pattern, None, form)
    assert torch.equal(found, F.conv2d(x, pattern.scatter(values), None, 1, 1))


sizes = st.integers(1, 9)


@given(sizes, sizes, sizes, st.integers(0, 9), st.booleans())
def test_reach_is_the_definition(size, taps, stride, padding, flipped):
    outputs = (size + 2 * padding - taps) // stride + 1
    if outputs < 1:
        return
    axis = Axis(taps, stride, padding, flipped)
    order, shifts = axis.order(), axis.shifts()
    counts = (size, outputs) if flipped else (outputs, size)
    found = {
        (out, int(order[t]), base + int(shifts[t]))
        for out, (base, first, end) in enumerate(axis.reach(*counts).tolist())
        for t in range(first, end)
    }
    pairs = [(o, t, o * stride + t - padding) for o in range(outputs) for t in range(taps)]
    pairs = [(o, t, i) for o, t, i in pairs if 0 <= i < size]
    assert found == ({(i, t, o) for o, t, i in pairs} if flipped else set(pairs))
    assert sorted(order.tolist()) == list(range(taps))


@settings(max_examples=50)
@given(sizes, sizes, sizes, st.integers(0, 4), st.integers(1, 40), st.booleans())
def test_tiles_cover_a_line_once(size, taps, stride, padding, batch, flipped):
    outputs = (size + 2 * padding - taps) // stride + 1
    if outputs < 1:
        return
    axis = Axis(taps, stride, padding, flipped)
    counts = (size, outputs) if flipped else (outputs, size)
    joined = runs(axis.reach(*counts))
    assert joined[:, 0].tolist() == [0, *joined[:-1, 1].tolist()]
    assert joined[-1, 1] == counts[0]
    form = Convolution((taps, taps), (stride, stride), (padding, padding), flipped)
    lengths = (64, 32, 16, 8, 2, 1)
    covered = []
    for to, _, kind, _, _ in tables(form, (1, counts[0]), (1, counts[1]), batch, 8).tiles:
        covered += range(to, to + lengths[kind])
    assert covered == list(range(counts[0] * batch))
