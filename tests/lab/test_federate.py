"""`featherweight federate`: recipes in, one line for every mistake, exact resume, reports."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from featherweight.federated.partition import load_partition, partition_hash
from featherweight.lab import cli, federate
from featherweight.lab import federated_checkpoint as checkpoint
from featherweight.lab.federated_data import make_clients
from featherweight.lab.federated_parse import identity, load
from featherweight.lab.federated_run import run, run_directory

TINY = [
    "data.limit=200",
    "partition.clients=8",
    "model.options.width=8",
    "sampler.size=4",
    "local.steps=2",
    "rounds=6",
    "evaluate.every=2",
    "seeds=[0]",
    "execute.checkpoint_seconds=0",
]


@pytest.fixture
def feather(capsys, tmp_path, monkeypatch):
    """Call the command line in an empty folder; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> tuple[int, str, str]:
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
        return (code, *capsys.readouterr())

    return call


def tiny(*changes, recipe="federated-digits"):
    (found,) = load(recipe, [*TINY, *changes])
    return found


def lines_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def outcome(directory):
    """Return all that must be the same however often a run was interrupted."""
    result = json.loads((directory / "result.json").read_text())
    result.pop("seconds")
    files = ("metrics.jsonl", "model.safetensors", "partition.safetensors", "partition.json")
    return result, {name: (directory / name).read_bytes() for name in files}


BAD = """
federate
federate no-such-recipe
federate lrr-digits
federate federated-digits roundz=3
federate federated-digits local.learning_rat=3
federate federated-digits rounds=0
federate federated-digits rounds=true
federate federated-digits rounds=[
federate federated-digits setting.kind=null
federate federated-digits setting.kind=cross-devices
federate federated-digits algorithm.name=fedavgg
federate federated-digits algorithm.options.mu=1
federate federated-digits algorithm.name=fedprox algorithm.options.mu=-1
federate federated-digits algorithm.server_rate=-1
federate federated-digits algorithm.name=scaffold
federate federated-digits algorithm.name=feddyn algorithm.server_rate=1
federate federated-digits codec.name=rand-k
federate federated-digits codec.name=rand-k codec.options.k=0
federate federated-digits codec.name=rand-k codec.options.k=many
federate federated-digits codec.name=rand-k codec.options.kay=3
federate federated-digits codec.name=rand-k-temporal codec.options.k=3
federate federated-digits local.epochs=1
federate federated-digits local.steps=null
federate federated-digits local.optimizer=adam local.momentum=0.5
federate federated-digits sampler.size=51
federate federated-digits sampler.name=diurnal sampler.size=40
federate federated-digits sampler.options.over=2
federate federated-digits sampler.name=over-selection sampler.options.over=many
federate federated-digits partition.clients=5000
federate federated-digits partition.clients=null
federate federated-digits partition.options.alpha=0
federate federated-digits partition.options.alfa=1
federate federated-digits partition.method=natural
federate federated-digits partition.file=nowhere
federate federated-digits partition.file=file
federate federated-digits privacy.clip=1
federate federated-digits privacy.clip=1 weighting=uniform
federate federated-digits aggregator.name=krum aggregator.options.bizantine=3
federate federated-digits model.options.norm=batch
federate federated-digits model.options.width=a
federate federated-digits data.name=mnist
federate federated-digits data.path=nowhere
federate federated-mnist-writers
federate federated-mnist-writers data.path=nowhere
federate federated-mnist-writers data.path=.
federate federated-mnist-writers data.path=. data.limit=100
federate federated-digits execute.backend=fast
federate federated-digits execute.device=tpu
federate federated-digits evaluate.split=clients evaluate.fraction=0.999
federate federated-digits --jobs 0
federate federated-digits --jobs many
federate federated-digits --out file
federate federated-digits --out file/below
federate file
federate .
federate binary
federate federated-digits =
""".strip().splitlines()


