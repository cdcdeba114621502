"""The Sign-In toy: who finds the target, what is conserved, and the closed forms."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from featherweight.lab import neuron, sign_toy
from featherweight.lab.sign_toy import mirror, unmirror
from featherweight.sparse.reparam import split

PAIRS = [(1.0, 1.0), (1.0, 0.5), (2.0, 0.1), (0.5, 1.0)]


def random_starts(count=300, seed=0):
    return sign_toy.starts(count, balanced=False, seed=seed)


def test_starts_are_what_they_say():
    for balanced in (True, False):
        a, w = sign_toy.starts(2000, balanced=balanced, seed=0)
        signs = torch.tensor(sign_toy.QUADRANTS).double().expand(2000, 4, 2)
        assert torch.equal(torch.stack([a.sign(), w.sign()], -1), signs)
        assert torch.equal(a.abs(), a[:, :1].abs().expand_as(a))
        assert torch.equal(a.abs(), w.abs()) == balanced
        assert a.square().mean().item() == pytest.approx(1, abs=0.1)


def test_pull_is_that_of_the_neuron_on_many_samples():
    data = neuron.sample(1, 200_000, 1, noise=0.0, generator=torch.Generator().manual_seed(0))
    data = neuron.Data(data.x[0], data.y[0])
    a, w = (t.flatten() for t in random_starts(5))
    sampled = neuron.pull(neuron.Neuron(a, w[:, None]), data)[:, 0]
    torch.testing.assert_close(sign_toy.pull(a, w), sampled, rtol=0.02, atol=0.01)
    assert sign_toy.pull(torch.tensor(1.0), torch.tensor(0.0)) == 0


@pytest.mark.parametrize("betas", PAIRS)
def test_flow_against_four_factors_and_an_ode_solver(betas):
    """Oracle: gradient flow of the loss on all four factors, by autograd and scipy."""
    a, w = torch.tensor(-0.6).double(), torch.tensor(0.9).double()
    start = torch.stack([*split(a, betas[0]), *split(w, betas[1])])

    def slope(_, state):
        factors = torch.tensor(state, requires_grad=True)
        a, w = factors[0] * factors[1], factors[2] * factors[3]
        product = a * w.relu() - 1
        loss = (product.square() + (a * (-w).relu()).square()) / 12
        return -torch.autograd.grad(loss, factors)[0].numpy()

    end = solve_ivp(slope, (0, 4.0), start.numpy(), rtol=1e-10, atol=1e-12).y[:, -1]
    found = sign_toy.flow(a, w, betas, step=0.05, steps=80)
    np.testing.assert_allclose([float(x) for x in found], [end[0] * end[1], end[2] * end[3]], 1e-6)


@pytest.mark.parametrize("betas", PAIRS)
def test_flow_conserves_k_up_to_its_fourth_order(betas):
    a, w = (start.clamp(-1, 1) for start in random_starts(50))
    drifts = []
    for step in (0.04, 0.02):
        end = sign_toy.flow(a, w, betas, step=step, steps=round(4 / step))
        smooth = end[1] * w > 0  # the pull jumps at w = 0
        assert (end[0] - a)[smooth].abs().max() > 0.1
        assert smooth.double().mean() > 0.8
        drift = sign_toy.conserved(*end, betas) - sign_toy.conserved(a, w, betas)
        drifts.append(drift[smooth].abs().max().item())
    assert drifts[1] < 1e-8
    assert drifts[0] / drifts[1] > 14


@pytest.mark.parametrize("betas", [None, *PAIRS])
def test_the_success_rule_on_random_starts(betas):
    a, w = random_starts()
    right = sign_toy.found(*sign_toy.flow(a, w, betas, step=0.2, steps=1500)) == sign_toy.succeeds(
        a, w, betas
    )
    margin = a.abs() - w.abs()
    if betas is not None:
        margin = sign_toy.conserved(a, w, betas) - (betas[0] - betas[1])
    away = margin.abs() > 0.01
    assert right[away].double().mean() >= 0.98
    assert away.double().mean() > 0.9


def test_plain_weights_are_the_limit_of_large_equal_betas():
    a, w = random_starts()
    plain, limit = sign_toy.succeeds(a, w, None), sign_toy.succeeds(a, w, (1e4, 1e4))
    assert (plain == limit).double().mean() > 0.995
    assert 0.4 < plain[:, 2].double().mean() < 0.6


def test_balanced_starts_succeed_by_the_order_of_the_betas():
    a, w = sign_toy.starts(100, balanced=True, seed=0)
    for betas in PAIRS:
        expected = torch.tensor([True, False, betas[0] > betas[1], False]).expand(100, 4)
        assert torch.equal(sign_toy.succeeds(a, w, betas), expected)


def test_the_table_of_the_theory():
    table = sign_toy.sign_table(seed=0, count=40)
    for column in (None, *PAIRS):
        rescued = column in ((1.0, 0.5), (2.0, 0.1))
        rates = [table.rate(*signs, column) for signs in sign_toy.QUADRANTS]
        assert rates == [1, 0, float(rescued), 0]
    lines = str(table).splitlines()
    assert lines[0].split()[3:5] == ["plain", "1,"]
    assert lines[3].split() == ["-1,", "+1", "0.00", "0.00", "1.00", "1.00", "0.00"]
    assert "40 starts" in lines[-1]


def test_the_table_repeats_by_seed():
    options = {"count": 20, "steps": 200, "balanced": False, "pairs": [(1.0, 0.5)]}
    tables = [sign_toy.sign_table(seed=seed, **options) for seed in (0, 0, 1)]
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]


def test_mirror_map_and_its_inverse():
    theta = torch.tensor([-3.0, 0.0, 1e-9, 0.4], dtype=torch.float64)
    torch.testing.assert_close(unmirror(mirror(theta, 0.7), 0.7), theta)
    theta.requires_grad_()
    mirror(theta, 0.7).sum().backward()
    torch.testing.assert_close(1 / theta.grad, sign_toy.metric(theta.detach(), 0.7))


def test_constant_pull_solves_its_equation():
    def slope(_, theta):
        return -0.8 * np.sqrt(0.5**2 + 4 * theta**2)

    times = np.array([0.0, 0.4, 2.0])
    solution = solve_ivp(slope, (0, 2), [0.9], t_eval=times, rtol=1e-11, atol=1e-13).y[0]
    start = torch.tensor(0.9, dtype=torch.float64)
    law = sign_toy.constant_pull(start, 0.8, 0.5, torch.tensor(times))
    np.testing.assert_allclose(law.numpy(), solution, atol=1e-9)


def test_time_to_zero():
    start = torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64)
    plain = sign_toy.time_to_zero(start, 0.8, None)
    torch.testing.assert_close(plain, start / 0.8)
    for beta in (1e-6, 0.1, 1.0, 5.0):
        time = sign_toy.time_to_zero(start, 0.8, beta)
        landed = sign_toy.constant_pull(start, 0.8, beta, time)
        torch.testing.assert_close(landed, torch.zeros_like(start), rtol=0, atol=1e-12)
    assert (sign_toy.time_to_zero(start, 0.8, 1.0) < plain).all()
    assert sign_toy.time_to_zero(start, 0.8, 1e-6)[1] > plain[1]
    tiny = [sign_toy.time_to_zero(start[1], 0.8, beta).item() for beta in (1e-10, 1e-20)]
    assert tiny[1] - tiny[0] == pytest.approx(math.log(1e10) / 1.6)  # it grows without end


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"steps": 0}, "steps=0"),
        ({"step": 0.0}, "step=0.0"),
        ({"pairs": [(1.0, 0.0)]}, "pairs must hold betas over 0"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sign_toy.sign_table(seed=0, **change)
    table = sign_toy.SignTable((None,), ((1,),) * 4, 1)
    for cell in ((1, 1, (1.0, 1.0)), (0, 1, None)):
        with pytest.raises(ValueError, match="no cell"):
            table.rate(*cell)
