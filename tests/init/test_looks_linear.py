"""Plain networks: looks-linear and delta-orthogonal weights, nonzero biases, He with biases."""

import math

import pytest
import torch
from torch import nn

from featherweight import init
from featherweight.lab.models import build
from tests.init.networks import UserBlock, framed, perceptron


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_haar_is_semi_orthogonal_and_uniform_in_sign():
    for rows, columns in ((6, 4), (4, 6), (5, 5), (1, 3)):
        matrix = init.haar(rows, columns, seed=0)
        gram = matrix.T @ matrix if rows >= columns else matrix @ matrix.T
        assert matrix.shape == (rows, columns)
        assert torch.allclose(gram, torch.eye(min(rows, columns)).double(), atol=1e-14)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([init.haar(3, 3, generator=generator) for _ in range(2000)])
    assert draws.mean(0).abs().max() < 5 * (1 / 3 / 2000) ** 0.5  # a QR without signs has a bias
    assert torch.allclose(draws.square().mean(0), torch.full((3, 3), 1 / 3).double(), atol=0.04)


def test_looks_linear_matrix_has_twice_the_singular_values_and_zeros():
    u, v = doubles(3, 5), doubles(5, 4)
    values = torch.linalg.svdvals(init.looks_linear_matrix(u))
    doubled = 2 * torch.linalg.svdvals(u)
    assert torch.allclose(values[:3], doubled, atol=1e-13)
    assert values[3:].max() < 1e-13
    both = init.looks_linear_matrix(u) @ init.looks_linear_matrix(v)
    assert torch.allclose(both, 2 * init.looks_linear_matrix(u @ v))
    d = doubles(4)
    state = torch.cat([d.relu(), (-d).relu()])
    through = init.looks_linear_matrix(u) @ (init.looks_linear_matrix(v) @ state).relu()
    assert torch.allclose(through, init.looks_linear_matrix(u @ v) @ state, atol=1e-13)


def test_delta_multiplies_pixels_and_interleave_makes_neighbours():
    matrix, x = doubles(4, 3), doubles(2, 3, 5, 5)
    weight = init.delta(matrix, (3, 5))
    out = nn.functional.conv2d(x, weight, padding=(1, 2))
    assert torch.allclose(out, torch.einsum("oc,bchw->bohw", matrix, x))
    assert init.interleave(torch.arange(6)).tolist() == [0, 3, 1, 4, 2, 5]
    assert init.interleave(torch.arange(4)[None], dim=1).tolist() == [[0, 2, 1, 3]]


def test_forty_looks_linear_layers_are_a_linear_isometry():
    model = perceptron(8, *[20] * 40, 6).double()
    init.looks_linear_(model, seed=0)
    x, y = doubles(2, 3, 8)
    assert init.jacobian_spectrum(model, x).isometric(1e-12)
    with torch.no_grad():
        assert torch.allclose(model(2 * x - y), 2 * model(x) - model(y), atol=1e-13)
    assert not model[0].bias.any()


def test_looks_linear_convolutions_with_pooling_and_flattening():
    model = build("vgg16", classes=5, shape=(3, 32, 32), seed=0, width=8).double()
    report = init.looks_linear_(model, seed=0)
    assert (
        sum("no isometry" in row.remark for row in report) == 4
    )  # the last one is before the head
    plain = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 200),
        nn.ReLU(),
        nn.Linear(200, 3),
    ).double()
    x = doubles(1, 1, 4, 4)
    init.looks_linear_(plain, seed=0, example=x)
    assert init.jacobian_spectrum(plain, x).isometric(1e-12)


def test_looks_linear_refuses_residual_blocks():
    model = framed(UserBlock(8, 8))
    before = [p.clone() for p in model.parameters()]
    for method in (init.looks_linear_, init.looks_linear_nonzero_bias_):
        with pytest.raises(ValueError, match=r"block '3' is residual.*use risotto_"):
            method(model, seed=0)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_looks_linear_with_biases_is_an_affine_isometry():
    model = perceptron(8, *[20] * 40, 6).double()
    init.looks_linear_nonzero_bias_(model, seed=0)
    x, y = doubles(2, 3, 8)
    assert init.jacobian_spectrum(model, x).isometric(1e-12)
    with torch.no_grad():
        middle = model((x + y) / 2)
        assert torch.allclose(middle, (model(x) + model(y)) / 2, atol=1e-13)
    bias = model[2].bias.detach()
    assert torch.equal(bias[:10], -bias[10:])
    assert bias.abs().min() > 0


