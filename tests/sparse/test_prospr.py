"""ProsPr against real training runs whose loss is differenced by the mask."""

import pytest
import torch
from torch import nn

from featherweight.sparse import score
from tests.models import mlp
from tests.oracles.prospr import slow_meta_loss
from tests.oracles.snip import slow_mask_derivative
from tests.sparse.test_grasp import smooth
from tests.sparse.test_snip import batch, snip, weights_of

BATCHES = [batch(seed=seed) for seed in range(4)]


def prospr(model, batches=BATCHES, **options):
    return score("prospr", weights_of(model), model=model, batches=batches, **options)


def tiny(norm):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(4)] if norm else []
    return nn.Sequential(nn.Linear(16, 4), *middle, nn.Tanh(), nn.Linear(4, 4)).double()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("steps", "given"), [(1, 2), (3, 4), (3, 2)])
def test_scores_are_the_derivative_of_training_by_the_mask(norm, steps, given):
    model, batches = tiny(norm), BATCHES[:given]
    shapes = {n: w.shape for n, w in weights_of(model).items()}
    slopes = slow_mask_derivative(
        lambda masks: slow_meta_loss(model, masks, batches, steps, 0.5), shapes
    )
    for name, found in prospr(model, batches, steps=steps, lr=0.5).items():
        torch.testing.assert_close(found, slopes[name].abs(), rtol=1e-5, atol=1e-8)


def test_three_steps_of_a_tenth_unless_told_otherwise():
    default, named = prospr(tiny(True)), prospr(tiny(True), steps=3, lr=0.1)
    assert all(torch.equal(default[n], named[n]) for n in default)


@pytest.mark.parametrize("first_order", [True, False])
def test_without_steps_it_is_snip_on_the_first_batch(first_order):
    model = mlp().double()
    expected = snip(model, BATCHES[:1])
    for options in ({"steps": 0}, {"steps": 4, "lr": 0.0}):
        found = prospr(model, first_order=first_order, **options)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_first_order_is_weight_times_gradient_after_training():
    model = smooth().double()
    found = prospr(model, lr=0.5, first_order=True)
    start = {n: w.detach().clone() for n, w in weights_of(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step, (x, y) in enumerate(BATCHES):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        if step < 3:
            optimizer.step()
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(found[name], (start[name] * weight.grad).abs())
    second = prospr(smooth().double(), lr=0.5)
    assert any(not torch.allclose(second[n], found[n], rtol=1e-3) for n in found)


def test_masked_weights_stay_away_during_the_steps():
    model = tiny(False)
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in weights_of(model).items()}
    masks["0.weight"][:, ::2] = False
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    shapes = {n: w.shape for n, w in weights_of(model).items()}
    slopes = slow_mask_derivative(
        lambda factors: slow_meta_loss(model, factors, BATCHES, 3, 0.5, held=masks), shapes
    )
    for name, found in prospr(model, lr=0.5, masks=masks).items():
        torch.testing.assert_close(found, slopes[name].abs(), rtol=1e-5, atol=1e-8)


def test_frozen_parameters_do_not_move_but_frozen_weights_are_scored():
    model = tiny(False)
    model[0].bias.requires_grad_(False)
    shapes = {n: w.shape for n, w in weights_of(model).items()}
    slopes = slow_mask_derivative(
        lambda masks: slow_meta_loss(model, masks, BATCHES, 2, 0.5), shapes
    )
    for name, found in prospr(model, steps=2, lr=0.5).items():
        torch.testing.assert_close(found, slopes[name].abs(), rtol=1e-5, atol=1e-8)
    model.requires_grad_(False)
    assert all(s.any() for s in prospr(model).values())


@pytest.mark.parametrize("options", [{"steps": -1}, {"lr": -0.1}, {"lr": float("nan")}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match="steps and lr must be at least 0"):
        prospr(mlp(), **options)
