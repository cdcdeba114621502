"""The matched-budget control: what it trains, when it is added, and what a report says of it."""

import json

import pytest

from featherweight.lab import report
from featherweight.lab.control import control, with_controls
from featherweight.lab.identity import distinctive
from featherweight.lab.parse import build, load
from featherweight.lab.runs import run, run_directory
from featherweight.sparse import Masks
from tests.lab.tiny_runs import METHODS, tiny

CYCLIC = tiny(**METHODS["cyclic"])
SCULPT = tiny(**METHODS["sculpt"])


def steps(directory):
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = {}
    for row in map(json.loads, lines):
        last[row["level"]] = row["steps"]
    return sum(last.values())


class TestControl:
    @pytest.mark.parametrize("recipe", [CYCLIC, SCULPT], ids=["cyclic", "sculpt"])
    def test_trains_as_many_steps_at_the_final_density_in_one_level(self, recipe, tmp_path):
        own, other = (run(r, 0, tmp_path) for r in (recipe, control(recipe)))
        assert steps(own) == steps(other) > 0
        assert not (other / "level-01").exists()
        last = max(own.glob("level-*"))
        masks = [Masks.load(f / "masks.safetensors") for f in (last, other / "level-00")]
        assert masks[0].nonzeros == masks[1].nonzeros

    def test_of_cyclic_training_has_the_very_same_masks(self, tmp_path):
        own, other = (run(r, 0, tmp_path) for r in (CYCLIC, control(CYCLIC)))
        masks = [Masks.load(f / "level-00" / "masks.safetensors") for f in (own, other)]
        assert masks[0] == masks[1]

    def test_one_cycle_is_its_own_control(self, tmp_path):
        one = tiny(sparse__method="cyclic", sparse__density=0.3, sparse__options={"cycles": 1})
        own, other = (run(r, 0, tmp_path) for r in (one, control(one)))
        results = [(f / "metrics.jsonl").read_bytes() for f in (own, other)]
        assert results[0] == results[1]

    def test_of_dense_cycles_is_dense(self):
        found = control(tiny(sparse__method="cyclic", sparse__options={"cycles": 3}))
        assert (found.sparse.method, str(found.fit.length)) == ("dense", "6ep")

    def test_milestones_move_along(self):
        steps = {"fit__schedule": "step", "fit__milestones": ["1ep", "3it"], "fit__warmup": "1it"}
        found = control(tiny(**METHODS["cyclic"], **steps)).fit
        assert list(map(str, [found.length, *found.milestones])) == ["6ep", "3ep", "9it"]
        assert str(found.warmup) == "1it"

    def test_other_methods_have_none(self):
        assert control(tiny(**METHODS["lrr"])) is None

    @pytest.mark.parametrize("name", ["cyclic-digits", "sculpt-digits", "sculpt-cifar100"])
    def test_shipped_recipes_have_one(self, name):
        (recipe,) = load(name)
        found = control(recipe)
        assert build({"name": found.name}) is not None
        assert found.fit.length.amount > recipe.fit.length.amount


class TestWithControls:
    def test_follow_their_recipes_once(self):
        found = with_controls([SCULPT, tiny(), SCULPT])
        assert [r.name for r in found] == ["tiny", "tiny-one-schedule", "tiny", "tiny"]

    def test_one_that_is_there_is_not_added(self):
        there = [CYCLIC, control(CYCLIC)]
        assert with_controls(there) == there


class TestReport:
    def test_names_what_is_missing(self, tmp_path):
        directory = run(CYCLIC, 0, tmp_path)
        (line,) = report.matched(report.collect([directory]))
        assert line.control is None
        assert "is missing" in str(line)
        assert "is missing" in report.write([directory], tmp_path / "report").html.read_text()

    def test_compares_seed_by_seed(self, tmp_path):
        other = control(CYCLIC)
        found = [run(r, seed, tmp_path) for r in (CYCLIC, other) for seed in (0, 1)]
        (line,) = report.matched(report.collect(found))
        accuracies = {}
        for recipe in (CYCLIC, other):
            for seed in (0, 1):
                folder = run_directory(tmp_path, recipe, seed)
                result = json.loads((folder / "result.json").read_text())
                accuracies[recipe.name, seed] = result["test_accuracy"]
        gains = [accuracies["tiny", s] - accuracies["tiny-one-schedule", s] for s in (0, 1)]
        assert line.gain == pytest.approx(sum(gains) / 2)
        assert line.low <= line.gain <= line.high
        assert f"{100 * line.gain:+.1f} points" in str(line)
        assert distinctive(other)["fit.length"] == "6ep"

    def test_without_cycles_there_is_nothing_to_say(self, tmp_path):
        assert report.matched(report.collect([run(tiny(), 0, tmp_path)])) == ()
