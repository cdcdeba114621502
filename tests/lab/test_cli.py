"""The command line: help with examples, exit codes, no traceback for anything a user may type."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from featherweight.lab import cli, launch
from featherweight.lab.claims import CLAIMS
from featherweight.lab.data import DATA
from featherweight.lab.errors import RunFailed
from featherweight.lab.identity import identity
from featherweight.lab.models import MODELS
from featherweight.lab.parse import describe, load, shipped
from featherweight.sparse import CRITERIA, DENSITIES, LOOPS, RESETS

COMMANDS = ["ls", "show", "cp", "run", "report", "claims", "doctor"]
TINY = [
    "data.limit=120",
    "model.options.width=8",
    "fit.length=1ep",
    "execute.device=cpu",
    "seeds=[0]",
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


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_has_an_example_of_itself(self, command, feather):
        code, out, err = feather(command, "--help")
        assert (code, err) == (0, "")
        assert re.search(rf"Example: featherweight {command}\b", out)

    def test_lists_all_commands(self, feather):
        code, out, _ = feather("--help")
        assert code == 0
        assert all(re.search(rf"^\W*{command}\b", out, re.MULTILINE) for command in COMMANDS)

    @pytest.mark.parametrize("command", COMMANDS)
    def test_examples_are_valid_commands(self, command, feather, monkeypatch):
        kinds = [kind for kind in vars(cli).values() if dataclasses.is_dataclass(kind)]
        called = []
        for kind in kinds:
            monkeypatch.setattr(kind, "execute", lambda self: called.append(type(self).__name__))
        _, out, _ = feather(command, "--help")
        example = re.search(r"Example: featherweight (.+?)\s*(│|$)", out, re.MULTILINE)
        assert feather(*example[1].split())[0] == 0
        assert called == [command.capitalize()]

    def test_no_command_is_an_error(self, feather):
        assert feather()[0] == 2


BAD = """
wrong
run
run no-such-recipe
run lrr-digits fit.lenght=3ep
run lrr-digits fit.length=3
run lrr-digits fit.length=0x_
run lrr-digits fit.length=[
run lrr-digits fit.learning_rate=.nan
run lrr-digits seeds=0
run lrr-digits =
run lrr-digits --jobs 0
run lrr-digits --jobs many
run lrr-digits --jobs
run lrr-digits --no-such-option
run lrr-digits --out
run lrr-digits --out file
run lrr-digits --out file/below
run lrr-digits sparse.density=1e-9
run lrr-digits sparse.include=[none*]
run lrr-digits sparse.masks_from=nowhere
run lrr-digits sparse.method=wr
run dense-digits data.path=nowhere
run dense-digits data.name=cifar10
run dense-digits data.name=cifar10 data.path=nowhere
run dense-digits data.name=cifar10 data.path=file
run dense-digits data.name=image-folder data.path=.
run dense-digits data.limit=5000
run dense-digits model.name=no.such:function
run dense-digits model.name=:
run dense-digits model.name=os:
run dense-digits model.options.width=a
run dense-digits model.name=vgg16
run file
run .
run binary
report
report nowhere
report file
report .
claims run
claims run no-such-claim
claims run all --jobs 0
claims run all --scale paper
claims run all --scale huge
claims walk
show
show no-such-name
cp
cp no-such-recipe
cp lrr-digits file
cp lrr-digits file/below
ls no-such-kind
doctor --quickly
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
        assert (tmp_path / "file").read_text() == "no recipe"
        if err.startswith("featherweight: "):
            assert len(err.splitlines()) == 1

    @pytest.mark.parametrize("name", ["a" * 300, "\udcff", "a\nb"])
    def test_strange_words(self, name, feather):
        for words in (
            ["run", name],
            ["show", name],
            ["cp", name],
            ["run", "dense-digits", f"name={name}"],
        ):
            code, _, err = feather(*words)
            assert code == 2, err
            assert "Traceback" not in err

    def test_several_ranks_and_several_jobs(self, feather, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, _, err = feather("run", "dense-digits", "--jobs", 2)
        assert (code, "ranks" in err) == (2, True)

    def test_as_a_process(self, tmp_path):
        # What the parametrised cases above see in one process holds of a real one.
        done = subprocess.run(
            [sys.executable, "-m", "featherweight.lab.cli", "run", "lrr-digit"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"featherweight: error: .*did you mean 'lrr-digits'.*\n", done.stderr)
        assert list(tmp_path.iterdir()) == []


class TestRun:
    def test_runs_reports_and_has_nothing_to_do_again(self, feather, tmp_path):
        words = ["run", "dense-digits", *TINY, "--report"]
        code, out, err = feather(*words)
        assert (code, err) == (0, "")
        assert out.startswith("1 runs in runs\n")
        assert "done: dense-digits seed 0" in out
        assert (tmp_path / "runs" / "report").is_dir()
        (name,) = {identity(recipe) for recipe in load("dense-digits", TINY)}
        assert (tmp_path / "runs" / name / "seed-0" / "result.json").is_file()
        code, out, _ = feather(*words)
        assert code == 0
        assert "1 of 1 runs are complete already" in out
        assert "done: " not in out

    def test_a_sweep_is_several_runs(self, feather, tmp_path):
        words = ["run", "random-digits", *TINY, "sparse.density=0.5,0.25", "seeds=[0,1]"]
        assert feather(*words)[0] == 0
        found = sorted(tmp_path.glob("runs/random-digits-*/seed-*/result.json"))
        assert len(found) == 4

    def test_a_recipe_named_twice_runs_once(self):
        recipes = load("dense-digits", ["seeds=[3,3]"]) + load("dense-digits", ["seeds=[3]"])
        assert [task.label for task in launch.tasks(recipes)] == ["dense-digits seed 3"]

    def test_failure_is_one(self, feather):
        code, out, err = feather("run", "dense-digits", *TINY, "fit.learning_rate=1e30")
        assert code == 1
        assert re.fullmatch(r"featherweight: failed: .*became.*\n", err)
        assert "done" not in out

    def test_interruption_is_one_and_says_what_to_type(self, feather, monkeypatch):
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(launch, "run", interrupt)
        code, _, err = feather("run", "dense-digits", "name=it's", "--out", "a b")
        assert code == 2  # such a name is refused
        code, _, err = feather("run", "dense-digits", "seeds=[0, 1]", "--out", "a b")
        assert code == 1
        assert err.endswith(
            "go on with:\n  featherweight run dense-digits 'seeds=[0, 1]' --out 'a b'\n"
        )

    def test_the_first_failure_of_parallel_jobs_is_one_line(self, feather):
        words = ["run", "dense-digits", *TINY, "fit.learning_rate=1e30", "seeds=[0,1]", "--jobs", 2]
        code, _, err = feather(*words)
        assert code == 1
        assert re.fullmatch(r"featherweight: failed: dense-digits seed [01]: .*became.*\n", err)

    def test_jobs_give_what_one_process_gives(self, tmp_path, feather):
        words = ["run", "dense-digits", *TINY, "execute.threads=1"]
        assert feather(*words, "--out", "one")[0] == 0
        assert feather(*words, "seeds=[0,1]", "--out", "two", "--jobs", 2)[0] == 0
        first, second = ((tmp_path / out).glob("*/seed-0/metrics.jsonl") for out in ("one", "two"))
        assert next(first).read_bytes() == next(second).read_bytes()

    @pytest.mark.parametrize("left", [1, 2])
    def test_threads_follow_from_the_command_not_from_what_is_left(
        self, left, monkeypatch, tmp_path
    ):
        seen = []
        monkeypatch.setattr(launch, "_in_parallel", lambda *call: seen.append(call[2:4]))
        monkeypatch.setattr(launch.os, "cpu_count", lambda: 8)
        monkeypatch.setattr(launch, "is_complete", lambda path: int(path.name[-1]) >= left)
        todo = launch.tasks(load("dense-digits", ["seeds=[0,1,2]"]))
        launch.launch(todo, tmp_path, 2, launch.Console(quiet=True))
        assert seen == [(min(left, 2), 4)]


class TestCp:
    def test_copies_what_show_prints(self, feather, tmp_path):
        code, out, _ = feather("cp", "lrr-digits")
        assert (code, out) == (0, "lrr-digits.yaml\n")
        assert (tmp_path / "lrr-digits.yaml").read_text() == feather("show", "lrr-digits")[1]

    def test_into_a_folder_or_a_new_one(self, feather, tmp_path):
        (tmp_path / "folder").mkdir()
        assert feather("cp", "lrr-digits", "folder")[0] == 0
        assert feather("cp", "lrr-digits", "new/mine.yaml")[0] == 0
        assert (tmp_path / "folder/lrr-digits.yaml").read_text() == (
            tmp_path / "new/mine.yaml"
        ).read_text()

    def test_does_not_overwrite(self, feather, tmp_path):
        (tmp_path / "lrr-digits.yaml").write_text("mine")
        for words in (
            ["lrr-digits"],
            ["imp-digits", "lrr-digits.yaml"],
            ["recipes/lrr-digits.yaml", "."],
        ):
            code, out, err = feather("cp", *words)
            assert (code, out) == (2, "")
            assert "exists already" in err
        assert (tmp_path / "lrr-digits.yaml").read_text() == "mine"

    def test_the_copy_runs_under_its_own_name(self, feather, tmp_path):
        feather("cp", "dense-digits", "mine.yaml")
        assert feather("run", "mine.yaml", *TINY)[0] == 0
        assert len(list(tmp_path.glob("runs/mine-*/seed-0/result.json"))) == 1


REGISTERED = {
    "methods": [*LOOPS, *CRITERIA, *DENSITIES, *RESETS],
    "recipes": list(shipped()),
    "data": list(DATA),
    "models": list(MODELS),
    "claims": list(CLAIMS),
}


class TestLists:
    @pytest.mark.parametrize("kind", REGISTERED)
    def test_every_registered_name_is_listed(self, kind, feather):
        for words in (["ls", kind], ["ls"]):
            code, out, err = feather(*words)
            assert (code, err) == (0, "")
            first = {line.split()[0] for line in out.splitlines() if line.strip()}
            assert set(REGISTERED[kind]) <= first

    def test_one_kind_leaves_the_others_out(self, feather):
        assert "resnet20 " not in feather("ls", "data")[1]

    @pytest.mark.parametrize(
        "name", sorted({name for names in REGISTERED.values() for name in names})
    )
    def test_every_registered_name_can_be_shown(self, name, feather):
        code, out, err = feather("show", name)
        assert (code, err) == (0, "")
        assert name in out
        assert len(out) > 60

    def test_fields_shows_every_key(self, feather):
        code, out, _ = feather("show", "fields")
        assert code == 0
        assert [line.split(":")[0] for line in out.splitlines()[::2]] == [
            key for key, _, _ in describe()
        ]

    def test_claims_are_listed_with_their_papers(self, feather):
        code, out, _ = feather("claims")
        assert code == 0
        for claim in CLAIMS.values():
            assert claim.name in out
            assert claim.paper in out


def test_errors_of_workers_can_cross_processes():
    import pickle

    assert str(pickle.loads(pickle.dumps(RunFailed("why")))) == "why"


@pytest.mark.parametrize(
    "words",
    [
        ["run", "--jobs", "2", "lrr-digits", "--out", "x", "seeds=[0]", "--report"],
        ["run", "lrr-digits", "seeds=[0]", "--jobs", "2", "--out", "x", "--report"],
        ["run", "--report", "lrr-digits", "--out", "x", "--jobs", "2", "seeds=[0]"],
    ],
)
def test_overrides_may_stand_anywhere(words, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.Run, "execute", lambda self: seen.append(self))
    cli.main(words)
    assert seen == [cli.Run(("lrr-digits", "seeds=[0]"), out=Path("x"), jobs=2, report=True)]
