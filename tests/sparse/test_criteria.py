"""Criteria against closed forms; what all of them must do is in test_conformance."""

import pytest
import torch
from torch import nn

from featherweight import sparse
from featherweight.sparse import Masks, score
from tests.models import mlp


def test_magnitude_ranking_ignores_the_scale_of_all_weights():
    model = mlp()
    before = sparse.magnitude(model, 0.2)
    with torch.no_grad():
        for weight in before.weights(model).values():
            weight.mul_(-8)
    assert sparse.magnitude(model, 0.2) == before


def test_folded_magnitude_is_the_magnitude_of_the_folded_network():
    model = mlp().eval()
    with torch.no_grad():
        for norm in (model[1], model[4]):
            norm.weight.uniform_(-2, 2)
            norm.running_var.uniform_(0.1, 5)
    scores = score("folded-magnitude", Masks.dense(model).weights(model), model=model)
    for layer, norm in ((0, 1), (3, 4)):
        fused = nn.utils.fusion.fuse_linear_bn_eval(model[layer], model[norm])
        torch.testing.assert_close(scores[f"{layer}.weight"], fused.weight.detach().abs())
    assert torch.equal(scores["6.weight"], model[6].weight.detach().abs())


def test_norm_magnitude_is_folded_magnitude_without_statistics():
    model = mlp()
    with torch.no_grad():
        model[1].weight.uniform_(-2, 2)
    weights = Masks.dense(model).weights(model)
    plain = score("norm-magnitude", weights, model=model)
    expected = model[0].weight.detach().abs() * model[1].weight.detach().abs()[:, None]
    assert torch.equal(plain["0.weight"], expected)


def test_norms_that_follow_other_layers_are_not_used():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    nn.init.constant_(model[2].weight, 5.0)
    nn.init.constant_(model[3].weight, 7.0)
    scores = score("norm-magnitude", Masks.dense(model).weights(model), model=model)
    assert torch.equal(scores["0.weight"], model[0].weight.detach().abs())
    assert torch.equal(scores["1.weight"], 5 * model[1].weight.detach().abs())


def test_what_a_criterion_needs_is_asked_for():
    weights = Masks.dense(mlp()).weights(mlp())
    with pytest.raises(ValueError, match="criterion 'random' needs generator="):
        score("random", weights)
    with pytest.raises(ValueError, match="criterion 'norm-magnitude' needs model="):
        score("norm-magnitude", weights)
