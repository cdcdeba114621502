"""What a claim is, and how one is tested."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol

from rich.console import Console

from featherweight.common import unknown
from featherweight.lab.errors import RunFailed
from featherweight.lab.launch import launch, tasks
from featherweight.lab.parse import load
from featherweight.lab.recipe import Recipe
from featherweight.lab.runs import run_directory
from featherweight.lab.statistics import Verdict, interval, judge

Scale = Literal["mini", "paper"]


@dataclass(frozen=True)
class Settings:
    """How to test claims.

    Attributes:
        out: folder of the runs.
        jobs: runs at a time.
        scale: "mini" or "paper".
        data: folder of the data set, for the paper's scale.
        console: where progress goes.
    """

    out: Path
    jobs: int
    scale: Scale
    data: Path | None
    console: Console


class Experiment(Protocol):
    """Whatever brings one number a seed."""

    def effects(self, settings: Settings) -> list[float]:
        """Run, and return the effect for each seed."""


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper that runs can confirm or contradict.

    Attributes:
        name: what users type.
        paper: authors, year, arXiv id.
        sentence: what is claimed.
        measured: what the effect is, in words, with its unit.
        region: the claim is true if the mean effect lies in this open interval.
        experiment: brings one effect a seed.
        scale: factor by which effects are shown (100 for points of accuracy).
    """

    name: str
    paper: str
    sentence: str
    measured: str
    experiment: Experiment
    region: tuple[float, float] = (0.0, inf)
    scale: float = 100.0

    @property
    def arxiv(self) -> str:
        """The paper's arXiv id."""
        return self.paper.rpartition("arXiv:")[2]

    def test(self, settings: Settings) -> Outcome:
        """Do what is missing of the runs and judge."""
        return Outcome(self, tuple(self.experiment.effects(settings)))

    def __str__(self) -> str:
        low, high = (self.scale * end for end in self.region)
        return (
            f"{self.name}\n{self.sentence}\n{self.paper}\n"
            f"effect: {self.measured}; the claim is true if it lies in ({low:g}, {high:g})"
        )


