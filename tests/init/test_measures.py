"""Jacobian spectra and signal reports against plain autograd, and the closed forms."""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from featherweight import init
from featherweight.lab.models import build
from featherweight.lab.models.residual import Variant
from featherweight.lab.models.residual_mlp import ResidualMlp
from tests.init.networks import UserBlock, basic_net, framed, perceptron
from tests.oracles import risotto as oracle


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def by_autograd(function, x):
    """Return singular values from reverse-mode rows, one example."""
    jacobian = torch.autograd.functional.jacobian(lambda z: function(z[None]).flatten(), x[0])
    return torch.linalg.svdvals(jacobian.flatten(1))


def test_exact_singular_values_are_those_of_autograd_at_any_state():
    model = framed(UserBlock(8, 8), UserBlock(8, 16, stride=2), inner=16).double()
    x = doubles(2, 3, 6, 6)
    model(x)
    model.eval()
    for state, function in (
        (None, model[:5]),
        ("3", model[:4]),
        (model[1], model[:2]),  # changed in place by the ReLU behind it
        (model, model),
    ):
        spectrum = init.jacobian_spectrum(model, x, state=state)
        expected = torch.stack([by_autograd(function, x[i : i + 1]) for i in range(2)])
        assert torch.allclose(spectrum.values, expected, atol=1e-10)
        assert spectrum.largest == spectrum.values.max()
        assert spectrum.outputs == function(x[:1]).numel()


def test_moments_are_over_all_input_directions():
    layer = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    spectrum = init.jacobian_spectrum(layer, doubles(1, 4))
    assert spectrum.values.tolist() == [[3.0, 1.0]]
    assert spectrum.mean_square == pytest.approx((9 + 1) / 4)
    assert spectrum.spread == pytest.approx(np.std([9, 1, 0, 0]))
    assert not spectrum.isometric()
    assert "largest 3, mean square 2.5" in str(spectrum)


def test_estimates_agree_with_exact_values():
    model = perceptron(30, 60, 60, 10).double()
    x = doubles(3, 30)
    exact = init.jacobian_spectrum(model, x, state="3")
    options = {"state": "3", "method": "estimate", "samples": 2000, "seed": 1}
    estimate = init.jacobian_spectrum(model, x, **options)
    assert estimate.values is None
    assert estimate.smallest is None
    assert estimate.largest == pytest.approx(exact.largest, rel=1e-5)
    assert estimate.mean_square == pytest.approx(exact.mean_square, rel=0.05)
    assert estimate.spread == pytest.approx(exact.spread, rel=0.05)
    assert str(init.jacobian_spectrum(model, x, **options)) == str(estimate)


def test_an_isometry_has_no_spread_in_the_estimate_and_a_single_lost_direction_shows():
    model = basic_net(5, "C").double()
    init.risotto_(model, seed=0)
    x = doubles(2, 3, 6, 6)
    estimate = init.jacobian_spectrum(model, x, method="estimate")
    assert estimate.isometric(1e-10)
    x[:, :, 0, 0] = 0  # a pixel of exact zeros: its ReLUs have derivative zero
    exact = init.jacobian_spectrum(model, x)
    assert (exact.values[0] < 1e-9).sum() == 3
    assert not init.jacobian_spectrum(model, x, method="estimate").isometric(1e-3)


def test_large_networks_are_estimated():
    model = build("resnet20", classes=10, shape=(3, 32, 32), seed=0, width=4)
    x = torch.randn(1, 3, 32, 32)
    assert init.jacobian_spectrum(model, x, samples=2, iterations=2).method == "estimate"


def test_isometry_report_follows_the_states():
    model = ResidualMlp(10, 4, 24, 3, Variant("C", "none")).double()
    x = doubles(1, 10)
    init.risotto_(model, seed=0)
    report = init.isometry_report(model, x)
    assert [s.state for s in report] == ["linear", "blocks.0", "blocks.1", "blocks.2"]
    assert report.isometric(1e-12)
    init.balanced_(model, seed=0)
    report = init.isometry_report(model, x)
    assert not report.isometric(0.1)
    last = report.spectra[-1].values
    assert torch.allclose(last, init.jacobian_spectrum(model, x).values)
    assert str(report).splitlines()[2].split()[0] == "blocks.0"