class TestBadInput:
    @pytest.mark.parametrize("line", BAD)
    def test_is_two_and_no_traceback(self, line, feather, tmp_path):
        (tmp_path / "file").write_text("no recipe")
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01")
        code, _, err = feather(*line.split())
        assert code == 2, err
        assert err.strip()
        assert "Traceback" not in err
        if err.startswith("featherweight: "):
            assert len(err.splitlines()) == 1

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("roundz=3", r"unknown key 'roundz': did you mean 'rounds'"),
            ("local.learning_rat=3", r"'local.learning_rat': did you mean 'learning_rate'"),
            ("algorithm.name=fedavgg", r"algorithm.name: unknown .* did you mean 'fedavg'"),
            ("algorithm.name=scaffold", r"setting: scaffold keeps state for each client"),
            ("codec.name=rand-k", r"codec: options: rand-k needs k"),
            ("sampler.options.over=2", r"sampler: options: uniform has none, got 'over'"),
            ("setting.kind=null", r"setting.kind: say cross-device or cross-silo"),
            ("model.options.norm=batch", r"setting: batch normalisation"),
        ],
    )
    def test_says_what_and_what_is_allowed(self, words, said, feather):
        _, _, err = feather("federate", "federated-digits", words)
        assert re.search(said, err), err

    def test_a_refused_setting_leaves_no_result(self, feather, tmp_path):
        assert feather("federate", "federated-digits", *TINY, "algorithm.name=scaffold")[0] == 2
        assert not list(tmp_path.rglob("result.json"))
        silo = ["algorithm.name=scaffold", "setting.kind=cross-silo"]
        assert feather("federate", "federated-digits", *TINY, *silo)[0] == 0


