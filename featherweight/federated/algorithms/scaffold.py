"""SCAFFOLD.

Sai Praneeth Karimireddy, Satyen Kale, Mehryar Mohri, Sashank Reddi, Sebastian Stich, Ananda
Theertha Suresh 2019, arXiv:1910.06378.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from featherweight.common import unknown
from featherweight.federated.algorithms.base import (
    UPDATE,
    VARIATE,
    Algorithm,
    ClientVectors,
    Federation,
    Summary,
    plain_sgd,
)
from featherweight.federated.algorithms.registry import ALGORITHMS
from featherweight.federated.local import Correction, Trained
from featherweight.federated.schedules import Rate
from featherweight.federated.server import ServerSgd
from featherweight.federated.work import Work

OPTIONS = ("I", "II")


@ALGORITHMS.register(
    "scaffold",
    "control variates take out what sets a client's gradient apart",
    "Karimireddy et al. 2019, arXiv:1910.06378",
)
class Scaffold(Algorithm):
    """Local steps along ``g_i(y) + c - c_i``, with a control variate for each client.

    The server's variate is the mean of the clients', weighted by their shares in the objective. All
    start from zero.

    Args:
        server_rate: the server's learning rate.
        option: "II": the new variate is ``c_i - c + (x - y_i) / (rate steps)``, the mean gradient
            along the steps; "I": the client's gradient over all its examples at x.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Karimireddy et al. 2019, arXiv:1910.06378, Algorithm 1, equations 3 to 5.
    """

    stateful: ClassVar[bool] = True
    private: ClassVar[bool] = False
    uplink = 2
    downlink = 2

    def __init__(self, server_rate: Rate = 1.0, option: Literal["I", "II"] = "II") -> None:
        super().__init__(ServerSgd(server_rate))
        if option not in OPTIONS:
            raise ValueError(unknown("option", option, OPTIONS))
        self.option = option
        self.wants_gradient = option == "I"

    def start(self, federation: Federation) -> None:
        """Set all variates to zero."""
        plain_sgd("scaffold", federation.local)
        self.variate = federation.zeros()
        self.own = ClientVectors(len(federation.shares), federation.length, federation.like)

    def correction(self, work: Work) -> Correction:
        """Return the server's variate minus the client's."""
        return Correction(offset=self.variate - self.own[work.clients])

    def messages(self, trained: Trained, gradients: Tensor | None) -> dict[str, Tensor]:
        """Return the updates and how the clients' variates change."""
        work = trained.work
        if gradients is not None:
            change = gradients - self.own[work.clients]
        else:
            steps = work.steps.to(trained.delta)[:, None]
            change = -self.variate - trained.delta / (trained.rate * steps)
        self.own.add(work.clients, change)
        return {UPDATE: trained.delta, VARIATE: change}

    def finish(self, weights: Tensor, means: Mapping[str, Tensor], summary: Summary) -> Tensor:
        """Return the server's new weights."""
        self.variate = self.variate + summary.share * means[VARIATE]
        return super().finish(weights, means, summary)

    def state_dict(self) -> dict[str, Any]:
        """Return the variates."""
        own = self.own.state_dict()
        return {**super().state_dict(), "variate": self.variate.clone(), "own": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the variates."""
        super().load_state_dict(state)
        self.variate = state["variate"].clone()
        self.own.load_state_dict(state["own"])
