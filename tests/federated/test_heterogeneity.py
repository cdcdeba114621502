"""Measures of how clients differ, against hand-made cases and slow formulas."""

import itertools

import pytest
import torch
from torch import nn

from featherweight.federated.clients_report import ClientsReport, evaluate_clients
from featherweight.federated.heterogeneity import (
    client_gradients,
    dissimilarity,
    partition_report,
)
from featherweight.federated.partition import dirichlet, shuffled
from featherweight.federated.population import Population
from featherweight.federated.skew import noisy, relabelled
from featherweight.federated.synthetic import quadratics, synthetic

TARGETS = torch.arange(1000) % 10


class TestPartitionReport:
    def test_by_hand(self):
        targets = torch.tensor([0, 0, 1, 1, 2, 2])
        report = partition_report(targets, (torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5])))
        assert report.sizes.tolist() == [2, 4]
        assert report.labels.tolist() == [1, 2]
        assert report.entropy.tolist() == pytest.approx([0.0, 1.0])
        assert report.distance.tolist() == pytest.approx([2 / 3, 1 / 3])
        assert report.pairwise == pytest.approx(1.0)
        assert "2 clients of 2 to 4 examples" in str(report)

    def test_pairwise_distance_is_that_over_all_pairs(self):
        partition = dirichlet(TARGETS, clients=13, seed=0, alpha=0.5)
        mixes = [TARGETS[part].bincount(minlength=10) / len(part) for part in partition]
        pairs = [(a - b).abs().sum() / 2 for a, b in itertools.combinations(mixes, 2)]
        expected = float(torch.stack(pairs).mean())
        assert partition_report(TARGETS, partition).pairwise == pytest.approx(expected, rel=1e-5)

    def test_one_client(self):
        report = partition_report(TARGETS, (torch.arange(1000),))
        assert (report.pairwise, float(report.distance)) == (0.0, 0.0)


class TestDissimilarity:
    def test_extremes(self):
        same = dissimilarity(torch.ones(5, 3))
        assert (same.variance, same.ratio, same.cosine, same.correlation) == pytest.approx(
            (0.0, 1.0, 1.0, 4.0)
        )
        orthogonal = dissimilarity(torch.eye(4))
        assert orthogonal.correlation == pytest.approx(0.0)
        assert orthogonal.ratio == pytest.approx(4.0)
        assert orthogonal.cosine == pytest.approx(0.5)
        cancelling = dissimilarity(torch.tensor([[1.0], [-1.0]]))
        assert cancelling.correlation == pytest.approx(-1.0)

    def test_identity_of_variance_and_ratio(self):
        vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
        weights = torch.arange(1.0, 8.0).double()
        found = dissimilarity(vectors, weights)
        shares = weights / weights.sum()
        mean = shares @ vectors
        slow = sum(
            float(s) * float((v - mean) @ (v - mean)) for s, v in zip(shares, vectors, strict=True)
        )
        assert found.variance == pytest.approx(slow)
        assert found.variance == pytest.approx(float(mean @ mean) * (found.ratio - 1))
        pairs = sum(float(a @ b) for a, b in itertools.permutations(vectors, 2))
        assert found.correlation == pytest.approx(pairs / float(vectors.square().sum()))

    def test_the_shuffled_twin_has_less(self):
        data = synthetic(1.0, 1.0, clients=10, seed=0, sizes=[60] * 10)
        model = nn.Linear(60, 10)
        twin = Population(data.inputs, data.targets, shuffled(data.clients, seed=0))
        before, after = (
            dissimilarity(client_gradients(model, population)) for population in (data, twin)
        )
        assert after.variance < before.variance / 5
        assert 1 <= after.ratio < before.ratio

    def test_gradients_are_those_of_each_clients_mean_loss(self):
        data = synthetic(0.5, 0.5, clients=3, seed=0, sizes=[5, 9, 2])
        model = nn.Linear(60, 10)
        found = client_gradients(model, data)
        assert model.weight.grad is None
        for client, row in enumerate(found):
            inputs, targets = data.client(client)
            logits = inputs @ model.weight.T + model.bias
            error = logits.softmax(1) - nn.functional.one_hot(targets, 10)
            expected = torch.cat([(error.T @ inputs).flatten(), error.sum(0)]) / len(targets)
            assert torch.allclose(row, expected, atol=1e-5)