class TestRun:
    def test_runs_reports_and_has_nothing_to_do_again(self, feather, tmp_path):
        words = ["federate", "federated-digits", *TINY, "--report"]
        code, out, err = feather(*words)
        assert (code, err) == (0, "")
        assert out.startswith("1 runs in runs\n")
        assert "done: federated-digits (fedavg) seed 0" in out
        assert (tmp_path / "runs" / "report" / "federated.html").is_file()
        directory = run_directory(tmp_path / "runs", tiny(), 0)
        before = outcome(directory)
        code, out, _ = feather(*words)
        assert (code, "1 of 1 runs are complete already" in out) == (0, True)
        assert outcome(directory) == before

    def test_leaves_what_a_run_is_made_of(self, tmp_path):
        recipe = tiny("evaluate.split=clients", "evaluate.fraction=0.25")
        directory = run(recipe, 3, tmp_path)
        names = {path.name for path in directory.iterdir()} - {"lock"}
        assert names == {
            "checkpoints",
            "environment.json",
            "metrics.jsonl",
            "model.safetensors",
            "partition.json",
            "partition.safetensors",
            "result.json",
            "timing.jsonl",
        }
        assert not list((directory / "checkpoints").iterdir())
        assert load(str(directory.parent / "federated.yaml")) == [recipe]
        rows = lines_of(directory)
        assert [row["rounds"] for row in rows] == [2, 4, 6]
        assert {"validation_client_p5", "validation_client_worst10"} <= set(rows[0])
        result = json.loads((directory / "result.json").read_text())
        weights = 64 * 8 + 8 + 8 * 10 + 10
        assert result["costs"]["bytes_up"] == 6 * 4 * weights * 4
        assert sum(result["participation"]) == 6 * 4
        assert result["costs"]["steps"] == 6 * 4 * 2
        partition, facts = load_partition(directory / "partition.safetensors", 200)
        held = json.loads((directory / "partition.json").read_text())
        assert held["hash"] == partition_hash(partition)
        assert (len(partition), len(held["sizes"]), held["validation_clients"]) == (8, 6, 2)
        assert facts["seed"] == 3
        state = load_file(directory / "model.safetensors")
        assert sum(tensor.numel() for tensor in state.values()) == weights

    def test_evaluations_do_not_change_the_training(self, tmp_path):
        often, seldom = (run(tiny(f"evaluate.every={every}"), 0, tmp_path) for every in (1, 5))
        assert (often / "model.safetensors").read_bytes() == (
            seldom / "model.safetensors"
        ).read_bytes()
        assert [row["rounds"] for row in lines_of(seldom)] == [5, 6]

    def test_algorithms_see_the_same_clients_cohorts_and_start(self, tmp_path):
        directories = [
            run(tiny(f"algorithm.name={name}", "rounds=2"), 0, tmp_path)
            for name in ("fedavg", "fedadam")
        ]
        results = [json.loads((path / "result.json").read_text()) for path in directories]
        assert results[0]["participation"] == results[1]["participation"]
        hashes = [json.loads((p / "partition.json").read_text())["hash"] for p in directories]
        assert hashes[0] == hashes[1]

    def test_a_partition_can_be_used_again(self, tmp_path):
        first = run(tiny(), 5, tmp_path)
        file = first / "partition.safetensors"
        again = make_clients(tiny(f"partition.file={file}"), 0)
        assert all(map(torch.equal, again.partition, make_clients(tiny(), 5).partition))

    def test_sweeps_and_jobs(self, feather, tmp_path):
        words = ["federate", "federated-digits", *TINY, "algorithm.name=fedavg,fedadam"]
        assert feather(*words, "seeds=[0,1]", "--jobs", 2, "--out", "two")[0] == 0
        assert feather(*words, "--out", "one")[0] == 0
        assert len(list(tmp_path.glob("two/*/seed-*/result.json"))) == 4
        for recipe in load("federated-digits", [*TINY, "algorithm.name=fedavg,fedadam"]):
            one, two = (run_directory(tmp_path / out, recipe, 0) for out in ("one", "two"))
            assert outcome(one) == outcome(two)

    def test_the_first_failure_of_parallel_jobs_is_one_line(self, feather):
        words = ["federate", "federated-digits", *TINY, "algorithm.name=scaffold", "seeds=[0,1]"]
        code, _, err = feather(*words, "--jobs", 2)
        assert code == 2
        assert re.fullmatch(r"featherweight: error: federated-digits .*seed [01]: .*\n", err)

    def test_interruption_is_one_and_says_what_to_type(self, feather, monkeypatch):
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(federate, "run", interrupt)
        code, _, err = feather("federate", "--out", "a b", "federated-digits", "seeds=[0, 1]")
        assert code == 1
        assert err.endswith(
            "\n  featherweight federate federated-digits 'seeds=[0, 1]' --out 'a b'\n"
        )

    def test_the_recipe_is_not_taken_for_another_kind_of_run(self, feather):
        assert feather("federate", "federated-digits", *TINY)[0] == 0
        code, _, err = feather("report", "runs")
        assert (code, "no run found" in err) == (2, True)

    def test_warnings_are_said_once_and_kept(self, feather, tmp_path):
        words = ["federate", "federated-digits", *TINY, "seeds=[0,1]", "setting.tuned_on=test"]
        _, out, _ = feather(*words)
        assert out.count("tuned-on-test") == 1
        for path in tmp_path.rglob("result.json"):
            rules = [one["rule"] for one in json.loads(path.read_text())["findings"]]
            assert "tuned-on-test" in rules


SILO = ["setting.kind=cross-silo"]
STATEFUL = {
    "plain": [],
    "fedadam, markov": ["algorithm.name=fedadam", "sampler.name=markov"],
    "scaffold": ["algorithm.name=scaffold", *SILO],
    "feddyn": ["algorithm.name=feddyn", *SILO],
    "adaquantfl": ["codec.name=adaquantfl", "algorithm.name=fedavgm"],
    "rand-k-temporal": ["codec.name=rand-k-temporal", "codec.options.k=0.1", *SILO],
    "private": [
        "privacy.clip=0.5",
        "privacy.quantile=0.5",
        "privacy.noise_multiplier=0.1",
        "weighting=uniform",
        "sampler.name=poisson",
    ],
    "epochs, warm-up": [
        "local.epochs=2",
        "local.steps=null",
        "local.schedule.name=inverse-sqrt",
        "algorithm.schedule.warmup=3",
    ],
    "replacement": ["sampler.name=with-replacement", "weighting=uniform"],
}


class Killed(Exception):
    """Stands for a process that ends."""


