"""PCA, K-means and logistic regression over distributed data, through codecs."""

import pytest
import torch
from torch.nn import functional as F

from featherweight.federated.codecs import QSGD, Identity, RandK, RandKSpatial, RandKTemporal
from featherweight.federated.mean import (
    estimate_mean,
    k_means,
    logistic_regression,
    power_iteration,
)


def clients(number=5, examples=60, features=12):
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(3.0, 0.5, features)
    data = torch.randn(number * examples, features, generator=generator) * spread
    return list((data - data.mean(0)).chunk(number))


class TestEstimate:
    def test_mean_and_bytes(self):
        vectors = list(torch.randn(4, 20))
        found = estimate_mean(vectors, Identity(), round=3, weights=[1, 1, 1, 5])
        expected = (sum(vectors[:3]) + 5 * vectors[3]) / 8
        torch.testing.assert_close(found.mean, expected)
        assert found.bytes == 4 * (32 + 80)

    def test_weights_for_every_client(self):
        with pytest.raises(ValueError, match="zip"):
            estimate_mean(list(torch.randn(2, 3)), Identity(), weights=[1.0])


class TestPowerIteration:
    def test_finds_the_top_eigenvector(self):
        data = clients()
        found = power_iteration(data, Identity(), rounds=200)
        whole = torch.cat(data)
        values, vectors = torch.linalg.eigh(whole.T @ whole)
        assert abs(float(found.result @ vectors[:, -1])) == pytest.approx(1, abs=1e-5)
        assert found.objective[-1] == pytest.approx(float(values[-1] / values.sum()), rel=1e-5)
        assert max(found.errors) < 1e-12
        assert found.bytes == 200 * 5 * (32 + 48)

    @pytest.mark.parametrize("codec", [RandK(4), RandKSpatial(4), RandKTemporal(4), QSGD(7)])
    def test_through_codecs(self, codec):
        found = power_iteration(clients(), codec, rounds=60)
        assert found.result.norm() == pytest.approx(1, abs=1e-5)
        assert len(found.objective) == len(found.errors) == 60
        assert max(found.errors) > 1e-3

    def test_data_without_variance(self):
        found = power_iteration([torch.ones(2, 3) * 1e-30] * 2, Identity(), rounds=2)
        assert torch.isfinite(found.result).all()


class TestKMeans:
    def data(self):
        generator = torch.Generator().manual_seed(1)
        centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 6.0]])
        points = [centres + 0.1 * torch.randn(20, 3, 2, generator=generator) for _ in range(4)]
        return centres, [own.reshape(-1, 2) for own in points]

    def test_finds_the_centres(self):
        centres, data = self.data()
        found = k_means(data, Identity(), rounds=5, start=centres + 0.5)
        torch.testing.assert_close(found.result, centres, rtol=0, atol=0.1)
        assert found.objective[-1] < 0.03

    def test_equal_clients_take_lloyds_steps(self):
        """One client alone is the plain algorithm."""
        _, data = self.data()
        start = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
        found = k_means(data[:1], Identity(), rounds=1, start=start)
        nearest = ((data[0][:, None] - start) ** 2).sum(2).argmin(1)
        expected = torch.stack([data[0][nearest == c].mean(0) for c in range(3)])
        torch.testing.assert_close(found.result, expected)

    def test_empty_clusters_stay(self):
        """0 / 0 would be NaN, for ever."""
        _, data = self.data()
        start = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [1000.0, 1000.0]])
        found = k_means(data, RandK(1.0), rounds=4, start=start)
        assert torch.isfinite(found.result).all()
        torch.testing.assert_close(found.result[2], start[2])


class TestLogisticRegression:
    def data(self):
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(4, 50, 5, generator=generator)
        weights = torch.randn(3, 5, generator=generator)
        return [(own, (own @ weights.T).argmax(1)) for own in inputs]

    def test_a_step_is_gradient_descent(self):
        data = self.data()
        options = {"rounds": 1, "classes": 3, "learning_rate": 0.3, "weight_decay": 0.1}
        found = logistic_regression(data, Identity(), **options)
        layer = torch.nn.Linear(5, 3)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        inputs, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
        F.cross_entropy(layer(inputs), labels).backward()
        expected = -0.3 * torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        torch.testing.assert_close(found.result, expected)

    @pytest.mark.parametrize("codec", [Identity(), RandKSpatial(9), RandKTemporal(9)])
    def test_the_loss_falls(self, codec):
        found = logistic_regression(self.data(), codec, rounds=60, classes=3, learning_rate=0.5)
        assert found.objective[-1] < 0.5 * found.objective[0]
