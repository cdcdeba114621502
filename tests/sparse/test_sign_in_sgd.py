"""Sign-In as an optimizer: the same as two factors, and a well-behaved torch optimizer."""

import copy
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherweight import sparse
from featherweight.sparse.reparam import (
    SignInSGD,
    fold,
    rescale,
    rescale_every,
    sign_in,
    sign_in_groups,
    sign_in_sgd,
    soft_threshold,
)
from tests.models import ConvNet, mlp, train_steps
from tests.oracles.sign_in import slow_descent


def problem(seed=0):
    """A small float64 network that learns to flip its outputs, so that many signs change."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    x = torch.randn(64, 6, dtype=torch.float64)
    return model, x, (-2 * model(x)).detach()


def fit(model, optimizer, x, y, steps, batch=64):
    for step in range(steps):
        rows = torch.arange(step * batch, (step + 1) * batch) % len(x)
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()


def both_forms(steps, beta=0.7, batch=64, support=None, **options):
    """Train a copy in two factors and one by SignInSGD; returns both, folded, and the start."""
    start, x, y = problem()
    one, two = copy.deepcopy(start), copy.deepcopy(start)
    sign_in(two, beta, support=support)
    factors = torch.optim.SGD(two.parameters(), **options)
    optimizer = SignInSGD(sign_in_groups(one, beta), **options)
    if support is not None:
        sparse.hold(one, optimizer, support)
    for model, trainer in ((one, optimizer), (two, factors)):
        fit(model, trainer, x, y, steps, batch)
    betas = [(p.original0**2 - p.original1**2).detach() for p in _products(two)]
    fold(two)
    return one, two, start, optimizer, betas


def _products(model):
    return [model[i].parametrizations.weight for i in (0, 2)]


def distance(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


def flips(one, other):
    return (one[0].weight.sign() != other[0].weight.sign()).double().mean().item()


@pytest.mark.parametrize("decay", [0.0, 0.02])
def test_is_descent_on_both_factors(decay):
    one, two, start, optimizer, betas = both_forms(300, lr=0.05, weight_decay=decay)
    assert distance(one, two) < 1e-12
    assert distance(one, start) > 0.1
    assert flips(one, start) > 0.05
    for layer, beta in zip((one[0], one[2]), betas, strict=True):
        torch.testing.assert_close(optimizer.beta_of(layer.weight), beta, rtol=0, atol=1e-12)


def test_is_descent_on_both_factors_under_a_mask():
    model, _, _ = problem()
    support = sparse.random(model, 0.4, seed=0)
    one, two, _, _, _ = both_forms(200, support=support, lr=0.05, weight_decay=0.02)
    assert distance(one, two) < 1e-12
    assert sparse.Masks.nonzero(one) == support


@pytest.mark.parametrize(("theta", "decay"), [(0.0, 0.0), (0.0, 0.3), (0.7, 0.0), (-4.0, 0.3)])
def test_one_weight_against_the_slow_oracle(theta, decay):
    weight = nn.Parameter(torch.tensor([theta], dtype=torch.float64))
    optimizer = SignInSGD([weight], 0.1, beta=0.6, weight_decay=decay)
    for _ in range(40):
        weight.grad = weight.detach() - 1.3
        optimizer.step()
    expected, beta = slow_descent(theta, 0.6, lambda t: t - 1.3, 0.1, decay, 40)
    assert weight.item() == pytest.approx(expected, abs=1e-12)
    assert optimizer.beta_of(weight).item() == pytest.approx(beta, abs=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_momentum_agrees_with_the_factors(nesterov, decay):
    """To second order in the rate without decay: a fourth of it leaves a tenth of the gap."""
    options = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": decay}
    gaps, moved = [], []
    for lr, steps in ((4e-3, 100), (1e-3, 400)):
        one, two, start, _, _ = both_forms(steps, lr=lr, **options)
        gaps.append(distance(one, two))
        moved.append(distance(one, start))
    assert min(moved) > 0.1
    assert gaps[1] < 2e-3 * moved[1]
    assert gaps[0] / gaps[1] > (3 if decay else 9)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_shrinks_beta_as_it_does_with_factors(nesterov):
    options = {"momentum": 0.9, "nesterov": nesterov}
    _, _, _, optimizer, betas = both_forms(500, batch=4, lr=0.03, beta=1.0, **options)
    weights = optimizer.param_groups[0]["params"]
    lost = torch.cat([(1 - optimizer.beta_of(weight)).flatten() for weight in weights])
    expected = torch.cat([(1 - beta).flatten() for beta in betas])
    assert expected.mean() > 0.01
    assert lost.mean() == pytest.approx(expected.mean().item(), rel=0.12)


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"momentum": 0.9, "nesterov": True}])
def test_groups_without_beta_are_plain_sgd(options):
    start, x, y = problem()
    models = [copy.deepcopy(start) for _ in range(2)]
    fit(models[0], torch.optim.SGD(models[0].parameters(), 0.1, **options), x, y, 20)
    fit(models[1], SignInSGD(models[1].parameters(), 0.1, beta=None, **options), x, y, 20)
    assert distance(*models) == 0


def test_large_beta_with_the_rate_divided_by_it_is_plain_sgd():
    gaps = []
    for beta in (1e2, 1e3):
        start, x, y = problem()
        models = [copy.deepcopy(start) for _ in range(2)]
        fit(models[0], torch.optim.SGD(models[0].parameters(), 0.1), x, y, 100)
        groups = sign_in_groups(models[1], beta)
        groups[0]["lr"] = 0.1 / beta
        fit(models[1], SignInSGD(groups, 0.1), x, y, 100)
        gaps.append(distance(*models))
    assert gaps[1] < 1e-3
    assert gaps[1] < gaps[0] / 5


def test_constant_gradient_follows_the_sinh_law():
    errors = []
    for steps in (1000, 2000):
        weight = nn.Parameter(torch.tensor([0.8, -0.8, 0.0], dtype=torch.float64))
        optimizer = SignInSGD([weight], 1.5 / steps, beta=0.5)
        for _ in range(steps):
            weight.grad = torch.full_like(weight, 0.9)
            optimizer.step()
        start = torch.tensor([0.8, -0.8, 0.0], dtype=torch.float64)
        law = 0.25 * torch.sinh(torch.asinh(2 * start / 0.5) - 2 * 0.9 * 1.5)
        errors.append(((weight - law) / law).abs().max().item())
    assert errors[1] < 5e-3
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_beta_zero_keeps_every_sign_and_beta_does_not():
    start, x, y = problem()
    signs = {}
    for beta in (0.0, 1.0):
        model = copy.deepcopy(start)
        groups = sign_in_groups(model, beta)
        fit(model, SignInSGD(groups, 0.05), x, y, 300)
        signs[beta] = flips(model, start)
    assert signs[0.0] == 0
    assert signs[1.0] > 0.05


@pytest.mark.parametrize(("decay", "limit"), [("factors", (-0.7, 0.0)), ("product", (-0.75, 0.15))])
def test_decay_is_an_l1_or_an_l2_penalty(decay, limit):
    targets = torch.tensor([-0.9, 0.18], dtype=torch.float64)
    weight = nn.Parameter(torch.full_like(targets, 0.5))
    optimizer = SignInSGD([weight], 0.1, weight_decay=0.2, decay=decay)
    for _ in range(2000):
        weight.grad = weight.detach() - targets
        optimizer.step()
    expected = torch.tensor(limit, dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=2e-3)


def test_without_decay_beta_falls_with_the_square_of_the_rate():
    lost = []
    for lr, steps in ((0.02, 50), (0.01, 100)):
        model, x, y = problem()
        optimizer = SignInSGD(sign_in_groups(model), lr)
        fit(model, optimizer, x, y, steps)
        lost.append((1 - optimizer.beta_of(model[0].weight)).mean().item())
    assert 0 < lost[1] < lost[0]
    assert lost[0] / lost[1] == pytest.approx(2, abs=0.1)  # O(rate^2) a step, over a fixed time


def test_rescaling_is_a_fresh_start_of_beta_alone():
    one, two, x, y = *(problem()[0] for _ in range(2)), *problem()[1:]
    sign_in(two)
    options = {"lr": 0.05, "weight_decay": 0.02}
    optimizer = SignInSGD(sign_in_groups(one), **options)
    factors = torch.optim.SGD(two.parameters(), **options)
    for _ in range(3):
        fit(one, optimizer, x, y, 20)
        fit(two, factors, x, y, 20)
        assert (optimizer.beta_of(one[0].weight) < 0.99).all()
        before = one[0].weight.detach().clone()
        optimizer.rescale()
        rescale(two)
        assert torch.equal(one[0].weight, before)
        assert (optimizer.beta_of(one[0].weight) == 1).all()
    fold(two)
    assert distance(one, two) < 1e-12


def test_the_schedule_rescales_this_form_too():
    model, x, y = problem()
    optimizer = SignInSGD(sign_in_groups(model), 0.05, weight_decay=0.1)
    rescale_every(model, optimizer, 20, until=0.5)
    fresh = []
    for step in range(1, 21):
        fit(model, optimizer, x, y, 1)
        if (optimizer.beta_of(model[0].weight) == 1).all():
            fresh.append(step)
    assert fresh == [2, 4, 6, 8, 10]


def test_masks_that_drop_and_grow_start_fresh():
    model, x, y = problem()
    optimizer = SignInSGD(sign_in_groups(model), 0.05, momentum=0.9, weight_decay=0.01)
    old, new = sparse.random(model, 0.3, seed=0), sparse.random(model, 0.3, seed=1)
    held = sparse.hold(model, optimizer, old)
    fit(model, optimizer, x, y, 20)
    assert sparse.Masks.nonzero(model) == old
    held.update(new)
    for name, weight in new.weights(model).items():
        beta, stays = optimizer.beta_of(weight), old[name] & new[name]
        assert (beta[new[name] & ~old[name]] == 1).all()
        assert (beta[stays] < 0.99).all()
    fit(model, optimizer, x, y, 3)
    moved = sparse.Masks.nonzero(model)
    assert moved <= new
    assert moved.nonzeros > 0.8 * new.nonzeros  # all but those on no path
    for name, weight in new.weights(model).items():  # what is masked stays fresh
        assert (optimizer.beta_of(weight)[~new[name]] == 1).all()


@pytest.mark.parametrize("name", ["set", "rigl", "acdc"])
def test_works_under_methods_that_change_masks(name):
    model = mlp(norm=False)
    optimizer = SignInSGD(sign_in_groups(model), 0.05, weight_decay=0.01)
    entry = sparse.DYNAMIC[name]
    needs = {"generator": torch.Generator().manual_seed(0)} if "generator" in entry.needs else {}
    with entry.method(model, optimizer, 0.3, steps=60, **needs) as evolving:
        train_steps(model, optimizer, 60)
        assert sparse.Masks.nonzero(model) == evolving.masks
        for weight in evolving.masks.weights(model).values():
            assert weight.isfinite().all()


def test_works_with_learning_rate_rewinding_and_magnitude():
    model = mlp(norm=False)
    optimizer = SignInSGD(sign_in_groups(model), 0.05)
    for level in sparse.lrr(model, density=0.25, per_level=0.5, optimizer=optimizer):
        with sparse.hold(model, optimizer, level.masks):
            train_steps(model, optimizer, 5)
        assert sparse.Masks.nonzero(model) == level.masks
    masks = sparse.magnitude(model, density=0.1)
    with sparse.hold(model, optimizer, masks):
        train_steps(model, optimizer, 5)
    assert sparse.Masks.nonzero(model) == masks


def test_works_under_a_soft_threshold():
    one, two = (nn.Linear(6, 4, dtype=torch.float64) for _ in range(2))
    two.load_state_dict(one.state_dict())
    soft_threshold(one, -1.5)
    optimizer = SignInSGD(sign_in_groups(one, include=["*original"]), 0.05)
    sign_in(two)
    s = nn.Parameter(torch.tensor(-1.5, dtype=torch.float64))
    factors = torch.optim.SGD([*two.parameters(), s], 0.05)
    x, y = torch.randn(2, 20, 6).double(), torch.randn(20, 4).double()
    for _ in range(30):
        for trainer in (optimizer, factors):
            trainer.zero_grad()
        (one(x[0]) - y).square().mean().backward()
        size = F.relu(two.weight.abs() - s.sigmoid())
        (F.linear(x[0], two.weight.sign() * size, two.bias) - y).square().mean().backward()
        optimizer.step()
        factors.step()
    original = one.parametrizations.weight.original
    torch.testing.assert_close(original, two.weight, rtol=0, atol=1e-12)
    assert 0 < (one.weight == 0).double().mean() < 1


def test_state_dict_round_trip_continues_bit_for_bit():
    model, x, y = problem()
    optimizer = SignInSGD(sign_in_groups(model), 0.05, momentum=0.9, weight_decay=0.01)
    fit(model, optimizer, x, y, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    again = SignInSGD(sign_in_groups(other, 9.0), 9.0)
    again.load_state_dict(torch.load(file, weights_only=True))
    fit(model, optimizer, x, y, 5)
    fit(other, again, x, y, 5)
    assert distance(model, other) == 0


def test_closures_maximize_and_added_groups():
    weight, late = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = SignInSGD([weight], 0.1, maximize=True)
    optimizer.add_param_group({"params": [late], "beta": None, "maximize": False})

    def closure():
        optimizer.zero_grad()
        loss = weight.sum() + late.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6.0
    assert (weight > 1).all()
    torch.testing.assert_close(late.detach(), torch.full((3,), 0.9))
    assert optimizer.step() is None


def test_parameters_without_gradient_are_left_alone():
    weight = nn.Parameter(torch.ones(3))
    optimizer = SignInSGD([weight], 0.1, weight_decay=0.5)
    optimizer.step()
    assert (weight == 1).all()
    assert not optimizer.state


def test_grad_scaler_skips_steps_that_overflow():
    model = mlp(norm=False)
    optimizer = SignInSGD(sign_in_groups(model), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plain, reference = copy.deepcopy(model), copy.deepcopy(model)
    other = SignInSGD(sign_in_groups(plain), 0.1)
    x = torch.randn(8, 16)
    scaler.scale(model(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    plain(x).square().mean().backward()
    other.step()
    assert distance(model, plain) < 1e-6
    optimizer.zero_grad()
    model[0].weight.grad = torch.full_like(model[0].weight, math.inf)
    scaler.step(optimizer)
    assert distance(model, plain) < 1e-6
    assert distance(model, reference) > 1e-4


def test_compiled_step_and_compiled_model():
    torch.compiler.reset()
    models = [mlp(norm=False) for _ in range(2)]
    optimizers = [SignInSGD(sign_in_groups(m), 0.1, momentum=0.9) for m in models]
    step = torch.compile(optimizers[1].step, backend="eager")
    forward = torch.compile(models[1], backend="eager")
    x = torch.randn(8, 16)
    for _ in range(3):
        for run, optimizer in zip((models[0], forward), optimizers, strict=True):
            optimizer.zero_grad()
            run(x).square().mean().backward()
        optimizers[0].step()
        step()
    assert distance(*models) < 1e-6
    torch.compiler.reset()


def test_parts_do_not_change_the_result(monkeypatch):
    """Entries are independent: small parts, whole tensors and odd memory formats agree."""
    models = []
    for part, layout in ((2**17, torch.contiguous_format), (3, torch.channels_last)):
        monkeypatch.setattr(sign_in_sgd, "PART", part)
        torch.manual_seed(0)
        model = ConvNet().to(memory_format=layout)
        optimizer = SignInSGD(sign_in_groups(model), 0.05, momentum=0.9, weight_decay=0.01)
        train_steps(model, optimizer, 3, inputs=(2, 3, 6, 6))
        models.append(model)
    assert distance(*models) < 1e-6


def test_groups_hold_each_trained_parameter_once():
    model = ConvNet()
    model.norm.weight.requires_grad_(False)
    names = list(sparse.Masks.dense(model))
    betas = {name: 0.5 if name.startswith("stem") else 1.0 for name in names}
    groups = sign_in_groups(model, betas, exclude=["grouped.weight"])
    assert [group["beta"] for group in groups] == [0.5, 1.0, None]
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert any(p is model.grouped.weight for p in groups[2]["params"])
    assert len(sign_in_groups(nn.Linear(2, 2, bias=False))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1"),
        ({"lr": math.nan}, "lr must be at least 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1"),
        ({"beta": -1.0}, "beta must be finite and at least 0, got -1"),
        ({"nesterov": True}, "nesterov"),
        ({"decay": "weights"}, "unknown decay 'weights'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SignInSGD([nn.Parameter(torch.ones(2))], **options)
    optimizer = SignInSGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1


def test_bad_steps_are_refused():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = SignInSGD([weight], 1.0, weight_decay=0.2, momentum=0.9)
    with pytest.raises(ValueError, match="must be under 1, got 1 "):
        optimizer.step()
    assert (weight == 1).all()
    rows = nn.Embedding(3, 2, sparse=True)
    rows(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients"):
        SignInSGD(rows.parameters()).step()
    with pytest.raises(ValueError, match="does not train"):
        optimizer.beta_of(torch.ones(2))
    with pytest.raises(ValueError, match="plain SGD"):
        SignInSGD([weight], beta=None).beta_of(weight)
