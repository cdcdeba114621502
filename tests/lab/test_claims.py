"""Claims: the statistics against scipy, every claim's recipes, and one experiment end to end."""

import json
import re
from dataclasses import replace
from math import inf
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from featherweight.lab.claims import CLAIMS, Claim, interval, judge
from featherweight.lab.claims.claim import (
    Computed,
    Settings,
    Trained,
    Tuned,
    accuracy_gain,
    last_validation,
    levels,
)
from featherweight.lab.claims.command import list_claims, run_claims, verdicts
from featherweight.lab.claims.masks_signs_lrr import _flip_gain
from featherweight.lab.control import control
from featherweight.lab.errors import BadInput, RunFailed
from featherweight.lab.identity import distinctive, identity
from featherweight.lab.parse import load

EVERY = list(CLAIMS.values())
TRAINED = [claim for claim in EVERY if isinstance(claim.experiment, Trained)]


def with_settings(out: Path, scale: str = "mini", data: Path | None = None) -> Settings:
    return Settings(out, 1, scale, data, Console(quiet=True))


class TestInterval:
    @settings(deadline=None)
    @given(
        st.lists(st.integers(-1000, 1000), min_size=2, max_size=12).filter(
            lambda e: len(set(e)) > 1
        ),
        st.floats(0.5, 0.999),
    )
    def test_is_scipys(self, effects, confidence):
        theirs = stats.ttest_1samp(effects, 0).confidence_interval(confidence)
        assert interval(effects, confidence) == pytest.approx(
            (theirs.low, theirs.high), rel=1e-9, abs=1e-9
        )

    def test_95_percent_by_default(self):
        effects = [0.1, 0.3, 0.2, 0.4, 0.25]
        theirs = stats.ttest_1samp(effects, 0).confidence_interval(0.95)
        assert interval(effects) == pytest.approx((theirs.low, theirs.high))

    @pytest.mark.parametrize("effects", [[], [0.5]])
    def test_without_two_seeds_anything_is_possible(self, effects):
        assert interval(effects) == (-inf, inf)

    def test_equal_effects_leave_a_point(self):
        assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def ends(low: float, high: float) -> list[float]:
    """Return two effects whose interval ends exactly there, or the mean where that is a point."""
    half = (high - low) / 2 / float(stats.t.ppf(0.975, 1))
    middle = (low + high) / 2
    return [middle - half, middle + half]


class TestVerdict:
    @pytest.mark.parametrize(
        ("low", "high", "region", "verdict"),
        [
            (0.1, 0.2, (0, inf), "holds"),
            (-0.1, 0.2, (0, inf), "undecided"),
            (-0.2, -0.1, (0, inf), "does not hold"),
            (-0.01, 0.01, (-0.02, 0.02), "holds"),
            (-0.03, 0.01, (-0.02, 0.02), "undecided"),
            (-0.01, 0.03, (-0.02, 0.02), "undecided"),
            (-0.05, 0.05, (-0.02, 0.02), "undecided"),
            (0.03, 0.05, (-0.02, 0.02), "does not hold"),
            (-0.05, -0.03, (-0.02, 0.02), "does not hold"),
        ],
    )
    def test_interval_against_region(self, low, high, region, verdict):
        assert interval(ends(low, high)) == pytest.approx((low, high))
        assert judge(ends(low, high), region) == verdict

    @pytest.mark.parametrize(
        ("point", "region", "verdict"),
        [
            (0.0, (0.0, inf), "does not hold"),
            (1e-12, (0.0, inf), "holds"),
            (0.02, (-0.02, 0.02), "does not hold"),
            (-0.02, (-0.02, 0.02), "does not hold"),
            (0.0, (-0.02, 0.02), "holds"),
        ],
    )
    def test_the_border_is_outside(self, point, region, verdict):
        assert judge([point, point, point], region) == verdict

    @pytest.mark.parametrize("effects", [[], [0.5]])
    def test_too_little_is_undecided(self, effects):
        assert judge(effects, (0, inf)) == "undecided"


