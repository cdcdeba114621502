"""Sign-In in two factors: exact splits, resets and decay, and what fold leaves behind."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from featherweight import sparse
from featherweight.sparse.reparam import (
    FORMS,
    beta_schedule,
    decay_product,
    fold,
    merge,
    metric,
    nonzero,
    parameter_groups,
    rescale,
    rescale_every,
    sign_in,
    split,
)
from tests.models import mlp, train_steps
from tests.oracles.sign_in import slow_descent, slow_split

NAMES = ["0.weight", "2.weight", "4.weight"]


def network():
    return mlp(norm=False)


def factors(layer):
    return layer.parametrizations.weight.original0, layer.parametrizations.weight.original1


def scalar(theta, beta=1.0, **options):
    """A model of one float64 weight, under Sign-In."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, theta)
    sign_in(model, beta, **options)
    return model


def thetas(dtype=torch.float64):
    return torch.tensor([0.0, 1e-12, -1e-12, 0.3, -0.3, 1e4, -1e4], dtype=dtype)


@pytest.mark.parametrize("beta", [0.0, 1e-3, 1.0, 50.0])
def test_split_and_merge_are_exact(beta):
    theta = thetas()
    m, w = split(theta, beta)
    torch.testing.assert_close(merge(m, w), theta, rtol=1e-14, atol=0)
    # The larger of the squares sets the rounding of their difference.
    assert (((m * m - w * w) - beta).abs() <= 1e-15 * m * m + 1e-15).all()
    torch.testing.assert_close(m * m + w * w, metric(theta, beta), rtol=1e-14, atol=0)
    assert (m >= 0).all() if beta == 0 else (m > 0).all()


def test_split_does_not_cancel_in_float32():
    theta = thetas(torch.float32)
    m, w = split(theta, 1.0)
    torch.testing.assert_close(merge(m, w), theta, rtol=1e-6, atol=0)


@given(theta=st.floats(-1e3, 1e3), beta=st.floats(1e-2, 10))
def test_split_against_the_root_formulas(theta, beta):
    m, w = split(torch.tensor(theta, dtype=torch.float64), beta)
    slow_m, slow_w = slow_split(theta, beta)
    assert m.item() == pytest.approx(slow_m, rel=1e-12)
    assert w.item() == pytest.approx(slow_w, rel=1e-7, abs=1e-7)


def test_the_function_is_unchanged_by_split_rescale_and_fold():
    model, x = network(), torch.randn(9, 16)
    plain = model(x)
    keys, names = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    sign_in(model, 0.7)
    torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-6)
    train_steps(model, torch.optim.SGD(model.parameters(), 0.05))
    trained = model(x)
    assert not torch.allclose(trained, plain)
    rescale(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-6)
    rescaled = model(x)
    fold(model)
    assert torch.equal(model(x), rescaled)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == names
    assert [type(m) for m in model] == [type(m) for m in network()]
    other = network()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), rescaled)


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("theta", [0.0, 0.4, -1.5])
def test_training_is_descent_on_both_factors(theta, decay):
    model = scalar(theta, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=decay)
    for _ in range(50):
        optimizer.zero_grad()
        (0.5 * (model.weight - 0.9).square().sum()).backward()
        optimizer.step()
    expected, beta = slow_descent(theta, 0.8, lambda t: t - 0.9, 0.1, decay, 50)
    m, w = factors(model)
    assert model.weight.item() == pytest.approx(expected, abs=1e-12)
    assert (m * m - w * w).item() == pytest.approx(beta, abs=1e-12)
    rescale(model)
    assert model.weight.item() == pytest.approx(expected, abs=1e-12)
    assert (m * m - w * w).item() == pytest.approx(0.8, abs=1e-12)