class TestClientsReport:
    REPORT = ClientsReport(
        accuracy=torch.tensor([1.0, 0.5, 0.0, 0.9] + [0.8] * 16).double(),
        loss=torch.ones(20).double(),
        sizes=torch.tensor([1, 1, 6, 2] + [1] * 16),
    )

    def test_pooled_is_not_the_mean_of_clients(self):
        row = self.REPORT.row()
        assert row["accuracy"] == pytest.approx((1 + 0.5 + 1.8 + 12.8) / 26)
        assert row["client_mean"] == pytest.approx((1 + 0.5 + 0.9 + 12.8) / 20)
        assert row["client_min"] == 0.0
        assert row["client_worst10"] == pytest.approx(0.25)
        assert row["client_p50"] == pytest.approx(0.8)
        assert row["client_p5"] == pytest.approx(0.5 * 0.95)
        assert row["loss"] == pytest.approx(1.0)

    def test_one_client_has_no_distribution(self):
        one = ClientsReport(torch.ones(1).double(), torch.ones(1).double(), torch.tensor([5]))
        assert set(one.row()) == {"accuracy", "loss"}

    def test_against_each_client_alone(self):
        data = synthetic(1.0, 1.0, clients=6, seed=1, sizes=[3, 50, 1, 20, 7, 4])
        data = Population(data.inputs, data.targets, data.clients[::-1])
        model = nn.Sequential(nn.Linear(60, 10), nn.Dropout(0.5)).train()
        report = evaluate_clients(model, data)
        assert model.training
        model.eval().requires_grad_(False)
        for client in range(6):
            inputs, targets = data.client(client)
            logits = model(inputs)
            assert report.accuracy[client] == pytest.approx(
                float((logits.argmax(1) == targets).double().mean())
            )
            loss = nn.functional.cross_entropy(logits, targets)
            assert float(report.loss[client]) == pytest.approx(float(loss), rel=1e-5)
        assert report.sizes.tolist() == [4, 7, 20, 1, 50, 3]

    def test_many_examples_go_in_chunks(self):
        data = Population(
            torch.randn(9000, 3), torch.zeros(9000, dtype=torch.int64), (torch.arange(9000),)
        )
        seen = []
        model = nn.Linear(3, 2)
        model.register_forward_hook(lambda module, args, out: seen.append(len(out)))
        evaluate_clients(model, data)
        assert max(seen) <= 4096
        assert sum(seen) == 9000


class TestSynthetic:
    def test_shapes_and_seed(self):
        one, again = (synthetic(1.0, 1.0, clients=5, seed=3) for _ in range(2))
        assert one.inputs.shape[1] == 60
        assert int(one.sizes.min()) >= 50
        assert int(one.targets.max()) <= 9
        assert torch.equal(one.inputs, again.inputs)
        assert not torch.equal(one.inputs[:50], synthetic(1.0, 1.0, clients=5, seed=4).inputs[:50])

    def test_input_variances_fall_by_the_power_law(self):
        data = synthetic(0.0, 0.0, clients=1, seed=0, sizes=[20000])
        variance = data.inputs.var(0)
        expected = torch.arange(1.0, 61.0) ** -1.2
        assert torch.allclose(variance, expected, rtol=0.06)

    def test_alpha_and_beta_move_clients_apart(self):
        centres = [
            torch.stack([data.client(i)[0].mean() for i in range(40)]).var()
            for data in (
                synthetic(0.0, beta, clients=40, seed=0, sizes=[50] * 40) for beta in (0.0, 4.0)
            )
        ]
        assert centres[1] > 20 * centres[0]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"alpha": -1.0, "beta": 0.0}, "at least 0"),
            ({"alpha": 0.0, "beta": 0.0, "sizes": [1, 2]}, "each of 3 clients"),
            ({"alpha": 0.0, "beta": 0.0, "sizes": [1, 0, 2]}, "each of 3 clients"),
        ],
    )
    def test_refuses(self, arguments, words):
        with pytest.raises(ValueError, match=words):
            synthetic(**arguments, clients=3, seed=0)


