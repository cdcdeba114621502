"""Continuous sparsification: soft masks, their temperature, rounds, and the mask at the end."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherweight import sparse
from featherweight.sparse.reparam import (
    anneal,
    continuous_sparsification,
    density,
    end_round,
    fold,
    mask_penalty,
    nonzero,
    parameter_groups,
)
from tests.models import mlp, train_steps

NAMES = ["0.weight", "2.weight", "4.weight"]


def network():
    return mlp(norm=False)


def forms_of(model):
    return [model[int(name[0])].parametrizations.weight[0] for name in NAMES]


def scatter_scores(model, seed=0):
    """Give the scores random values of both signs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for form in forms_of(model):
            form.scores.copy_(0.3 * torch.randn(form.scores.shape, generator=generator))


@pytest.mark.parametrize("initial", [-0.1, 0.0, 0.1, 3.0])
def test_the_first_mask_is_one(initial):
    model, x = network(), torch.randn(5, 16)
    plain = model(x)
    continuous_sparsification(model, initial)
    torch.testing.assert_close(model(x), plain)
    for form in forms_of(model):
        torch.testing.assert_close(form.mask(), torch.ones_like(form.scores))
    numel = sum(form.scores.numel() for form in forms_of(model))
    assert mask_penalty(model).item() == pytest.approx(numel, rel=1e-5)


def test_the_mask_is_the_formula():
    model = network()
    continuous_sparsification(model, -0.1)
    scatter_scores(model)
    anneal(model, torch.optim.SGD(model.parameters(), 0.1), 10, start=5)
    temperature = 200 ** (5 / 9)
    sums = 0.0
    for form in forms_of(model):
        for score, value in zip(form.scores.flatten(), form.mask().flatten(), strict=True):
            expected = (1 + math.exp(0.1)) / (1 + math.exp(-temperature * score.item()))
            assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
            sums += expected
    assert mask_penalty(model).item() == pytest.approx(sums, rel=1e-4)