def test_squared_norm_grows_by_the_variance_of_the_biases():
    widths, x = [100] * 5, doubles(1, 20)
    grown = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        model = perceptron(20, *widths, 3).double()
        init.looks_linear_nonzero_bias_(model, generator=generator)
        with torch.no_grad():
            grown.append(model[:-1](x).square().sum() - x.square().sum())
    stds = init.bias_scales([50**-0.5] * 5)
    expected = sum(std**2 * 100 / 2 for std in stds)
    samples = torch.stack(grown)
    assert samples.mean().item() == pytest.approx(expected, abs=4 * float(samples.std()) / 300**0.5)


@pytest.mark.parametrize("depth", [2, 6])
def test_dependent_biases_keep_norms_exactly(depth):
    model = perceptron(8, *[20] * depth, 3).double()
    init.looks_linear_nonzero_bias_(model, biases="dependent", seed=0)
    x = doubles(5, 8)
    with torch.no_grad():
        states = [model[: 2 * layer](x) for layer in range(1, depth + 1)]
    norms = [state.norm(dim=1) / x.norm(dim=1) for state in states]
    assert all(torch.allclose(norm, torch.ones(5).double(), atol=1e-13) for norm in norms[1::2])
    assert all((norm - 1).abs().max() > 1e-3 for norm in norms[::2])
    assert model[2].bias.abs().min() > 0


def test_dependent_biases_pass_a_flattening_and_no_max_pooling():
    def convolutional(*pooling):
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1),
            nn.ReLU(),
            *pooling,
            nn.Flatten(),
            nn.LazyLinear(200),
            nn.ReLU(),
            nn.Linear(200, 3),
        ).double()

    x = doubles(2, 1, 4, 4)
    model = convolutional()
    model(x)
    init.looks_linear_nonzero_bias_(model, biases="dependent", seed=0, example=x)
    with torch.no_grad():
        norms = model[:-1](x).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.ones(2).double(), atol=1e-13)
    pooled = convolutional(nn.MaxPool2d(2))
    pooled(x)
    with pytest.raises(ValueError, match="dependent biases do not pass the max-pooling"):
        init.looks_linear_nonzero_bias_(pooled, biases="dependent", seed=0, example=x)


def test_a_layer_without_a_bias_is_refused():
    model = perceptron(4, 8, 8, 2)
    model[2] = nn.Linear(8, 8, bias=False)
    with pytest.raises(ValueError, match="layer '2' has no bias"):
        init.looks_linear_nonzero_bias_(model, seed=0)
    with pytest.raises(ValueError, match="unknown biases 'zero'"):
        init.looks_linear_nonzero_bias_(model, seed=0, biases="zero")


@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_delta_orthogonal_convolutions_keep_norms_and_flattened_ones_do_not(mode):
    conv = nn.Conv2d(4, 9, 3, padding=1, padding_mode=mode, bias=False).double()
    x = doubles(5, 4, 6, 6)

    def stretch():
        return conv(x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)

    init.orthogonal_delta_(conv, seed=0)
    assert torch.allclose(stretch(), torch.ones(5).double(), atol=1e-13)
    nn.init.orthogonal_(conv.weight)
    assert (stretch() - 1).abs().max() > 0.05


def test_orthogonal_delta_treats_each_layer_and_group():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 5, groups=8),
        nn.Conv2d(8, 4, 1, stride=2),
        nn.Flatten(),
        nn.Linear(6, 6),
    ).double()
    report = init.orthogonal_delta_(model, gain=2.0, seed=0)
    group = model[0].weight[:4, :, 1, 1]
    assert torch.allclose(group.T @ group, 4 * torch.eye(2).double(), atol=1e-12)
    assert torch.equal(model[2].weight[:, 0, 2, 2].abs(), torch.full((8,), 2.0).double())
    assert model[0].weight.count_nonzero() == 8 * 2
    assert torch.allclose(model[5].weight @ model[5].weight.T, 4 * torch.eye(6).double())
    assert report["3"].remark == "contracts 8 to 4; stride: skips pixels"
    assert not model[0].bias.any()
    for bad, message in (
        (nn.Conv2d(2, 2, 2), "layer '' has an even kernel"),
        (nn.ConvTranspose2d(2, 2, 3), "transposed"),
        (nn.ReLU(), "no linear layer"),
    ):
        with pytest.raises(ValueError, match=message):
            init.orthogonal_delta_(bad, seed=0)


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize(("mode", "fan"), [("fan_in", (50, 400)), ("fan_out", (400, 300))])
def test_he_biases_have_the_running_product_as_their_scale(mode, fan, distribution):
    model = perceptron(50, 400, 300, 20).double()
    init.he_nonzero_bias_(
        model, bias_factor=0.5, fan_mode=mode, distribution=distribution, density=0.25, seed=0
    )
    product = 0.5
    for layer, size in zip((model[0], model[2]), fan, strict=True):
        std = math.sqrt(2 / size / 0.25)
        product *= std
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
        assert layer.bias.std().item() == pytest.approx(product, rel=0.15)
        if distribution == "uniform":
            assert layer.weight.abs().max() <= math.sqrt(3) * std