class TestRegistry:
    @pytest.mark.parametrize("claim", EVERY, ids=lambda claim: claim.name)
    def test_says_whose_what_and_in_which_unit(self, claim):
        assert re.fullmatch(r".+ \d{4}, arXiv:\d{4}\.\d{5}", claim.paper)
        assert claim.sentence.endswith(".")
        assert claim.measured
        assert re.fullmatch(r"[a-z0-9.-]+", claim.name)
        assert claim.region[0] < claim.region[1]
        assert len(set(claim.experiment.seeds)) == len(claim.experiment.seeds) >= 3

    @pytest.mark.parametrize("claim", TRAINED, ids=lambda claim: claim.name)
    @pytest.mark.parametrize("scale", ["mini", "paper"])
    def test_arms_load_and_differ_in_nothing_but_what_is_claimed(self, claim, scale, tmp_path):
        data = tmp_path if scale == "paper" else None
        recipes = claim.experiment.recipes(with_settings(tmp_path, scale, data))
        assert list(recipes) == list(claim.experiment.arms) == list(claim.experiment.paper_arms)
        assert len({identity(recipe) for recipe in recipes.values()}) == len(recipes) >= 2
        first, *others = recipes.values()
        for arm, recipe in recipes.items():
            assert recipe.name == arm
            assert recipe.seeds == list(claim.experiment.seeds)
        longer = control(first)
        for other in others:
            assert (other.data, other.model) == (first.data, first.model)
            matched = longer is not None and distinctive(longer) == distinctive(other)
            assert matched or other.fit == first.fit
        assert first.data.name == ("digits" if scale == "mini" else "cifar10")
        assert first.data.path == (None if scale == "mini" else str(tmp_path))

    def test_an_arm_finds_the_masks_of_another(self, tmp_path):
        claim = CLAIMS["lrr-trains-imp-masks-better"]
        recipes = claim.experiment.recipes(with_settings(tmp_path))
        assert recipes["lrr-imp-masks"].sparse.masks_from == str(
            tmp_path / identity(recipes["imp"])
        )

    @pytest.mark.parametrize("paper", ["2402.19262", "2210.02412"])
    def test_papers_are_found_by_their_number(self, paper):
        found = CLAIMS.find([paper])
        assert found == [claim for claim in EVERY if claim.paper.endswith(f"arXiv:{paper}")] != []

    def test_all_and_twice(self):
        assert CLAIMS.find(["all"]) == EVERY
        assert CLAIMS.find([EVERY[0].name, "all", EVERY[0].name]) == EVERY

    @pytest.mark.parametrize("name", ["lrr-beat-imp", "arXiv", "Burkholz", "2402"])
    def test_other_names_are_refused(self, name):
        with pytest.raises(ValueError, match="unknown claim"):
            CLAIMS.find([name])

    def test_a_name_is_taken_once(self):
        with pytest.raises(ValueError, match="registered already"):
            CLAIMS.add(EVERY[0])


