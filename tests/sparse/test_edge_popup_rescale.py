"""Scaling the frozen parameters so that outputs fit."""

import copy

import pytest
import torch
from scipy import optimize
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from featherweight.sparse.reparam import (
    edge_popup,
    fit_by_descent,
    fit_cross_entropy,
    fit_squares,
    fold,
    masks,
    scale_last_layer_,
    scale_output_,
    scale_to_fit_,
    score_parameters,
)


def convolutional():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.LeakyReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(4, 3),
    )


def dense():
    return nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))


CASES = [(convolutional, (6, 2, 6, 6)), (dense, (6, 5))]


@pytest.mark.parametrize(("make", "shape"), CASES)
@pytest.mark.parametrize("popup", [False, True])
@pytest.mark.parametrize("factor", [7.0, 0.01])
def test_the_output_is_multiplied_exactly(make, shape, popup, factor):
    model = make().double()
    if popup:
        edge_popup(model, 0.6, biases=True, seed=0)
    x = torch.randn(shape).double()
    before, chosen = model(x), masks(model) if popup else None
    scale_output_(model, factor)
    torch.testing.assert_close(model(x), factor * before, rtol=1e-10, atol=1e-14)
    assert torch.equal(model(x).argmax(1), before.argmax(1))
    if popup:
        assert masks(model) == chosen
        after = model(x)
        fold(model)
        torch.testing.assert_close(model(x), after)


def test_the_factor_is_spread_over_the_layers():
    model = dense()
    before = copy.deepcopy(model.state_dict())
    scale_output_(model, 8.0)
    for layer, power in ((0, 1), (2, 2), (4, 3)):
        torch.testing.assert_close(model[layer].weight, 2 * before[f"{layer}.weight"])
        torch.testing.assert_close(model[layer].bias, 2**power * before[f"{layer}.bias"])


def test_the_last_layer_of_a_residual_network():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(x + self.norm(self.stem(x)).relu())

    model = Residual().eval()
    edge_popup(model, 0.5, biases=True, seed=0)
    x = torch.randn(8, 4)
    before = model(x)
    with pytest.raises(ValueError, match="model must be a Sequential, got Residual"):
        scale_output_(model, 3.0)
    scale_last_layer_(model, 3.0)
    torch.testing.assert_close(model(x), 3 * before)
    labels = torch.randint(2, (8,))
    factor = scale_to_fit_(model, x, labels, fit_cross_entropy, scale=scale_last_layer_)
    torch.testing.assert_close(model(x), 3 * factor * before)


def test_norms_and_other_functions_are_refused_untouched():
    for module, name in ((nn.BatchNorm1d(9), "BatchNorm1d"), (nn.Tanh(), "Tanh")):
        model = nn.Sequential(nn.Linear(5, 9), module, nn.ReLU(), nn.Linear(9, 3))
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=f"module '1', a {name}, does not keep the scale"):
            scale_output_(model, 2.0)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_bias_before_batch_norm_does_nothing():
    """Why biases can't help there: in training mode the mean takes them away."""
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9, affine=False)).double()
    x = torch.randn(20, 5).double()
    before = model(x)
    with torch.no_grad():
        model[0].bias.add_(torch.randn(9))
    torch.testing.assert_close(model(x), before)


def test_other_models_are_refused():
    shared = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="one place"):
        scale_output_(nn.Sequential(shared, nn.ReLU(), shared), 2.0)
    with pytest.raises(ValueError, match="one or more layers"):
        scale_output_(nn.Sequential(nn.ReLU()), 2.0)
    with pytest.raises(ValueError, match="no linear or convolution"):
        scale_last_layer_(nn.ReLU(), 2.0)
    with pytest.raises(ValueError, match="another form"):
        scale_output_(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4))), 2.0)
    for factor in (0.0, -1.0, float("inf"), float("nan")):
        for scale in (scale_output_, scale_last_layer_):
            with pytest.raises(ValueError, match="factor"):
                scale(dense(), factor)


def test_least_squares():
    """Oracle: a numeric minimum."""
    outputs, targets = torch.randn(30, 2).double(), torch.randn(30, 2).double()

    def loss(factor):
        return float((factor * outputs - targets).square().mean())

    assert fit_squares(outputs, targets) == pytest.approx(
        optimize.minimize_scalar(loss).x, abs=1e-7
    )
    assert fit_squares(torch.zeros(3), torch.ones(3)) == 1
    with pytest.raises(ValueError, match="one shape"):
        fit_squares(outputs, targets[:, 0])


def test_cross_entropy():
    """Oracle: a numeric minimum."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=generator)
    logits = F.one_hot(labels, 4) + torch.randn(200, 4, generator=generator)

    def loss(factor):
        return float(F.cross_entropy(factor * logits.double(), labels))

    best = optimize.minimize_scalar(loss, bounds=(0, 10), method="bounded", options={"xatol": 1e-9})
    assert fit_cross_entropy(logits, labels) == pytest.approx(best.x, abs=1e-5)
    right = 5.0 * F.one_hot(labels, 4)
    assert fit_cross_entropy(right, labels) == pytest.approx(10.0)
    assert fit_cross_entropy(right, labels, limit=3.0) == pytest.approx(3.0)
    assert fit_cross_entropy(-right, labels) == pytest.approx(0.0, abs=1e-12)


def test_descent():
    """Oracle: the steps of 1 - rate * slope by hand, for a squared error."""
    outputs, targets = torch.randn(30).double(), torch.randn(30).double()
    factor = 1.0
    for _ in range(20):
        slope = 2 * float(((factor * outputs - targets) * outputs).mean())
        factor -= 0.1 * slope
    assert fit_by_descent(F.mse_loss)(outputs, targets) == pytest.approx(factor, rel=1e-12)
    closed = fit_squares(outputs, targets)
    assert fit_by_descent(F.mse_loss, steps=2000)(outputs, targets) == pytest.approx(closed)
    assert fit_by_descent(F.cross_entropy)(torch.randn(9, 3), torch.randint(3, (9,))) > 0
    for steps, rate in ((0, 0.1), (20, 0.0), (20, float("nan"))):
        with pytest.raises(ValueError, match="steps"):
            fit_by_descent(F.mse_loss, steps, rate)


def test_scaling_to_fit_never_raises_the_loss_on_its_batch():
    model = dense().double()
    edge_popup(model, 0.5, biases=True, seed=0)
    optimizer = torch.optim.SGD(score_parameters(model), lr=0.1)
    x = torch.randn(40, 5).double()
    before = model(x)
    targets = 3 * before.detach() + 0.1 * torch.randn(40, 3)
    factor = scale_to_fit_(model, x, targets, optimizer=optimizer)
    assert factor == pytest.approx(3, rel=0.5)
    torch.testing.assert_close(model(x), factor * before)
    assert F.mse_loss(model(x), targets) < F.mse_loss(before, targets)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / factor)
    assert scale_to_fit_(model, x, -targets, optimizer=optimizer) == 1
    torch.testing.assert_close(model(x), factor * before)


def test_scores_learn_at_the_same_pace_after_scaling():
    """Gradients by the scores grow with the factor; the learning rate falls by it."""
    models = [dense().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(10, 5).double()
    for model, factor in zip(models, (1.0, 4.0), strict=True):
        edge_popup(model, 0.5, biases=True, seed=0)
        scale_output_(model, factor)
        model(x).sum().backward()
    for plain, scaled in zip(*(score_parameters(model) for model in models), strict=True):
        torch.testing.assert_close(scaled.grad, 4 * plain.grad)