def test_decay_of_the_factors_is_the_soft_threshold():
    targets = torch.tensor([[-2.0, -0.3, 0.05, 0.7]], dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(model.weight, 0.5)
    sign_in(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.2)
    for _ in range(1500):
        optimizer.zero_grad()
        (0.5 * (model.weight - targets).square().sum()).backward()
        optimizer.step()
    expected = F.softshrink(targets, 0.2)
    torch.testing.assert_close(model.weight.detach(), expected, rtol=0, atol=1e-5)


def test_decay_of_the_product_is_that_of_the_plain_weight():
    model = scalar(0.5, decay="product")
    groups = parameter_groups(model, weight_decay=9.0)
    assert [group["weight_decay"] for group in groups] == [0.0]
    optimizer = torch.optim.SGD(groups, 0.05)
    handle = decay_product(model, optimizer, 0.25)
    for _ in range(800):
        optimizer.zero_grad()
        (0.5 * (model.weight - 1.0).square().sum()).backward()
        optimizer.step()
    assert model.weight.item() == pytest.approx(1 / 1.25, abs=1e-9)
    handle.remove()
    for _ in range(800):
        optimizer.zero_grad()
        (0.5 * (model.weight - 1.0).square().sum()).backward()
        optimizer.step()
    assert model.weight.item() == pytest.approx(1.0, abs=1e-9)


def test_groups_decay_factors_unless_told_otherwise():
    for decay, rates in (("factors", {1e-3}), ("none", {1e-3, 0.0})):
        model = network()
        sign_in(model, decay=decay)
        groups = parameter_groups(model, 1e-3)
        assert {group["weight_decay"] for group in groups} == rates
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        assert (id(factors(model[0])[0]) in decayed) == (decay == "factors")
        assert id(model[0].bias) in decayed
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    with pytest.raises(ValueError, match=r"'0\.weight' has decay 'none'"):
        decay_product(model, torch.optim.SGD(model.parameters(), 0.1), 0.1)


def test_masked_entries_are_exactly_zero_and_frozen():
    model = network()
    masks = sparse.random(model, 0.3, seed=0)
    sign_in(model, support=masks)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    train_steps(model, optimizer)
    for name, mask in masks.items():
        layer = model[int(name[0])]
        m, w = factors(layer)
        assert not layer.weight[~mask].any()
        assert not m.grad[~mask].any()
        assert not w.grad[~mask].any()
        assert m.grad[mask].any()
        assert (m[~mask] < 1).all()  # decay has shrunk them
        assert not w[~mask].any()
    with torch.no_grad():
        factors(model[0])[1].fill_(0.5)  # written from outside, also off the support
    rescale(model)
    for name, mask in masks.items():
        m, w = factors(model[int(name[0])])
        assert (m[~mask] == 1).all()
        assert not w[~mask].any()
    assert nonzero(model) == masks
    fold(model)
    assert sparse.Masks.nonzero(model) == masks
    assert not any(torch.signbit(model.get_parameter(n)[~mask]).any() for n, mask in masks.items())


def test_masked_gradients_are_zero_even_where_the_loss_explodes():
    model = nn.Linear(2, 1, bias=False)
    sign_in(model, support={"weight": torch.tensor([[True, False]])})
    (model.weight * torch.tensor([[1.0, torch.inf]])).sum().backward()
    m, w = factors(model)
    assert torch.equal(m.grad[0, 1:], torch.zeros(1))
    assert torch.equal(w.grad[0, 1:], torch.zeros(1))


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "adam": lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True),
}