def write_levels(folder: Path, *rows: dict) -> Path:
    folder.mkdir()
    (folder / "levels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class TestEffects:
    def test_accuracy_gain_takes_the_last_level(self, tmp_path):
        runs = {
            "a": write_levels(tmp_path / "a", {"test_accuracy": 0.1}, {"test_accuracy": 0.75}),
            "b": write_levels(tmp_path / "b", {"test_accuracy": 0.9}, {"test_accuracy": 0.5}),
        }
        assert accuracy_gain("a", "b")(runs) == 0.25
        assert accuracy_gain("b", "a")(runs) == -0.25

    def test_flip_gain_is_the_difference_of_fractions(self, tmp_path):
        runs = {
            "lrr": write_levels(tmp_path / "l", {"flips_from_start": {"kept": 10, "flipped": 5}}),
            "imp": write_levels(tmp_path / "i", {"flips_from_start": {"kept": 20, "flipped": 2}}),
        }
        assert _flip_gain(runs) == pytest.approx(0.4)

    def test_outcome_is_shown_in_the_unit_of_the_claim(self, tmp_path):
        effects = [0.01, 0.03, 0.02]
        claim = Claim("x", "p", "s.", "m", Computed(lambda seed: effects[seed], seeds=(0, 1, 2)))
        outcome = claim.test(with_settings(tmp_path))
        assert outcome.effect == pytest.approx(100 * fmean(effects))
        assert outcome.interval == pytest.approx([100 * end for end in interval(effects)])
        assert outcome.verdict == judge(effects, (0, inf))
        assert verdicts([outcome], [1.0]).row_count == 1


class TestCommand:
    @pytest.mark.parametrize(
        ("names", "scale", "said"),
        [
            ([], "mini", "name claims"),
            (["x"], "mini", "unknown claim"),
            (["all"], "paper", "--data"),
        ],
    )
    def test_bad_input(self, names, scale, said, tmp_path):
        with pytest.raises(BadInput, match=said):
            run_claims(names, tmp_path, 1, scale, None)

    def test_lists_every_sentence(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "300")
        list_claims()
        out = capsys.readouterr().out
        assert all(claim.sentence in out and claim.name in out for claim in EVERY)

    def test_the_single_neuron(self, tmp_path, monkeypatch, capsys):
        claim = CLAIMS["lrr-neuron-needs-one-sign"]
        fewer = replace(claim, experiment=replace(claim.experiment, seeds=(0, 1)))
        monkeypatch.setitem(CLAIMS, claim.name, fewer)
        (outcome,) = run_claims([claim.name], tmp_path, 1, "mini", None)
        assert outcome.verdict == "holds"
        assert all(0.5 < effect <= 1 for effect in outcome.effects)
        assert "holds" in capsys.readouterr().out

    def test_one_that_trains_from_end_to_end(self, tmp_path, monkeypatch, capsys):
        claim = CLAIMS["lrr-trains-imp-masks-better"]
        tiny = ["data.limit=120", "model.options.width=8", "fit.length=1ep", "sparse.density=0.25"]
        arms = {arm: [*words, *tiny] for arm, words in claim.experiment.arms.items()}
        experiment = replace(claim.experiment, arms=arms, seeds=(0, 1))
        monkeypatch.setitem(CLAIMS, claim.name, replace(claim, experiment=experiment))
        for _ in range(2):  # the second time nothing is left to train
            (outcome,) = run_claims([claim.name], tmp_path, 1, "mini", None)
        last = {
            run.parent.name.rpartition("-")[0]: levels(run)[-1] for run in tmp_path.glob("*/seed-1")
        }
        expected = last["lrr-imp-masks"]["test_accuracy"] - last["imp"]["test_accuracy"]
        assert outcome.effects[1] == pytest.approx(expected)
        assert last["imp"]["layers"] == last["lrr-imp-masks"]["layers"]
        assert "complete already" in capsys.readouterr().out


TUNED_ARMS = {
    arm: ["dense-digits", "data.limit=200", "fit.length=1ep", f"fit.momentum={momentum}"]
    for arm, momentum in (("heavy", 0.9), ("plain", 0.0))
}


class TestTuned:
    def tuned(self, rates):
        return Tuned(TUNED_ARMS, rates, accuracy_gain("heavy", "plain"), TUNED_ARMS, seeds=(0, 1))

    def test_each_arm_takes_the_rate_of_best_validation_accuracy(self, tmp_path):
        rates = (1e-4, 0.1)
        found = self.tuned(rates).effects(with_settings(tmp_path))
        runs = {}
        for folder in tmp_path.glob("*/seed-*"):
            recipe = load(str(folder.parent / "recipe.yaml"))[0]
            key = recipe.name, recipe.fit.learning_rate
            runs.setdefault(key, {})[int(folder.name[5:])] = folder
        best = {}
        for arm in TUNED_ARMS:
            scores = {r: fmean(map(last_validation, runs[arm, r].values())) for r in rates}
            assert scores[0.1] != scores[1e-4]
            best[arm] = runs[arm, max(scores, key=scores.get)]
        effect = accuracy_gain("heavy", "plain")
        assert found == [effect({arm: best[arm][seed] for arm in best}) for seed in (0, 1)]

    def test_a_rate_that_diverges_is_out(self, tmp_path):
        assert len(self.tuned((0.1, 1e30)).effects(with_settings(tmp_path))) == 2

    def test_nothing_but_divergence_is_a_failure(self, tmp_path):
        with pytest.raises(RunFailed, match="every learning rate"):
            self.tuned((1e30,)).effects(with_settings(tmp_path))

    @pytest.mark.parametrize("scale", ["mini", "paper"])
    def test_arms_of_tuned_claims_load_and_differ_in_the_optimizer(self, scale, tmp_path):
        data = tmp_path if scale == "paper" else None
        for claim in EVERY:
            if isinstance(claim.experiment, Tuned):
                recipes = claim.experiment.recipes(with_settings(tmp_path, scale, data))
                assert len({identity(recipe) for recipe in recipes.values()}) == len(recipes)
                assert all(recipe.data.validation > 0 for recipe in recipes.values())