class TestResume:
    @pytest.mark.parametrize("changes", STATEFUL.values(), ids=STATEFUL)
    def test_is_bit_identical(self, changes, tmp_path):
        recipe = tiny(*changes)
        whole = run(recipe, 0, tmp_path / "whole")
        for stop in (2, 4, 6):

            def kill(update, stop=stop):
                if update.done == stop:
                    raise Killed

            with pytest.raises(Killed):
                run(recipe, 0, tmp_path / "cut", kill)
        assert outcome(run(recipe, 0, tmp_path / "cut")) == outcome(whole)

    def test_after_a_kill_at_any_moment(self, tmp_path):
        overrides = [*TINY, "rounds=100", "evaluate.every=1"]
        (recipe,) = load("federated-digits", overrides)
        whole = run(recipe, 0, tmp_path / "whole")
        directory = run_directory(tmp_path / "cut", recipe, 0)
        command = [sys.executable, "-m", "featherweight.lab.cli", "federate", "federated-digits"]
        for lines in (20,):
            process = subprocess.Popen(
                [*command, *overrides, "--out", str(tmp_path / "cut")],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            metrics = directory / "metrics.jsonl"
            while process.poll() is None:
                if metrics.is_file() and metrics.read_bytes().count(b"\n") >= lines:
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.002)
            process.wait()
        assert outcome(run(recipe, 0, tmp_path / "cut")) == outcome(whole)
        assert not list(directory.rglob(".*"))

    def test_a_damaged_checkpoint_is_passed_over(self, tmp_path):
        recipe = tiny()
        whole, warned = run(recipe, 0, tmp_path / "whole"), []
        self._stop_at(recipe, tmp_path / "cut", 6)
        folder = run_directory(tmp_path / "cut", recipe, 0) / "checkpoints"
        old, new = sorted(folder.iterdir())
        assert [int(path.stem) for path in (old, new)] == [2, 4]
        content = bytearray(new.read_bytes())
        content[-1] ^= 1
        new.write_bytes(content)
        done = run(recipe, 0, tmp_path / "cut", lambda u: warned.append(u.text))
        assert any("refused: it does not match its checksum" in text for text in warned)
        assert outcome(done) == outcome(whole)

    def test_all_damaged_starts_over(self, tmp_path):
        recipe = tiny()
        whole = run(recipe, 0, tmp_path / "whole")
        self._stop_at(recipe, tmp_path / "cut", 6)
        for path in (run_directory(tmp_path / "cut", recipe, 0) / "checkpoints").iterdir():
            path.write_bytes(b"gone")
        assert outcome(run(recipe, 0, tmp_path / "cut")) == outcome(whole)

    def test_a_newer_format_is_no_reason_to_start_over(self, tmp_path, feather, monkeypatch):
        recipe = tiny()
        monkeypatch.setattr(checkpoint, "VERSION", 2)
        self._stop_at(recipe, tmp_path / "runs", 4)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        code, _, err = feather("federate", "federated-digits", *TINY)
        assert code == 2
        assert "written by a newer featherweight" in err

    def test_two_processes_keep_out_of_each_others_way(self, tmp_path, feather):
        from filelock import FileLock

        directory = run_directory(tmp_path / "runs", tiny(), 0)
        directory.mkdir(parents=True)
        with FileLock(directory / "lock"):
            code, _, err = feather("federate", "federated-digits", *TINY)
        assert (code, "in use by another process" in err) == (2, True)

    @staticmethod
    def _stop_at(recipe, out, rounds):
        def kill(update):
            if update.done == rounds:
                raise Killed

        with pytest.raises(Killed):
            run(recipe, 0, out, kill)


class TestIdentity:
    def test_neutral_keys_keep_the_folder(self):
        assert identity(tiny()) == identity(tiny("execute.threads=2", "seeds=[4]"))
        assert identity(tiny()) != identity(tiny("rounds=7"))
        assert identity(tiny()) != identity(tiny("codec.options.values=float16"))

    def test_the_hash_is_pinned(self):
        (recipe,) = load("federated-digits", ["rounds=7"])
        assert identity(recipe) == "federated-digits-7cf3de70"
