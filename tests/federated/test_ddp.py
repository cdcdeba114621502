"""Communication hooks on two ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from featherweight.federated.ddp import RandKState
from tests.federated.ddp_ranks import HOOKS, STEPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.federated.ddp_ranks", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", HOOKS)
def test_everything_sent_is_the_mean(ranks, name):
    mean = (ranks[0]["alone"] + ranks[1]["alone"]) / 2
    for own in ranks:
        found, steps = own[name, "all"]
        torch.testing.assert_close(found, mean.expand(2, -1))
        assert steps == 2


@pytest.mark.parametrize("name", HOOKS)
def test_ranks_agree_to_the_bit(ranks, name):
    assert torch.equal(ranks[0][name, "some"][0], ranks[1][name, "some"][0])


@pytest.mark.parametrize("name", HOOKS)
def test_half_the_entries_are_unbiased(ranks, name):
    mean = (ranks[0]["alone"] + ranks[1]["alone"]) / 2
    found, steps = ranks[0][name, "some"]
    assert steps == STEPS
    deviation = (found.mean(0) - mean).abs() / (found.std(0) / STEPS**0.5)
    assert deviation.max() < 5


def test_shared_choices_leave_half_zero(ranks):
    found, _ = ranks[0]["shared", "some"]
    assert set((found != 0).sum(1).tolist()) == {14}  # of 28
    assert len({tuple(row.tolist()) for row in found != 0}) > STEPS / 2


def test_max_and_avg_are_the_same_for_two_ranks_and_beat_shared_choices(ranks):
    """Where ranks choose apart, more entries arrive."""
    found, _ = ranks[0]["spatial", "some"]
    assert 14 < float((found != 0).sum(1).float().mean()) < 28
    mean = (ranks[0]["alone"] + ranks[1]["alone"]) / 2
    errors = [float((ranks[0][n, "some"][0] - mean).square().sum(1).mean()) for n in HOOKS]
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("options", "error"),
    [({"k": 0}, ValueError), ({"k": "1"}, TypeError), ({"k": 1, "transform": "opt"}, ValueError)],
)
def test_bad_options(options, error):
    with pytest.raises(error):
        RandKState(**options)
