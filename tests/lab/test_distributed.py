"""Two ranks on the CPU: the same masks and weights on both, and as from one process."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from featherweight.common import write_text
from featherweight.lab.parse import build, to_yaml
from featherweight.lab.recipe import Recipe
from featherweight.lab.runs import run, run_directory
from featherweight.sparse import Masks
from tests.lab.tiny_runs import METHODS, tiny

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without distributed"
)


def recipe(name: str, norm: str, length: str = "4ep") -> Recipe:
    """An epoch is four batches of 32 images and one of 7, which two ranks cannot share evenly."""
    return build(
        {
            "name": name,
            "data": {"limit": 150},
            "model": {"options": {"width": 16, "norm": norm}},
            "sparse": {"method": "lrr", "levels": 2, "per_level": 0.5},
            "fit": {"length": length, "batch_size": 32, "learning_rate": 0.05},
            "execute": {"checkpoint_seconds": 0, "threads": 1},
        }
    )


PLAIN, NORMED = recipe("plain", "none"), recipe("normed", "batch")
LONG = recipe("long", "batch", "8ep")

# One of each kind of method; ranks that came to different masks would refuse to go on, too.
EVERY = {
    name: replace(tiny(**METHODS[name]), name=f"every-{index}")
    for index, name in enumerate(METHODS)
    if "convolutions" not in name and "truly sparse" not in name
}

# Runs recipes as the command line does, and lets every rank say what it ends each level with.
SCRIPT = """
import os, sys
from pathlib import Path
from safetensors.torch import save_file
from featherweight.lab import runs
from featherweight.lab.cli import _leave_ranks
from featherweight.lab.parse import load

out, original = Path(sys.argv[1]), runs._Run._after_level

def after_level(self, level, done):
    original(self, level, done)
    folder = out / "ranks" / self.recipe.name / os.environ["RANK"]
    folder.mkdir(parents=True, exist_ok=True)
    self.kept.masks.save(folder / f"{level.index}-masks.safetensors")
    state = {name: t.clone() for name, t in self.model.state_dict().items()}
    save_file(state, folder / f"{level.index}-model.safetensors")
    backend = runs.torch.distributed.get_backend()
    (folder / "backend").write_text(f"{self.accelerator.num_processes} {backend}")

runs._Run._after_level = after_level
for file in sys.argv[2:]:
    runs.run(load(file)[0], 0, out)
_leave_ranks()
"""


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """Folder of runs that two ranks made."""
    out = tmp_path_factory.mktemp("two")
    (out / "script.py").write_text(SCRIPT)
    files = []
    for each in (PLAIN, NORMED, LONG, *EVERY.values()):
        files.append(out / f"{each.name}.yaml")
        write_text(files[-1], to_yaml(each))
    finish(torchrun(out / "script.py", out, *files))
    return out


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process."""
    return run(PLAIN, 0, tmp_path_factory.mktemp("one"))


def rows(directory: Path, log: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"{log}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("each", [PLAIN, NORMED], ids=["without norms", "with batch norm"])
class TestRanks:
    def test_speak_gloo(self, each, two):
        for rank in "01":
            assert (two / "ranks" / each.name / rank / "backend").read_text() == "2 gloo"

    @pytest.mark.parametrize("level", range(3))
    def test_have_the_same_masks(self, each, level, two):
        first, second = (
            Masks.load(two / "ranks" / each.name / rank / f"{level}-masks.safetensors")
            for rank in "01"
        )
        assert first == second
        assert first.density == pytest.approx(0.5**level, abs=1e-3)

    @pytest.mark.parametrize("level", range(3))
    def test_have_the_same_parameters_to_the_bit(self, each, level, two):
        first, second = (
            load_file(two / "ranks" / each.name / rank / f"{level}-model.safetensors")
            for rank in "01"
        )
        written = load_file(run_directory(two, each, 0) / f"level-0{level}" / "model.safetensors")
        for name, tensor in first.items():
            assert torch.equal(tensor, written[name])
            if "running" not in name:  # batch statistics are those of rank 0
                assert torch.equal(tensor, second[name]), name

    def test_write_once(self, each, two):
        directory = run_directory(two, each, 0)
        epochs = [(row["level"], row["epoch"]) for row in rows(directory, "metrics")]
        assert epochs == [(level, epoch) for level in range(3) for epoch in range(4)]
        assert [row["level"] for row in rows(directory, "levels")] == [0, 1, 2]
        assert len(rows(directory, "timing")) == 12
        assert (directory / "result.json").is_file()
        assert len(list((directory / "tensorboard").iterdir())) == 1


class TestLikeOneProcess:
    @pytest.mark.parametrize("level", range(3))
    def test_masks(self, level, one, two):
        name = f"level-0{level}/masks.safetensors"
        assert Masks.load(run_directory(two, PLAIN, 0) / name) == Masks.load(one / name)

    @pytest.mark.parametrize("level", range(3))
    def test_weights_up_to_rounding(self, level, one, two):
        name = f"level-0{level}/model.safetensors"
        ours, theirs = load_file(run_directory(two, PLAIN, 0) / name), load_file(one / name)
        start = load_file(one / "level-00/model.safetensors")
        for key, tensor in theirs.items():
            assert (ours[key] - tensor).abs().max() < 1e-5, key
        if level:  # the weights have moved by far more than that
            moved = [(tensor - start[key]).abs().max().item() for key, tensor in theirs.items()]
            assert min(moved) > 1e-3

    @pytest.mark.parametrize(
        ("log", "keys"),
        [
            ("metrics", ["steps", "train_loss", "train_accuracy", "validation_loss"]),
            ("levels", ["nonzeros", "flops", "bytes", "test_loss", "test_accuracy"]),
        ],
    )
    def test_logs_up_to_rounding(self, log, keys, one, two):
        found = run_directory(two, PLAIN, 0)
        for ours, theirs in zip(rows(found, log), rows(one, log), strict=True):
            for key in keys:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks through /proc")
def test_one_rank_is_killed_and_the_same_command_goes_on(two, tmp_path):
    directory, metrics = run_directory(tmp_path, LONG, 0), "metrics.jsonl"
    command = ("-m", "featherweight.lab.cli", "run", two / "long.yaml", "--out", tmp_path)
    process = torchrun(*command)
    end = time.monotonic() + 60
    while not (directory / metrics).exists() or len(rows_so_far(directory / metrics)) < 10:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0, output
    assert not (directory / "result.json").exists()

    finish(torchrun(*command))
    expected = run_directory(two, LONG, 0)
    for name in ("metrics.jsonl", "levels.jsonl", "level-02/model.safetensors"):
        assert (directory / name).read_bytes() == (expected / name).read_bytes(), name
    assert Masks.load(directory / "level-02/masks.safetensors") == Masks.load(
        expected / "level-02/masks.safetensors"
    )


def rows_so_far(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.mark.parametrize("name", EVERY)
def test_ranks_agree_on_the_masks_of_every_method(two, name):
    folders = [two / "ranks" / EVERY[name].name / str(rank) for rank in (0, 1)]
    files = sorted(path.name for path in folders[0].glob("*-masks.safetensors"))
    assert files
    for file in files:
        first, second = (Masks.load(folder / file) for folder in folders)
        assert first == second
