"""Runs under attack: killed, locked out, short of disk, diverged. Nothing done may be lost."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

from featherweight.common import write_text
from featherweight.lab import checkpoint, cost, runs, setup
from featherweight.lab.errors import BadInput, RunFailed
from featherweight.lab.parse import build, to_yaml
from featherweight.lab.recipe import Recipe
from featherweight.lab.runs import Update, is_complete, run, run_directory
from featherweight.sparse import Masks

TINY = [
    ("data.limit", 120),
    ("model.options.width", 12),
    ("fit.length", "2ep"),
    ("fit.batch_size", 32),
    ("execute.device", "cpu"),
    ("execute.checkpoint_seconds", 0),
]
"""Four steps an epoch; a level takes some hundredths of a second."""


def tiny(**changes: object) -> Recipe:
    """Make a recipe; ``sparse__method`` stands for ``sparse.method``."""
    pairs = [(key.replace("__", "."), value) for key, value in changes.items()]
    return build({"name": "tiny"}, [*TINY, *pairs])


METHODS: dict[str, dict[str, object]] = {
    "dense": {},
    "random": {"sparse__method": "random", "sparse__density": 0.3, "sparse__allocation": "erk"},
    "lrr": {"sparse__method": "lrr", "sparse__levels": 2, "sparse__per_level": 0.5},
    "imp": {"sparse__method": "imp", "sparse__levels": 2, "sparse__per_level": 0.5},
    "wr": {"sparse__method": "wr", "sparse__levels": 2, "sparse__rewind": "1ep"},
    "lrr, warm-up of three epochs": {
        "sparse__method": "lrr",
        "sparse__levels": 1,
        "sparse__rewind": "11it",
    },
    "lrr, random criterion": {
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__criterion": "random",
    },
    "lrr, shuffled magnitudes": {
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__reset": ["shuffled-magnitudes", "norms"],
    },
    "lrr, adamw, state carried": {
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__optimizer_state": "carry",
        "fit__optimizer": "adamw",
        "fit__learning_rate": 0.003,
    },
    "lrr, adamw, state rewound": {
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__rewind": "1ep",
        "sparse__optimizer_state": "rewind",
        "fit__optimizer": "adamw",
        "fit__learning_rate": 0.003,
    },
    "lrr, length in steps, augmented, clipped": {
        "sparse__method": "lrr",
        "sparse__levels": 1,
        "fit__length": "9it",
        "fit__clip": 0.5,
        "fit__label_smoothing": 0.1,
        "data__augment": "crop-flip",
    },
    "convolutions, channels last, bf16": {
        "model__name": "resnet20",
        "model__options": {"width": 2},
        "data__limit": 40,
        "sparse__method": "imp",
        "sparse__levels": 1,
        "execute__channels_last": True,
        "execute__precision": "bf16",
    },
    "convolutions, channels last, adamw, state rewound": {
        "model__name": "resnet20",
        "model__options": {"width": 2},
        "data__limit": 40,
        "sparse__method": "lrr",
        "sparse__levels": 2,
        "sparse__rewind": "2ep",
        "sparse__optimizer_state": "rewind",
        "fit__length": "1ep",
        "fit__optimizer": "adamw",
        "execute__channels_last": True,
    },
}


class Killed(BaseException):
    """Stands for kill -9: nothing in the package may catch it."""


def killer(epoch: int):
    """Return a listener that dies in the given epoch of its process: logged, not saved."""
    seen = [0]

    def listen(update: Update) -> None:
        assert not update.warning, update.text
        seen[0] += 1
        if seen[0] == epoch:
            raise Killed

    return listen


def run_until_killed(recipe: Recipe, folder: Path, epoch: int) -> bool:
    """Run; tell whether it was killed before its end."""
    try:
        run(recipe, 0, folder, killer(epoch))
    except Killed:
        return True
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    """One uninterrupted run of each method."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: run(tiny(**changes), 0, folder) for name, changes in METHODS.items()}