@dataclass(frozen=True)
class Outcome:
    """A tested claim.

    Attributes:
        claim: what was tested.
        effects: one a seed.
    """

    claim: Claim
    effects: tuple[float, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether it holds."""
        return judge(self.effects, self.claim.region)

    @property
    def effect(self) -> float:
        """Mean over seeds, in the claim's unit."""
        return self.claim.scale * fmean(self.effects)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval, in the claim's unit."""
        low, high = interval(self.effects)
        return self.claim.scale * low, self.claim.scale * high


@dataclass(frozen=True)
class Trained:
    """An experiment of training runs: some arms, the same seeds in each.

    Attributes:
        arms: arm name to a shipped recipe and overrides, at the small scale.
        effect: from an arm's run directories of one seed to a number.
        paper_arms: the same at the paper's scale.
        seeds: of both.
    """

    arms: Mapping[str, Sequence[str]]
    effect: Callable[[Mapping[str, Path]], float]
    paper_arms: Mapping[str, Sequence[str]]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def recipes(self, settings: Settings) -> dict[str, Recipe]:
        """Return each arm's recipe; an arm may name an earlier arm's folder as ``{arm}``."""
        chosen = self.arms if settings.scale == "mini" else self.paper_arms
        recipes: dict[str, Recipe] = {}
        for arm, (base, *changes) in chosen.items():
            folders = {n: run_directory(settings.out, r, 0).parent for n, r in recipes.items()}
            overrides = [change.format(**folders) for change in changes]
            overrides += [f"name={arm}", f"seeds={list(self.seeds)}"]
            overrides += [f"data.path={settings.data}"] if settings.data else []
            (recipes[arm],) = load(base, overrides)
        return recipes

    def effects(self, settings: Settings) -> list[float]:
        """Train what is not trained yet and return the effect for each seed."""
        recipes = self.recipes(settings)
        for recipe in recipes.values():  # in order: an arm may read an earlier arm's masks
            launch(tasks([recipe]), settings.out, settings.jobs, settings.console)
        where = partial(run_directory, settings.out)
        return [self.effect({a: where(r, s) for a, r in recipes.items()}) for s in self.seeds]


@dataclass(frozen=True)
class Tuned:
    """Arms that each get the learning rate that suits them best, chosen on validation images.

    Attributes:
        arms: as in `Trained`, without a learning rate.
        rates: learning rates that each arm tries; the best mean validation accuracy at the end of
            training decides, and test accuracy is looked at for the chosen one alone.
        effect: from the chosen run directories of one seed to a number.
        paper_arms: the same at the paper's scale.
        seeds: of both.
    """

    arms: Mapping[str, Sequence[str]]
    rates: Sequence[float]
    effect: Callable[[Mapping[str, Path]], float]
    paper_arms: Mapping[str, Sequence[str]]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def effects(self, settings: Settings) -> list[float]:
        """Train every arm at every rate and return the effect of the chosen ones for each seed."""
        chosen = {arm: self._best(arm, settings) for arm in self.arms}
        where = partial(run_directory, settings.out)
        return [self.effect({a: where(r, s) for a, r in chosen.items()}) for s in self.seeds]

    def recipes(self, settings: Settings) -> dict[str, Recipe]:
        """Return all recipes, by arm and rate."""
        return {
            f"{arm}-lr{rate:g}": self._recipe(arm, rate, settings)
            for arm in self.arms
            for rate in self.rates
        }

    def _recipe(self, arm: str, rate: float, settings: Settings) -> Recipe:
        changes = [f"fit.learning_rate={rate}"]
        arms = {
            name: [base, *given, *changes]
            for name, (base, *given) in (
                self.arms if settings.scale == "mini" else self.paper_arms
            ).items()
        }
        return Trained({arm: arms[arm]}, self.effect, {arm: arms[arm]}, self.seeds).recipes(
            settings
        )[arm]

    def _best(self, arm: str, settings: Settings) -> Recipe:
        """Return the recipe of the best rate; one that diverges with any seed is out."""
        scores: list[tuple[float, Recipe]] = []
        for rate in self.rates:
            recipe = self._recipe(arm, rate, settings)
            try:
                runs = launch(tasks([recipe]), settings.out, settings.jobs, settings.console)
            except RunFailed as error:
                settings.console.print(f"{arm} at learning rate {rate:g}: {error}")
                continue
            scores.append((fmean(map(last_validation, runs)), recipe))
        if not scores:
            raise RunFailed(f"{arm}: every learning rate of {self.rates} diverged")
        return max(scores, key=lambda pair: pair[0])[1]


@dataclass(frozen=True)
class Computed:
    """An experiment that needs no training run.

    Attributes:
        function: seed to effect.
        seeds: one effect each.
    """

    function: Callable[[int], float]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def effects(self, settings: Settings) -> list[float]:
        """Return the effect for each seed."""
        return [self.function(seed) for seed in self.seeds]


class _Claims(dict[str, Claim]):
    """Claims by name."""

    def add(self, claim: Claim) -> None:
        """Register a claim under its name, once."""
        if claim.name in self:
            raise ValueError(f"claim {claim.name!r} is registered already")
        self[claim.name] = claim

    def find(self, names: Sequence[str]) -> list[Claim]:
        """Return claims by name, by paper (its arXiv id), or all."""
        found: list[Claim] = []
        for name in names:
            some = [c for c in self.values() if name in ("all", c.name) or c.arxiv == name]
            if not some:
                raise ValueError(unknown("claim", name, ["all", *self]))
            found += [claim for claim in some if claim not in found]
        return found


CLAIMS = _Claims()


def levels(directory: Path) -> list[dict[str, Any]]:
    """Return what a run measured at the end of each level."""
    lines = (directory / "levels.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def last_validation(directory: Path) -> float:
    """Return the validation accuracy at the end of a run."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return float(json.loads(lines[-1])["validation_accuracy"])


def accuracy_gain(better: str, worse: str) -> Callable[[Mapping[str, Path]], float]:
    """Make the effect "final test accuracy of one arm minus that of another", in [-1, 1]."""

    def effect(runs: Mapping[str, Path]) -> float:
        last = {arm: float(levels(runs[arm])[-1]["test_accuracy"]) for arm in (better, worse)}
        return last[better] - last[worse]

    return effect
