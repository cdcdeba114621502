"""Runs that cannot go on: diverged, short of disk, badly asked for, locked out."""

import errno
import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

from featherweight.common import write_text
from featherweight.lab import checkpoint, setup
from featherweight.lab.errors import BadInput, RunFailed
from featherweight.lab.parse import to_yaml
from featherweight.lab.runs import Update, is_complete, run, run_directory
from tests.lab.tiny_runs import METHODS, assert_same_run, exact, interrupted, python, rows, tiny


def no_module(classes: int, shape: tuple[int, ...]) -> dict:
    return {}


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
            model__name="tests.lab.test_runs_failures:explodes",
            model__options={"call": call},
            **changes,
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
            model__name="tests.lab.test_runs_failures:bad_gradient",
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
            model__name="tests.lab.test_runs_failures:held_out_nan",
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
                {"model__name": "tests.lab.test_runs_failures:no_module", "model__options": {}},
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