def content(directory: Path) -> dict[str, bytes]:
    """Return all that a run leaves but wall-clock times, by relative name."""
    timed = ("timing.jsonl", "result.json", "environment.json", "lock")
    files = [p for p in directory.rglob("*") if p.is_file() and p.name not in timed]
    return {
        str(p.relative_to(directory)): exact(p) for p in files if p.parent.name != "tensorboard"
    }


def exact(path: Path) -> bytes:
    """Return a file's bytes; of masks what they hold: safetensors orders its metadata at random."""
    if path.name != "masks.safetensors":
        return path.read_bytes()
    return b"".join(n.encode() + m.numpy().tobytes() for n, m in Masks.load(path).items())


def assert_same_run(one: Path, other: Path) -> None:
    first, second = content(one), content(other)
    assert set(first) == set(second)
    assert [name for name in first if first[name] != second[name]] == []
    results = [json.loads((d / "result.json").read_text()) | {"seconds": 0} for d in (one, other)]
    assert results[0] == results[1]
    stages = [[(t["stage"], t["epoch"]) for t in rows(d, "timing")] for d in (one, other)]
    assert stages[0] == stages[1]


def rows(directory: Path, log: str) -> list[dict]:
    return [json.loads(line) for line in (directory / f"{log}.jsonl").read_text().splitlines()]


