"""Top-k and its relatives, Wangni, induced, error feedback."""

import itertools
import math

import numpy as np
import pytest
import torch

from featherweight.federated.codecs import (
    QSGD,
    AdaQuantFL,
    ErrorFeedback,
    Identity,
    Induced,
    RandK,
    RandKSpatial,
    RandKTemporal,
    RTopK,
    TopK,
    TopKFeedback,
    Wangni,
)
from featherweight.federated.codecs.indexed import largest
from featherweight.federated.codecs.wangni import probabilities
from featherweight.federated.wire import HEADER_BYTES, Refused
from tests.federated.test_codecs_all import encoded
from tests.oracles import federated_codecs as oracle
from tests.oracles.select import slow_top_k


def decoded(codec, vector, round=0, client=0):
    return codec.decode_mean([codec.encode(vector, round=round, client=client)])


def draws(codec, vector, count):
    return torch.stack([decoded(codec, vector, round=r) for r in range(count)])


def assert_unbiased(found, vector):
    """The error of the average of N estimates is that of one over N, within 5 deviations."""
    expected = float((found - vector).square().sum(1).mean()) / len(found)
    error = float((found.mean(0) - vector).square().sum())
    assert error / expected == pytest.approx(1, abs=5 * math.sqrt(2 / len(vector)))


class TestTopK:
    @pytest.mark.parametrize("count", [0, 1, 3, 7, 8])
    def test_largest_of_equal_ones_the_first(self, count):
        vector = np.array([1, -3, 3, 0, -3, 2, 1, -1], np.float32)
        chosen = slow_top_k([abs(x) for x in vector.tolist()], count)
        assert largest(vector, count).tolist() == [i for i, c in enumerate(chosen) if c]

    def test_sends_them_as_they_are(self):
        vector = torch.randn(500)
        found = decoded(TopK(0.1), vector)
        kept = torch.zeros(500, dtype=torch.bool)
        kept[vector.abs().topk(50).indices] = True
        assert torch.equal(found, vector * kept)

    def test_contracts(self):
        for k in (1, 10, 100):
            vector = torch.randn(100)
            error = (decoded(TopK(k), vector) - vector).square().sum()
            assert error <= (1 - k / 100) * vector.square().sum() + 1e-6

    def test_indices_cost_less_than_log2_d_each(self):
        message = TopK(1000).encode(torch.randn(100_000), round=0, client=0)
        bits = 8 * (len(message) - HEADER_BYTES) / 1000 - 32
        assert bits < math.log2(100) + 1.6 < 17

    def test_the_count_must_be_the_servers(self):
        message = TopK(3).encode(torch.randn(10), round=0, client=0)
        with pytest.raises(Refused, match="count is 3, not 2"):
            TopK(2).read(message)


class TestRTopK:
    def test_k_of_the_r_largest(self):
        vector = torch.randn(200)
        top = set(vector.abs().topk(20).indices.tolist())
        found = draws(RTopK(5, 20), vector, 400)
        assert set((found != 0).sum(1).tolist()) == {5}
        often = (found != 0).sum(0)
        assert set(often.nonzero().flatten().tolist()) == top
        assert all(abs(n - 100) < 5 * math.sqrt(75) for n in often[list(top)].tolist())
        assert torch.equal(found.sum(0), vector * often) or torch.allclose(
            found.sum(0), vector * often, rtol=1e-4
        )

    def test_r_equal_k_is_top_k(self):
        vector = torch.randn(200)
        assert torch.equal(decoded(RTopK(7, 7), vector), decoded(TopK(7), vector))

    def test_r_below_k(self):
        with pytest.raises(ValueError, match="r must be at least k, got 3 and 5"):
            RTopK(5, 3).encode(torch.ones(10), round=0, client=0)
        with pytest.raises(ValueError, match=r"^r must"):
            RTopK(5, 0)


class TestWangni:
    @pytest.mark.parametrize("count", [1, 3, 7, 20])
    def test_probabilities_are_the_bisections(self, count):
        vector = np.random.default_rng(count).standard_cauchy(20).astype(np.float32)
        found = probabilities(vector, count)
        np.testing.assert_allclose(found, oracle.wangni(vector.tolist(), count), rtol=1e-6)
        assert found.sum() == pytest.approx(count)

    def test_zeros_are_never_kept(self):
        vector = np.array([0, 1, 0, 2], np.float32)
        assert probabilities(vector, 3).tolist() == [0, 1, 0, 1]
        assert probabilities(vector * 0, 3).tolist() == [0, 0, 0, 0]

    def test_even_values_are_kept_evenly(self):
        np.testing.assert_allclose(probabilities(np.full(10, -3.0, np.float32), 4), 0.4)

    def test_unbiased_with_the_variance_of_its_probabilities(self):
        vector = torch.randn(2000)
        found = draws(Wangni(0.1), vector, 60)
        assert_unbiased(found, vector)
        kept = probabilities(vector.numpy(), 200)
        expected = float((vector.numpy().astype(np.float64) ** 2 * (1 / kept - 1)).sum())
        assert float((found - vector).square().sum(1).mean()) == pytest.approx(expected, rel=0.03)
        assert expected < Wangni(0.1).excess(2000) * float(vector.square().sum())

    def test_k_entries_are_expected(self):
        codec = Wangni(50)
        counts = [
            int.from_bytes(codec.encode(torch.randn(1000), round=r, client=0)[12:16], "little")
            for r in range(200)
        ]
        assert np.mean(counts) == pytest.approx(50, abs=5 * math.sqrt(50 / 200))

    def test_values_that_would_overflow_are_not_sent(self):
        vector = torch.full((1000,), 2.0**63)
        with pytest.raises(ValueError, match="over its probability"):
            draws(Wangni(1), vector, 100)


