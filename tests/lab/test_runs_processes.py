"""Runs as processes: signals, workers, and what they leave behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from featherweight.common import write_text
from featherweight.lab.errors import BadInput
from featherweight.lab.parse import to_yaml
from featherweight.lab.recipe import Recipe
from featherweight.lab.runs import is_complete, run, run_directory
from tests.lab.tiny_runs import assert_same_run, tiny


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Start the command line in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", "featherweight.lab.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 60) -> None:
    """Wait until something is so; fails when the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def group(leader: int) -> set[int]:
    """Return the living processes of a process group."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found


LONG = {
    "fit__length": "25ep",
    "sparse__method": "imp",
    "sparse__levels": 3,
    "sparse__per_level": 0.5,
}


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> tuple[Recipe, Path]:
    """A recipe that takes some seconds, and its run without interruption."""
    recipe = tiny(**LONG, execute__threads=1)
    return recipe, run(recipe, 0, tmp_path_factory.mktemp("long"))


class TestProcesses:
    @pytest.fixture
    def recipe_file(self, long, tmp_path) -> Path:
        path = tmp_path / "tiny.yaml"
        write_text(path, to_yaml(long[0]))
        return path

    def test_kill_minus_nine_in_the_middle(self, long, recipe_file, tmp_path):
        recipe, expected = long
        directory = run_directory(tmp_path, recipe, 0)
        process = start("run", recipe_file, "--out", tmp_path)
        wait_for(lambda: lines(directory / "metrics.jsonl") >= 30, process)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        assert not is_complete(directory)
        assert_same_run(run(recipe, 0, tmp_path), expected)

    def test_control_c_says_how_to_go_on_and_the_lock_is_real(self, long, recipe_file, tmp_path):
        recipe, expected = long
        directory = run_directory(tmp_path, recipe, 0)
        process = start("run", recipe_file, "--out", tmp_path)
        wait_for(lambda: lines(directory / "metrics.jsonl") >= 3, process)
        with pytest.raises(BadInput, match="is in use by another process"):
            run(recipe, 0, tmp_path)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        command = f"featherweight run {recipe_file} --out {tmp_path}"
        assert (
            errors
            == f"featherweight: interrupted; what was done is saved, go on with:\n  {command}\n"
        )
        assert_same_run(run(recipe, 0, tmp_path), expected)

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
    @pytest.mark.parametrize("how", ["control-c", "kill parent"])
    def test_no_worker_outlives_its_parent(self, how, long, recipe_file, tmp_path):
        recipe, _ = long
        process = start("run", recipe_file, "seeds=[0,1]", "--out", tmp_path, "--jobs", 2)
        logs = [run_directory(tmp_path, recipe, seed) / "metrics.jsonl" for seed in (0, 1)]
        wait_for(lambda: all(lines(log) >= 2 for log in logs), process)
        assert len(group(process.pid)) >= 3
        if how == "control-c":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (1 if how == "control-c" else -signal.SIGKILL)
        end = time.monotonic() + 30
        while group(process.pid):
            assert time.monotonic() < end, "a worker goes on alone"
            time.sleep(0.05)
        if how == "control-c":
            assert "go on with:\n  featherweight run" in errors
            assert "Traceback" not in errors
        for log in logs:
            FileLock(log.parent / "lock").acquire(timeout=0).lock.release()
            assert not is_complete(log.parent), "the worker went on to the end"
