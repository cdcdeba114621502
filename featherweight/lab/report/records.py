"""What a run leaves on disk, as plain frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Epoch:
    """One line of ``metrics.jsonl``; accuracies are fractions of 1."""

    stage: str
    level: int
    epoch: int
    train_loss: float | None
    train_accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None
    learning_rate: float | None


@dataclass(frozen=True)
class Timing:
    """One line of ``timing.jsonl``: the median time of a training step in one epoch, in seconds."""

    stage: str
    epoch: int
    step_seconds: float


@dataclass(frozen=True)
class Layer:
    """How much of one layer's weight is kept."""

    name: str
    numel: int
    nonzeros: int
    density: float


@dataclass(frozen=True)
class Flips:
    """Of ``kept`` weights, how many have another sign than before."""

    kept: int
    flipped: int

    @property
    def fraction(self) -> float | None:
        """Flipped over kept; None where nothing is kept."""
        return self.flipped / self.kept if self.kept else None


@dataclass(frozen=True)
class Level:
    """One line of ``levels.jsonl``: the network at the end of one finished stage.

    Operations are of one forward pass of one sample, multiplications with zeros skipped in
    ``flops``; bytes are of the packed sparse file and of the dense one.
    """

    stage: str
    level: int
    density: float
    nonzeros: int
    prunable: int
    parameters: int
    test_accuracy: float | None
    test_loss: float | None
    layers: tuple[Layer, ...]
    flips_from_start: Flips | None
    flips_from_previous: Flips | None
    flops: float | None
    dense_flops: float | None
    bytes: int | None
    dense_bytes: int | None


@dataclass(frozen=True)
class Execution:
    """How the last level was executed, as ``result.json`` has it; seconds of a training step."""

    form: str
    seconds: float
    dense_seconds: float
    bytes: int
    dense_bytes: int


@dataclass(frozen=True)
class Seed:
    """Everything that one seed of a recipe has written so far."""

    path: Path
    number: int
    complete: bool
    seconds: float | None
    environment: Mapping[str, Any]
    epochs: tuple[Epoch, ...]
    levels: tuple[Level, ...]
    timings: tuple[Timing, ...]
    execution: Execution | None = None


@dataclass(frozen=True)
class Run:
    """One recipe with its seeds.

    Attributes:
        path: the identity directory.
        name: what tables and legends call it; unique within one report.
        recipe: the resolved recipe.
        recipe_text: the same, as it stands in ``recipe.yaml``.
        seeds: in ascending order; may be empty.
    """

    path: Path
    name: str
    recipe: Mapping[str, Any]
    recipe_text: str
    seeds: tuple[Seed, ...]