class TestInduced:
    def test_unbiased_with_the_error_of_the_rest(self):
        vector = torch.randn(2000) ** 3
        found = draws(Induced(200), vector, 60)
        assert_unbiased(found, vector)
        rest = vector - decoded(TopK(100), vector)
        expected = (2000 / 100 - 1) * float(rest.square().sum())
        error = (found - vector).square().sum(1)
        tolerance = 5 * float(error.std()) / math.sqrt(len(error))
        assert float(error.mean()) == pytest.approx(expected, abs=tolerance)
        assert expected <= Induced(200).excess(2000) * float(vector.square().sum())

    def test_half_precision_is_made_up_for(self):
        """What rounding the first half loses is in the rest, and so stays unbiased."""
        vector = torch.tensor([1.001, 0.0, 0.0, 0.0])
        codec = Induced(2, values="bfloat16")
        found = draws(codec, vector, 500).mean(0)
        assert float(vector[0].bfloat16()) == 1.0
        assert float(found[0]) == pytest.approx(1.001, abs=4e-4)

    def test_budget_and_size(self):
        message = Induced(11).encode(torch.randn(1024), round=0, client=0)
        assert len(message) <= HEADER_BYTES + 4 * 11 + math.ceil(5 * 10 / 8)
        with pytest.raises(ValueError, match="at least 2"):
            Induced(1).encode(torch.randn(10), round=0, client=0)


class TestErrorFeedback:
    @pytest.mark.parametrize(
        "codec", [TopK(3), RTopK(3), RandK(3), QSGD(2), Wangni(3), Induced(4), Identity()]
    )
    def test_nothing_is_lost(self, codec):
        """What was sent and what is owed add up to what was given."""
        feedback = ErrorFeedback(codec)
        vectors = torch.randn(20, 12)
        sent = torch.stack([decoded(feedback, v, round=r) for r, v in enumerate(vectors)]).sum(0)
        owed = feedback.state_dict()["residual.0"]
        torch.testing.assert_close(sent + owed, vectors.sum(0), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("codec", [TopK(3), RandK(3), QSGD(1), Wangni(3), Induced(4)])
    def test_residuals_stay_bounded(self, codec):
        """With the scale of the unbiased codec they would grow without bound."""
        feedback = ErrorFeedback(codec)
        vector = torch.randn(60, generator=torch.Generator().manual_seed(3))
        for round in range(400):
            feedback.encode(vector, round=round, client=0)
        owed = feedback.state_dict()["residual.0"].norm()
        assert owed < 3 * (1 + (codec.excess(60) or 60 / 3)) * vector.norm()

    def test_without_the_factor_they_explode(self):
        codec, owed = RandK(3), torch.zeros(60)
        for round in range(40):
            given = owed + torch.ones(60)
            owed = given - decoded(codec, given, round=round)
        assert owed.norm() > 1e6

    def test_top_k_with_feedback_sends_everything_in_time(self):
        vector = torch.linspace(0.1, 1.0, 20)
        plain = torch.stack([decoded(TopK(2), vector, r) for r in range(400)]).mean(0)
        feedback = TopKFeedback(2)
        found = torch.stack([decoded(feedback, vector, r) for r in range(400)]).mean(0)
        assert (plain == 0).sum() == 18
        torch.testing.assert_close(found, vector, rtol=0.3, atol=0.02)

    def test_clients_owe_apart(self):
        feedback = TopKFeedback(1)
        encoded(feedback, torch.tensor([[1.0, 2.0], [4.0, 3.0]]))
        state = feedback.state_dict()
        assert state["residual.0"].tolist() == [1.0, 0.0]
        assert state["residual.1"].tolist() == [0.0, 3.0]
        feedback.forget(0)
        assert set(feedback.state_dict()) == {"residual.1"}

    @pytest.mark.parametrize("codec", [RandKTemporal(2), RandKSpatial(2), AdaQuantFL()])
    def test_codecs_it_does_not_fit(self, codec):
        with pytest.raises(ValueError, match="can't have error feedback"):
            ErrorFeedback(codec)

    def test_another_length(self):
        feedback = TopKFeedback(1)
        feedback.encode(torch.ones(4), round=0, client=0)
        with pytest.raises(ValueError, match="residual"):
            feedback.encode(torch.ones(5), round=1, client=0)


@pytest.mark.parametrize("codec", [RandK(2), Induced(4)])
def test_every_choice_counted(codec, monkeypatch):
    """Exact: over all choices of the random entries the mean is the vector itself."""
    vector = torch.tensor([1.0, -2.0, 0.5, 4.0, 3.0])
    module = __import__(type(codec).__module__, fromlist=["choose"])
    found = []
    for chosen in itertools.combinations(range(5), 2):
        monkeypatch.setattr(module, "choose", lambda *_, chosen=chosen: np.array(chosen))
        found.append(decoded(codec, vector))
    torch.testing.assert_close(torch.stack(found).mean(0), vector)