def test_the_oracle_agrees_on_ordinary_weights():
    model = ResidualMlp(10, 4, 24, 3, Variant("C", "none", "both")).double()
    init.balanced_(model, seed=0)
    blocks = [
        oracle.Block(
            block.linear1.weight.detach().numpy(),
            block.linear2.weight.detach().numpy(),
            block.scalars.skip.scale.item() * block.shortcut.weight.detach().numpy(),
            block.scalars.branch.scale.item(),
        )
        for block in model.blocks
    ]
    x = doubles(1, 10)
    state, jacobian = oracle.run(model.linear.weight.detach().numpy(), blocks, x[0].numpy())
    values = init.jacobian_spectrum(model, x).values[0]
    assert np.allclose(values, np.linalg.svd(jacobian, compute_uv=False), atol=1e-12)
    norm = init.signal_report(model, torch.cat([x, 2 * x])).rows[-2].norm
    assert norm == pytest.approx(np.linalg.norm(state) / x.norm().item())


def test_signal_report_by_hand():
    model = perceptron(5, 8, 8, 3).double()
    x = doubles(2, 5)
    report = init.signal_report(model, x, seed=3)
    assert [row.state for row in report] == ["input", "0", "2", "output"]
    first = model[0](x).relu()
    cosine = nn.functional.cosine_similarity(first[:1], first[1:]).item()
    assert report.rows[1].cosine == pytest.approx(cosine)
    assert report.rows[1].norm == pytest.approx((first.norm(dim=1) / x.norm(dim=1)).mean().item())
    assert report.rows[1].pair_cosine is None
    direction = torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direction = direction / direction.norm(dim=1, keepdim=True)
    state = first.detach().requires_grad_()
    (slope,) = torch.autograd.grad((model[2:](state) * direction).sum(), state)
    assert report.rows[1].gradient == pytest.approx(slope.norm(dim=1).mean().item())
    assert report.rows[-1].gradient == 1


def test_signals_of_an_isometry_keep_norms_and_the_cosine_of_differences():
    model = basic_net(20, "C").double()
    init.risotto_(model, seed=0)
    report = init.signal_report(model, doubles(3, 3, 6, 6))
    states = report.rows[1:-1]
    assert len(states) == 21
    for row in states:
        assert row.norm == pytest.approx(1, abs=1e-12)
        assert row.pair_cosine == pytest.approx(report.rows[0].cosine, abs=1e-12)
        assert row.cosine != pytest.approx(row.pair_cosine, abs=1e-3)


def test_other_models_are_measured_at_their_layers_and_left_alone():
    model = build("vit", classes=3, shape=(3, 8, 8), seed=0, width=12, depth=2)
    x = torch.randn(2, 3, 8, 8)
    report = init.signal_report(model, x)
    assert report.rows[1].state == "patches"
    assert report.rows[-2].state == "classifier"
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert init.jacobian_spectrum(model, x).state == "output"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fast"}, "unknown method 'fast'"),
        ({"samples": 1}, "samples must be at least 2, got 1"),
        ({"iterations": 1}, "iterations must be at least 2, got 1"),
        ({"state": "5"}, "state '5' is no submodule of Sequential"),
        ({"state": nn.ReLU()}, "state must be a submodule of the model, got ReLU"),
        ({"x": torch.ones(3, 5, dtype=torch.int64)}, r"x must be floats \[B, ...\]"),
        ({"seed": None}, "exactly one of seed= and generator="),
    ],
)
def test_bad_arguments_of_a_spectrum(options, message):
    model = perceptron(5, 8, 3)
    with pytest.raises(ValueError, match=message):
        init.jacobian_spectrum(model, **{"x": torch.randn(1, 5)} | options)


def test_a_state_that_runs_twice_and_a_single_example_are_refused():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Linear(5, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, 3))
    with pytest.raises(ValueError, match="state '1' must run once in a pass, it runs 2 times"):
        init.jacobian_spectrum(model, torch.randn(1, 5), state=relu)
    with pytest.raises(ValueError, match=r"B >= 2, got torch.float32 \[1, 5\]"):
        init.signal_report(model, torch.randn(1, 5))


def test_pictures_are_drawn_and_written(tmp_path):
    pytest.importorskip("matplotlib")
    model = perceptron(5, 8, 8, 3)
    x = torch.randn(2, 5)
    signal = init.signal_report(model, x)
    for name, measure in (
        ("signal.png", signal),
        ("isometry.svg", init.isometry_report(model, x)),
        ("spectrum.png", init.jacobian_spectrum(model, x)),
        ("estimate.png", init.jacobian_spectrum(model, x, method="estimate")),
    ):
        figure = measure.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
        assert figure.axes
    (line,) = signal.plot().axes[0].lines
    assert list(line.get_ydata()) == [row.norm for row in signal]


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'featherweight\[lab\]'"):
        init.signal_report(perceptron(5, 8, 3), torch.randn(2, 5)).plot()


