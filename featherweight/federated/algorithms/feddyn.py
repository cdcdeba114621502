"""FedDyn.

Durmus Alp Emre Acar, Yue Zhao, Ramon Matas Navarro, Matthew Mattina, Paul Whatmough, Venkatesh
Saligrama 2021, arXiv:2111.04263.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from featherweight.federated.algorithms.base import (
    UPDATE,
    Algorithm,
    ClientVectors,
    Federation,
    Summary,
)
from featherweight.federated.algorithms.registry import ALGORITHMS
from featherweight.federated.local import Correction, Trained
from featherweight.federated.work import Work


@ALGORITHMS.register(
    "feddyn",
    "each client's loss is bent so that all optima agree",
    "Acar et al. 2021, arXiv:2111.04263",
)
class FedDyn(Algorithm):
    """Each client minimises ``F_i(y) + <l_i, y - x> + mu / 2 |y - x|^2``.

    Afterwards ``l_i = l_i + mu (y - x)``. The server's weights are the mean of the cohort's plus
    the mean of all ``l_i`` divided by mu. At the fixed point ``l_i`` is minus the client's gradient
    at the optimum.

    Args:
        mu: strength of the hold, above 0; the paper's alpha.

    Raises:
        ValueError: mu is not above 0.

    Source:
        Acar et al. 2021, arXiv:2111.04263, Algorithm 1; the multipliers' sign is that of Wang et
        al. 2021, arXiv:2107.06917, equation 8.
    """

    stateful: ClassVar[bool] = True
    private: ClassVar[bool] = False

    def __init__(self, mu: float = 0.1) -> None:
        super().__init__()
        if not 0.0 < mu < float("inf"):
            raise ValueError(f"mu must be a finite number above 0, got {mu:g}")
        self.mu = mu

    def start(self, federation: Federation) -> None:
        """Set all multipliers to zero."""
        self.multiplier = federation.zeros()
        self.own = ClientVectors(len(federation.shares), federation.length, federation.like)

    def correction(self, work: Work) -> Correction:
        """Return multiplier and pull."""
        return Correction(offset=self.own[work.clients], proximal=self.mu)

    def messages(self, trained: Trained, gradients: Tensor | None) -> dict[str, Tensor]:
        """Return the updates."""
        self.own.add(trained.work.clients, self.mu * trained.delta)
        return {UPDATE: trained.delta}

    def finish(self, weights: Tensor, means: Mapping[str, Tensor], summary: Summary) -> Tensor:
        """Return the server's new weights."""
        self.multiplier = self.multiplier + self.mu * summary.share * means[UPDATE]
        return super().finish(weights, means, summary) + self.multiplier / self.mu

    def state_dict(self) -> dict[str, Any]:
        """Return the multipliers."""
        own = self.own.state_dict()
        return {**super().state_dict(), "multiplier": self.multiplier.clone(), "own": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the multipliers."""
        super().load_state_dict(state)
        self.multiplier = state["multiplier"].clone()
        self.own.load_state_dict(state["own"])
