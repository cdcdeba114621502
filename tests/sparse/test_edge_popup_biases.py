"""Edge-popup with biases: one ranking a layer, frozen biases, and what folding leaves."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherweight.sparse.reparam import (
    edge_popup,
    fold,
    masks,
    nonzero,
    parameter_groups,
    score_parameters,
    set_density_,
)

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 4)).double()


def scores_of(model):
    return {n: p for n, p in model.named_parameters() if n.endswith("scores")}


def score(model, name):
    layer, _, attribute = name.partition(".")
    return model.get_submodule(layer).parametrizations[attribute][0].scores


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.9, 1.0])
def test_weights_and_biases_of_a_layer_share_one_ranking(density):
    """Oracle: a sort of all pairs (score, place) of a layer."""
    model = network()
    edge_popup(model, density, biases=True, seed=0)
    chosen = masks(model)
    assert list(chosen) == NAMES
    for layer, size in (("0", 80), ("2", 84)):
        ranked = []
        for attribute in ("weight", "bias"):
            values = score(model, f"{layer}.{attribute}").abs().flatten().tolist()
            ranked += [(-value, len(ranked) + k) for k, value in enumerate(values)]
        ranked = [(value, place) for place, (value, _) in enumerate(ranked)]
        best = {place for _, place in sorted(ranked)[: round(density * size)]}
        flat = torch.cat([chosen[f"{layer}.{a}"].flatten() for a in ("weight", "bias")])
        assert set(flat.nonzero().flatten().tolist()) == best
        assert len(best) == round(density * size)


def test_gradients_pass_both_masks():
    """Oracle: sign(c) times parameter times the gradient of the masked parameter."""
    model = network()
    edge_popup(model, 0.4, biases=True, seed=0)
    chosen, original, plain = masks(model), network(), network()
    chosen.apply_(plain)
    x, y = torch.randn(9, 3).double(), torch.randn(9, 4).double()
    for net in (model, plain):
        F.mse_loss(net(x), y).backward()
    for name in NAMES:
        own = score(model, name)
        expected = own.sign() * original.get_parameter(name) * plain.get_parameter(name).grad
        torch.testing.assert_close(own.grad, expected, rtol=1e-12, atol=1e-14)
    assert score(model, "2.weight").grad[~chosen["2.weight"]].any()


def test_biases_are_frozen_and_folded():
    model, original = network(), network()
    edge_popup(model, 0.3, biases=True, seed=0)
    optimizer = torch.optim.SGD(parameter_groups(model), lr=1.0, momentum=0.9)
    assert (
        sum(len(g["params"]) for g in optimizer.param_groups) == len(score_parameters(model)) == 4
    )
    before = masks(model)
    x, y = torch.randn(64, 3).double(), torch.randn(64, 4).double()
    for _ in range(15):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    chosen, outputs = masks(model), model(x)
    assert chosen != before
    assert nonzero(model) == chosen
    fold(model)
    torch.testing.assert_close(model(x), outputs, rtol=0, atol=0)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, torch.where(chosen[name], original.get_parameter(name), 0))


def test_state_and_copies():
    model, other = network(), network(5)
    edge_popup(model, 0.3, biases=True, seed=0)
    edge_popup(other, 0.3, biases=True, seed=9)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    x = torch.randn(5, 3).double()
    assert masks(other) == masks(model)
    assert torch.equal(other(x), model(x))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        score(twin, "0.bias").fill_(10)
    assert masks(twin)["0.bias"].all()
    assert not masks(model)["0.bias"].all()
    assert len(scores_of(model)) == 4


def test_layers_without_bias_and_supports():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Conv1d(4, 2, 1))
    support = {"0.weight": torch.eye(4).bool(), "2.weight": torch.ones(2, 4, 1).bool()}
    edge_popup(model, 0.25, support=support, biases=True, seed=0)
    assert masks(model)["0.weight"].equal(torch.eye(4).bool())
    assert list(masks(model)) == ["0.weight", "2.weight", "2.bias"]
    set_density_(model, {"0.weight": 0.1, "2.weight": 1.0})
    assert masks(model).counts() == {"0.weight": 2, "2.weight": 8, "2.bias": 2}
    with pytest.raises(ValueError, match="support holds"):
        set_density_(model, 0.5)


def test_biases_start_with_larger_scores():
    model = nn.Linear(6, 5000)
    edge_popup(model, 0.5, biases=True, seed=0)
    weights, biases = score_parameters(model)
    assert weights.abs().max().item() == pytest.approx(6**-0.5, rel=1e-3)
    assert biases.abs().max().item() == pytest.approx(1.0, rel=1e-3)


def test_without_biases_nothing_changes():
    models = [network(), network()]
    edge_popup(models[0], 0.3, seed=0)
    edge_popup(models[1], 0.3, biases=False, seed=0)
    assert masks(models[0]) == masks(models[1])
    assert models[0][0].bias.requires_grad


def test_scores_that_are_nearly_constant_break_ties_at_random():
    model = nn.Linear(50, 40)
    edge_popup(model, 0.5, scores="near-constant", seed=0)
    (scores,) = score_parameters(model)
    assert scores.min() >= 0.5
    assert scores.max() <= 0.5005
    kept = masks(model)["weight"].flatten()
    assert kept.sum() == 1000
    assert 400 < int(kept[:1000].sum()) < 600
    with pytest.raises(ValueError, match="seed"):
        edge_popup(nn.Linear(2, 2), 0.5, scores="near-constant")


def test_tied_biases_are_refused_untouched():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].bias = model[0].bias
    with pytest.raises(ValueError, match=r"0\.bias and 1\.bias are tied"):
        edge_popup(model, 0.5, biases=True, seed=0)
    assert [type(m) for m in model] == [nn.Linear, nn.Linear]
    edge_popup(model, 0.5, seed=0)


def nonzero_bias_network(seed, biases):
    """He weights; biases with the running product of the weights' scales."""
    generator = torch.Generator().manual_seed(seed)
    modules, product = [], 1.0
    for inputs, outputs in ((1, 100), (100, 100), (100, 1)):
        linear = nn.Linear(inputs, outputs)
        sigma = (2 / inputs) ** 0.5
        product *= sigma
        with torch.no_grad():
            linear.weight.copy_(sigma * torch.randn(outputs, inputs, generator=generator))
            draws = product * torch.randn(outputs, generator=generator)
            linear.bias.copy_(draws if biases else 0 * draws)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def found_ticket(target, biases, epochs=8):
    """Search with edge-popup at density 0.5; return the ticket."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(2000, 1, generator=generator) - 1
    model = nonzero_bias_network(0, biases)
    edge_popup(model, 0.5, biases=biases, seed=0)
    optimizer = torch.optim.SGD(score_parameters(model), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(32):
            optimizer.zero_grad()
            F.mse_loss(model(x[batch]), target(x[batch])).backward()
            optimizer.step()
        schedule.step()
    fold(model)
    return model


@pytest.mark.parametrize(
    ("target", "floor"),
    [
        (lambda x: torch.full_like(x, 0.5), 1 / 16),  # 1/8 is the integral over [-1, 1]
        (lambda x: (x + 0.5).relu(), 0.05143),
    ],
    ids=["one half", "shifted relu"],
)
def test_zero_bias_tickets_stay_above_their_floor_and_others_do_not(target, floor):
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None]
    # The floor itself: the best a relu(x) + b relu(-x), by least squares.
    basis = torch.cat([x.relu(), (-x).relu()], 1)
    best = basis @ torch.linalg.lstsq(basis, target(x)).solution
    assert F.mse_loss(best, target(x)).item() == pytest.approx(floor, rel=2e-3)
    without, given = (found_ticket(target, biases).double() for biases in (False, True))
    torch.testing.assert_close(without(3 * x), 3 * without(x))
    errors = [F.mse_loss(net(x), target(x)).item() for net in (without, given)]
    assert floor * 0.998 <= errors[0] < 1.2 * floor
    assert errors[1] < 0.1 * floor
