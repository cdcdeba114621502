"""Edge-popup: which edges it keeps, what it learns from, and what it leaves behind."""

import copy

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from featherweight.sparse.masks import Masks
from featherweight.sparse.reparam import edge_popup, fold, masks, score_parameters


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 3)
    )


NAMES = ["0.weight", "3.weight", "5.weight"]


def random_support(model, density, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: model.get_parameter(name).shape for name in NAMES}
    return Masks({n: torch.rand(s, generator=generator) < density for n, s in shapes.items()})


def effective(model):
    return {name: model.get_submodule(name[0]).weight.detach() for name in NAMES}


def originals(model):
    return {n: model.get_submodule(n[0]).parametrizations.weight.original for n in NAMES}


def train(model, steps=20):
    """Train the scores only, on a target that the biases can't reach."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(score_parameters(model), lr=1.0, momentum=0.9, weight_decay=1e-3)
    for _ in range(steps):
        x = torch.randn(32, 1, 5, 5, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x), (x.sum((1, 2, 3)) > 0).long()).backward()
        optimizer.step()


def test_effective_weights_are_a_bitwise_subset_and_weights_never_change():
    model = network()
    weights = {name: model.get_parameter(name).detach().clone() for name in NAMES}
    support = random_support(model, 0.6)
    edge_popup(model, 0.3, support=support, seed=0)
    before = masks(model)
    train(model)
    after = masks(model)
    assert before != after
    assert after <= support
    for name, weight in effective(model).items():
        assert int(after[name].sum()) == round(0.3 * weight.numel())
        assert torch.equal(weight, torch.where(after[name], weights[name], 0))
        assert torch.equal(originals(model)[name], weights[name])
        assert not originals(model)[name].requires_grad


def test_chosen_edges_have_the_best_scores_of_the_support():
    """Oracle: a plain sort of (score, index) pairs."""
    model = network()
    support = random_support(model, 0.6)
    edge_popup(model, 0.3, support=support, seed=1)
    for name, chosen in masks(model).items():
        scores = model.get_submodule(name[0]).parametrizations.weight[0].scores
        ranked = sorted(
            (-abs(score), index)
            for index, (score, allowed) in enumerate(
                zip(scores.flatten().tolist(), support[name].flatten().tolist(), strict=True)
            )
            if allowed
        )
        best = sorted(index for _, index in ranked[: round(0.3 * chosen.numel())])
        assert chosen.flatten().nonzero().flatten().tolist() == best


def test_constant_scores_tie_to_the_lowest_index():
    model = nn.Linear(5, 4)
    support = torch.ones(4, 5, dtype=torch.bool)
    support[0, 1] = False
    edge_popup(model, 0.3, support={"weight": support}, scores="constant")
    kept = masks(model)["weight"].flatten().nonzero().flatten().tolist()
    assert kept == [0, 2, 3, 4, 5, 6]


def test_kaiming_scores_are_uniform_in_the_fan_in_bound():
    model = nn.Conv2d(4, 200, 3)
    edge_popup(model, 0.5, seed=0)
    (scores,) = score_parameters(model)
    bound = 36**-0.5
    assert bound * 0.99 < scores.abs().max() <= bound
    assert scores.mean().abs() < 5 * bound / (3 * scores.numel()) ** 0.5
    assert scores.var().item() == pytest.approx(bound**2 / 3, rel=0.05)


@pytest.mark.parametrize("density", [0.3, 0.1])
def test_gradient_of_the_scores_against_a_hand_written_oracle(density):
    """Oracle: numpy, one linear layer under a squared loss, sign(c) * W * dL/dW_eff."""
    model = nn.Linear(6, 4, dtype=torch.float64)
    support = torch.rand(4, 6) < 0.7
    edge_popup(model, density, support={"weight": support}, seed=0)
    x, y = torch.randn(10, 6).double(), torch.randn(10, 4).double()
    (0.5 * (model(x) - y).square().sum()).backward()

    form = model.parametrizations.weight
    weight, scores = form.original.numpy(), form[0].scores.detach().numpy()
    allowed = np.flatnonzero(support.numpy().ravel())
    best = allowed[np.argsort(-np.abs(scores.ravel()[allowed]))[: round(density * 24)]]
    mask = np.zeros(24, bool)
    mask[best] = True
    kept = weight * mask.reshape(4, 6)
    residual = x.numpy() @ kept.T + model.bias.detach().numpy() - y.numpy()
    expected = np.sign(scores) * weight * (residual.T @ x.numpy()) * support.numpy()

    gradient = form[0].scores.grad.numpy()
    np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-14)
    assert not gradient[~support.numpy()].any()
    assert gradient[support.numpy() & ~mask.reshape(4, 6)].any()
    assert form.original.grad is None


def test_scores_outside_the_support_stay_without_weight_decay():
    model = network()
    support = random_support(model, 0.5)
    edge_popup(model, 0.2, support=support, seed=0)
    start = [scores.detach().clone() for scores in score_parameters(model)]
    optimizer = torch.optim.SGD(score_parameters(model), lr=1.0, momentum=0.9)
    for _ in range(3):
        model(torch.randn(8, 1, 5, 5)).square().mean().backward()
        optimizer.step()
    for old, new, mask in zip(start, score_parameters(model), support.values(), strict=True):
        assert torch.equal(old[~mask], new[~mask])
        assert not torch.equal(old[mask], new[mask])


def test_density_one_is_the_plain_network():
    plain = network()
    model = copy.deepcopy(plain)
    edge_popup(model, 1.0, seed=0)
    x = torch.randn(7, 1, 5, 5)
    assert torch.equal(model(x), plain(x))


def test_fold_leaves_a_plain_model():
    model = network()
    keys, parameters = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    edge_popup(model, dict.fromkeys(NAMES, 0.3), seed=0)
    train(model, steps=3)
    x = torch.randn(7, 1, 5, 5)
    output, chosen = model(x), masks(model)
    fold(model)
    assert [type(m) for m in model] == [type(m) for m in network()]
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == parameters
    assert torch.equal(model(x), output)
    for name, mask in chosen.items():
        weight = model.get_parameter(name)
        assert weight.requires_grad
        assert torch.equal(weight != 0, mask)
        assert not torch.signbit(weight[~mask]).any()
    fold(model)
    with pytest.raises(ValueError, match="not under edge_popup"):
        masks(model)


def test_fold_keeps_frozen_weights_frozen_and_foreign_parametrizations():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[0].weight.requires_grad_(False)
    parametrizations.weight_norm(model[1])
    edge_popup(model, 0.5, include=["0.weight"], seed=0)
    fold(model)
    assert not model[0].weight.requires_grad
    assert type(model[0]) is nn.Linear
    assert "parametrizations" in dict(model[1].named_children())


def test_fold_refuses_a_mixed_chain_untouched():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    edge_popup(model, 0.5, seed=0)
    parametrizations.orthogonal(model[1])
    with pytest.raises(ValueError, match=r"1\.weight"):
        fold(model)
    assert list(masks(model)) == ["0.weight", "1.weight"]


def test_state_dict_reloads_weights_scores_and_support():
    model = network(seed=0)
    edge_popup(model, 0.3, support=random_support(model, 0.6), seed=0)
    train(model, steps=3)
    state = copy.deepcopy(model.state_dict())
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = network(seed=9)
    edge_popup(other, 0.3, support=random_support(other, 0.9, seed=5), seed=7)
    other.load_state_dict(state)
    x = torch.randn(3, 1, 5, 5)
    assert masks(other) == masks(model)
    assert torch.equal(other(x), model(x))


def test_same_seed_same_scores():
    models = [network() for _ in range(4)]
    for model, seed in zip(models, (1, 1, 2, None), strict=True):
        generator = torch.Generator().manual_seed(1) if seed is None else None
        edge_popup(model, 0.3, seed=seed, generator=generator)
    first, again, other, drawn = (masks(model) for model in models)
    assert first == again == drawn
    assert first != other


def test_support_is_copied():
    model = nn.Linear(4, 4)
    support = torch.ones(4, 4, dtype=torch.bool)
    edge_popup(model, 0.5, support={"weight": support}, seed=0)
    kept = masks(model)
    support.zero_()
    assert masks(model) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, "density 0 "),
        ({"density": 1.5}, "density 1.5"),
        ({"density": float("nan")}, "density nan"),
        ({"density": 0.01}, "keeps 0"),
        ({"density": {"0.weight": 0.5}}, "density lacks '3.weight'"),
        ({"scores": "uniform"}, "unknown scores 'uniform'"),
        ({"seed": None}, "seed"),
        ({"support": {}}, "mask"),
        ({"support": {"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool)}}, "3.weight"),
        ({"exclude": ["9.*"]}, "pattern"),
    ],
)
def test_bad_arguments_leave_the_model_untouched(change, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        edge_popup(model, **({"density": 0.3, "seed": 0} | change))
    assert [type(m) for m in model] == [type(m) for m in network()]
    assert all(p.requires_grad for p in model.parameters())


def test_a_support_that_is_too_small_leaves_the_model_untouched():
    model = network()
    tensors = dict(random_support(model, 1.1))
    tensors["5.weight"].fill_(False)[0] = True
    with pytest.raises(ValueError, match=r"'5\.weight'.*20 that the support holds"):
        edge_popup(model, 0.5, support=tensors, seed=0)
    assert [type(m) for m in model] == [type(m) for m in network()]
    tensors["5.weight"][1, :10] = True
    edge_popup(model, 0.5, support=tensors, seed=0)
    assert torch.equal(masks(model)["5.weight"], tensors["5.weight"])


def test_supports_that_are_not_bool_or_misshapen_are_refused():
    model = nn.Linear(4, 4)
    with pytest.raises(TypeError, match="bool"):
        edge_popup(model, 0.5, support={"weight": torch.ones(4, 4)}, seed=0)
    with pytest.raises(ValueError, match="shape"):
        edge_popup(model, 0.5, support={"weight": torch.ones(4, 5, dtype=torch.bool)}, seed=0)
    assert type(model) is nn.Linear


def test_tied_and_parametrised_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are tied"):
        edge_popup(model, 0.5, seed=0)
    edge_popup(model, 0.5, exclude=["0.weight"], seed=0)
    assert list(masks(model)) == ["2.weight"]
    with pytest.raises(ValueError, match="parametrised"):
        edge_popup(model, 0.5, seed=0)
    with pytest.raises(ValueError, match="parametrised"):
        edge_popup(model, 0.5, include=["*original"], seed=0)


def digits():
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32)
    x, y = (x - x.mean()) / x.std(), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1000], y[:1000], x[1000:], y[1000:]


def test_choosing_edges_alone_learns_digits_inside_a_random_support():
    x, y, test_x, test_y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 300, bias=False), nn.ReLU(), nn.Linear(300, 10, bias=False))
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
    generator = torch.Generator().manual_seed(1)
    support = {
        n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()
    }
    edge_popup(model, 0.25, support=support, seed=0)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(scores) for scores in score_parameters(model)
    }

    def accuracy():
        with torch.no_grad():
            return (model(test_x).argmax(1) == test_y).double().mean().item()

    start = accuracy()
    optimizer = torch.optim.SGD(score_parameters(model), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(10):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    assert start < 0.3
    assert accuracy() > 0.85
