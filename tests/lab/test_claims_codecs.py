"""The experiments behind the claims about codecs."""

from itertools import pairwise
from math import inf
from pathlib import Path

import pytest
import torch
from rich.console import Console

from featherweight.federated.codecs import QSGD, Identity
from featherweight.lab.claims import adaquantfl
from featherweight.lab.claims import sparsified_mean_estimation as sparsified
from featherweight.lab.claims.claim import CLAIMS, Settings

OURS = [c for c in CLAIMS.values() if c.paper in (sparsified.PAPER, adaquantfl.PAPER)]


def digits():
    return sparsified.images(Settings(Path(), 1, "mini", None, Console(quiet=True)))


def test_they_are_registered():
    assert len(OURS) == 12


class TestSparsified:
    def test_clients_share_the_images_evenly(self):
        data = digits()
        clients = data.clients(0)
        assert [len(inputs) for inputs, _ in clients] == [100] * 10
        assert data.inputs.mean(0).abs().max() < 1e-5
        assert len(torch.cat([inputs for inputs, _ in clients]).unique(dim=0)) > 950

    @pytest.mark.parametrize("task", [sparsified.pca, sparsified.clusters, sparsified.classifier])
    def test_tasks_are_solved_without_compression(self, task):
        trace = task(digits(), Identity(), 0)
        assert max(trace.errors) < 1e-10
        if task is not sparsified.pca:  # the variance along a direction grows, the others fall
            assert trace.objective[-1] < trace.objective[0]

    def test_order_of_the_codecs_in_error(self):
        """Temporal < Avg < Rand-k in the relative squared error of power iteration."""
        data = digits()
        found = {
            name: sparsified.error(sparsified.pca(data, make(6, 0), 0))
            for name, make in sparsified.MAKERS.items()
        }
        assert found["temporal"] < found["spatial"] < found["rand-k"]

    def test_an_effect_is_a_decrease(self):
        same = sparsified.Compared(
            sparsified.pca, sparsified.error, *[sparsified.MAKERS["rand-k"]] * 2, seeds=(0,)
        )
        assert same.effects(Settings(Path(), 1, "mini", None, Console(quiet=True))) == [0.0]

    def test_wangni_sends_no_more_bytes(self):
        codec = sparsified.wangni_at_equal_bytes(102, 0)
        sizes = [len(codec.encode(torch.randn(1024), round=r, client=0)) for r in range(50)]
        assert sum(sizes) / 50 == pytest.approx(32 + 4 * 102, rel=0.02)

    def test_real_images_are_padded(self, shared_data):
        settings = Settings(Path(), 1, "paper", shared_data / "mnist", Console(quiet=True))
        data = sparsified.images(settings)
        assert data.inputs.shape == (10_000, 1024)
        assert data.entries == 102


class TestAdaQuantFL:
    def test_a_course_is_measured(self):
        course = adaquantfl.Course((4.0,) * 10 + (1.0,) * 60, tuple(range(70)))
        assert course.floor == 1.0
        assert course.bytes_to(4.5) == 9
        assert course.bytes_to(2.0) == 16
        assert course.bytes_to(0.5) == inf

    def test_local_steps_are_those_of_one_client_at_a_time(self, monkeypatch):
        for name, value in {"EXAMPLES": 30, "FEATURES": 5, "STEPS": 3}.items():
            monkeypatch.setattr(adaquantfl, name, value)
        problem, start = adaquantfl.LeastSquares(0), torch.ones(5)
        found = problem.updates(start, torch.Generator().manual_seed(1))
        generator = torch.Generator().manual_seed(1)
        chosen = [torch.randint(30, (4, 4), generator=generator) for _ in range(3)]
        for client in range(4):
            weights = start.clone().requires_grad_()
            for batch in chosen:
                inputs = problem.inputs[client, batch[client]]
                residuals = inputs @ weights - problem.targets[client, batch[client]]
                (gradient,) = torch.autograd.grad(residuals.square().mean() / 2, weights)
                weights = (weights - adaquantfl.RATE * gradient).detach().requires_grad_()
            torch.testing.assert_close(found[client], weights.detach() - start)

    def test_training_falls_and_counts_bytes(self, monkeypatch):
        monkeypatch.setattr(adaquantfl, "ROUNDS", 12)
        course = adaquantfl.train(QSGD(15), 0)
        assert course.excess[-1] < course.excess[0]
        assert all(later > earlier for earlier, later in pairwise(course.sent))