def test_the_product_runs_along_the_main_path_and_shortcuts_continue_at_their_input():
    model = build("resnet20", classes=5, shape=(3, 8, 8), seed=0, width=64, norm="none").double()
    report = init.he_nonzero_bias_(model, seed=0)
    std = {row.name: float(row.what.split(",")[0].split()[1]) for row in report}
    bias = {row.name: float(row.what.split("bias ")[1]) for row in report}
    main = ["conv1", *(f"layer1.{b}.conv{c}" for b in range(3) for c in (1, 2))]
    before = math.prod(std[name] for name in main)
    block = "layer2.0."
    shortcut = before * std[block + "shortcut.0"]
    assert bias[block + "shortcut.0"] == pytest.approx(shortcut, rel=1e-2)
    branch = before * std[block + "conv1"] * std[block + "conv2"]
    assert bias[block + "conv2"] == pytest.approx(branch, rel=1e-2)
    assert bias["layer2.1.conv1"] == pytest.approx(branch * std["layer2.1.conv1"], rel=1e-2)
    assert model.layer2[0].shortcut[0].bias.std().item() == pytest.approx(shortcut, rel=0.3)


def test_he_remarks_on_biases_that_a_norm_removes_and_needs_one_bias():
    report = init.he_nonzero_bias_(build("mlp", classes=3, shape=(1, 4, 4), seed=0), seed=0)
    assert report["linear1"].remark == "the norm behind it removes the bias"
    with pytest.raises(ValueError, match="no layer of the model has a bias"):
        init.he_nonzero_bias_(perceptron(4, 8, 2, bias=False), seed=0)
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got 0"):
        init.he_nonzero_bias_(perceptron(4, 8, 2), density=0.0, seed=0)
    with pytest.raises(ValueError, match="unknown fan_mode 'fan'"):
        init.he_nonzero_bias_(perceptron(4, 8, 2), fan_mode="fan", seed=0)


@torch.no_grad()
def test_scaling_weights_and_biases_by_the_products_scales_the_output():
    model = perceptron(6, 30, 30, 4).double()
    init.he_nonzero_bias_(model, bias_factor=1.0, seed=0)
    x = doubles(5, 6)
    before, product = model(x), 1.0
    for layer, scale in zip(model[::2], (0.3, 2.0, 1.7), strict=True):
        product *= scale
        layer.weight *= scale
        layer.bias *= product
    assert torch.allclose(model(x), product * before, rtol=1e-12)


@torch.no_grad()
def test_without_biases_a_network_is_homogeneous_and_with_them_it_is_not():
    model, x = perceptron(6, 30, 30, 4).double(), doubles(5, 6)
    init.he_nonzero_bias_(model, bias_factor=0.0, seed=0)
    assert torch.allclose(model(3 * x), 3 * model(x), rtol=1e-12)
    init.he_nonzero_bias_(model, seed=0)
    assert (model(3 * x) - 3 * model(x)).abs().max() > 1e-3


@torch.no_grad()
def test_zero_biases_sit_on_the_floor_of_a_constant_and_nonzero_ones_go_below():
    # With zero biases f(x) = a relu(x) + b relu(-x): the best fit of 1/2 has mean square 1/16.
    # Of relu(x + 1/2) it is 0.05143 (the same two numbers, by quadrature).
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None]
    floors = {}
    for factor in (0.0, 1.0):
        model = perceptron(1, 200, 200, 1).double()
        init.he_nonzero_bias_(model, bias_factor=factor, seed=0)
        hidden = model[:-1](x)
        for name, target in (("half", torch.full_like(x, 0.5)), ("shifted", (x + 0.5).relu())):
            fit = torch.linalg.lstsq(hidden, target, driver="gelsd").solution
            floors[name, factor] = float((hidden @ fit - target).square().mean())
    assert floors["half", 0.0] == pytest.approx(1 / 16, rel=2e-3)
    assert floors["shifted", 0.0] == pytest.approx(0.05143, rel=2e-3)
    assert floors["half", 1.0] < 1e-6
    assert floors["shifted", 1.0] < 1e-4