class TestWholeRuns:
    def test_leave_these_files(self, whole):
        assert set(content(whole["lrr"])) == {
            "metrics.jsonl",
            "levels.jsonl",
            *(
                f"level-0{level}/{name}.safetensors"
                for level in range(3)
                for name in ("model", "masks", "packed")
            ),
        }
        assert list((whole["lrr"] / "checkpoints").iterdir()) == []
        assert len(list((whole["lrr"] / "tensorboard").iterdir())) == 1

    def test_logs_hold_no_wall_clock(self, whole):
        for row in rows(whole["lrr"], "metrics") + rows(whole["lrr"], "levels"):
            assert not [key for key in row if "second" in key or "time" in key]

    def test_same_seed_same_bits_other_seed_others(self, whole, tmp_path):
        again, other = (run(tiny(**METHODS["lrr"]), seed, tmp_path) for seed in (0, 1))
        assert_same_run(again, whole["lrr"])
        assert content(other)["metrics.jsonl"] != content(again)["metrics.jsonl"]

    def test_masks_and_zeros_agree_and_counts_are_exact(self, whole):
        for level, row in enumerate(rows(whole["imp"], "levels")):
            masks = Masks.load(whole["imp"] / f"level-0{level}" / "masks.safetensors")
            assert masks.nonzeros == row["nonzeros"] == round(0.5**level * masks.numel)

    def test_a_complete_run_is_not_touched(self, whole):
        def times() -> dict[Path, tuple[int, int]]:
            around = [*whole["lrr"].parent.rglob("*")]
            return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in around}

        before = times()
        assert run(tiny(**METHODS["lrr"]), 0, whole["lrr"].parent.parent) == whole["lrr"]
        assert times() == before

    def test_settings_of_the_process_are_put_back(self, tmp_path):
        before = torch.get_num_threads(), torch.get_float32_matmul_precision()
        run(
            tiny(execute__threads=2, execute__matmul_precision="medium", fit__length="1it"),
            0,
            tmp_path,
        )
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == before

    def test_no_training_at_all(self, tmp_path):
        directory = run(tiny(fit__length="0ep", **METHODS["lrr"]), 0, tmp_path)
        assert not (directory / "metrics.jsonl").exists()
        assert len(rows(directory, "levels")) == 3

    def test_without_validation(self, tmp_path):
        directory = run(tiny(data__validation=0), 0, tmp_path)
        assert [row["validation_loss"] for row in rows(directory, "metrics")] == [None, None]

    @pytest.mark.parametrize("images", [33, 65])
    def test_a_last_batch_of_one_image_does_not_stop_batch_norm(self, images, tmp_path):
        directory = run(tiny(data__limit=images, data__validation=0), 0, tmp_path)
        assert rows(directory, "metrics")[-1]["steps"] == 2 * (images // 32)

    def test_a_last_batch_of_two_is_trained_on(self, tmp_path):
        directory = run(tiny(data__limit=66, data__validation=0), 0, tmp_path)
        assert rows(directory, "metrics")[-1]["steps"] == 6


class TestKilled:
    @pytest.mark.parametrize("name", METHODS)
    def test_in_every_epoch_one_after_the_other(self, name, whole, tmp_path):
        # Each process saves one epoch and dies in the next, whose line must be cut off the log.
        recipe = tiny(**METHODS[name])
        starts = 1
        while run_until_killed(recipe, tmp_path, epoch=2):
            starts += 1
            assert starts < 20, "does not get on"
        assert starts == len(rows(whole[name], "metrics"))
        assert_same_run(run_directory(tmp_path, recipe, 0), whole[name])

    @pytest.mark.parametrize(
        ("name", "needed"), [("imp", 3), ("wr", 4), ("lrr, random criterion", 3)]
    )
    def test_without_a_checkpoint_inside_the_level(self, name, needed, whole, tmp_path):
        recipe = tiny(**METHODS[name] | {"execute__checkpoint_seconds": 1000})
        starts = 1
        while run_until_killed(recipe, tmp_path, epoch=3):
            starts += 1
            assert starts < 20, "does not get on"
        assert starts == needed
        assert_same_run(run_directory(tmp_path, recipe, 0), whole[name])

    @pytest.mark.parametrize(
        "function",
        ["save_packed", "write_text", "save", "discard", "tensorboard", "evaluate", "save_file"],
    )
    @pytest.mark.parametrize("nth", [1, 2, 3])
    def test_before_and_after_each_write(self, function, nth, whole, tmp_path, monkeypatch):
        recipe = tiny(**METHODS["lrr"])
        owners = {"save_packed": cost, "save_file": cost, "save": checkpoint, "discard": checkpoint}
        owner = owners.get(function, runs)
        original, calls = getattr(owner, function), [0]

        def deadly(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == nth:
                raise Killed
            result = original(*args, **kwargs)
            if calls[0] == nth - 1:
                raise Killed
            return result

        monkeypatch.setattr(owner, function, deadly)
        for _ in range(3):
            try:
                run(recipe, 0, tmp_path)
            except Killed:
                continue
            break
        monkeypatch.undo()
        assert calls[0] >= 1
        assert_same_run(run(recipe, 0, tmp_path), whole["lrr"])

    def test_what_a_killed_write_leaves_is_removed(self, whole, tmp_path):
        recipe = tiny(**METHODS["imp"])
        with pytest.raises(Killed):
            run(recipe, 0, tmp_path, killer(3))
        directory = run_directory(tmp_path, recipe, 0)
        for name in (
            "checkpoints/.000007.safetensors.a_b1c2d3",
            "checkpoints/.tmpA1b2C3",
            "level-00/.model.safetensors.abcdefgh",
            ".result.json.abcdefgh",
        ):
            (directory / name).write_text("half")
        assert_same_run(run(recipe, 0, tmp_path), whole["imp"])

    def test_files_of_the_user_stay(self, tmp_path):
        recipe = tiny()
        directory = run_directory(tmp_path, recipe, 0)
        directory.mkdir(parents=True)
        for name in (".notes", "notes.txt", ".hidden.json"):
            (directory / name).write_text("mine")
        run(recipe, 0, tmp_path)
        assert all((directory / name).exists() for name in (".notes", "notes.txt", ".hidden.json"))

    def test_goes_on_with_the_threads_it_had(self, tmp_path):
        # Another number of threads rounds otherwise, and --jobs may leave another number.
        recipe = tiny(**METHODS["lrr"] | {"fit__length": "1it"})
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            with pytest.raises(Killed):
                run(recipe, 0, tmp_path, killer(2))
            torch.set_num_threads(1)
            directory = run(recipe, 0, tmp_path)
        finally:
            torch.set_num_threads(before)
        assert json.loads((directory / "environment.json").read_text())["threads"] == 2

    def test_neutral_changes_may_be_made_in_between(self, whole, tmp_path):
        with pytest.raises(Killed):
            run(tiny(**METHODS["lrr"]), 0, tmp_path, killer(3))
        other = tiny(**METHODS["lrr"] | {"execute__checkpoint_seconds": 99, "seeds": [0, 1]})
        assert_same_run(run(other, 0, tmp_path), whole["lrr"])


def interrupted(folder: Path, name: str = "lrr", epoch: int = 4) -> tuple[Recipe, Path]:
    """Leave a run that has two checkpoints."""
    recipe = tiny(**METHODS[name])
    with pytest.raises(Killed):
        run(recipe, 0, folder, killer(epoch))
    directory = run_directory(folder, recipe, 0)
    assert len(list((directory / "checkpoints").glob("[0-9]*.json"))) == 2
    return recipe, directory


def heard(recipe: Recipe, folder: Path) -> list[str]:
    """Finish a run and return its warnings."""
    updates: list[Update] = []
    run(recipe, 0, folder, updates.append)
    return [update.text for update in updates if update.warning]


class TestDamaged:
    @pytest.mark.parametrize("kind", ["json", "safetensors"])
    @pytest.mark.parametrize("name", ["lrr", "imp"])
    def test_the_checkpoint_before_is_used(self, kind, name, whole, tmp_path):
        recipe, directory = interrupted(tmp_path, name)
        path = sorted((directory / "checkpoints").glob(f"[0-9]*.{kind}"))[-1]
        path.write_bytes(path.read_bytes()[:-30])
        (warning,) = heard(recipe, tmp_path)
        assert f"checkpoint {path.stem} refused: " in warning
        assert_same_run(directory, whole[name])

    @pytest.mark.parametrize("name", ["lrr", "imp"])
    def test_without_any_whole_one_it_starts_over(self, name, whole, tmp_path):
        recipe, directory = interrupted(tmp_path, name)
        for path in (directory / "checkpoints").glob("[0-9]*.safetensors"):
            path.write_bytes(b"")
        assert len(heard(recipe, tmp_path)) == 2
        assert_same_run(directory, whole[name])

    def test_a_damaged_rewinding_point_is_written_anew(self, whole, tmp_path):
        # It used to be kept for its name, and each later checkpoint was refused on its account.
        recipe, directory = interrupted(tmp_path, "imp")
        (path,) = (directory / "checkpoints").glob("rewind-*")
        path.write_bytes(path.read_bytes()[:-1])
        kill = killer(2)
        with pytest.raises(Killed):
            run(recipe, 0, tmp_path, lambda u: None if u.warning else kill(u))
        assert checkpoint.newest(directory / "checkpoints")[0] is not None
        assert heard(recipe, tmp_path) == []
        assert_same_run(directory, whole["imp"])

    def test_one_of_a_newer_version_stops_the_run_and_stays(self, tmp_path):
        recipe, directory = interrupted(tmp_path)
        paths = sorted((directory / "checkpoints").glob("[0-9]*.json"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "VERSION", 0)
            before = content(directory)
            with pytest.raises(BadInput, match="newer featherweight"):
                run(recipe, 0, tmp_path)
        assert content(directory) == before
        assert all(path.exists() for path in paths)

    @pytest.mark.parametrize("log", ["metrics", "levels", "timing"])
    def test_a_log_that_was_cut_by_hand_stops_the_run(self, log, tmp_path):
        recipe, directory = interrupted(tmp_path)
        path = directory / f"{log}.jsonl"
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(RunFailed, match=f"{log}.jsonl has .* to start over, remove"):
            run(recipe, 0, tmp_path)

    def test_a_log_with_half_a_line_is_cut_back(self, whole, tmp_path):
        recipe, directory = interrupted(tmp_path)
        with (directory / "metrics.jsonl").open("a") as file:
            file.write('{"stage": "level-0')
        assert_same_run(run(recipe, 0, tmp_path), whole["lrr"])

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"threads": "two"}', '{"threads": null}'])
    def test_what_it_ran_on_need_not_be_readable(self, text, whole, tmp_path):
        recipe, directory = interrupted(tmp_path)
        (directory / "environment.json").write_text(text)
        assert_same_run(run(recipe, 0, tmp_path), whole["lrr"])

    def test_a_model_that_has_changed_is_one_line(self, tmp_path, monkeypatch):
        recipe = tiny(model__name="tests.lab.test_runs:changing", model__options={})
        monkeypatch.setattr(sys.modules[__name__], "WIDTH", 7)
        with pytest.raises(Killed):
            run(recipe, 0, tmp_path, killer(2))
        monkeypatch.setattr(sys.modules[__name__], "WIDTH", 8)
        with pytest.raises(BadInput, match="is of another model") as caught:
            run(recipe, 0, tmp_path)
        assert "\n" not in str(caught.value)


def no_module(classes: int, shape: tuple[int, ...]) -> dict:
    return {}


WIDTH = 7


def changing(classes: int, shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))


class Explodes(nn.Module):
    """Gives NaN from the given call in training mode on."""

    def __init__(self, classes: int, call: int) -> None:
        super().__init__()
        self.linear, self.left = nn.Linear(64, classes), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        return self.linear(x.flatten(1)) * (float("nan") if self.left < 0 else 1.0)


def explodes(classes: int, shape: tuple[int, ...], call: int) -> nn.Module:
    return Explodes(classes, call)


class BadGradient(Explodes):
    """Gives finite logits throughout, and a NaN gradient from the given call on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        logits = self.linear(x.flatten(1))
        if self.left < 0 and self.training:
            logits.register_hook(lambda gradient: gradient * float("nan"))
        return logits


def bad_gradient(classes: int, shape: tuple[int, ...], call: int) -> nn.Module:
    return BadGradient(classes, call)


class HeldOutNan(Explodes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1)) * (1.0 if self.training else float("nan"))


def held_out_nan(classes: int, shape: tuple[int, ...]) -> nn.Module:
    return HeldOutNan(classes, 0)


class TestDiverged:
    def explode(self, call: int, folder: Path, **changes: object) -> str:
        recipe = tiny(
            model__name="tests.lab.test_runs:explodes", model__options={"call": call}, **changes
        )
        with pytest.raises(RunFailed) as caught:
            run(recipe, 0, folder)
        assert "\n" not in str(caught.value)
        assert not is_complete(run_directory(folder, recipe, 0))
        return str(caught.value)

    def test_before_any_checkpoint(self, tmp_path):
        said = self.explode(1, tmp_path)
        assert said == "the loss became nan in epoch 0 of level 0; no checkpoint was made before"

    @pytest.mark.parametrize(
        ("call", "place"),
        [
            (4, "epoch 1 of level 0; the last good checkpoint is level 0, epoch 1,"),
            (9, "epoch 0 of level 1; the last good checkpoint is level 0, epoch 2,"),
        ],
    )
    def test_the_last_good_checkpoint_is_named_and_is_good(self, call, place, tmp_path):
        said = self.explode(call, tmp_path, **METHODS["lrr"])
        assert place in said
        directory = Path(said.rpartition(" in ")[2])
        found, _ = checkpoint.newest(directory / "checkpoints")
        assert all(t.isfinite().all() for t in found.model.values())
        assert all(row["train_loss"] == row["train_loss"] for row in rows(directory, "metrics"))

    @pytest.mark.parametrize("rate", [1e20, 1e38])
    @pytest.mark.parametrize("length", ["1it", "1ep"])
    def test_a_huge_learning_rate(self, rate, length, tmp_path):
        # After a single step the loss of that step is finite still, the weights are not.
        recipe = tiny(fit__learning_rate=rate, fit__length=length, **METHODS["lrr"])
        with pytest.raises(RunFailed, match="became"):
            run(recipe, 0, tmp_path)
        assert not is_complete(run_directory(tmp_path, recipe, 0))

    def test_nan_weights_behind_a_finite_loss_are_not_saved(self, tmp_path):
        # The last step of the second epoch spoils the weights; its loss was taken before.
        recipe = tiny(
            model__name="tests.lab.test_runs:bad_gradient",
            model__options={"call": 7},
            data__validation=0,
            fit__length="3ep",
        )
        with pytest.raises(
            RunFailed, match="a weight became infinite or NaN in epoch 1 of level 0"
        ):
            run(recipe, 0, tmp_path)
        found, _ = checkpoint.newest(run_directory(tmp_path, recipe, 0) / "checkpoints")
        assert found.position.epochs == 1
        assert all(tensor.isfinite().all() for tensor in found.model.values())

    @pytest.mark.parametrize("validation", [0, 0.1])
    def test_nan_on_held_out_images(self, validation, tmp_path):
        recipe = tiny(
            model__name="tests.lab.test_runs:held_out_nan",
            model__options={},
            data__validation=validation,
        )
        with pytest.raises(RunFailed, match="held-out images became nan; "):
            run(recipe, 0, tmp_path)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestDisk:
    @pytest.mark.parametrize("nth", range(1, 22, 3))
    def test_full_at_any_flush_loses_nothing(self, nth, whole, tmp_path, monkeypatch):
        calls, original = [0], os.fsync

        def fsync(handle: int) -> None:
            calls[0] += 1
            if calls[0] >= nth:  # and it stays full
                raise FULL
            original(handle)

        recipe = tiny(**METHODS["imp"])
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            with pytest.raises(
                RunFailed, match="No space left on device; what was saved before is kept"
            ):
                run(recipe, 0, tmp_path)
        assert not list(tmp_path.rglob(".*"))
        assert_same_run(run(recipe, 0, tmp_path), whole["imp"])

    def test_really_too_small(self, whole, tmp_path):
        # The limit on the size of files stands for a full disk: the system itself refuses.
        recipe = tiny(**METHODS["imp"])
        limit = (whole["imp"] / "level-00" / "model.safetensors").stat().st_size + 500
        code = (
            "import resource, sys, pathlib\n"
            "from featherweight.lab.runs import run\n"
            "from featherweight.lab.parse import load\n"
            "from featherweight.lab.errors import RunFailed\n"
            "recipe = load(sys.argv[1])[0]\n"
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "try: run(recipe, 0, pathlib.Path(sys.argv[2]))\n"
            "except RunFailed as error: print(error); sys.exit(1)\n"
        )
        write_text(tmp_path / "tiny.yaml", to_yaml(recipe))
        done = python("-c", code, tmp_path / "tiny.yaml", tmp_path / "out")
        assert (done.returncode, done.stderr) == (1, "")
        assert "what was saved before is kept" in done.stdout
        assert len(done.stdout.splitlines()) == 1
        assert_same_run(run(recipe, 0, tmp_path / "out"), whole["imp"])

    def test_out_is_a_file(self, tmp_path):
        (tmp_path / "out").write_text("mine")
        with pytest.raises(BadInput, match=r"cannot write .*out"):
            run(tiny(), 0, tmp_path / "out")
        assert (tmp_path / "out").read_text() == "mine"

    @pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EPERM])
    def test_not_writable(self, code, tmp_path, monkeypatch):
        def mkdir(self: Path, *_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code), str(self))

        monkeypatch.setattr(Path, "mkdir", mkdir)
        with pytest.raises(BadInput, match=f"cannot write .*{os.strerror(code)}"):
            run(tiny(), 0, tmp_path)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_really_not_writable(self, tmp_path):
        (tmp_path / "out").mkdir(mode=0o500)
        with pytest.raises(BadInput, match="Permission denied"):
            run(tiny(), 0, tmp_path / "out")

    def test_a_name_longer_than_the_system_allows(self, tmp_path):
        with pytest.raises(BadInput, match="name too long"):
            run(tiny(name="n" * 300), 0, tmp_path)


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            (
                {"data__name": "cifar10", "data__path": "/nowhere"},
                "data: .*no such file or folder /nowhere",
            ),
            ({"data__name": "mnist"}, "data: .*needs path="),
            ({"data__path": "/nowhere"}, "data: .*leave out path"),
            ({"data__limit": 10**6}, "data: limit must be"),
            ({"data__limit": 3, "data__validation": 0.9}, "data: validation"),
            ({"data__limit": 1, "data__validation": 0}, "data: 1 training images are too few"),
            ({"model__options": {"widht": 3}}, "model: .*did you mean 'width'"),
            ({"model__options": {"width": 0}}, "model: width must be"),
            ({"model__options": {"width": 10**13}}, "model: .*allocate"),
            ({"model__name": "no.such:function"}, "model: .*cannot import 'no.such'"),
            ({"model__name": "os:getcwd"}, "model: .*TypeError"),
            (
                {"model__name": "tests.lab.test_runs:no_module", "model__options": {}},
                "model: .*returned a dict",
            ),
            (
                {"model__name": "hf", "model__options": {"path": "/nowhere"}},
                "model: .*existing folder",
            ),
            ({"sparse__method": "lrr", "sparse__density": 1e-9}, "sparse: .*keeps none"),
            ({"sparse__method": "wr", "sparse__levels": 1}, "sparse: wr needs sparse.rewind"),
            (
                {"sparse__method": "random", "sparse__include": ["conv*"]},
                "sparse: pattern 'conv\\*'",
            ),
            (
                {"sparse__method": "lrr", "sparse__masks_from": "/nowhere"},
                "sparse: masks_from: .*no finished run",
            ),
        ],
    )
    def test_is_one_line_and_leaves_no_lock(self, changes, said, tmp_path):
        recipe = tiny(**changes)
        for _ in range(2):
            with pytest.raises(BadInput, match=said) as caught:
                run(recipe, 0, tmp_path)
            assert "\n" not in str(caught.value)

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without a GPU")
    @pytest.mark.parametrize("device", ["cuda", "mps"])
    def test_a_device_that_is_not_there(self, device, tmp_path):
        with pytest.raises(BadInput, match=f"this machine has no {device}"):
            run(tiny(execute__device=device), 0, tmp_path)

    def test_masks_of_fewer_levels_or_another_model(self, whole, tmp_path):
        shallow = whole["lrr, warm-up of three epochs"].parent
        deeper = tiny(sparse__method="lrr", sparse__levels=3, sparse__masks_from=str(shallow))
        with pytest.raises(BadInput, match=r"sparse: no mask file at .*level-02"):
            run(deeper, 0, tmp_path)
        wider = tiny(
            sparse__method="lrr",
            sparse__levels=1,
            sparse__masks_from=str(shallow),
            model__options={"width": 13},
        )
        with pytest.raises(BadInput, match="sparse: masks do not fit"):
            run(wider, 0, tmp_path)

    def test_masks_of_another_run_are_used(self, whole, tmp_path):
        source = whole["imp"].parent
        directory = run(tiny(**METHODS["lrr"], sparse__masks_from=str(source)), 0, tmp_path)
        for level in range(3):
            name = f"level-0{level}/masks.safetensors"
            assert exact(directory / name) == exact(whole["imp"] / name)

    def test_data_that_cannot_be_read(self, tmp_path, monkeypatch):
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "/data/file")

        monkeypatch.setattr(setup, "load_data", refuse)
        with pytest.raises(BadInput, match=r"data: .*Permission denied: '/data/file'"):
            run(tiny(), 0, tmp_path)


class TestLock:
    def test_another_run_in_the_same_directory_is_refused(self, whole, tmp_path):
        recipe = tiny(**METHODS["lrr"])
        refusals = []

        def second(update: Update) -> None:
            with pytest.raises(BadInput) as caught:
                run(recipe, 0, tmp_path)
            refusals.append(str(caught.value))

        directory = run(recipe, 0, tmp_path, second)
        assert set(refusals) == {f"{directory} is in use by another process"}
        assert_same_run(directory, whole["lrr"])

    def test_is_free_after_a_failure(self, tmp_path):
        recipe, directory = interrupted(tmp_path)
        with FileLock(directory / "lock", timeout=0):
            pass
        assert run(recipe, 0, tmp_path) == directory

    def test_other_seeds_are_not_locked(self, tmp_path):
        recipe = tiny()
        first = run_directory(tmp_path, recipe, 0)
        first.mkdir(parents=True)
        with FileLock(first / "lock"):
            run(recipe, 1, tmp_path)


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


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
