"""What the layers of one routed model tell each other during a forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

STRIDE = 1_000_003  # a prime larger than any number of layers: seeds of different layers differ


class Prediction(NamedTuple):
    """Which tokens a layer processed, and what it would have predicted: all [B, N]."""

    logits: Tensor
    chosen: Tensor
    valid: Tensor | None


@dataclass
class Ledger:
    """State of the last forward; a deep copy of a model starts with an empty one.

    Every layer writes under its own number and reads what earlier layers wrote, so that a layer
    that is computed again for its gradient, under checkpointing, chooses the same tokens again.

    Its lists have an entry for every layer from the beginning: a dictionary that grows would make
    ``torch.compile`` compile the second forward again.

    Attributes:
        layers: number of layers.
        scores: by layer, the score [B, N] that the next routed layer may choose by.
        visited: by layer, bool [B, N], the tokens it processed.
        predictions: by layer, what the auxiliary loss compares.
        external: scores given by the user, [B, N].
        step: forwards in training mode so far; random choices differ from one to the next.
    """

    layers: int
    scores: list[Tensor | None] = field(init=False)
    visited: list[Tensor | None] = field(init=False)
    predictions: list[Prediction | None] = field(init=False)
    external: Tensor | None = None
    step: int = 0

    def __post_init__(self) -> None:
        self.scores = [None] * self.layers
        self.visited = [None] * self.layers
        self.predictions = [None] * self.layers

    def score(self, layer: int) -> Tensor:
        """Return the score that a layer wrote in this forward."""
        score = self.scores[layer]
        assert score is not None
        return score

    def seed(self, seed: int, layer: int) -> int:
        """Return the seed of a layer's random choices in this forward."""
        return ((seed * STRIDE + layer) * STRIDE + self.step) % 2**63

    def __deepcopy__(self, memo: dict[int, Any]) -> Ledger:
        return Ledger(self.layers, step=self.step)
