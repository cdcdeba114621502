"""SNIP against differences of the loss, and its invariances."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from featherweight.sparse import Masks, score
from tests.models import mlp
from tests.oracles.snip import slow_mask_derivative


def batch(examples=12, seed=1, inputs=16, classes=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (examples,), generator=generator)


def weights_of(model):
    return Masks.dense(model).weights(model)


def snip(model, batches, **options):
    return score("snip", weights_of(model), model=model, batches=batches, **options)


def homogeneous(*widths):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


@pytest.mark.parametrize("norm", [True, False])
def test_scores_are_the_derivative_by_the_mask(norm):
    model = mlp(5, norm).double()
    x, y = batch()
    shapes = {n: w.shape for n, w in weights_of(model).items()}

    def loss(masks):
        net = copy.deepcopy(model).train()
        with torch.no_grad():
            for name, weight in weights_of(net).items():
                weight.mul_(masks[name])
            return cross_entropy(net(x), y)

    slopes = slow_mask_derivative(loss, shapes)
    for name, found in snip(model, [(x, y)]).items():
        torch.testing.assert_close(found, slopes[name].abs(), rtol=1e-5, atol=1e-9)


def test_batches_add_up_to_the_mean_over_examples():
    model = mlp(norm=False).double()
    x, y = batch(20)
    whole = snip(model, [(x, y)])
    parts = snip(model, [(x[:3], y[:3]), [x[3:], y[3:]]])
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_rescaling_layers_against_each_other_changes_nothing():
    model = homogeneous(16, 12, 10, 4)
    before = snip(model, [batch()])
    with torch.no_grad():
        model[0].weight.mul_(8.0)
        model[4].weight.div_(8.0)
    after = snip(model, [batch()])
    for name in before:
        torch.testing.assert_close(after[name], before[name])


def test_gradient_flow_is_the_same_through_every_layer():
    """In a homogeneous net the sums of g * w agree (Euler), those of |g * w| do not."""
    model = homogeneous(16, 12, 10, 4)
    x, y = batch()
    scores = snip(model, [(x, y)])
    cross_entropy(model(x), y).backward()
    signs = {n: (w.grad * w).sign().detach() for n, w in weights_of(model).items()}
    flows = torch.stack([(signs[n] * s).sum() for n, s in scores.items()])
    torch.testing.assert_close(flows, flows[:1].expand(3))
    sums = torch.stack([s.sum() for s in scores.values()])
    assert sums.max() > 1.05 * sums.min()


def test_where_all_products_have_one_sign_scores_are_the_flow():
    line = homogeneous(1, 1, 1, 1)
    with torch.no_grad():
        for weight in line.parameters():
            weight.abs_()
    scores = snip(line, [(torch.full((2, 1), 3.0), torch.zeros(2, 1))], objective=mse_loss)
    output = line(torch.full((1, 1), 3.0, dtype=torch.float64)).item()
    for found in scores.values():
        assert found.item() == pytest.approx(2 * output**2)


def test_objective_replaces_cross_entropy():
    model = mlp(norm=False).double()
    x, y = batch()
    scores = snip(model, [(x, y)], objective=lambda logits, _: logits.sum())
    model(x).sum().backward()
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(scores[name], (weight.grad * weight).detach().abs())


def test_the_given_weights_are_scored_and_not_the_models_own():
    model, other = mlp(seed=0).double(), mlp(seed=1).double()
    for a, b in zip(model, other, strict=True):
        if isinstance(a, nn.Linear):
            b.bias.data.copy_(a.bias)
    data = {"batches": [batch()]}
    given = score("snip", weights_of(other), model=model, **data)
    own = score("snip", weights_of(other), model=other, **data)
    assert all(torch.equal(given[n], own[n]) for n in own)


def test_half_precision_scores_come_in_float32_and_agree():
    model = mlp(64, norm=False)
    exact = snip(model, [batch()])
    coarse = snip(copy.deepcopy(model).bfloat16(), [batch()])
    for name, found in coarse.items():
        assert found.dtype == torch.float32
        assert torch.corrcoef(torch.stack([found.flatten(), exact[name].flatten()]))[0, 1] > 0.99


def test_many_batches_add_up_without_rounding_in_half_precision():
    model = mlp(norm=False).bfloat16()
    once, often = snip(model, [batch()]), snip(model, [batch()] * 64)
    for name in once:
        torch.testing.assert_close(often[name], once[name])
