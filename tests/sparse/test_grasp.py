"""GraSP against differences of the gradient, and the meaning of its sign."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from featherweight.sparse import Masks, score
from tests.models import mlp
from tests.oracles.grasp import slow_gradient, slow_hessian_gradient
from tests.sparse.test_snip import batch, weights_of


def grasp(model, batches, **options):
    return score("grasp", weights_of(model), model=model, batches=batches, **options)


def smooth(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
@pytest.mark.parametrize("sizes", [[12], [7], [5, 7]])
def test_scores_are_weight_times_hessian_times_gradient(temperature, sizes):
    model = smooth().double()
    x, y = batch(sum(sizes))
    expected = slow_hessian_gradient(
        model, weights_of(model), lambda net: cross_entropy(net(x) / temperature, y)
    )
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    for name, found in grasp(model, batches, temperature=temperature).items():
        wanted = weights_of(model)[name].detach() * expected[name]
        scale = wanted.abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7 * scale)


def test_the_temperature_is_200_unless_told_otherwise():
    model = mlp(norm=False).double()
    default, named = grasp(model, [batch()]), grasp(model, [batch()], temperature=200)
    assert all(torch.equal(default[n], named[n]) for n in default)


def test_a_batch_is_run_in_two_halves():
    model = mlp().double()
    seen = []
    model.register_forward_pre_hook(lambda _m, inputs: seen.append(len(inputs[0])))
    grasp(model, [batch(13)])
    assert seen == [7, 6, 7, 6]


def test_the_sign_cutting_a_high_score_off_loses_gradient_norm():
    model = smooth().double()
    x, y = batch(40)
    scores = grasp(model, [(x, y)], temperature=1)

    def norm(net):
        gradient = slow_gradient(net, scores, lambda net: cross_entropy(net(x), y))
        return sum(part.square().sum() for part in gradient.values())

    def shrunk(name, index, by=1e-5):
        net = copy.deepcopy(model)
        with torch.no_grad():
            weights_of(net)[name].view(-1)[index] *= 1 - by
        return norm(net)

    start = norm(model)
    for name, found in scores.items():
        flat = found.flatten()
        best, worst = int(flat.argmax()), int(flat.argmin())
        assert flat[best] > 0 > flat[worst]
        assert shrunk(name, best) < start < shrunk(name, worst)
        change = (start - shrunk(name, best)) / (2 * 1e-5)
        torch.testing.assert_close(change, flat[best], rtol=1e-3, atol=0)


def test_masked_weights_count_for_nothing():
    """As if the mask were part of the network: their gradients flow nowhere."""
    model = smooth().double()
    x, y = batch(40)
    generator = torch.Generator().manual_seed(5)
    masks = {
        n: torch.rand(w.shape, generator=generator) < 0.5 for n, w in weights_of(model).items()
    }
    with torch.no_grad():
        Masks(masks).apply_(model)
    found = grasp(model, [(x, y)], masks=masks, temperature=1)
    weights = weights_of(model)
    slopes = torch.autograd.grad(
        cross_entropy(model(x), y), list(weights.values()), create_graph=True
    )
    kept = [s * masks[n] for n, s in zip(weights, slopes, strict=True)]
    half_norm = 0.5 * sum(s.square().sum() for s in kept)
    curvature = torch.autograd.grad(half_norm, list(weights.values()))
    for (name, weight), bend in zip(weights.items(), curvature, strict=True):
        torch.testing.assert_close(found[name], (weight * bend).detach())
        assert not found[name][~masks[name]].any()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_is_checked(temperature):
    with pytest.raises(ValueError, match="temperature must be over 0"):
        grasp(mlp(), [batch()], temperature=temperature)
