"""The layout with the batch innermost, and batch norm in it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherweight.sparse.execute.chwn import empty_chwn, is_chwn, to_chwn
from featherweight.sparse.execute.chwn_norm import (
    AppliedReLU,
    ChwnBatchNorm2d,
    chwn_norms_,
    plain_norms_,
)
from tests.oracles import conv as oracle

pytest.importorskip("numba")


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (1, 3, 5, 6), (4, 1, 5, 1)])
def test_layout(shape):
    x = torch.randn(shape)
    for start in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        found = to_chwn(start)
        assert is_chwn(found)
        assert torch.equal(found, start)
        assert to_chwn(found) is found
        assert found.permute(1, 2, 3, 0).is_contiguous()
        assert is_chwn(empty_chwn(x, start.shape))


def test_layout_is_not_mistaken():
    assert not is_chwn(torch.randn(4, 3, 5, 6))
    assert not is_chwn(torch.randn(4, 3, 5, 6).contiguous(memory_format=torch.channels_last))
    assert not is_chwn(to_chwn(torch.randn(8, 3, 5, 6))[::2])
    assert not is_chwn(torch.randn(3, 5))


KEEPS = {
    "relu": F.relu,
    "sum": lambda x: x + x,
    "scale": lambda x: x * torch.ones(1),
    "channels": lambda x: x * torch.ones(1, 3, 1, 1),
    "dropout": F.dropout,
    "gelu": F.gelu,
    "clone": torch.clone,
}
LOSES = {
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "cat": lambda x: torch.cat([x, x], 1),
}


@pytest.mark.parametrize("name", KEEPS)
def test_elementwise_functions_keep_the_layout(name):
    x = to_chwn(torch.randn(4, 3, 6, 6)).requires_grad_()
    y = KEEPS[name](x)
    assert is_chwn(y)
    (gradient,) = torch.autograd.grad(y, x, to_chwn(torch.randn(4, 3, 6, 6)))
    assert is_chwn(gradient)


@pytest.mark.parametrize("name", LOSES)
def test_what_the_guide_says_loses_the_layout(name):
    assert not is_chwn(LOSES[name](to_chwn(torch.randn(4, 3, 6, 6))))


def norms(**options):
    plain = nn.BatchNorm2d(5, **options).double()
    if plain.affine:
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
    fast = chwn_norms_(copy.deepcopy(plain))
    assert type(fast) is ChwnBatchNorm2d
    return plain, fast


def passes(norm, relu, chwn, count=3):
    """Outputs and all gradients of passes in training mode and one in evaluation."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(count):
        norm.train(step < count - 1)
        x = torch.randn(6, 5, 4, 3, generator=generator, dtype=torch.float64) * 2 + 3
        x = (to_chwn(x) if chwn else x).requires_grad_()
        y = F.relu(norm(x)) if relu else norm(x)
        gradient = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        found += [y, *torch.autograd.grad(y, [x, *norm.parameters()], gradient)]
    return [t.detach() for t in found]


OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.7, "eps": 0.1},
    "no affine": {"affine": False},
    "no statistics": {"track_running_stats": False},
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_norm_is_that_of_torch(name, relu):
    plain, fast = norms(**OPTIONS[name])
    expected = passes(plain, relu, chwn=False)
    fast.relu = relu
    found = passes(fast, False, chwn=True)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.allclose(fast.state_dict()[key], value, rtol=1e-12, atol=1e-14)


def test_norm_is_the_definition():
    _, norm = norms(momentum=1.0)
    x = torch.randn(6, 5, 4, 3, dtype=torch.float64) * 3 + 100
    y = norm(to_chwn(x)).detach().numpy()
    affine = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    expected, mean, variance = oracle.batch_norm(x.numpy(), *affine, norm.eps)
    assert np.allclose(y, expected, atol=1e-12)
    assert np.allclose(norm.running_mean, mean)
    assert np.allclose(norm.running_var, variance * 72 / 71)


@pytest.mark.parametrize("training", [True, False])
def test_norm_in_single_precision_far_from_zero(training):
    norm = chwn_norms_(nn.BatchNorm2d(3)).train(training)
    norm.running_mean.fill_(1000.0)
    x = torch.randn(64, 3, 40, 40) + 1000.0  # longer than a block
    double = copy.deepcopy(norm).double()
    assert torch.allclose(norm(to_chwn(x)).double(), double(x.double()), atol=2e-3)
    assert torch.allclose(norm.running_var.double(), double.running_var, rtol=1e-5)


