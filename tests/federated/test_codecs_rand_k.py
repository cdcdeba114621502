"""Rand-k, Spatial and Temporal: closed forms, exact enumerations, unbiasedness."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from featherweight.federated.codecs import (
    RandK,
    RandKSpatial,
    RandKSpatioTemporal,
    RandKTemporal,
    correlation,
    spatial,
)
from featherweight.federated.codecs.rand_k_spatial import JointDecoder, Part, estimated
from tests.federated.test_codecs_all import encoded
from tests.oracles import federated_codecs as oracle

CONSTANTS = [  # n, d, k, T, beta, c1, c2, break-even, ratio at rho = n - 1, ratio at rho = 0
    (2, 4, 1, "max", 4.57142857, 0.24489796, 0.67346939, 0.364, 0.85714, 1.08163),
    (2, 4, 1, "avg", 4.57142857, 0.24489796, 0.67346939, 0.364, 0.85714, 1.08163),
    (10, 40, 6, "max", 12.45135263, 1.71460374, 0.54776864, 3.130, 0.43259, 1.30258),
    (10, 40, 6, "avg", 10.39317361, 0.78738950, 0.41217651, 1.910, 0.48432, 1.13895),
    (10, 1024, 102, "max", 15.38922648, 1.94163079, 0.62129111, 3.125, 0.59621, 1.21480),
    (10, 1024, 102, "avg", 13.60050230, 0.91287214, 0.47031711, 1.941, 0.63271, 1.10099),
    (50, 1024, 20, "max", 79.74252024, 10.52663765, 0.63232893, 16.65, 0.59248, 1.20969),
    (50, 1024, 20, "avg", 69.10060726, 4.46992548, 0.46277273, 9.66, 0.63733, 1.08904),
    (100, 1024, 10, "max", 159.94887236, 21.24579226, 0.63330222, 33.55, 0.59121, 1.20952),
    (100, 1024, 10, "avg", 138.23005198, 8.91260022, 0.46165096, 19.31, 0.63717, 1.08790),
]


def line(transform, clients, ratio=0.0):
    return spatial.transform_values(spatial.slope(transform, clients, ratio), clients)


def rand_k_error(probability, given):
    return (1 / probability - 1) * given.own


class TestClosedForms:
    @pytest.mark.parametrize("row", CONSTANTS, ids=lambda row: "-".join(map(str, row[:4])))
    def test_constants(self, row):
        n, d, k, transform, beta, c1, c2, even, alike, unlike = row
        values, p = line(transform, n), k / d
        assert spatial.scale(values, p) == pytest.approx(beta, rel=1e-9)
        assert spatial.coefficients(values, p) == pytest.approx((c1, c2), rel=3e-8)
        assert c1 / c2 == pytest.approx(even, rel=1e-3)
        for cross, expected in ((n - 1, alike), (0.0, unlike)):
            given = spatial.Correlation(1.0, cross)
            found = spatial.squared_error(values, p, given) / rand_k_error(p, given)
            assert found == pytest.approx(expected, abs=6e-6)

    def test_slope_of_avg_is_over_n_minus_one(self):
        """T(m) = 1 + (n / 2) (m - 1) / (n - 1), and for two clients T(m) = m."""
        assert line("avg", 10).tolist() == pytest.approx([1 + 5 * m / 9 for m in range(10)])
        assert line("avg", 2).tolist() == line("max", 2).tolist() == [1.0, 2.0]

    @pytest.mark.parametrize(("n", "p"), [(2, 0.25), (3, 0.4), (4, 0.5)])
    @pytest.mark.parametrize("transform", ["max", "avg"])
    def test_beta_is_its_definition(self, n, p, transform):
        values = line(transform, n)
        exact = oracle.spatial_beta(n, Fraction(p), lambda m: Fraction(values[m - 1]))
        assert spatial.scale(values, p) == pytest.approx(float(exact), rel=1e-12)

    @pytest.mark.parametrize("n", [1, 2, 10, 3000])
    def test_max_has_a_short_form(self, n):
        """beta = n / (1 - q^n); identical vectors are missed with probability q^n."""
        p = 0.01
        miss = (1 - p) ** n
        assert spatial.scale(line("max", n), p) == pytest.approx(n / (1 - miss), rel=1e-9)
        given = spatial.Correlation(1 / n, (n - 1) / n)  # R1 and R2 of n vectors x / n
        error = spatial.squared_error(line("max", n), p, given)
        assert error == pytest.approx(miss / (1 - miss), rel=1e-6)

    def test_constant_t_is_rand_k(self):
        for scale in (1.0, 2.0, 0.3):
            values = np.full(7, scale)
            beta = spatial.scale(values, 0.2)
            np.testing.assert_allclose(beta / values, 5.0, rtol=1e-14)
            np.testing.assert_allclose(spatial.coefficients(values, 0.2), 0.0, atol=1e-13)

    def test_the_optimal_t_beats_all_others(self):
        """T*(r) = 1 + rho (r - 1) / (n - 1), and its error is ((beta - 1) R1 - R2)."""
        n, p, draw = 6, 0.3, np.random.default_rng(0)
        for rho in (-0.9, 0.0, 0.5, 2.0, 5.0):
            given = spatial.Correlation(1.0, rho)
            best = line("opt", n, rho)
            least = spatial.squared_error(best, p, given)
            assert least == pytest.approx((spatial.scale(best, p) - 1) - rho, rel=1e-9)
            for _ in range(200):
                other = best * np.exp(0.3 * draw.standard_normal(n))
                assert spatial.squared_error(other, p, given) >= least - 1e-12
            for transform in ("max", "avg"):
                assert spatial.squared_error(line(transform, n), p, given) >= least - 1e-12

    def test_c1_is_never_negative(self):
        draw = np.random.default_rng(1)
        for _ in range(200):
            values = np.exp(draw.standard_normal(5))
            assert spatial.coefficients(values, draw.uniform(0.01, 1))[0] >= -1e-12

    def test_all_entries_sent(self):
        assert spatial.scale(line("avg", 5), 1.0) == pytest.approx(line("avg", 5)[-1])

    def test_r2_counts_ordered_pairs(self):
        vectors = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
        pairs = itertools.permutations(vectors, 2)
        expected = sum(float(a @ b) for a, b in pairs)
        found = correlation(vectors)
        assert found.cross == pytest.approx(expected)
        assert found.own == pytest.approx(float(vectors.square().sum()))
        same = correlation(torch.ones(4, 3))
        assert same.ratio == pytest.approx(3.0)
        assert correlation([torch.ones(3), -torch.ones(3)]).ratio == pytest.approx(-1.0)
        assert correlation(torch.zeros(4, 3)).ratio == 0.0

    def test_negative_correlation_keeps_t_positive(self):
        assert line("opt", 2, -1.0).min() == spatial.LEAST

    def test_own_probabilities(self):
        """Poisson-binomial scales are the definition, summed over all subsets of the others."""
        probabilities = [0.2, 0.5, 0.7]
        values = line("max", 3)
        found = spatial.scales(values, probabilities)
        for i, own in enumerate(probabilities):
            others = [p for j, p in enumerate(probabilities) if j != i]
            mean = sum(
                math.prod(p if sent else 1 - p for p, sent in zip(others, sends, strict=True))
                / values[sum(sends)]
                for sends in itertools.product((0, 1), repeat=2)
            )
            assert found[i] == pytest.approx(1 / (own * mean), rel=1e-12)
        np.testing.assert_allclose(spatial.scales(values, [0.2] * 3), spatial.scale(values, 0.2))


def outcomes(length, counts):
    """All ways in which clients can choose their entries."""
    return itertools.product(*(oracle.subsets(length, count) for count in counts))


def decode_parts(decoder, vectors, chosen, weights):
    parts = [
        Part(np.array(subset), vectors[i].numpy()[list(subset)], weights[i])
        for i, subset in enumerate(chosen)
    ]
    return decoder.estimate(parts, vectors.shape[1]).astype(np.float64)


@pytest.mark.parametrize("transform", ["max", "avg", "opt"])
@pytest.mark.parametrize(
    ("length", "counts", "weights"),
    [
        (4, (1, 1), (0.5, 0.5)),
        (4, (1, 1), (0.8, 0.2)),
        (4, (1, 3), (0.3, 0.7)),
        (3, (1, 2, 1), None),
    ],
)
def test_every_outcome_counted(transform, length, counts, weights):
    """The mean over all choices is the mean of the clients; for equal k the error is the formula's.

    For n = 2, d = 4, k = 1 these are 16 outcomes, and beta is 32 / 7.
    """
    n = len(counts)
    weights = weights or (1 / n,) * n
    vectors = torch.randn(n, length)
    weighted = vectors.double() * torch.tensor(weights)[:, None]
    given = correlation(weighted)
    ratio = given.ratio if transform == "opt" else None
    decoder = JointDecoder(transform, ratio, 0.9)
    found = np.array(
        [decode_parts(decoder, vectors, chosen, weights) for chosen in outcomes(length, counts)]
    )
    mean = weighted.sum(0).numpy()
    np.testing.assert_allclose(found.mean(0), mean, atol=2e-7)
    if len(set(counts)) == 1:
        error = np.square(found - mean).sum(1).mean()
        values = line(transform, n, given.ratio)
        expected = spatial.squared_error(values, counts[0] / length, given)
        assert error == pytest.approx(expected, rel=1e-5)


def test_the_decoder_is_the_definition():
    """Exact fractions: beta = 32 / 7, and 0 where nobody sent."""
    vectors = [[Fraction(i * 5 + j) for j in range(4)] for i in (1, 2)]
    decoder = JointDecoder("max", None, 0.9)
    for chosen in outcomes(4, (1, 1)):
        exact = oracle.spatial_decode(
            vectors, chosen, [Fraction(1, 2)] * 2, lambda m: Fraction(m), [Fraction(32, 7)] * 2
        )
        tensors = torch.tensor([[float(x) for x in row] for row in vectors])
        found = decode_parts(decoder, tensors, chosen, (0.5, 0.5))
        np.testing.assert_allclose(found, [float(x) for x in exact], rtol=1e-6)


def test_estimated_correlations_are_unbiased_over_all_outcomes():
    vectors = torch.randn(2, 4)
    own, cross = np.mean(
        [
            estimated(
                [Part(np.array(s), vectors[i].numpy()[list(s)], 0.5) for i, s in enumerate(c)], 4
            )
            for c in outcomes(4, (1, 2))
        ],
        axis=0,
    )
    given = correlation(vectors)
    assert own == pytest.approx(given.own, rel=1e-6)
    assert cross == pytest.approx(given.cross, rel=1e-5, abs=1e-6)


def moments(codec, vectors, weights=None, draws=60):
    """Return estimates of many rounds: [draws, length]."""
    return torch.stack(
        [codec.decode_mean(encoded(codec, vectors, r, weights)) for r in range(draws)]
    )


MANY = 4000  # entries, where entries are the sample


def correlated(n=10, length=40):
    generator = torch.Generator().manual_seed(2)
    common = torch.randn(length, generator=generator)
    return common + 0.7 * torch.randn(n, length, generator=generator)


def assert_unbiased(found, mean):
    """The error of the average of N estimates is that of one over N, within 5 deviations."""
    draws, length = found.shape
    expected = float((found - mean).square().sum(1).mean()) / draws
    error = float((found.mean(0) - mean).square().sum())
    assert error / expected == pytest.approx(1, abs=5 * math.sqrt(2 / length))


@pytest.mark.parametrize("transform", [None, "max", "avg", "opt"])
def test_simulated_error_is_the_formula(transform):
    vectors = correlated(length=MANY)
    mean, given = vectors.mean(0), correlation(vectors / 10)
    if transform is None:
        codec, values = RandK(0.15), np.ones(10)
    else:
        ratio = given.ratio if transform == "opt" else None
        codec, values = RandKSpatial(0.15, transform, ratio=ratio), line(transform, 10, given.ratio)
    found = moments(codec, vectors)
    assert_unbiased(found, mean)
    errors = (found - mean).square().sum(1)
    expected = spatial.squared_error(values, 0.15, given)
    assert abs(float(errors.mean()) - expected) < 4 * float(errors.std()) / math.sqrt(len(errors))


def test_weighted_and_own_counts_are_unbiased():
    vectors = correlated(4, MANY)
    weights = [1.0, 2.0, 3.0, 4.0]
    mean = (vectors * torch.tensor(weights)[:, None]).sum(0) / 10
    codec = RandKSpatial({0: 600, 1: 0.3, 2: 0.5, 3: 1.0}, "max")
    assert_unbiased(moments(codec, vectors, weights), mean)


class TestRandK:
    def test_estimate_is_the_definition(self):
        vectors = torch.randn(3, 30)
        codec = RandK(0.2, seed=4)
        expected = torch.zeros(30)
        for client, vector in enumerate(vectors):
            chosen = torch.from_numpy(codec.indices(30, round=5, client=client))
            expected[chosen] += vector[chosen] * (30 / 6) / 3
        torch.testing.assert_close(codec.decode_mean(encoded(codec, vectors, 5)), expected)

    def test_fractions_and_counts(self):
        assert RandK(0.1).expected_bytes(1000) == RandK(100).expected_bytes(1000) == 432
        assert RandK(1e-9).expected_bytes(1000) == 36
        assert RandK({0: 1, 1: 0.5}).expected_bytes(10, client=1) == 52
        assert RandK({0: 1, 1: 0.5}).most_bytes(10) == 52

    @pytest.mark.parametrize("k", [0, -1, 0.0, 1.5, float("nan"), {}, {0: 0}])
    def test_bad_counts(self, k):
        with pytest.raises(ValueError, match=r"^k "):
            RandK(k)

    @pytest.mark.parametrize("k", [True, "3", None])
    def test_counts_are_numbers(self, k):
        with pytest.raises(TypeError, match="k must be an int"):
            RandK(k)

    def test_more_than_there_is(self):
        with pytest.raises(ValueError, match="k is 9, but the vector has 8 entries"):
            RandK(9).encode(torch.ones(8), round=0, client=0)
        with pytest.raises(ValueError, match="no entry for client 3"):
            RandK({0: 2}).encode(torch.ones(8), round=0, client=3)

    def test_choices_differ_between_rounds_clients_and_seeds(self):
        choices = {
            tuple(RandK(5, seed=s).indices(1000, round=r, client=c))
            for s in range(3)
            for r in range(3)
            for c in range(3)
        }
        assert len(choices) == 27
        shared = RandK(5, shared=True)
        same = [shared.indices(1000, round=1, client=c).tolist() for c in (0, 8)]
        assert same[0] == same[1]

    def test_spatial_reads_rand_ks_messages(self):
        messages = encoded(RandK(6), correlated())
        RandKSpatial(6).decode_mean(messages)
        RandKTemporal(6).decode_mean(messages)


class TestSpatial:
    @pytest.mark.parametrize("transform", ["max", "avg", "adaptive"])
    def test_everything_sent_is_the_exact_mean(self, transform):
        vectors = correlated()
        found = RandKSpatial(1.0, transform).decode_mean(encoded(RandK(1.0), vectors))
        torch.testing.assert_close(found, vectors.mean(0))

    @pytest.mark.parametrize("transform", ["max", "avg", "adaptive"])
    def test_one_client_is_rand_k(self, transform):
        messages = encoded(RandK(6), correlated(1))
        torch.testing.assert_close(
            RandKSpatial(6, transform).decode_mean(messages), RandK(6).decode_mean(messages)
        )

    def test_ratio_zero_is_rand_k(self):
        messages = encoded(RandK(6), correlated())
        found = RandKSpatial(6, "opt", ratio=0.0).decode_mean(messages)
        torch.testing.assert_close(found, RandK(6).decode_mean(messages), rtol=1e-6, atol=1e-7)

    def test_opt_is_max_for_equal_vectors(self):
        messages = encoded(RandK(6), correlated())
        torch.testing.assert_close(
            RandKSpatial(6, "opt", ratio=9.0).decode_mean(messages),
            RandKSpatial(6, "max").decode_mean(messages),
        )

    def test_beta_follows_the_messages_that_arrived(self):
        """Three of ten arrive: what is unbiased is the decoder for three."""
        vectors = correlated(length=MANY)[:3]
        found = moments(RandKSpatial(600, "max"), vectors)
        assert_unbiased(found, vectors.mean(0))

    def test_adaptive_begins_as_rand_k_and_learns_from_the_past(self):
        vectors = correlated()
        codec = RandKSpatial(6, "adaptive", decay=0.95)
        first = encoded(codec, vectors, 0)
        torch.testing.assert_close(
            codec.decode_mean(first), RandK(6).decode_mean(first), rtol=1e-6, atol=1e-7
        )
        moments(codec, vectors, draws=300)
        truth = correlation(vectors).ratio / 9
        assert codec.decoder.slope(10) == pytest.approx(truth, abs=0.15)
        assert 0 <= codec.decoder.slope(5) <= 1

    def test_adaptive_survives_zeros_and_opposites(self):
        codec = RandKSpatial(0.5, "adaptive")
        for vectors in (torch.zeros(2, 8), torch.stack([torch.ones(8), -torch.ones(8)])):
            for round in range(5):
                assert torch.isfinite(codec.decode_mean(encoded(codec, vectors, round))).all()
        assert codec.decoder.slope(2) == 0.0

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"transform": "mean"}, "unknown transform 'mean'"),
            ({"transform": "opt"}, "ratio="),
            ({"transform": "max", "ratio": 1.0}, "ratio="),
            ({"transform": "opt", "ratio": -2.0}, "ratio must be at least -1"),
            ({"transform": "adaptive", "decay": 1.0}, "decay"),
        ],
    )
    def test_bad_options(self, options, reason):
        with pytest.raises(ValueError, match=reason):
            RandKSpatial(3, **options)


def remembered(codec, memories):
    codec.load_state_dict({f"memory.{c}": memory for c, memory in enumerate(memories)})
    return codec


class TestTemporal:
    def test_without_memory_it_is_rand_k(self):
        messages = encoded(RandK(6), correlated())
        torch.testing.assert_close(
            RandKTemporal(6).decode_mean(messages), RandK(6).decode_mean(messages)
        )

    def test_a_perfect_memory_leaves_no_error(self):
        vectors = correlated()
        codec = remembered(RandKTemporal(6), vectors)
        found = codec.decode_mean(encoded(codec, vectors))
        torch.testing.assert_close(found, vectors.mean(0), rtol=0, atol=1e-6)

    def test_unbiased_with_the_error_of_the_change(self):
        """The innovation is scaled: filling in received values would be biased."""
        vectors = correlated(length=MANY)
        memories = vectors + 0.3 * torch.randn(10, MANY)
        found = torch.stack(
            [
                remembered(RandKTemporal(600), memories).decode_mean(
                    encoded(RandK(600), vectors, r)
                )
                for r in range(60)
            ]
        )
        mean = vectors.mean(0)
        assert_unbiased(found, mean)
        errors = (found - mean).square().sum(1)
        expected = (MANY / 600 - 1) * float((vectors - memories).square().sum()) / 100
        assert float(errors.mean()) == pytest.approx(expected, rel=0.03)

    def test_memory_is_the_raw_value_on_received_entries(self):
        vectors = correlated(2)
        codec = RandKTemporal(6)
        codec.decode_mean(encoded(codec, vectors, 3))
        for client, vector in enumerate(vectors):
            chosen = torch.from_numpy(codec.indices(40, round=3, client=client))
            expected = torch.zeros(40)
            expected[chosen] = vector[chosen]
            assert torch.equal(codec.state_dict()[f"memory.{client}"], expected)

    def test_still_vectors_are_learned_geometrically(self):
        """E ||x - b||^2 = (1 - k / d)^R ||x||^2 after R rounds."""
        vectors = torch.randn(200, 40)
        codec = RandKTemporal(10)
        for round in range(1, 6):
            codec.decode_mean(encoded(codec, vectors, round))
            held = torch.stack([codec.state_dict()[f"memory.{c}"] for c in range(200)])
            share = float((vectors - held).square().sum() / vectors.square().sum())
            assert share == pytest.approx(0.75**round, rel=0.06)

    def test_absent_clients_have_no_part(self):
        vectors = correlated(3)
        codec = RandKTemporal(6)
        codec.decode_mean(encoded(codec, vectors))
        before = codec.state_dict()["memory.2"]
        fresh = remembered(RandKTemporal(6), [codec.state_dict()[f"memory.{c}"] for c in range(2)])
        messages = encoded(codec, vectors[:2], 1)
        assert torch.equal(codec.decode_mean(messages), fresh.decode_mean(messages))
        assert torch.equal(codec.state_dict()["memory.2"], before)

    @pytest.mark.parametrize("memory", ["float16", "bfloat16"])
    def test_small_memories_are_unbiased_too(self, memory):
        codec = RandKTemporal(1.0, memory=memory)
        vectors = correlated(3)
        codec.decode_mean(encoded(codec, vectors))
        assert codec.state_dict()["memory.0"].dtype == getattr(torch, memory)
        found = codec.decode_mean(encoded(codec, vectors + 1, 1))
        torch.testing.assert_close(found, vectors.mean(0) + 1)

    def test_forgetting(self):
        codec = RandKTemporal(6)
        codec.decode_mean(encoded(codec, correlated(2)))
        codec.forget(0)
        codec.forget(77)
        assert set(codec.state_dict()) == {"memory.1"}

    def test_another_length_is_refused_before_anything_changes(self):
        codec = RandKTemporal(6)
        codec.decode_mean(encoded(codec, correlated(2)))
        before = codec.state_dict()
        with pytest.raises(ValueError, match="its memory has 40"):
            codec.decode_mean(encoded(codec, correlated(2, 41), 1))
        assert all(torch.equal(v, before[n]) for n, v in codec.state_dict().items())

    def test_unknown_memory(self):
        with pytest.raises(ValueError, match="unknown type of memory"):
            RandKTemporal(6, memory="int8")


class TestSpatioTemporal:
    def test_it_is_spatial_on_the_changes(self):
        vectors = correlated()
        memories = vectors.mean(0) + 0.1 * torch.randn(10, 40)
        messages = encoded(RandK(6), vectors)
        codec = remembered(RandKSpatioTemporal(6, "max"), memories)
        changes = RandKSpatial(6, "max").decode_mean(encoded(RandK(6), vectors - memories))
        torch.testing.assert_close(
            codec.decode_mean(messages), memories.mean(0) + changes, rtol=1e-5, atol=1e-6
        )

    def test_unbiased(self):
        vectors = correlated(4, MANY)
        memories = vectors - 1.0
        found = torch.stack(
            [
                remembered(RandKSpatioTemporal(600, "max"), memories).decode_mean(
                    encoded(RandK(600), vectors, r)
                )
                for r in range(60)
            ]
        )
        assert_unbiased(found, vectors.mean(0))
