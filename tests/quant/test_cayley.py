"""Descent over orthogonal matrices: the step, its size, planted optima."""

import math
from itertools import pairwise

import pytest
import torch

from featherweight.quant.cayley import (
    Angle,
    Clipped,
    cayley_step,
    descend,
    polar,
    skew_direction,
    spectral_norm,
)
from featherweight.quant.hadamard import random_orthogonal
from featherweight.quant.objective import quartic
from featherweight.quant.rotate import orthogonality_error
from tests.oracles.jacobi import best_angle, sweep


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def skew(n, batch=(), seed=0):
    matrix = torch.randn(*batch, n, n, generator=generator(seed), dtype=torch.float64)
    return matrix - matrix.mT


def fourth(rows):
    return lambda rotation: quartic(rows, rotation, torch.ones(len(rows)).to(rows))


def learn(rows, start, steps=300, **options):
    rule = options.pop("rule", Angle(**options))
    return descend(fourth(rows), start, steps=steps, rule=rule, generator=generator())


def test_a_step_is_orthogonal_whatever_its_size():
    start = random_orthogonal(12, seed=0)
    for size in (1e-3, 1.0, 100.0):
        step = cayley_step(start, skew(12), torch.tensor(size, dtype=torch.float64))
        assert orthogonality_error(step) < 1e-12


def test_a_small_step_is_the_exponential():
    start, size = random_orthogonal(6, seed=0), torch.tensor(1e-3, dtype=torch.float64)
    expected = torch.linalg.matrix_exp(-size * skew(6)) @ start
    torch.testing.assert_close(cayley_step(start, skew(6), size), expected, rtol=0, atol=1e-7)


def test_batched_steps_are_those_of_each_matrix():
    starts = torch.stack([random_orthogonal(5, seed=i) for i in range(3)])
    turns, sizes = skew(5, (3,)), torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    together = cayley_step(starts, turns, sizes)
    for one, start, turn, size in zip(together, starts, turns, sizes, strict=True):
        torch.testing.assert_close(one, cayley_step(start, turn, size))


def test_slope_along_the_direction_is_minus_its_square():
    rows = torch.randn(50, 8, generator=generator(), dtype=torch.float64)
    rotation = random_orthogonal(8, seed=1)
    value, gradient = fourth(rows)(rotation)
    direction = skew_direction(gradient, rotation)
    torch.testing.assert_close(direction, -direction.mT)
    size = 1e-7
    moved = torch.linalg.matrix_exp(-size * direction) @ rotation
    slope = (fourth(rows)(moved)[0] - value) / size
    assert slope == pytest.approx(-direction.pow(2).sum().item(), rel=1e-3)


def test_spectral_norm_is_estimated_from_below():
    turns = skew(30, (4,), seed=2)
    exact = torch.linalg.matrix_norm(turns, ord=2)
    found = spectral_norm(turns, generator())
    assert (found <= exact * (1 + 1e-12)).all()
    assert (found > 0.8 * exact).all()


def test_angle_bounds_the_rotation_of_a_step():
    rule = Angle(theta=0.2, momentum=0.0)
    turn = skew(20)
    for step, expected in ((0, 0.2), (50, 0.1), (100, 0.0)):
        size = rule.size(turn, step, 100, generator())
        moved = cayley_step(torch.eye(20, dtype=torch.float64), turn, size)
        angles = torch.linalg.eigvals(moved).angle().abs().max().item()
        assert angles <= 1.3 * expected + 1e-12
        assert angles >= 0.9 * expected


def test_clipped_rule_ignores_a_learning_rate_above_the_clip():
    turn = 1e4 * skew(10)
    sizes = [Clipped(lr).size(turn, 0, 1, generator()).item() for lr in (1.0, 0.1, 0.01)]
    assert len(set(sizes)) == 1
    assert sizes[0] == pytest.approx(1 / turn.abs().sum(0).max().item())
    assert Clipped(1e-9).size(turn, 0, 1, generator()).item() == pytest.approx(1e-9)