def test_norm_sends_gradients_to_what_wants_them():
    _, norm = norms()
    norm.weight.requires_grad_(False)
    x = to_chwn(torch.randn(6, 5, 4, 3, dtype=torch.float64))
    norm(x).sum().backward()
    assert norm.weight.grad is None
    assert torch.allclose(norm.bias.grad, torch.full((5,), 72.0, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_norm_gradcheck(training, relu):
    norm = norms()[1].train(training)
    norm.relu = relu
    x = to_chwn(torch.randn(3, 5, 2, 2, dtype=torch.float64)).requires_grad_()

    def call(x, *_):
        return norm(x)

    assert torch.autograd.gradcheck(call, (x, norm.weight, norm.bias))
    assert torch.autograd.gradgradcheck(call, (x, norm.weight, norm.bias))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_norm_gradients_are_the_same_with_a_graph(training, relu):
    norm = norms()[1].train(training)
    norm.relu = relu
    x = to_chwn(torch.randn(6, 5, 4, 3, dtype=torch.float64)).requires_grad_()
    y, inputs = (norm(x) - 1).square().sum(), [x, *norm.parameters()]
    graph = torch.autograd.grad(y, inputs, create_graph=True)
    for a, b in zip(graph, torch.autograd.grad(y, inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(6, 5, 4, 3),
        to_chwn(torch.randn(6, 5, 4, 3)).bfloat16(),
        torch.randn(5, 1, 1, 6).permute(3, 0, 1, 2)[:1].expand(6, 5, 4, 3),
    ],
    ids=["other layout", "other dtype", "expanded"],
)
def test_other_inputs_are_treated_by_torch(x):
    plain = nn.BatchNorm2d(5).to(x.dtype)
    fast = chwn_norms_(copy.deepcopy(plain))
    assert torch.equal(fast(x), plain(x))
    fast.relu = True
    assert torch.equal(fast(x), plain(x).relu())


@pytest.mark.parametrize(
    ("shape", "error"),
    [((1, 5, 1, 1), ValueError), ((2, 4, 3, 3), RuntimeError), ((2, 5, 3), ValueError)],
)
def test_errors_are_those_of_torch(shape, error):
    x = torch.randn(shape)
    x = to_chwn(x) if x.ndim == 4 else x
    with pytest.raises(error) as expected:
        nn.BatchNorm2d(5)(x)
    with pytest.raises(error) as found:
        chwn_norms_(nn.BatchNorm2d(5))(x)
    assert str(found.value) == str(expected.value)


def test_not_a_number_is_not_hidden_by_the_relu():
    norm = norms()[1].eval()
    norm.relu = True
    x = torch.randn(6, 5, 4, 3, dtype=torch.float64)
    x[0, 0, 0, 0] = float("nan")
    assert norm(to_chwn(x)).isnan().sum() == 1


def test_gradient_of_a_norm_that_is_changed_in_place():
    plain, fast = norms()
    x = torch.randn(6, 5, 4, 3, dtype=torch.float64)
    for norm, inputs in ((plain, x), (fast, to_chwn(x))):
        y = norm(inputs)
        y += 1
        y = y.relu_()
        y.square().sum().backward()
    assert torch.allclose(fast.weight.grad, plain.weight.grad, atol=1e-10)
    assert torch.allclose(fast.bias.grad, plain.bias.grad, atol=1e-10)


def stack():
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU())
    )


def test_norms_change_and_change_back():
    model = stack()
    modules, kinds = list(model.modules()), [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    assert chwn_norms_(model) is model
    assert list(model.modules()) == modules
    assert list(model.state_dict()) == keys
    assert type(model[0]) is ChwnBatchNorm2d
    assert (model[0].relu, model[2][0].relu) == (True, False)
    assert (type(model[1]), type(model[2][2])) == (AppliedReLU, nn.ReLU)
    assert plain_norms_(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model[0], "relu")


def test_converted_norms_compute_the_same():
    model = stack().double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(model)(x)
    assert torch.allclose(chwn_norms_(model)(to_chwn(x)), expected, atol=1e-12)
    assert torch.equal(copy.deepcopy(model).eval()(x), plain_norms_(model).eval()(x))


def test_shared_and_watched_modules_are_not_joined():
    relu = nn.ReLU()
    shared = nn.Sequential(nn.BatchNorm2d(3), relu, nn.BatchNorm2d(3), relu)
    assert not any(m.relu for m in chwn_norms_(shared) if isinstance(m, ChwnBatchNorm2d))
    seen = []
    watched = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    watched[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    chwn_norms_(watched)(to_chwn(torch.randn(4, 3, 5, 5)))
    assert seen[0].min() < 0


def test_subclasses_are_left_alone():
    class Own(nn.BatchNorm2d):
        pass

    model = chwn_norms_(nn.Sequential(Own(3), nn.ReLU()))
    assert type(model[0]) is Own
    assert type(model[1]) is nn.ReLU
