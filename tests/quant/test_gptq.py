"""GPTQ on one matrix: slow oracles, identities of the theory, and bad input."""

import pytest
import torch

from featherweight.quant.gptq import Gptq, gptq_matrix, inverse_factor, ldl_diagonal
from featherweight.quant.grid import Grid, encode, fit
from featherweight.quant.rtn import round_to_nearest
from tests.oracles.gptq import least_squares_obq


def problem(rows=24, columns=64, seed=0, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / tokens


def loss(weight, hessian, quantized):
    difference = (quantized.dequantize() - weight).double()
    return torch.trace(difference @ hessian.double() @ difference.T).item()


def damped(hessian, damping=0.01):
    ridge = damping * hessian.diagonal().mean()
    return hessian.double() + ridge * torch.eye(len(hessian), dtype=torch.float64)


def on_grid(scale, zero, grid):
    def point(_, column):
        codes = encode(column.float(), scale, zero, grid)
        return ((codes - zero) * scale).double()

    return point


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_equals_solving_anew_after_every_column(bits, symmetric):
    weight, hessian = problem()
    grid = Grid(bits, None, symmetric, False)
    expected = least_squares_obq(weight, hessian, on_grid(*fit(weight, grid), grid), 0.01)
    found = gptq_matrix(weight, hessian, grid).quantized.dequantize()
    different = (found - expected).abs() > 1e-4
    assert different.float().mean() < 0.01


def test_groups_are_fitted_on_weights_corrected_by_all_columns_before():
    weight, hessian = problem()
    grid, state = Grid(3, 16, False, False), {}

    def point(column, current):
        return state["grid"](column, current)

    def oracle():
        # least squares with scales fitted when the sweep reaches a group
        current, original, full = weight.double().clone(), weight.double(), damped(hessian)
        for c in range(64):
            if c % 16 == 0:
                state["grid"] = on_grid(*fit(current[:, c : c + 16].float(), grid), grid)
            current[:, c] = point(c, current[:, c])
            if c < 63:
                shift = (current[:, : c + 1] - original[:, : c + 1]) @ full[: c + 1, c + 1 :]
                solved = shift @ torch.linalg.inv(full[c + 1 :, c + 1 :])
                current[:, c + 1 :] = original[:, c + 1 :] - solved
        return current

    expected = oracle()
    for block in (5, 32, 64):
        found = gptq_matrix(weight, hessian, grid, Gptq(block=block)).quantized.dequantize()
        assert ((found - expected).abs() > 1e-3).float().mean() < 0.02


@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": True}])
def test_block_size_does_not_change_the_result(group_size, options):
    weight, hessian = problem(seed=1)
    grid = Grid(4, group_size, False, False)
    whole = gptq_matrix(weight, hessian, grid, Gptq(block=64, **options)).quantized
    for block in (1, 7, 32):
        found = gptq_matrix(weight, hessian, grid, Gptq(block=block, **options)).quantized
        assert (found.codes != whole.codes).float().mean() < 0.005


@pytest.mark.parametrize("options", [{}, {"static_groups": True}, {"act_order": True}])
@pytest.mark.parametrize("clip", [True, False])
def test_equals_rounding_to_nearest_where_inputs_are_independent(clip, options):
    weight, grid = torch.randn(12, 64), Grid(4, 16, False, clip)
    expected = round_to_nearest(weight, grid)
    for hessian in (3 * torch.eye(64), torch.diag(torch.rand(64) + 0.1)):
        found = gptq_matrix(weight, hessian, grid, Gptq(**options)).quantized
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.scale, expected.scale)
        assert torch.equal(found.zero, expected.zero)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_loses_less_than_rounding_to_nearest(bits, group_size, symmetric):
    grid, ratios = Grid(bits, group_size, symmetric, False), []
    for seed in range(4):
        weight, hessian = problem(seed=seed)
        found = loss(weight, hessian, gptq_matrix(weight, hessian, grid).quantized)
        ratios.append(found / loss(weight, hessian, round_to_nearest(weight, grid)))
    assert sum(ratios) / 4 < 0.8


def test_visiting_large_inputs_first_helps_on_average_and_keeps_the_layout():
    gains = []
    for seed in range(6):
        weight, hessian = problem(seed=seed)
        scale = torch.linspace(0.1, 3, 64)[torch.randperm(64)]
        hessian = hessian * scale * scale[:, None]
        grid = Grid(3, 16, False, False)
        plain = gptq_matrix(weight, hessian, grid, Gptq(static_groups=True)).quantized
        ordered = gptq_matrix(weight, hessian, grid, Gptq(act_order=True)).quantized
        assert torch.equal(plain.scale, ordered.scale)
        gains.append(loss(weight, hessian, ordered) / loss(weight, hessian, plain))
    assert sum(gains) / 6 < 0.95


def test_permuting_columns_permutes_the_result():
    weight, hessian = problem(seed=3)
    order = torch.randperm(64)
    grid, options = Grid(4, None, False, False), Gptq(act_order=True)
    found = gptq_matrix(weight, hessian, grid, options).quantized.codes[:, order]
    moved = gptq_matrix(weight[:, order], hessian[order][:, order], grid, options).quantized.codes
    assert (found != moved).float().mean() < 0.005


def test_sixteen_bits_leave_the_weights():
    weight, hessian = problem()
    found = gptq_matrix(weight, hessian, Grid(16, None, False, False)).quantized.dequantize()
    torch.testing.assert_close(found, weight, rtol=0, atol=2e-3)


def test_rows_are_independent():
    weight, hessian = problem()
    grid = Grid(4, 16, False, True)
    whole = gptq_matrix(weight, hessian, grid).quantized.codes
    parts = [gptq_matrix(part, hessian, grid).quantized.codes for part in weight.split(8)]
    assert (whole != torch.cat(parts)).float().mean() < 0.005


