"""The sparse convolution as a layer, and whole networks of it."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherweight.lab import models
from featherweight.sparse.execute import compiled
from featherweight.sparse.execute.chwn import is_chwn, to_chwn
from featherweight.sparse.execute.chwn_norm import chwn_norms_
from featherweight.sparse.execute.conv import CONV_BACKENDS, SparseConv2d
from featherweight.sparse.execute.conv_choose import choose_conv
from featherweight.sparse.execute.pattern import SparsePattern

pytest.importorskip("numba")


def sparsified(model, density, backend="chwn"):
    """Mask the convolutions of a copy, and make a second copy with sparse ones."""
    masked = copy.deepcopy(model)
    for module in masked.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand_like(module.weight) < density
    sparse = copy.deepcopy(masked)
    for parent in list(sparse.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d):
                setattr(parent, name, SparseConv2d.from_dense(child, backend=backend))
    return masked, sparse


CONVS = {
    "bias": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "stride": lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(0, 2), bias=False),
    "same": lambda: nn.Conv2d(4, 6, (3, 5), padding="same"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid"),
    "1x1": lambda: nn.Conv2d(4, 6, 1, stride=2),
}


@pytest.mark.parametrize("backend", CONV_BACKENDS)
@pytest.mark.parametrize("name", CONVS)
def test_there_and_back(name, backend):
    conv, mask = CONVS[name]().double().eval(), torch.rand(6, 4, 1, 1) < 0.5
    mask = mask.expand(conv.weight.shape)
    layer = SparseConv2d.from_dense(conv, mask, backend)
    back = layer.to_dense()
    assert torch.equal(back.weight, conv.weight * mask)
    assert layer.bias is conv.bias
    assert back.bias is conv.bias
    assert not layer.training
    assert not back.training
    x = torch.randn(3, 4, 8, 9, dtype=torch.float64)
    conv.weight.data *= mask
    assert torch.allclose(layer(x), conv(x), atol=1e-12)
    assert torch.allclose(back(x), conv(x), atol=1e-12)


def test_nonzeros_are_the_default_mask():
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.data[:, 1] = 0
    layer = SparseConv2d.from_dense(conv)
    assert torch.equal(layer.pattern.mask(), conv.weight != 0)
    assert layer.parameter_roles == {"values": "weight"}
    assert torch.equal(layer.weight, conv.weight)
    assert "density=0.75" in repr(layer)


def test_frozen_weights_stay_frozen():
    conv = nn.Conv2d(4, 6, 3)
    conv.weight.requires_grad_(False)
    layer = SparseConv2d.from_dense(conv)
    assert not layer.values.requires_grad
    assert not layer.to_dense().weight.requires_grad


@pytest.mark.parametrize(
    ("conv", "word"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups"),
        (nn.Conv2d(4, 4, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode"),
        (nn.Conv2d(4, 4, (2, 3), padding="same"), "padding 'same'"),
    ],
)
def test_what_is_not_supported_says_why(conv, word):
    assert word in SparseConv2d.supports(conv)
    with pytest.raises(ValueError, match=word):
        SparseConv2d.from_dense(conv)


def test_bad_arguments():
    pattern = SparsePattern.from_mask(torch.rand(6, 4, 3, 3) < 0.5)
    values = torch.randn(pattern.nnz)
    with pytest.raises(ValueError, match="unknown convolution backend 'bag'"):
        SparseConv2d(pattern, values, backend="bag")
    with pytest.raises(ValueError, match="values must be"):
        SparseConv2d(pattern, values[1:])
    with pytest.raises(ValueError, match=r"pattern must be of a weight \(O, I, kh, kw\)"):
        SparseConv2d(SparsePattern.from_mask(torch.ones(3, 4, dtype=torch.bool)), values[:12])


def test_without_numba(monkeypatch):
    monkeypatch.setattr(compiled, "available", lambda: False)
    conv = nn.Conv2d(4, 6, 3)
    mask = torch.rand_like(conv.weight) < 0.05
    with pytest.raises(ValueError, match=r"needs numba: pip install 'featherweight\[optim\]'"):
        SparseConv2d.from_dense(conv, mask, "chwn")
    assert choose_conv(conv, mask, None) == "masked"
    layer = SparseConv2d.from_dense(conv, mask, choose_conv(conv, mask, None))
    x = torch.randn(2, 4, 6, 6)
    assert torch.allclose(layer(x), F.conv2d(x, conv.weight * mask, conv.bias), atol=1e-6)
    norm = chwn_norms_(nn.BatchNorm2d(4))
    assert torch.equal(norm(to_chwn(x)), nn.BatchNorm2d(4)(to_chwn(x)))


def test_checkpoints_are_those_of_the_dense_layer():
    conv = nn.Conv2d(4, 6, 3)
    mask = torch.rand_like(conv.weight) < 0.3
    layer = SparseConv2d.from_dense(conv, mask)
    assert torch.equal(layer.state_dict()["weight"], conv.weight * mask)
    other = nn.Conv2d(4, 6, 3)
    layer.load_state_dict({"weight": other.weight.detach() * mask, "bias": other.bias.detach()})
    x = torch.randn(2, 4, 6, 6)
    assert torch.allclose(layer(x), F.conv2d(x, other.weight * mask, other.bias), atol=1e-6)


def test_another_pattern():
    conv = nn.Conv2d(4, 6, 3, stride=2).double()
    layer = SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) < 0.3)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer(x)
    mask = torch.rand_like(conv.weight) < 0.5
    pattern = SparsePattern.from_mask(mask)
    layer.set_pattern(pattern, pattern.gather(conv.weight.detach()))
    assert torch.allclose(layer(x), F.conv2d(x, conv.weight * mask, conv.bias, 2), atol=1e-12)


def test_dense_gradient_on_demand():
    conv = nn.Conv2d(4, 6, 3).double()
    mask = torch.rand_like(conv.weight) < 0.3
    layer, found = SparseConv2d.from_dense(conv, mask), []
    layer.on_weight = lambda weight: weight.register_hook(found.append)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    weight = (conv.weight.detach() * mask).requires_grad_()
    F.conv2d(x, weight, conv.bias).square().sum().backward()
    assert torch.allclose(found[0], weight.grad, atol=1e-12)
    assert torch.allclose(layer.values.grad, layer.pattern.gather(weight.grad), atol=1e-12)


def trained(model, images, labels, steps=20):
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9, weight_decay=5e-4)
    held = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    masks = [p.detach() != 0 for p in held]
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        for parameter, mask in zip(held, masks, strict=True):
            parameter.grad *= mask
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_twenty_steps_of_a_residual_network(shortcut):
    options = {"classes": 10, "shape": (3, 8, 8), "seed": 0, "width": 4, "shortcut": shortcut}
    model = models.build("resnet20", **options).double()
    compare(model, density=0.3, tolerance=1e-11)


def test_twenty_steps_in_single_precision():
    # Smooth: where a ReLU's input is zero but for rounding, two orders of summation part for good,
    # as the dense network in single and in double precision do.
    widths = [3, 8, 8, 16]
    layers = [
        module
        for a, b in itertools.pairwise(widths)
        for module in (nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.GELU())
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    compare(model, density=0.3, tolerance=1e-5)


def compare(model, density, tolerance):
    masked, sparse = sparsified(model, density)
    chwn_norms_(sparse)
    dtype = next(model.parameters()).dtype
    images, labels = torch.randn(16, 3, 8, 8, dtype=dtype), torch.randint(10, (16,))
    losses = trained(masked, images, labels)
    assert losses[-1] < 0.95 * losses[0]
    for found, expected in zip(trained(sparse, images, labels), losses, strict=True):
        assert found == pytest.approx(expected, abs=tolerance)
    assert sparse.state_dict().keys() == masked.state_dict().keys()
    masked.eval()
    assert torch.allclose(sparse.eval()(images), masked(images), atol=10 * tolerance)


def test_the_layout_flows_through_a_residual_network(monkeypatch):
    model = models.build("resnet20", classes=10, shape=(3, 8, 8), seed=0, width=4)
    _, sparse = sparsified(model, 0.3)
    layouts = []
    for module in chwn_norms_(sparse).modules():
        if isinstance(module, (SparseConv2d, nn.BatchNorm2d)):
            module.register_forward_pre_hook(lambda m, inputs: layouts.append(is_chwn(inputs[0])))
    sparse(torch.randn(4, 3, 8, 8))
    assert layouts[0] is False
    assert all(layouts[1:])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("training", [True, False])
def test_compiles_as_one_graph(training):
    _, model = sparsified(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), 0.5)
    model.train(training)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(whole(x), model(x), atol=1e-6)
    whole(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad, atol=1e-5)


@pytest.mark.parametrize("backend", CONV_BACKENDS)
def test_exports(backend):
    _, model = sparsified(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), 0.5, backend)
    x = torch.randn(2, 3, 6, 6)
    program = torch.export.export(model.eval(), (x,))
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_choice_falls_back_where_sparse_is_not_faster(monkeypatch):
    choose = pytest.importorskip("featherweight.sparse.execute.conv_choose")
    conv = nn.Conv2d(8, 8, 3, padding=1)
    mask = torch.rand_like(conv.weight) < 0.1
    cells = []

    def seconds(cell, measure):
        cells.append(cell)
        return {"masked": 1.0, "chwn": times.pop()}

    monkeypatch.setattr(choose.cost, "seconds", seconds)
    times = [0.9, 0.7]
    assert choose_conv(conv, mask, (128, 8, 32, 32)) == "chwn"
    assert choose_conv(conv, mask, (128, 8, 32, 32)) == "masked"
    assert choose_conv(conv, torch.ones_like(mask), None) == "masked"  # dense: nothing is timed
    assert choose_conv(conv.half(), mask, None) == "masked"
    assert len(cells) == 2
    assert cells[0] == cells[1]


def test_measured_costs():
    choose = pytest.importorskip("featherweight.sparse.execute.conv_choose")
    form = choose.Convolution((3, 3), (2, 2), (1, 1))
    found = choose.conv_seconds((4, 3), form, (2, 6, 6), 0.5)
    assert found.keys() == {"masked", "chwn"}
    assert all(value > 0 for value in found.values())


@pytest.mark.parametrize("example", [[128, 224, 224], [1, 4096, 4096], [4096, 2, 2], [2, 4, 4]])
def test_large_layers_are_tried_small(example):
    choose = pytest.importorskip("featherweight.sparse.execute.conv_choose")
    batch, height, width = choose._smaller(example, 10_000)
    assert batch * height * width * 10_000 <= choose.PRODUCTS or batch == 1
    assert batch <= example[0]
    assert height <= example[1]
