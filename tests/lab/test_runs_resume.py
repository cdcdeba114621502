"""Runs that are whole, killed at any moment, or damaged: each ends as if nothing had happened."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from featherweight.lab import checkpoint, cost, runs
from featherweight.lab.errors import BadInput, RunFailed
from featherweight.lab.recipe import Recipe
from featherweight.lab.runs import Update, run, run_directory
from featherweight.sparse import Masks
from tests.lab.tiny_runs import (
    METHODS,
    Killed,
    assert_same_run,
    content,
    interrupted,
    killer,
    rows,
    run_until_killed,
    tiny,
)


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
        recipe = tiny(model__name="tests.lab.test_runs_resume:changing", model__options={})
        monkeypatch.setattr(sys.modules[__name__], "WIDTH", 7)
        with pytest.raises(Killed):
            run(recipe, 0, tmp_path, killer(2))
        monkeypatch.setattr(sys.modules[__name__], "WIDTH", 8)
        with pytest.raises(BadInput, match="is of another model") as caught:
            run(recipe, 0, tmp_path)
        assert "\n" not in str(caught.value)


WIDTH = 7


def changing(classes: int, shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, classes))