@pytest.mark.parametrize("options", [{}, {"act_order": True}])
def test_pruned_weights_stay_zero(options):
    weight, hessian = problem()
    mask = torch.rand(weight.shape) < 0.5
    weight[mask] = 0.0
    grid = Grid(4, 16, False, True)
    kept = gptq_matrix(weight, hessian, grid, Gptq(keep_zeros=True, **options)).quantized
    assert not kept.dequantize()[mask].any()
    free = gptq_matrix(weight, hessian, grid, Gptq(**options)).quantized
    assert free.dequantize()[mask].any()
    nearest = loss(weight, hessian, round_to_nearest(weight, grid))
    assert loss(weight, hessian, kept) < nearest


# Identities of H = V D V^T


def test_diagonal_of_the_factorisation():
    hessian = damped(problem()[1])
    diagonal = ldl_diagonal(hessian)
    factor, damping = inverse_factor(problem()[1].double(), 0.01)
    torch.testing.assert_close(1 / factor.double().diagonal().pow(2), diagonal, rtol=1e-3, atol=0)
    assert damping == 0.01
    torch.testing.assert_close(diagonal.log().sum(), torch.logdet(hessian))
    unit = factor.double() / factor.double().diagonal()[:, None]
    rebuilt = torch.linalg.inv(unit) @ torch.diag(diagonal) @ torch.linalg.inv(unit).T
    torch.testing.assert_close(rebuilt, hessian, rtol=1e-3, atol=1e-3 * hessian.max().item())


def test_bounds_of_the_trace():
    for seed in range(5):
        hessian = damped(problem(seed=seed)[1])
        trace = ldl_diagonal(hessian).sum().item()
        low = 64 * torch.exp(torch.logdet(hessian) / 64).item()
        assert low <= trace <= hessian.trace().item()
    diagonal = torch.diag(torch.rand(9, dtype=torch.float64) + 1)
    torch.testing.assert_close(ldl_diagonal(diagonal), diagonal.diagonal())


def test_loss_is_the_weighted_sum_of_rounding_errors():
    """In the damped Hessian there are no cross terms: sum_c D_c |error of column c|^2."""
    weight, hessian = problem()
    grid = Grid(4, None, False, False)
    found = gptq_matrix(weight, hessian, grid).quantized
    full = damped(hessian)
    difference = found.dequantize().double() - weight.double()
    lower = torch.linalg.cholesky(full.flip(0, 1))
    unit = (lower / lower.diagonal()).flip(0, 1)  # V, unit upper triangular
    rounding = difference @ unit  # errors before correction, column by column
    assert rounding.abs().max() <= (found.scale.max() / 2) * 1.3  # within half a step, bar clamping
    expected = (rounding.pow(2).sum(0) * ldl_diagonal(full)).sum()
    actual = torch.trace(difference @ full @ difference.T)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_expected_loss_is_the_trace_of_d():
    """E loss = tr D / 12 sum_r s_r^2 where nothing clamps; round to nearest has tr H."""
    ratios, predicted = [], []
    for seed in range(4):
        weight, hessian = problem(rows=128, seed=seed, tokens=2000)
        grid, full = Grid(6, None, False, False), damped(hessian)
        found = gptq_matrix(weight, hessian, grid).quantized
        expected = ldl_diagonal(full).sum() / 12 * found.scale.pow(2).sum().double()
        assert loss(weight, full, found) == pytest.approx(expected.item(), rel=0.1)
        nearest = round_to_nearest(weight, grid)
        ratios.append(loss(weight, full, found) / loss(weight, full, nearest))
        predicted.append((ldl_diagonal(full).sum() / full.trace()).item())
    assert sum(ratios) == pytest.approx(sum(predicted), rel=0.1)


# What goes wrong


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hessians_that_are_not_finite_are_refused(value):
    weight, hessian = problem()
    hessian[3, 4] = value
    with pytest.raises(ValueError, match="hessian holds values that are not finite"):
        gptq_matrix(weight, hessian, Grid())


def test_hessians_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"hessian must be 64 x 64, got \(8, 8\)"):
        gptq_matrix(torch.randn(2, 64), torch.eye(8), Grid())


def test_damping_rises_until_there_is_a_factor():
    weight, hessian = problem()
    shift = torch.linalg.eigvalsh(hessian)[0].item() + 0.03 * hessian.diagonal().mean().item()
    indefinite = hessian - shift * torch.eye(64)
    outcome = gptq_matrix(weight, indefinite, Grid(clip=False))
    assert outcome.damping in (0.04, 0.08)


def test_without_a_factor_the_matrix_is_rounded_and_the_outcome_says_so():
    weight = torch.randn(4, 8)
    hopeless = torch.ones(8, 8) * 100 + torch.eye(8) * -99.0  # smallest eigenvalue -99
    hopeless.diagonal().fill_(1.0)
    hopeless[0, 1] = hopeless[1, 0] = -100
    outcome = gptq_matrix(weight, hopeless, Grid(clip=False))
    assert outcome.damping is None
    assert torch.equal(outcome.quantized.codes, round_to_nearest(weight, Grid(clip=False)).codes)


def test_inputs_that_never_fire():
    weight, hessian = problem()
    hessian[:, 5] = hessian[5] = 0.0
    found = gptq_matrix(weight, hessian, Grid(4, None, False, False)).quantized.dequantize()
    assert not found[:, 5].any()
    assert torch.isfinite(found).all()


def test_the_arguments_stay_as_they_are():
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    gptq_matrix(weight, hessian, Grid(4, 16), Gptq(act_order=True, keep_zeros=True))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must lie"),
        ({"damping": 2.0}, "damping"),
        ({"block": 0}, "block"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Gptq(**options)
