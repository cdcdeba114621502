"""QSGD's rounding, AdaQuantFL's rule, and the bits of both."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.federated.codecs import (
    QSGD,
    AdaQuantFL,
    DAdaQuant,
    best_levels,
    client_levels,
    formula_bits,
    full_bits,
    loss_rule,
    variance_factor,
)
from featherweight.federated.codecs.quantise import norms, quantise, variance
from featherweight.federated.indices import generator
from featherweight.federated.wire import HEADER_BYTES, Refused
from tests.federated.test_codecs_all import encoded
from tests.federated.test_codecs_sparse import assert_unbiased, decoded, draws
from tests.oracles import federated_codecs as oracle


class Fixed:
    """A generator that draws one number for ever."""

    def __init__(self, number):
        self.number = number

    def random(self, count, kind):
        return np.full(count, self.number, kind)


def l2(vector):
    return norms(vector, 0, "l2")


class TestRounding:
    @pytest.mark.parametrize("levels", [1, 3, 255, 65535])
    def test_both_neighbours_and_their_chances(self, levels):
        """A number below the chance rounds up, any other down: the definition, entry by entry."""
        vector = np.random.default_rng(levels).standard_normal(50).astype(np.float32)
        scale = l2(vector)
        expected = [oracle.quantised(float(x), float(scale[0]), levels) for x in vector]
        for number in (0.0, 0.25, 0.5, 0.75, 0.999):
            signed = quantise(vector, scale, 0, levels, Fixed(number))
            for found, (low, high, chance) in zip(signed.tolist(), expected, strict=True):
                if abs(number - chance) > 0.02:
                    value = high if number < chance else low
                    assert found * float(scale[0]) / levels == pytest.approx(value, rel=1e-5)

    @pytest.mark.parametrize("levels", [1, 2, 3, 7])
    def test_the_mean_of_both_neighbours_is_the_value(self, levels):
        vector = np.random.default_rng(1).standard_normal(50)
        norm = float(np.linalg.norm(vector))
        for value in vector.tolist():
            low, high, chance = oracle.quantised(value, norm, levels)
            assert low + chance * (high - low) == pytest.approx(value)

    @pytest.mark.parametrize(
        ("options", "length"),
        [
            ({"levels": 1}, 4096),
            ({"levels": 3}, 4096),
            ({"levels": 15}, 2000),
            ({"levels": 255}, 2000),
        ],
    )
    def test_unbiased_with_the_exact_variance(self, options, length):
        vector = torch.randn(length)
        found = draws(QSGD(**options), vector, 60)
        assert_unbiased(found, vector)
        exact = variance(vector.numpy(), options["levels"], float(l2(vector.numpy())[0]))
        error = (found - vector).square().sum(1)
        tolerance = 5 * float(error.std()) / math.sqrt(len(error))
        assert float(error.mean()) == pytest.approx(exact, abs=tolerance)

    @pytest.mark.parametrize("bucket", [64, 100])
    @pytest.mark.parametrize("norm", ["l2", "max"])
    def test_buckets(self, bucket, norm):
        vector = torch.randn(2000) * torch.linspace(0.01, 10, 2000)
        codec = QSGD(3, bucket=bucket, norm=norm)
        found = draws(codec, vector, 60)
        assert_unbiased(found, vector)
        size = -(-2000 // bucket)
        scale = norms(vector.numpy(), bucket, norm)
        assert len(scale) == size
        exact = sum(
            variance(vector.numpy()[i * bucket : (i + 1) * bucket], 3, float(scale[i]))
            for i in range(size)
        )
        assert float((found - vector).square().sum(1).mean()) == pytest.approx(exact, rel=0.05)
        whole = variance(vector.numpy(), 3, float(l2(vector.numpy())[0]))
        assert exact < whole
        assert exact <= codec.excess(2000) * float(vector.square().sum())

    @pytest.mark.parametrize("levels", [1, 2, 3, 7, 15, 255])
    @pytest.mark.parametrize("length", [16, 256, 4096])
    def test_bounds(self, levels, length):
        vector = np.random.default_rng(levels).standard_normal(length).astype(np.float32)
        norm = float(np.linalg.norm(vector))
        factor = variance(vector, levels, norm) / norm**2
        assert factor <= variance_factor(length, levels)
        assert variance_factor(length, levels) <= min(
            length / levels**2, math.sqrt(length) / levels
        )
        signed = quantise(vector, l2(vector), 0, levels, generator(levels))
        error = np.linalg.norm(signed * (norm / levels) - vector)
        assert error <= math.sqrt(length) * norm / levels
        expected = (np.abs(vector) * levels / norm).clip(max=1).sum()
        assert expected <= levels * (levels + math.sqrt(length))

    @pytest.mark.parametrize(
        ("length", "levels", "exact", "tolerance"),
        [
            (4096, 1, 50.2, 0.6),
            (4096, 3, 16.1, 0.3),
            (4096, 15, 2.41, 0.06),
            (4096, 255, 0.0105, 3e-4),
        ],
    )
    def test_known_variances_of_gaussians(self, length, levels, exact, tolerance):
        vector = np.random.default_rng(0).standard_normal(length).astype(np.float32)
        norm = float(np.linalg.norm(vector))
        assert variance(vector, levels, norm) / norm**2 == pytest.approx(exact, abs=tolerance)

    def test_one_entry_alone_is_exact(self):
        for value in (3.7, -1e-30, 2.0**63):
            vector = torch.zeros(9)
            vector[4] = value
            assert torch.allclose(decoded(QSGD(1), vector), vector, rtol=1e-6, atol=0)

    def test_many_levels_are_nearly_exact(self):
        vector = torch.randn(1000)
        error = (decoded(QSGD(65535), vector) - vector).norm() / vector.norm()
        assert error < math.sqrt(1000) / 65535

    @settings(deadline=None, max_examples=30)
    @given(st.integers(-20, 20), st.integers(0, 1000))
    def test_scale_and_sign_pass_through(self, power, seed):
        vector = torch.from_numpy(np.random.default_rng(seed).standard_normal(50)).float()
        codec = QSGD(7, seed=seed)
        found = decoded(codec, vector)
        assert torch.equal(decoded(codec, vector * 2.0**power), found * 2.0**power)
        assert torch.equal(decoded(codec, -vector), -found)

    def test_norms_are_rounded_up(self):
        """So that no entry exceeds its norm, and no level s."""
        draw = np.random.default_rng(0)
        for _ in range(300):
            vector = draw.standard_normal(3).astype(np.float32) * 10.0 ** draw.integers(-30, 15)
            exact = math.sqrt(sum(float(x) ** 2 for x in vector))
            assert float(l2(vector)[0]) >= exact * (1 - 1e-15)
            assert np.abs(quantise(vector, l2(vector), 0, 3, Fixed(0.999999))).max() <= 3

    @pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38])
    def test_tiny_vectors(self, size):
        vector = torch.tensor([size, 0.0, -size])
        found = decoded(QSGD(255), vector)
        assert torch.isfinite(found).all()
        assert found[1] == 0

    def test_norms_beyond_the_range_are_not_sent(self):
        with pytest.raises(ValueError, match="a norm"):
            QSGD(3).encode(torch.full((5,), 2.0**64), round=0, client=0)

    def test_independent_noise_averages_out(self):
        vector = torch.randn(2000)
        codec = QSGD(3)
        found = torch.stack([codec.decode_mean(encoded(codec, [vector] * 8, r)) for r in range(30)])
        one = variance(vector.numpy(), 3, float(l2(vector.numpy())[0]))
        error = float((found - vector).square().sum(1).mean())
        assert error == pytest.approx(one / 8, rel=0.1)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"levels": 0}, "levels must be an integer from 1"),
            ({"levels": 65536}, "levels must be"),
            ({"levels": 2.5}, "levels must be"),
            ({"levels": True}, "levels must be"),
            ({"levels": 3, "bucket": -1}, "bucket"),
            ({"levels": 3, "norm": "l1"}, "unknown norm 'l1'"),
        ],
    )
    def test_bad_options(self, options, reason):
        with pytest.raises(ValueError, match=reason):
            QSGD(**options)


class TestBits:
    @pytest.mark.parametrize(
        ("levels", "bits"),
        [(1, 2), (2, 3), (3, 3), (4, 4), (7, 4), (8, 5), (15, 5), (255, 9), (65535, 17)],
    )
    def test_the_papers_formula_is_a_staircase(self, levels, bits):
        assert formula_bits(1000, levels) == bits * 1000 + 32
        assert formula_bits(1000, levels) <= 1000 * math.log2(4 * levels) + 32 + 1e-6

    def test_full_bits_are_free(self):
        assert [full_bits(s) for s in (1, 2, 3, 4, 7, 8, 200)] == [1, 3, 3, 7, 7, 15, 255]
        assert all(formula_bits(9, full_bits(s)) == formula_bits(9, s) for s in range(1, 300))

    def test_few_levels_and_one_norm_cost_far_less_than_the_formula(self):
        message = QSGD(2).encode(torch.randn(100_000), round=0, client=0)
        assert 8 * len(message) < formula_bits(100_000, 2) / 30

    @pytest.mark.parametrize("levels", [1, 3, 7, 255])
    def test_never_more_than_fixed(self, levels):
        for spread in (0.0, 1.0, 30.0):
            vector = torch.randn(1000).sign() * (1 + spread * torch.rand(1000))
            codec = QSGD(levels, bucket=4, norm="max")
            message = codec.encode(vector, round=0, client=0)
            fixed = math.ceil(1000 * math.ceil(math.log2(2 * levels + 1)) / 8)
            assert len(message) <= HEADER_BYTES + 4 * 250 + fixed

    def test_a_zero_update_is_its_norm(self):
        assert len(QSGD(3).encode(torch.zeros(1000), round=0, client=0)) == HEADER_BYTES + 4


class TestRule:
    def test_it_is_the_square_root(self):
        assert loss_rule(2, 8.0, 8.0) == 2
        assert loss_rule(2, 8.0, 2.0) == 4
        assert loss_rule(2, 8.0, 2.0, rate=0.5) == 2
        assert math.isfinite(loss_rule(2, 8.0, 0.0))

    def test_its_origin(self):
        """s* = sqrt(2 ln 2 A2 B / A1) minimises A1 log2(4 s) / B + A2 / s^2."""
        bits, per_bit, per_square = 5e5, 700.0, 3.0
        grid = np.linspace(1, 200, 200_000)
        bound = per_bit * np.log2(4 * grid) / bits + per_square / grid**2
        best = best_levels(bits, per_bit, per_square)
        assert best == pytest.approx(grid[bound.argmin()], abs=2e-3)

    def heard(self, losses, **options):
        codec = AdaQuantFL(**({"levels": 2, "full_bits": False} | options))
        found = []
        for round, loss in enumerate(losses):
            codec.observe(loss, round)
            found.append(codec.levels)
        return found

    def test_levels_follow_the_loss(self):
        assert self.heard([4.0, 4.0, 1.0, 0.25, 4.0]) == [2, 2, 4, 8, 2]
        assert self.heard([4.0, 3.9]) == [2, 3]  # rounded up

    def test_full_bits_by_default(self):
        assert AdaQuantFL().levels == 3
        assert self.heard([4.0, 1.0, 0.2], full_bits=True) == [3, 7, 15]

    def test_monotone(self):
        assert self.heard([4.0, 1.0, 4.0], monotone=True) == [2, 4, 4]

    def test_clamped(self):
        assert self.heard([1.0, 0.0, 1e-30]) == [2, 255, 255]
        assert self.heard([1.0, 1e12], levels=2) == [2, 1]
        assert self.heard([1.0, 1e-8], most=1000) == [2, 1000]

    def test_smoothing(self):
        codec = AdaQuantFL(2, full_bits=False, smoothing=0.5, most=10**4)
        codec.observe(8.0, 0)
        codec.observe(2.0, 1)
        assert codec.levels == math.ceil(2 * math.sqrt(8 / 5))

    def test_every_rounds(self):
        losses = [4.0, 1.0, 0.25, 0.0625, 0.0625]
        assert self.heard(losses, every_rounds=2) == [2, 2, 8, 8, 16]

    def test_every_bits(self):
        codec = AdaQuantFL(2, full_bits=False, every_bits=1000)
        codec.observe(4.0, 0)
        codec.observe(1.0, 1)
        assert codec.levels == 2
        messages = encoded(codec, torch.randn(2, 400).sign(), 1)
        while codec._numbers.get("bits", 0) < 1000:
            codec.decode_mean(messages)
        codec.observe(1.0, 2)
        assert codec.levels == 4

    def test_learning_rate(self):
        codec = AdaQuantFL(8, full_bits=False)
        codec.observe(4.0, 0, learning_rate=0.1)
        codec.observe(4.0, 1, learning_rate=0.05)
        assert codec.levels == 4

    @pytest.mark.parametrize("loss", [float("nan"), float("inf")])
    def test_a_loss_that_is_none_changes_nothing(self, loss):
        codec = AdaQuantFL(2, full_bits=False)
        codec.observe(4.0, 0)
        codec.observe(1.0, 1)
        with pytest.warns(UserWarning, match="levels stay 4"):
            codec.observe(loss, 2)
        assert codec.levels == 4

    def test_servers_take_any_allowed_number_of_levels(self):
        vector = torch.randn(50)
        for levels in (1, 30, 255):
            message = QSGD(levels).encode(vector, round=0, client=0)
            expected = QSGD(levels).decode_mean([message])
            assert torch.equal(AdaQuantFL().decode_mean([message]), expected)
        with pytest.raises(Refused, match="levels are 256, not from 1 to 255"):
            AdaQuantFL().read(QSGD(256).encode(vector, round=0, client=0))

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"levels": 0}, "levels"),
            ({"most": 0}, "most"),
            ({"smoothing": 1.0}, "smoothing"),
            ({"every_rounds": 0}, "every_rounds"),
            ({"every_bits": -1}, "every_bits"),
        ],
    )
    def test_bad_options(self, options, reason):
        with pytest.raises(ValueError, match=reason):
            AdaQuantFL(**options)


class TestDAdaQuant:
    def test_levels_double_on_a_plateau(self):
        codec = DAdaQuant(1, patience=3, smoothing=0.0)
        found = []
        for round, loss in enumerate([5.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 1.0, 1.0]):
            codec.observe(loss, round)
            found.append(codec.levels)
        assert found == [1, 1, 1, 1, 2, 2, 2, 4, 4, 4]

    def test_capped(self):
        codec = DAdaQuant(1, patience=1, most=5)
        for round in range(20):
            codec.observe(1.0, round)
        assert codec.levels == 5

    def test_heavier_clients_get_more_levels(self):
        """At the expected variance sum w^2 / q^2 of equal levels, up to rounding."""
        weights = [0.5, 0.3, 0.15, 0.05]
        found = client_levels(100, weights)
        assert found == sorted(found, reverse=True)
        spent = sum(w**2 / q**2 for w, q in zip(weights, found, strict=True))
        assert spent == pytest.approx(sum(w**2 for w in weights) / 100**2, rel=0.02)
        assert client_levels(7, [0.25] * 4) == [7] * 4
        assert client_levels(1, [0.999, 0.001])[1] == 1

    def test_bad_patience(self):
        with pytest.raises(ValueError, match="patience"):
            DAdaQuant(patience=0)