def test_polar_is_the_nearest_orthogonal_matrix():
    noisy = random_orthogonal(16, seed=0) + 1e-3 * torch.randn(16, 16, dtype=torch.float64)
    left, _, right = torch.linalg.svd(noisy)
    torch.testing.assert_close(polar(noisy), left @ right, rtol=0, atol=1e-10)


def test_two_dimensions_have_a_closed_form():
    rows = torch.randn(40, 2, generator=generator(), dtype=torch.float64) * torch.tensor([3.0, 1])
    theta = best_angle(rows[:, 0], rows[:, 1])
    best = torch.tensor(
        [[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]]
    ).double()
    turned = fourth(rows)(best)[0]
    angles = torch.linspace(0, math.pi / 2, 5001, dtype=torch.float64)
    x = rows[:, :1] * angles.cos() + rows[:, 1:] * angles.sin()
    y = rows[:, 1:] * angles.cos() - rows[:, :1] * angles.sin()
    assert turned == pytest.approx((x**4 + y**4).sum(0).min().item(), rel=1e-6)
    found = learn(rows, torch.eye(2, dtype=torch.float64))
    assert fourth(rows)(found)[0] == pytest.approx(turned, rel=1e-5)


@pytest.mark.parametrize("d", [4, 8])
def test_reaches_what_jacobi_sweeps_reach(d):
    rows = torch.randn(40 * d, d, generator=generator(), dtype=torch.float64) ** 3
    swept = rows
    for _ in range(20):
        before = swept.pow(4).sum()
        swept = sweep(swept)
        assert swept.pow(4).sum() <= before * (1 + 1e-12)
    best = min(fourth(rows)(learn(rows, random_orthogonal(d, seed=i)))[0] for i in range(3))
    assert best <= swept.pow(4).sum().item() * 1.02


@pytest.mark.parametrize(("d", "m"), [(8, 500), (16, 2000), (64, 6000)])
def test_finds_a_planted_rotation(d, m):
    """Rows of signs turned by Q: the optimum has kurtosis 1 and undoes Q, up to signs and order."""
    signs = (1 - 2 * torch.randint(0, 2, (m, d), generator=generator())).float()
    planted = random_orthogonal(d, seed=5).float()
    rows = signs @ planted.T
    found = learn(rows, random_orthogonal(d, seed=6).float())
    assert fourth(rows)(found)[0] / (m * d) == pytest.approx(1, abs=1e-4)
    assert (planted.T @ found).abs().amax(1).min() > 0.999999
    assert orthogonality_error(found) < 1e-5


def test_planted_outlier_channel_is_spread_out():
    rows = torch.randn(2000, 64, generator=generator())
    rows[:, 3] *= 20
    starts = {"identity": torch.eye(64), "haar": random_orthogonal(64, seed=0).float()}
    peaks = {name: (rows @ start).abs().max().item() for name, start in starts.items()}
    peaks["learned"] = (rows @ learn(rows, starts["haar"])).abs().max().item()
    assert peaks["identity"] > 2.5 * peaks["haar"] > 3.5 * peaks["learned"]


def test_small_full_batch_steps_never_rise():
    rows = torch.randn(300, 16, generator=generator()) ** 3
    values = []
    descend(
        fourth(rows),
        random_orthogonal(16, seed=0).float(),
        steps=60,
        rule=Angle(theta=0.02, momentum=0.0),
        generator=generator(),
        on_step=lambda step, value: values.append(value),
    )
    assert all(b < a for a, b in pairwise(values))


def test_orthogonal_between_and_after():
    rows, errors = torch.randn(300, 32, generator=generator()), []

    def gradient(rotation):
        errors.append(orthogonality_error(rotation))
        return fourth(rows)(rotation)

    start = random_orthogonal(32, seed=0).float()
    found = descend(gradient, start, steps=250, rule=Angle(), generator=generator())
    assert max(errors) < 1e-5
    assert orthogonality_error(found) < 1e-6


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (Angle, {"theta": 0.0}),
        (Angle, {"theta": math.nan}),
        (Angle, {"momentum": 1.0}),
        (Clipped, {"lr": 0.0}),
        (Clipped, {"momentum": -0.1}),
    ],
)
def test_bad_rules(rule, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rule(**options)
