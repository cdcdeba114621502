"""STR: its value and gradient, weight decay as its knob, and what it leaves behind."""

import copy
import math

import pytest
import torch
from torch import nn

from featherweight import sparse
from featherweight.sparse.reparam import (
    FORMS,
    density,
    edge_popup,
    fold,
    nonzero,
    parameter_groups,
    score_parameters,
    soft_threshold,
    thresholds,
)
from tests.models import ConvNet, mlp, train_steps
from tests.oracles.soft_threshold import slow_soft_threshold

NAMES = ["0.weight", "2.weight", "4.weight"]


def network():
    return mlp(norm=False)


def form_of(layer):
    return layer.parametrizations.weight[0]


@pytest.mark.parametrize("s", [-3.0, -0.5, 1.0])
def test_value_and_gradients_against_the_slow_oracle(s):
    layer = nn.Linear(40, 1, bias=False, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    theta = layer.weight.detach().flatten().tolist()
    upstream = torch.randn(1, 40, dtype=torch.float64)
    soft_threshold(layer, s)
    (layer.weight * upstream).sum().backward()
    slow = [slow_soft_threshold(value, s) for value in theta]
    gradients = upstream.flatten().tolist()
    assert layer.weight.flatten().tolist() == pytest.approx([v for v, _, _ in slow], abs=1e-15)
    by_theta = [g * d for g, (_, d, _) in zip(gradients, slow, strict=True)]
    original = layer.parametrizations.weight.original
    assert original.grad.flatten().tolist() == pytest.approx(by_theta, abs=1e-15)
    by_s = sum(g * d for g, (_, _, d) in zip(gradients, slow, strict=True))
    assert form_of(layer).s.grad.item() == pytest.approx(by_s, abs=1e-14)
    assert 0 < sum(v == 0 for v, _, _ in slow) < 40


def test_gradients_by_finite_differences():
    weight = torch.tensor([1.5, -0.9, 0.1, -0.05], dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    soft_threshold(layer, 0.0)
    form = form_of(layer)

    def value(weight, s):
        return torch.func.functional_call(form, {"s": s}, (weight,))

    assert torch.autograd.gradcheck(value, (weight, form.s))


def test_the_usual_start_changes_nothing():
    model, x = network(), torch.randn(5, 16)
    plain = model(x)
    soft_threshold(model)
    assert torch.equal(model(x), plain)
    assert density(model) == 1
    assert thresholds(model) == dict.fromkeys(NAMES, 0.0)


def test_density_is_read_at_any_time_and_kept_by_fold():
    model, x = network(), torch.randn(5, 16)
    keys, names = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    soft_threshold(model, -2.5)
    train_steps(model, torch.optim.SGD(model.parameters(), 0.1))
    for name, threshold in thresholds(model).items():
        original = model[int(name[0])].parametrizations.weight.original
        assert torch.equal(nonzero(model)[name], original.abs() > threshold)
    output, kept = model(x), nonzero(model)
    assert 0.1 < density(model) == kept.density < 0.9
    fold(model)
    assert torch.equal(model(x), output)
    assert sparse.Masks.nonzero(model) == kept
    assert not any(torch.signbit(model.get_parameter(n)[~mask]).any() for n, mask in kept.items())
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == names


def test_weight_decay_acts_on_the_threshold_and_sets_the_density():
    densities = []
    for decay in (0.0, 0.02, 0.1):
        model = network()
        soft_threshold(model, -10.0)
        optimizer = torch.optim.SGD(parameter_groups(model, decay), 0.1)
        assert len(optimizer.param_groups) == 1
        assert {id(p) for p in optimizer.param_groups[0]["params"]} == set(
            map(id, model.parameters())
        )
        train_steps(model, optimizer, 200)
        if decay:
            assert all(form_of(model[int(n[0])]).s.item() > -8 for n in NAMES)
        densities.append(density(model))
    assert densities[0] > densities[1] > densities[2]


def test_the_threshold_is_one_number_a_layer():
    model = ConvNet()
    soft_threshold(model, -3.0, exclude=["head.weight"])
    assert list(thresholds(model)) == ["stem.weight", "depthwise.weight", "grouped.weight"]
    for threshold in thresholds(model).values():
        assert threshold == pytest.approx(1 / (1 + math.exp(3)), rel=1e-6)
    assert form_of(model.stem).s.shape == ()


def test_the_support_is_never_left():
    model = network()
    support = sparse.random(model, 0.4, seed=0)
    soft_threshold(model, -4.0, support=support)
    train_steps(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01))
    assert nonzero(model) <= support
    for name, mask in support.items():
        chain = model[int(name[0])].parametrizations.weight
        assert not chain.original.grad[~mask].any()
    fold(model)
    assert sparse.Masks.nonzero(model) <= support


def test_state_dict_and_copies():
    model, x = network(), torch.randn(5, 16)
    soft_threshold(model, -2.0, support=sparse.random(model, 0.5, seed=0))
    other = network()
    soft_threshold(other, -9.0, support=sparse.random(other, 0.7, seed=1))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"initial": math.nan}, "initial must be finite, got nan"),
        ({"initial": -math.inf}, "initial must be finite, got -inf"),
        ({"support": {"0.weight": torch.ones(24, 16, dtype=torch.bool)}}, "2.weight"),
        ({"include": ["9.*"]}, "pattern"),
    ],
)
def test_bad_arguments_leave_the_model_untouched(change, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        soft_threshold(model, **change)
    assert [type(m) for m in model] == [type(m) for m in network()]
    with pytest.raises(ValueError, match="not under soft_threshold"):
        thresholds(model)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_keeps_a_support_and_folds(name):
    """What a caller that knows the registry alone relies on."""
    entry, model = FORMS[name], network()
    keys = list(model.state_dict())
    support = sparse.random(model, 0.5, "uniform", seed=0)
    needs = {"density": 0.3, "generator": torch.Generator().manual_seed(0)}
    options = {need: needs[need] for need in entry.needs}
    entry.method(model, support=support, include=NAMES, exclude=(), **options)
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-3), 0.1)
    follow = entry.defaults.get("follow")
    if follow is not None:
        follow(model, optimizer, 6)
    train_steps(model, optimizer, 6)
    kept = nonzero(model)
    fold(model)
    assert kept <= support
    assert sparse.Masks.nonzero(model) == kept
    assert list(model.state_dict()) == keys
    assert entry.summary
    assert "arXiv" in entry.paper


def test_edge_popup_trains_its_scores_alone():
    model = network()
    edge_popup(model, 0.3, seed=0)
    (group,) = parameter_groups(model, 1e-3)
    assert list(map(id, group["params"])) == list(map(id, score_parameters(model)))
    assert group["weight_decay"] == 1e-3