class TestQuadratics:
    def test_gradients_vanish_where_they_should(self):
        problem = quadratics(5, 4, seed=0)
        assert torch.allclose(problem.gradients(problem.centres), torch.zeros(5, 4).double())
        assert problem.gradients(problem.optimum).sum(0).abs().max() < 1e-12

    def test_fixed_point_of_fedavg_by_running_it(self):
        problem = quadratics(4, 3, seed=1, condition=3.0)
        for steps in (torch.tensor([1, 5, 2, 9]), torch.tensor(3)):
            x = torch.zeros(3, dtype=torch.float64)
            for _ in range(250):
                local = x.expand(4, 3).clone()
                for step in range(int(steps.max())):
                    moving = (step < steps.expand(4))[:, None]
                    local -= 0.3 * problem.gradients(local) * moving
                x = local.mean(0)
            assert torch.allclose(x, problem.fedavg_fixed_point(0.3, steps), atol=1e-10)

    def test_one_step_is_the_optimum_and_unequal_steps_are_not(self):
        problem = quadratics(6, 3, seed=2)
        assert torch.allclose(problem.fedavg_fixed_point(0.3, 1), problem.optimum)
        unequal = problem.fedavg_fixed_point(1e-5, torch.arange(1, 7))
        assert (unequal - problem.optimum).norm() > 0.05
        assert (problem.fedavg_fixed_point(1e-5, 7) - problem.optimum).norm() < 1e-3

    def test_neutral_values(self):
        alike = quadratics(5, 3, seed=0, spread=0.0, condition=1.0)
        assert torch.allclose(alike.curvatures, torch.eye(3).double().expand(5, 3, 3))
        assert alike.centres.abs().max() == 0
        eigenvalues = torch.linalg.eigvalsh(quadratics(5, 3, seed=0, condition=50.0).curvatures)
        assert torch.allclose(eigenvalues[:, 0], torch.tensor(0.02).double())
        assert torch.allclose(eigenvalues[:, -1], torch.tensor(1.0).double())
        with pytest.raises(ValueError, match="must be at least 1"):
            quadratics(5, 3, seed=0, condition=0.5)


class TestSkew:
    DATA = Population(
        torch.zeros(3000, 20), torch.arange(3000) % 10, torch.arange(3000).split(1000)
    )

    def test_noise_grows_with_the_client(self):
        found = noisy(self.DATA, seed=0, largest=3.0)
        levels = [float(found.client(i)[0].std()) for i in range(3)]
        assert levels == pytest.approx([1.0, 2.0, 3.0], rel=0.03)
        assert torch.equal(found.targets, self.DATA.targets)
        assert torch.equal(noisy(self.DATA, seed=0, largest=0.0).inputs, self.DATA.inputs)

    def test_groups_name_things_differently(self):
        found = relabelled(self.DATA, seed=0, groups=2, classes=10)
        assert torch.equal(found.client(0)[1], self.DATA.client(0)[1])
        assert torch.equal(found.client(2)[1], self.DATA.client(2)[1])
        before, after = self.DATA.client(1)[1], found.client(1)[1]
        names = {int(b): int(a) for b, a in zip(before, after, strict=True)}
        assert not torch.equal(before, after)
        assert sorted(names.values()) == list(range(10))
        assert torch.equal(after, torch.tensor([names[int(b)] for b in before]))
        same = relabelled(self.DATA, seed=0, groups=1, classes=10)
        assert torch.equal(same.targets, self.DATA.targets)

    def test_shared_examples_are_refused(self):
        shared = Population(
            torch.zeros(4, 2),
            torch.zeros(4, dtype=torch.int64),
            (
                torch.arange(3),
                torch.arange(2, 4),
            ),
        )
        with pytest.raises(ValueError, match="clients share examples"):
            noisy(shared, seed=0, largest=1.0)
        with pytest.raises(ValueError, match="clients share examples"):
            relabelled(shared, seed=0, groups=2, classes=3)
        with pytest.raises(ValueError, match="largest must be at least 0"):
            noisy(self.DATA, seed=0, largest=-1.0)
        with pytest.raises(ValueError, match="groups must be at least 1"):
            relabelled(self.DATA, seed=0, groups=0, classes=10)