def test_the_temperature_rises_exponentially_to_its_end():
    model = network()
    continuous_sparsification(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    temperatures = [forms_of(model)[0].temperature.item()]
    handle = anneal(model, optimizer, 5)
    for _ in range(6):
        temperatures.append(forms_of(model)[0].temperature.item())
        train_steps(model, optimizer, 1)
    expected = [200 ** (t / 4) for t in range(5)]
    assert temperatures == pytest.approx([1.0, *expected, 200.0])
    handle.remove()
    end_round(model)
    train_steps(model, optimizer, 1)
    assert [form.temperature.item() for form in forms_of(model)] == [1.0] * 3


def test_fold_is_the_limit_of_the_soft_mask():
    model, x = network(), torch.randn(5, 16)
    keys, names = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    continuous_sparsification(model, 0.1)
    scatter_scores(model)
    signs = [form.scores > 0 for form in forms_of(model)]
    weights = [model[int(n[0])].parametrizations.weight.original.clone() for n in NAMES]
    anneal(model, torch.optim.SGD(model.parameters(), 0.1), 1, final=1e6, start=1)
    output, kept = model(x), nonzero(model)
    assert density(model) == kept.density
    assert [mask.tolist() for mask in kept.values()] == [sign.tolist() for sign in signs]
    fold(model)
    torch.testing.assert_close(model(x), output, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == names
    scale = 1 + math.exp(-0.1)
    for name, mask, weight in zip(NAMES, signs, weights, strict=True):
        found = model.get_parameter(name)
        assert torch.equal(found != 0, mask)
        assert not torch.signbit(found[~mask]).any()
        torch.testing.assert_close(found[mask].detach(), scale * weight[mask])


def test_the_penalty_lowers_scores_and_the_density():
    model = network()
    continuous_sparsification(model)
    optimizer = torch.optim.SGD(parameter_groups(model), 0.1)
    assert density(model) == 0  # a score of just zero is not over zero
    with torch.no_grad():
        for form in forms_of(model):
            form.scores.fill_(1e-3)
    assert density(model) == 1
    mask_penalty(model).backward()
    for form in forms_of(model):
        mask = form.scores.detach().sigmoid()
        torch.testing.assert_close(form.scores.grad, 2 * mask * (1 - mask))
    optimizer.step()
    assert density(model) == 0


def test_scores_never_decay():
    model = network()
    continuous_sparsification(model, 0.2)
    groups = parameter_groups(model, 0.5)
    spared = {id(p) for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert spared == {id(form.scores) for form in forms_of(model)}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(groups, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = model[0].parametrizations.weight.original.detach().clone()
    optimizer.step()
    assert all((form.scores == 0.2).all() for form in forms_of(model))
    torch.testing.assert_close(model[0].parametrizations.weight.original.detach(), 0.95 * before)


def test_a_round_ends_by_its_rule_and_what_is_gone_stays_gone():
    model = network()
    continuous_sparsification(model, 0.05)
    scatter_scores(model)
    anneal(model, torch.optim.SGD(model.parameters(), 0.1), 1, start=1)
    before = [form.scores.detach().clone() for form in forms_of(model)]
    end_round(model)
    for form, old in zip(forms_of(model), before, strict=True):
        torch.testing.assert_close(form.scores.detach(), (200 * old).clamp(max=0.05))
        mask = form.mask().detach()
        torch.testing.assert_close(mask[old > 0.01], torch.ones_like(mask[old > 0.01]))
        assert (mask[old < -0.1] < 1e-6).all()


def test_rewinding_takes_all_but_the_masks():
    model = network()
    continuous_sparsification(model)
    early = sparse.snapshot(model)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), 0.1)
    anneal(model, optimizer, 10)
    train_steps(model, optimizer, 10)
    kept, scores = nonzero(model), [form.scores.detach().clone() for form in forms_of(model)]
    assert 0 < kept.density < 1
    end_round(model, early)
    for name, old in zip(NAMES, scores, strict=True):
        chain = model[int(name[0])].parametrizations.weight
        assert torch.equal(chain.original, early[f"{name[0]}.parametrizations.weight.original"])
        torch.testing.assert_close(chain[0].scores.detach(), (200 * old).clamp(max=0))
        assert (chain[0].scores[kept[name]] == 0).all()
    assert torch.equal(model[0].bias, early["0.bias"])
    with pytest.raises(RuntimeError, match="Missing key"):
        end_round(model, {"0.bias": early["0.bias"]})


def test_the_support_is_never_left_and_costs_nothing():
    model = network()
    support = sparse.random(model, 0.4, seed=0)
    continuous_sparsification(model, support=support)
    assert mask_penalty(model).item() == support.nonzeros
    train_steps(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    for form, mask in zip(forms_of(model), support.values(), strict=True):
        assert not form.scores.grad[~mask].any()
        assert form.scores.grad[mask].any()
    assert nonzero(model) <= support
    fold(model)
    assert sparse.Masks.nonzero(model) <= support


def test_state_dict_holds_scores_and_temperature():
    model, x = network(), torch.randn(5, 16)
    continuous_sparsification(model)
    scatter_scores(model)
    anneal(model, torch.optim.SGD(model.parameters(), 0.1), 3, start=1)
    other = network()
    continuous_sparsification(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_training_finds_the_weights_that_matter():
    """Half of the inputs are noise: their weights go, the others stay."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 1, bias=False)
    nn.init.constant_(layer.weight, 0.1)
    truth = torch.cat([torch.ones(10), torch.zeros(10)])
    continuous_sparsification(layer)
    optimizer = torch.optim.SGD(parameter_groups(layer), 0.1)
    anneal(layer, optimizer, 300)
    for _ in range(300):
        x = torch.randn(64, 20)
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x)[:, 0], x @ truth) + 0.01 * mask_penalty(layer)
        loss.backward()
        optimizer.step()
    assert torch.equal(nonzero(layer)["weight"][0], truth.bool())
    fold(layer)
    torch.testing.assert_close(layer.weight[0].detach(), truth, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial": math.nan}, r"initial must lie in \[-80, 80\], got nan"),
        ({"initial": 100.0}, "got 100"),
        ({"support": {"0.weight": torch.ones(24, 16, dtype=torch.bool)}}, "2.weight"),
        ({"exclude": ["9.*"]}, "pattern"),
    ],
)
def test_bad_arguments_leave_the_model_untouched(change, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        continuous_sparsification(model, **change)
    assert [type(m) for m in model] == [type(m) for m in network()]


def test_bad_calls_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for call in (mask_penalty, end_round, lambda model: anneal(model, optimizer, 5)):
        with pytest.raises(ValueError, match="not under continuous_sparsification"):
            call(model)
    continuous_sparsification(model)
    for options in ({"steps": 0}, {"final": 0.5}, {"final": math.inf}, {"start": -1}):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            anneal(model, optimizer, **({"steps": 5} | options))