def test_expected_norm_of_residual_networks_by_sampling():
    generator = torch.Generator().manual_seed(0)
    widths, hidden, alpha, beta, count = (10, 12, 8), 6, 0.8, 0.5, 100_000

    def normal(rows, columns, std):
        return std * torch.randn(count, rows, columns, generator=generator)

    x = torch.randn(4, 1, generator=generator)
    state = (normal(10, 4, 0.4) @ x).relu()
    scales = []
    for inputs, width in pairwise(widths):
        middle = (normal(hidden, inputs, 0.5) @ state).relu()
        branch = normal(width, hidden, 0.3) @ middle
        state = (alpha * branch + beta * (normal(width, inputs, 0.35) @ state)).relu()
        scales.append(init.BlockScales(width, hidden, 0.5, 0.3, 0.35, alpha, beta))
    sampled = state.square().sum((1, 2)) / x.square().sum()
    expected = init.expected_square_norm(10, 0.4, scales)
    error = sampled.std() / math.sqrt(count)
    assert error < 0.01 * expected
    assert abs(sampled.mean() - expected) < 4 * error


def test_balanced_weights_keep_the_expected_norm():
    block = init.BlockScales(
        20, 30, math.sqrt(2 / 30), math.sqrt(2 / 20), math.sqrt(2 / 20), 0.6, 0.8
    )
    assert init.expected_square_norm(50, math.sqrt(2 / 50), [block] * 100) == pytest.approx(1)


def test_expected_norm_with_biases_by_sampling():
    generator = torch.Generator().manual_seed(0)
    widths, stds = (6, 9, 5), (0.7, 0.4, 0.6)
    biases = init.bias_scales(stds, bias_factor=1.5)
    assert biases == pytest.approx((1.05, 0.42, 0.252))
    x = torch.randn(4, 1, generator=generator)
    state = x.expand(100_000, 4, 1)
    for width, std, bias in zip(widths, stds, biases, strict=True):
        weight = std * torch.randn(100_000, width, state.shape[1], generator=generator)
        shift = bias * torch.randn(100_000, width, 1, generator=generator)
        state = (weight @ state + shift).relu()
    expected = init.expected_square_norm_with_biases(x.square().sum().item(), widths, stds, biases)
    assert state.square().sum((1, 2)).mean().item() == pytest.approx(expected, rel=0.01)
    with pytest.raises(ValueError, match="must be of one length, got 3, 2, 3"):
        init.expected_square_norm_with_biases(1.0, widths, stds[:2], biases)


def test_cosines_follow_the_recursion_in_wide_networks():
    start = torch.zeros(2, 200)
    start[0, 0], start[1, :2] = 1.0, torch.tensor([0.2, math.sqrt(1 - 0.2**2)])
    generator = torch.Generator().manual_seed(0)
    rotated = start @ init.haar(200, 200, generator=generator).float()
    measured = []
    for _ in range(30):
        model = ResidualMlp(200, 2, 400, 8, Variant("C", "none", "both"))
        init.balanced_(model, alpha=0.6, generator=generator)
        measured.append([row.cosine for row in init.signal_report(model, rotated)][1:-1])
    predicted = init.similarity_by_depth(init.relu_cosine(0.2), 8, alpha=0.6)
    assert len(predicted) == 9
    assert np.abs(np.mean(measured, 0) - predicted).max() < 0.03


def test_relu_cosine_is_never_below_its_argument_and_similarity_goes_to_one():
    for cosine in np.linspace(-1, 0.999, 50):
        assert init.relu_cosine(cosine) > cosine
    assert init.relu_cosine(1.0) == pytest.approx(1)
    assert init.relu_cosine(0.0) == pytest.approx(1 / math.pi)
    assert init.relu_cosine(-1.0) == pytest.approx(0)
    assert init.similarity_by_depth(-0.5, 400)[-1] > 0.999
    slow, fast = (init.similarity_by_depth(0.0, 5, alpha=a)[-1] for a in (0.1, 0.9))
    assert slow < fast
    with pytest.raises(ValueError, match=r"cosine must lie in \[-1, 1\], got 2"):
        init.relu_cosine(2.0)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got -1"):
        init.similarity_by_depth(0.5, 3, alpha=-1.0)
