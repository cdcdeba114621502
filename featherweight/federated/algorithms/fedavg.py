"""Federated averaging.

Brendan McMahan, Eider Moore, Daniel Ramage, Seth Hampson, Blaise Agüera y Arcas 2017,
arXiv:1602.05629; with a server's optimizer: Reddi et al. 2020, arXiv:2003.00295.
"""

from __future__ import annotations

from featherweight.federated.algorithms.base import Algorithm
from featherweight.federated.algorithms.registry import ALGORITHMS
from featherweight.federated.schedules import Rate
from featherweight.federated.server import ServerSgd

PAPER = "McMahan et al. 2017, arXiv:1602.05629"


@ALGORITHMS.register("fedavg", "the server moves by the mean of the clients' updates", PAPER)
class FedAvg(Algorithm):
    """Generalised federated averaging: ``x = x + server_rate mean(y_i - x)``.

    Args:
        server_rate: the server's learning rate; 1: the mean of the clients' weights.

    Raises:
        ValueError: the rate is not above 0.
    """

    def __init__(self, server_rate: Rate = 1.0) -> None:
        super().__init__(ServerSgd(server_rate))
