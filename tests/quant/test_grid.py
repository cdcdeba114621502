"""The uniform grid and rounding to it, against brute force and closed forms."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from featherweight.quant.grid import Grid, fit, fit_groups
from featherweight.quant.rtn import round_to_nearest
from tests.oracles.gptq import brute_force_nearest


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_rounding_takes_the_nearest_grid_point(bits, symmetric, clip):
    weight = torch.randn(5, 24) + 0.3
    grid = Grid(bits, None, symmetric, clip)
    found = round_to_nearest(weight, grid)
    expected = brute_force_nearest(weight, found.scale[:, 0], found.zero[:, 0], grid.top)
    difference = (found.codes.long() - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01  # ties alone
    assert found.codes.dtype == torch.uint8


def test_symmetric_scale_is_the_largest_value_over_half_the_codes():
    scale, zero = fit(torch.tensor([[-3.0, 1.5], [0.0, 7.5]]), Grid(4, clip=False))
    assert scale.tolist() == pytest.approx([3 / 7.5, 1.0])
    assert zero.tolist() == [8, 8]


def test_asymmetric_range_holds_zero_and_both_ends():
    scale, zero = fit(
        torch.tensor([[1.0, 16.0], [-2.0, 13.0]]), Grid(4, symmetric=False, clip=False)
    )
    assert scale.tolist() == pytest.approx([16 / 15, 1.0])
    assert zero.tolist() == [0, 2]


def test_groups_are_consecutive_columns():
    weight = torch.cat([torch.full((2, 32), 1.0), torch.full((2, 32), 100.0)], dim=1)
    scale, zero = fit_groups(weight, Grid(4, 32, clip=False))
    assert scale.shape == zero.shape == (2, 2)
    assert (scale[:, 1] / scale[:, 0]).tolist() == pytest.approx([100, 100])
    found = round_to_nearest(weight, Grid(4, 32, clip=False))
    one = round_to_nearest(weight[:, :32], Grid(4, None, clip=False))
    assert torch.equal(found.codes[:, :32], one.codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_lowers_the_error_it_searches(symmetric):
    weight = torch.randn(16, 128)
    weight[:, 0] = 8.0

    def error(clip):
        rounded = round_to_nearest(weight, Grid(3, None, symmetric, clip)).dequantize()
        return (rounded - weight).abs().pow(2.4).sum(1)

    assert (error(True) <= error(False)).all()
    assert error(True).sum() < 0.9 * error(False).sum()


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_stays_zero(symmetric, clip):
    weight = torch.randn(8, 64)
    weight[torch.rand(8, 64) < 0.5] = 0.0
    weight[3] = 0.0
    rounded = round_to_nearest(weight, Grid(3, 32, symmetric, clip)).dequantize()
    assert not rounded[weight == 0].any()


def test_many_bits_leave_the_weights():
    weight = torch.randn(4, 32)
    for symmetric in (True, False):
        rounded = round_to_nearest(weight, Grid(16, None, symmetric, False)).dequantize()
        torch.testing.assert_close(rounded, weight, rtol=0, atol=2e-4)


def test_rounding_twice_changes_nothing():
    grid = Grid(4, 32, clip=False)
    once = round_to_nearest(torch.randn(8, 64), grid)
    again = brute_force_nearest(once.dequantize()[:, :32], once.scale[:, 0], once.zero[:, 0], 15)
    assert torch.equal(again, once.codes[:, :32].long())


def test_expected_error_of_uniform_rounding():
    """E tr(dW H dW^T) = tr H / 12 sum_r s_r^2 for errors that are uniform and independent."""
    weight, inputs = torch.randn(64, 256), torch.randn(1000, 256)
    hessian = inputs.T @ inputs / 1000
    found = round_to_nearest(weight, Grid(6, None, False, False))
    difference = found.dequantize() - weight
    expected = hessian.trace() / 12 * found.scale.pow(2).sum()
    assert torch.trace(difference @ hessian @ difference.T).item() == pytest.approx(
        expected.item(), rel=0.05
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_rounded_before_they_are_used(dtype):
    found = round_to_nearest(torch.randn(4, 32), Grid(4, scale_dtype=dtype))
    assert torch.equal(found.scale, found.scale.to(dtype).float())


def test_bits_per_weight_count_scales_and_zero_points():
    assert Grid(4, 64).bits_per_weight(128) == 4.25
    assert Grid(4, 64, symmetric=False).bits_per_weight(128) == 4 + 20 / 64
    assert Grid(3, None).bits_per_weight(160) == 3.1


@settings(max_examples=30, deadline=None)
@given(st.integers(-5, 20).filter(lambda bits: bits not in (*range(2, 9), 16)))
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"bits must lie in 2..8, got"):
        Grid(bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 0}, "group_size must be positive"),
        ({"scale_dtype": torch.int8}, "scale_dtype must be floating"),
    ],
)
def test_other_bad_grids(options, message):
    with pytest.raises(ValueError, match=message):
        Grid(**options)


def test_groups_that_do_not_divide_a_row_are_refused_and_others_named():
    with pytest.raises(ValueError, match=r"128 does not divide 576 columns.* 64, 32, 16 do"):
        round_to_nearest(torch.randn(2, 576), Grid(group_size=128))


def test_groups_are_halved_down_to_32():
    assert Grid(group_size=128).fitting(576).group_size == 64
    assert Grid(group_size=128).fitting(1536) == Grid(group_size=128)
    assert Grid(group_size=256).fitting(96).group_size == 32
    assert Grid().fitting(7) == Grid()
    assert Grid(group_size=16).fitting(48).group_size == 16
    with pytest.raises(
        ValueError, match="group_size 128 does not divide 48 columns; of the usual sizes 16"
    ):
        Grid(group_size=128).fitting(48)
    with pytest.raises(ValueError, match="group_size 48 does not divide 64"):
        Grid(group_size=48).fitting(64)
