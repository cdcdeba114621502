"""FedProx.

Tian Li, Anit Kumar Sahu, Manzil Zaheer, Maziar Sanjabi, Ameet Talwalkar, Virginia Smith 2018,
arXiv:1812.06127.
"""

from __future__ import annotations

from featherweight.federated.algorithms.base import Algorithm
from featherweight.federated.algorithms.registry import ALGORITHMS
from featherweight.federated.local import Correction
from featherweight.federated.schedules import Rate
from featherweight.federated.server import ServerSgd
from featherweight.federated.work import Work


@ALGORITHMS.register(
    "fedprox", "clients are held near the server's weights", "Li et al. 2018, arXiv:1812.06127"
)
class FedProx(Algorithm):
    """Each client minimises ``F_i(y) + mu / 2 |y - x|^2``.

    Args:
        mu: strength of the hold, at least 0; 0: `FedAvg`.
        server_rate: the server's learning rate.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Li et al. 2018, arXiv:1812.06127, Algorithm 2.
    """

    def __init__(self, mu: float = 0.01, server_rate: Rate = 1.0) -> None:
        super().__init__(ServerSgd(server_rate))
        if not 0.0 <= mu < float("inf"):
            raise ValueError(f"mu must be a finite number of at least 0, got {mu:g}")
        self.mu = mu

    def correction(self, work: Work) -> Correction:
        """Return the pull towards the server's weights."""
        return Correction(proximal=self.mu)
