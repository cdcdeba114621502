"""HAM's limits in closed form, against the optimizers' own paths and other solvers."""

import math
from itertools import islice

import pytest
import torch
from scipy.optimize import linprog
from torch import nn

from featherweight import optim
from featherweight.optim import implicit_bias
from featherweight.optim.implicit_bias import inverse_mirror, mirror

TABLE = {  # alpha: L1, L2, distance to the sparse truth; a dual solver of its own found them
    0.0: (9.062, 1.928, 2.129),
    0.1: (9.022, 1.928, 2.114),
    1.0: (8.724, 1.935, 1.999),
    10.0: (7.618, 2.059, 1.508),
    100.0: (6.522, 2.377, 0.818),
}


@pytest.fixture(scope="module")
def problem():
    """Forty unknowns, twelve equations, a truth of four entries."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 40, dtype=torch.float64, generator=generator) / 12**0.5
    truth = torch.zeros(40, dtype=torch.float64)
    truth[:4] = torch.tensor([1.5, -2.0, 1.0, -1.0])
    return features, truth, features @ truth


def slope_of(features, targets):
    return lambda theta: features.T @ (features @ theta - targets)


def end_of(path, slope, tolerance=1e-9, most=60_000):
    """Walk until the gradient is gone."""
    theta = None
    for number, theta in enumerate(islice(path, most)):
        if number % 50 == 0 and slope(theta).abs().max() < tolerance:
            break
    return theta


def distance(theta, other):
    return ((theta - other).norm() / other.norm()).item()


@pytest.mark.parametrize("alpha", TABLE)
def test_closed_form_has_the_tabulated_norms(problem, alpha):
    features, truth, targets = problem
    theta = implicit_bias.closed_form(features, targets, alpha)
    torch.testing.assert_close(features @ theta, targets, rtol=0, atol=1e-11)
    norms = (theta.abs().sum().item(), theta.norm().item(), (theta - truth).norm().item())
    assert norms == pytest.approx(TABLE[alpha], abs=6e-4)


def test_closed_form_is_least_squares_at_alpha_0_and_tends_to_the_sparse_program(problem):
    features, _, targets = problem
    nearest = torch.linalg.pinv(features) @ targets
    torch.testing.assert_close(implicit_bias.closed_form(features, targets, 0.0), nearest)
    torch.testing.assert_close(
        implicit_bias.closed_form(features, targets, 1e-6), nearest, rtol=1e-5, atol=1e-6
    )
    both = torch.cat([features, -features], dim=1).numpy()
    least = linprog([1.0] * 80, A_eq=both, b_eq=targets.numpy()).fun
    sizes = [
        implicit_bias.closed_form(features, targets, alpha).abs().sum().item()
        for alpha in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0, 1e5)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert least < sizes[-1] < 1.04 * least


@pytest.mark.parametrize("sign_at", ["half", "full"])
@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_the_path_ends_in_the_closed_form_with_an_error_of_first_order(problem, alpha, sign_at):
    features, _, targets = problem
    slope, limit = slope_of(features, targets), implicit_bias.closed_form(features, targets, alpha)
    errors = []
    for rate in (0.02 / (1 + alpha), 0.01 / (1 + alpha)):
        path = implicit_bias.trajectory(
            slope, torch.zeros_like(limit), lr=rate, alpha=alpha, sign_at=sign_at
        )
        errors.append(distance(end_of(path, slope), limit))
    assert errors[1] < 3e-3
    low, high = (1.9, 2.1) if sign_at == "half" else (1.6, 2.1)
    assert low < errors[0] / errors[1] < high


@pytest.mark.parametrize("direction", ["gradient", "update"])
def test_the_optimizer_walks_the_path(problem, direction):
    features, _, targets = problem
    weight = nn.Parameter(torch.zeros(40, dtype=torch.float64))
    ham = optim.HamSGD([weight], 0.01, alpha=5.0, beta=0.2, clamp=None, direction=direction)
    slope = slope_of(features, targets)
    path = implicit_bias.trajectory(slope, torch.zeros(40).double(), lr=0.01, alpha=5.0, beta=0.2)
    for theta in islice(path, 300):
        weight.grad = slope(weight.detach())
        ham.step()
        torch.testing.assert_close(weight.detach(), theta, rtol=1e-10, atol=1e-12)


def test_the_start_matters_and_is_accounted_for(problem):
    features, _, targets = problem
    start = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slope = slope_of(features, targets)
    end = end_of(implicit_bias.trajectory(slope, start, lr=0.001, alpha=5.0), slope)
    limit = implicit_bias.closed_form(features, targets, 5.0, start)
    assert distance(end, limit) < 2e-3
    assert distance(end, implicit_bias.closed_form(features, targets, 5.0)) > 0.3
    # The closed form minimises the divergence over all solutions: moves within them increase it.
    projector = torch.eye(40).double() - torch.linalg.pinv(features) @ features
    least = implicit_bias.bregman(limit, start, 5.0)
    moves = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for move in moves:
        assert implicit_bias.bregman(limit + 0.01 * projector @ move, start, 5.0) > least


def test_what_gradient_flow_cannot_see_is_conserved(problem):
    features, _, targets = problem
    slope, start = slope_of(features, targets), torch.full((40,), 0.3, dtype=torch.float64)
    projector = torch.eye(40).double() - torch.linalg.pinv(features) @ features
    drifts = []
    for rate, steps in ((2e-3, 500), (1e-3, 1000)):
        path = implicit_bias.trajectory(slope, start, lr=rate, alpha=3.0)
        *_, end = islice(path, steps)
        moved = mirror(end, 3.0) - mirror(start, 3.0)
        drifts.append(((projector @ moved).norm() / moved.norm()).item())
    assert drifts[1] < 2e-3
    assert 1.8 < drifts[0] / drifts[1] < 2.2


def test_momentum_divides_alpha(problem):
    features, _, targets = problem
    slope, start = slope_of(features, targets), torch.zeros(40, dtype=torch.float64)
    path = implicit_bias.trajectory(slope, start, lr=1e-4, alpha=10.0, momentum=0.9)
    end = end_of(path, slope)
    assert distance(end, implicit_bias.closed_form(features, targets, 1.0)) < 3e-3
    assert distance(end, implicit_bias.closed_form(features, targets, 10.0)) > 0.2


def test_beta_ends_in_the_fair_penalised_minimum_from_anywhere(problem):
    features, _, targets = problem
    alpha, beta = 4.0, 1.0
    limit = implicit_bias.penalised_form(features, targets, alpha, beta)
    pull = features.T @ (targets - features @ limit)
    torch.testing.assert_close(pull, beta * limit / (1 + alpha * limit.abs()))
    assert pull.abs().max() <= beta / alpha
    slope = slope_of(features, targets)

    def error(seed, rate):
        start = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        *_, end = islice(
            implicit_bias.trajectory(slope, start, lr=rate, alpha=alpha, beta=beta), int(30 / rate)
        )
        return distance(end, limit)

    coarse, fine = error(1, 0.01), error(1, 0.005)
    assert fine < 5e-3
    assert coarse / fine == pytest.approx(2.0, abs=0.1)
    assert error(2, 0.01) == pytest.approx(coarse, rel=0.01)


def test_beta_without_alpha_is_ridge_regression(problem):
    features, _, targets = problem
    ridge = torch.linalg.solve(features.T @ features + 0.1 * torch.eye(40), features.T @ targets)
    torch.testing.assert_close(implicit_bias.penalised_form(features, targets, 0.0, 0.1), ridge)


@pytest.mark.parametrize("alpha", [0.0, 1e-9, 1e-4, 0.1, 1.0, 50.0])
def test_potential_mirror_and_penalty_are_what_they_say(alpha):
    theta = torch.tensor([0.0, 1e-7, -1e-3, 0.2, -3.0, 40.0], dtype=torch.float64)
    theta.requires_grad_()
    (slope,) = torch.autograd.grad(implicit_bias.potential(theta.clone(), alpha), theta)
    torch.testing.assert_close(slope, mirror(theta, alpha), rtol=1e-9, atol=1e-15)
    (pull,) = torch.autograd.grad(implicit_bias.fair_penalty(theta.clone(), alpha), theta)
    torch.testing.assert_close(pull, theta / (1 + alpha * theta.abs()), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(inverse_mirror(mirror(theta, alpha), alpha), theta)
    curvature = torch.autograd.functional.jacobian(lambda t: mirror(t, alpha), theta).diagonal()
    expected = 1 / (1 + alpha * theta.abs())
    torch.testing.assert_close(curvature[1:], expected[1:], rtol=1e-9, atol=0)


def test_limits_of_the_potential():
    theta = torch.tensor([0.3, -2.0, 1e-5], dtype=torch.float64)
    half_square = (theta**2).sum() / 2
    torch.testing.assert_close(implicit_bias.potential(theta, 0.0), half_square, rtol=1e-15, atol=0)
    torch.testing.assert_close(implicit_bias.potential(theta, 1e-7), half_square, rtol=1e-6, atol=0)
    scaled = [
        (implicit_bias.potential(theta, a) * a / math.log(a)).item() for a in (1e10, 1e60, 1e120)
    ]
    errors = [abs(s - theta.abs().sum().item()) for s in scaled]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02
    for alpha in (0.0, 3.0):
        assert implicit_bias.bregman(theta, theta, alpha) == 0
        assert implicit_bias.bregman(theta, -theta, alpha) > 0
    torch.testing.assert_close(
        implicit_bias.bregman(theta, 2 * theta, 0.0), half_square, rtol=1e-12, atol=0
    )


def test_one_step_is_a_step_of_the_product_of_two_vectors_up_to_second_order():
    generator = torch.Generator().manual_seed(0)
    theta, slope = torch.randn(2, 9, dtype=torch.float64, generator=generator)
    errors = []
    for rate in (1e-2, 1e-3, 1e-4):
        m, w = theta.sign() * theta.abs().sqrt(), theta.abs().sqrt()
        # θ = m w with the penalty λ(|m|² + |w|²), λ = 0.1
        new_m = m - rate * (slope * w + 0.2 * m)
        new_w = w - rate * (slope * m + 0.2 * w)
        step = theta.clone()
        # the exponential step alone: no base step, alpha = 2, beta = 4 λ
        step = step * (-rate * (2.0 * step.sign() * slope + 0.4)).exp()
        errors.append(((new_m * new_w - step).norm() / rate**2).item())
    assert errors[2] == pytest.approx(errors[1], rel=0.02)
    assert errors[1] == pytest.approx(errors[0], rel=0.2)


def test_never_slower_than_gradient_descent_and_within_the_bound(problem):
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(30, 10, dtype=torch.float64, generator=generator) / 30**0.5
    targets = torch.randn(30, dtype=torch.float64, generator=generator)
    start = torch.randn(10, dtype=torch.float64, generator=generator)
    slope = slope_of(features, targets)

    def loss(theta):
        return ((features @ theta - targets) ** 2).sum().item() / 2

    best = loss(torch.linalg.lstsq(features, targets[:, None]).solution[:, 0])
    pl = torch.linalg.eigvalsh(features.T @ features)[0].item()
    rate = 1e-3
    paths = [
        islice(implicit_bias.trajectory(slope, start, lr=rate, alpha=a), 4000) for a in (0.0, 5.0)
    ]
    for number, (plain, ham) in enumerate(zip(*paths, strict=True), 1):
        bound = (loss(start) - best) * math.exp(-2 * pl * rate * number)
        assert loss(ham) <= loss(plain) + 1e-12
        assert loss(ham) - best <= bound + 1e-12


def test_a_wrong_sign_is_left_behind_sooner_than_by_gradient_descent():
    start = torch.tensor([-0.1], dtype=torch.float64)

    def steps(**options):
        path = implicit_bias.trajectory(lambda x: x - 1, start, lr=0.01, **options)
        return next(i for i, x in enumerate(path, 1) if x > 0.95)

    plain = steps(alpha=0.0)
    assert plain == pytest.approx(308, abs=1)
    assert steps(alpha=10.0) < plain / 4
    assert steps(alpha=10.0, sign_at="full") < plain / 4


def test_the_two_signs_differ_where_the_base_step_crosses_zero():
    start = torch.tensor([-0.1], dtype=torch.float64)
    for sign_at, sign in (("half", 1.0), ("full", -1.0)):
        path = implicit_bias.trajectory(lambda x: x - 1, start, lr=0.5, alpha=2.0, sign_at=sign_at)
        half = -0.1 + 0.5 * 1.1
        assert next(path).item() == pytest.approx(half * math.exp(0.5 * 2.0 * sign * 1.1))


def test_bad_arguments_are_refused(problem):
    features, _, targets = problem
    for call in (
        lambda: implicit_bias.closed_form(features, targets, -1.0),
        lambda: implicit_bias.penalised_form(features, targets, math.nan, 1.0),
        lambda: implicit_bias.potential(targets, -1.0),
        lambda: implicit_bias.trajectory(torch.sin, targets, lr=0.1, alpha=-2.0),
    ):
        with pytest.raises(ValueError, match="alpha must be at least 0"):
            call()
    with pytest.raises(ValueError, match="shape"):
        implicit_bias.closed_form(features, targets[:3], 1.0)
    with pytest.raises(ValueError, match="no more rows than columns"):
        implicit_bias.closed_form(features.T, torch.zeros(40).double(), 1.0)
    with pytest.raises(ValueError, match="beta must be above 0"):
        implicit_bias.penalised_form(features, targets, 1.0, 0.0)
    with pytest.raises(ValueError, match="sign_at"):
        implicit_bias.trajectory(torch.sin, targets, lr=0.1, alpha=1.0, sign_at="both")
    with pytest.raises(RuntimeError, match="after 2 Newton steps"):
        implicit_bias.closed_form(features, targets, 100.0, steps=2)
