"""Sign experiments: what moves and what must not."""

from math import sqrt

import pytest
import torch

from featherweight import sparse
from featherweight.sparse import hold, hold_signs, perturb_signs_, train_only_norms_
from tests.models import mlp, train_steps


def test_perturbed_signs_keep_magnitudes_and_rate():
    model = torch.nn.Linear(200, 200)
    before = model.weight.detach().clone()
    masks = sparse.random(model, 0.5, seed=0)
    perturb_signs_(model, masks, 0.3, seed=1)
    mask = masks["weight"]
    assert torch.equal(model.weight[mask].abs(), before[mask].abs())
    assert (model.weight[~mask] == 0).all()
    flipped, kept = int((model.weight[mask] != before[mask]).sum()), int(mask.sum())
    assert abs(flipped - 0.3 * kept) < 5 * sqrt(kept * 0.3 * 0.7)


@pytest.mark.parametrize(("ratio", "factor"), [(0.0, 1), (1.0, -1)])
def test_ratio_ends(ratio, factor):
    model = mlp()
    before = model[0].weight.detach().clone()
    perturb_signs_(model, sparse.Masks.dense(model), ratio, seed=0)
    assert torch.equal(model[0].weight, factor * before)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_ratio_out_of_range(ratio):
    model = mlp()
    with pytest.raises(ValueError, match="ratio must lie in"):
        perturb_signs_(model, sparse.Masks.dense(model), ratio, seed=0)


def test_held_signs_never_change():
    model = mlp()
    masks = sparse.random(model, 0.5, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hold(model, optimizer, masks)
    signs = {n: w.detach().sign() for n, w in masks.weights(model).items()}
    handle = hold_signs(model, optimizer, masks)
    moved = {n: w.detach().clone() for n, w in masks.weights(model).items()}
    train_steps(model, optimizer, 10, scale=3)
    for name, weight in masks.weights(model).items():
        assert ((weight.sign() == signs[name]) | (weight == 0)).all()
        assert not torch.equal(weight, moved[name])
    handle.remove()
    train_steps(model, optimizer, 10, scale=3)
    assert any((w.sign() == -signs[n]).any() for n, w in masks.weights(model).items())


def test_signs_of_another_run_are_forced():
    model = mlp()
    masks = sparse.Masks.dense(model)
    other = {n: -w.detach() for n, w in masks.weights(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    hold_signs(model, optimizer, masks, other)
    train_steps(model, optimizer, 1)
    assert all((w.sign() == other[n].sign()).all() for n, w in masks.weights(model).items())


@pytest.mark.parametrize("linear", [False, True])
def test_only_norms_train(linear):
    model = mlp()
    train_only_norms_(model, linear=linear)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    norms = {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert trained == (norms if not linear else {n for n, _ in model.named_parameters()})
