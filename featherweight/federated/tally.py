"""What is written down of a round while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.federated.local import Trained
from featherweight.federated.record import RoundRecord

LARGEST = 2.0**96  # of an entry, so that codecs can square it


def usable_rows(vectors: Tensor) -> Tensor:
    """Tell which of the vectors [C, length] are finite and can be sent."""
    return vectors.abs().amax(1) < LARGEST  # NaN is not


class Tally:
    """The figures of a round; tensors have one entry a client of the cohort.

    Args:
        cohort: ids, int64, [M].
        weights: in the mean, float64, [M].
        steps: local steps, int64, [M].
        rate: the clients' learning rate.
        like: dtype of losses.
    """

    def __init__(
        self, cohort: Tensor, weights: Tensor, steps: Tensor, rate: float, like: Tensor
    ) -> None:
        self.cohort, self.weights, self.steps, self.rate = cohort, weights, steps, rate
        self.losses = torch.full((len(cohort),), torch.nan, dtype=like.dtype)
        self.first = self.losses.clone()
        self.examples = torch.zeros_like(cohort)
        self.bytes_up, self.bytes_down = self.examples.clone(), self.examples.clone()
        self.kept = torch.ones_like(cohort, dtype=torch.bool)
        self.refused: dict[int, str] = {}
        self.factor = 1.0

    def take(self, trained: Trained, passes: int) -> None:
        """Write down what local steps gave, with so many gradients an example."""
        places = trained.work.places
        self.losses[places] = trained.losses.cpu()
        self.first[places] = trained.first.cpu()
        self.examples[places] += passes * trained.work.counts()

    def usable(self, trained: Trained) -> Trained | None:
        """Leave out the clients whose update is not finite; return None if nobody is left."""
        usable = usable_rows(trained.delta)
        if bool(usable.all()):
            return trained
        refused = trained.work.places[~usable.cpu()]
        self.kept[refused] = False
        reason = "its update is not finite"
        self.refused.update(dict.fromkeys(self.cohort[refused].tolist(), reason))
        if not bool(usable.any()):
            return None
        losses = (trained.losses[usable], trained.first[usable])
        work = trained.work.rows(usable.cpu())
        return Trained(work, trained.delta[usable], *losses, trained.rate)

    def start_loss(self) -> float:
        """Return the weighted mean loss at the server's weights, of the clients kept."""
        weights = self.weights[self.kept]
        return float((weights * self.first[self.kept]).sum() / weights.sum())

    def record(
        self, round: int, metrics: Mapping[str, Any], seconds: float, server_rate: float
    ) -> RoundRecord:
        """Return the record of the round."""
        return RoundRecord(
            round=round,
            cohort=self.cohort,
            train_loss=float(self.losses.mean()),
            client_losses=self.losses,
            start_losses=self.first,
            steps=self.steps,
            examples=self.examples,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            metrics=metrics,
            seconds=seconds,
            refused=self.refused,
            server_rate=server_rate,
            client_rate=self.rate,
        )