def accumulate(model, optimizer, steps=4):
    """Collect gradients into the state while the learning rate of 0 holds the factors fixed."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_transport_gives_the_state_that_the_new_factors_would_have(name):
    old, new = network().double(), network().double()
    sign_in(old, 0.3)
    sign_in(new, 1.0)
    optimizers = [OPTIMIZERS[name](model.parameters(), 0.0) for model in (old, new)]
    for model, optimizer in zip((old, new), optimizers, strict=True):
        accumulate(model, optimizer)
    rescale(old, 1.0, optimizers[0], "transport")
    for a, b in zip(old.parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        states = [optimizers[0].state[a], optimizers[1].state[b]]
        assert len(states[0]) >= 1
        for key, value in states[0].items():
            torch.testing.assert_close(value, states[1][key], rtol=1e-10, atol=1e-18)


def test_states_keep_and_zero():
    model = network()
    sign_in(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train_steps(model, optimizer)
    m, w = factors(model[0])
    before = copy.deepcopy(dict(optimizer.state[w]))
    bias = optimizer.state[model[0].bias]["exp_avg"].clone()
    rescale(model, optimizer=optimizer, state="keep")
    assert torch.equal(optimizer.state[w]["exp_avg"], before["exp_avg"])
    rescale(model, optimizer=optimizer, state="zero")
    for factor in (m, w):
        assert not optimizer.state[factor]["exp_avg"].any()
        assert not optimizer.state[factor]["exp_avg_sq"].any()
    assert torch.equal(optimizer.state[model[0].bias]["exp_avg"], bias)


def test_transport_through_a_factor_of_zero_starts_anew():
    model = scalar(0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.weight.sum().backward()
    optimizer.step()
    m, w = factors(model)
    with torch.no_grad():
        m.zero_()
    rescale(model, optimizer=optimizer, state="transport")
    assert (m.item(), w.item()) == (1.0, 0.0)
    assert optimizer.state[w]["momentum_buffer"].item() == 0
    assert optimizer.state[m]["momentum_buffer"].item() == 0


def test_a_state_that_cannot_be_transported_is_refused_untouched():
    model = network()
    sign_in(model)
    optimizer = torch.optim.Adagrad(model.parameters(), 0.1)
    train_steps(model, optimizer)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="'sum' of Adagrad"):
        rescale(model, optimizer=optimizer, state="transport")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_schedule_rescales_when_it_says():
    model = scalar(0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    handle = rescale_every(model, optimizer, 20, every=4, until=0.5)
    fresh = []
    for step in range(1, 21):
        optimizer.zero_grad()
        model.weight.sum().backward()
        optimizer.step()
        m, w = factors(model)
        if (m * m - w * w).item() == pytest.approx(1.0, abs=1e-12):
            fresh.append(step)
    assert fresh == [4, 8]
    handle.remove()
    assert FORMS["sign-in"].defaults["follow"] is rescale_every


def test_the_schedule_goes_on_from_where_it_was():
    model = scalar(0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    rescale_every(model, optimizer, 40, start=3)
    model.weight.sum().backward()
    optimizer.step()
    m, w = factors(model)
    assert (m * m - w * w).item() == pytest.approx(1.0, abs=1e-12)


def test_beta_zero_keeps_every_sign():
    torch.manual_seed(0)
    start = torch.randn(200, dtype=torch.float64)
    signs = {}
    for beta in (0.0, 1.0):
        model = nn.Linear(200, 1, bias=False, dtype=torch.float64)
        model.weight.data.copy_(start)
        sign_in(model, beta)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(500):
            optimizer.zero_grad()
            (0.5 * (model.weight + start).square().sum()).backward()
            optimizer.step()
        signs[beta] = (model.weight.detach().sign() == start.sign()).double().mean().item()
    assert signs == {0.0: 1.0, 1.0: 0.0}


def test_frozen_weights_and_module_order_survive_fold():
    model = nn.MultiheadAttention(4, 2)
    names = [n for n, _ in model.named_parameters()]
    model.in_proj_weight.requires_grad_(False)
    sign_in(model, include=["in_proj_weight", "in_proj_bias", "out_proj.weight"])
    with torch.no_grad():
        fold(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert not dict(model.named_buffers())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["in_proj_weight"]


def test_two_forms_on_one_module_leave_its_order():
    model = nn.Module()
    for name in "abc":
        model.register_parameter(name, nn.Parameter(torch.ones(2, 2)))
    sign_in(model, include=["b", "c"])
    fold(model)
    assert [name for name, _ in model.named_parameters()] == ["a", "b", "c"]


def test_state_dict_and_copies():
    model = network()
    sign_in(model, support=sparse.random(model, 0.5, seed=0))
    train_steps(model, torch.optim.SGD(model.parameters(), 0.1))
    x = torch.randn(3, 16)
    other = network()
    sign_in(other, support=sparse.random(other, 0.9, seed=3))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_assigning_a_weight_splits_it_afresh():
    model = scalar(0.5, 0.6)
    model.weight = torch.tensor([[-2.0]], dtype=torch.float64)
    m, w = factors(model)
    assert (m * w).item() == pytest.approx(-2.0)
    assert (m * m - w * w).item() == pytest.approx(0.6)


def test_beta_by_name_and_schedule():
    model = network()
    betas = beta_schedule(model, output=1.0, input=0.25)
    assert list(betas) == NAMES
    assert list(betas.values()) == pytest.approx([0.25, 0.5, 1.0])
    sign_in(model, betas)
    for name in NAMES:
        m, w = factors(model[int(name[0])])
        torch.testing.assert_close(m * m - w * w, torch.full_like(m, betas[name]))
    assert beta_schedule(nn.Linear(2, 2)) == {"weight": 1.0}
    with pytest.raises(ValueError, match="over 0"):
        beta_schedule(model, input=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta must be finite and at least 0, got -1 for '0.weight'"),
        ({"beta": float("nan")}, "got nan"),
        ({"beta": float("inf")}, "got inf"),
        ({"beta": {"0.weight": 1.0}}, "beta lacks '2.weight'"),
        ({"decay": "weights"}, "unknown decay 'weights'"),
        ({"support": {"0.weight": torch.ones(24, 16, dtype=torch.bool)}}, "2.weight"),
        ({"exclude": ["9.*"]}, "pattern"),
    ],
)
def test_bad_arguments_leave_the_model_untouched(change, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        sign_in(model, **change)
    assert [type(m) for m in model] == [type(m) for m in network()]


def test_bad_calls_on_models_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for call in (rescale, fold, nonzero, parameter_groups):
        if call is not fold:
            with pytest.raises(ValueError, match="under"):
                call(model)
    sign_in(model)
    with pytest.raises(ValueError, match="parametrised"):
        sign_in(model)
    with pytest.raises(ValueError, match="unknown state 'drop'"):
        rescale(model, state="drop")
    with pytest.raises(ValueError, match="needs optimizer"):
        rescale(model, state="zero")
    for options in ({"steps": 0}, {"every": 0}, {"until": 1.5}, {"start": -1}):
        with pytest.raises(ValueError, match="steps and every"):
            rescale_every(model, optimizer, **({"steps": 10} | options))
