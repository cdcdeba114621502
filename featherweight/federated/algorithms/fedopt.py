"""Federated averaging with momentum or an adaptive optimizer on the server.

Sashank Reddi, Zachary Charles, Manzil Zaheer, Zachary Garrett, Keith Rush, Jakub Konečný, Sanjiv
Kumar, Brendan McMahan 2020, arXiv:2003.00295; defaults of Jianyu Wang et al. 2021,
arXiv:2107.06917, section 4.
"""

from __future__ import annotations

from featherweight.federated.algorithms.base import Algorithm
from featherweight.federated.algorithms.registry import ALGORITHMS
from featherweight.federated.schedules import Rate
from featherweight.federated.server import Adaptive, Correct, ServerSgd, adagrad, adam, yogi

PAPER = "Reddi et al. 2020, arXiv:2003.00295"


@ALGORITHMS.register("fedavgm", "momentum on the server", "Hsu et al. 2019, arXiv:1909.06335")
class FedAvgM(Algorithm):
    """Momentum on the server, without dampening: ``m = momentum m + update``; ``x = x + rate m``.

    Args:
        server_rate: the server's learning rate.
        momentum: in [0, 1); 0: `FedAvg`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, server_rate: Rate = 1.0, momentum: float = 0.9) -> None:
        super().__init__(ServerSgd(server_rate, momentum))


@ALGORITHMS.register("fedadagrad", "Adagrad on the server", PAPER)
class FedAdagrad(Algorithm):
    """Adagrad on the server: `Adaptive` by the sum of squares, without a first moment.

    Args:
        server_rate: the server's learning rate.
        epsilon: added to the root; try 1e-1 to 1e-4.
        initial: what the sum of squares starts from; the paper asks for epsilon squared at least.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self, server_rate: Rate = 0.1, epsilon: float = 1e-3, initial: float = 0.0
    ) -> None:
        super().__init__(Adaptive(adagrad, server_rate, (0.0, 0.0), epsilon, initial))


@ALGORITHMS.register("fedadam", "Adam on the server", PAPER)
class FedAdam(Algorithm):
    """Adam on the server.

    Args:
        server_rate: the server's learning rate.
        betas: decay of the two moments.
        epsilon: added to the root; try 1e-1 to 1e-5, never Adam's usual 1e-8.
        initial: what the second moment starts from.
        bias_correction: "keras", as in the guide's experiments; "adam", as torch; "none", as in the
            paper. Another choice wants another learning rate.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        server_rate: Rate = 0.03,
        betas: tuple[float, float] = (0.9, 0.99),
        epsilon: float = 1e-3,
        initial: float = 0.0,
        bias_correction: Correct = "keras",
    ) -> None:
        super().__init__(Adaptive(adam, server_rate, betas, epsilon, initial, bias_correction))


@ALGORITHMS.register("fedyogi", "Yogi on the server", PAPER)
class FedYogi(Algorithm):
    """Yogi on the server, whose second moment forgets slowly.

    Args:
        server_rate: the server's learning rate.
        betas: decay of the two moments.
        epsilon: added to the root; try 1e-1 to 1e-5.
        initial: what the second moment starts from.
        bias_correction: see `FedAdam`.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        server_rate: Rate = 0.03,
        betas: tuple[float, float] = (0.9, 0.99),
        epsilon: float = 1e-3,
        initial: float = 0.0,
        bias_correction: Correct = "none",
    ) -> None:
        super().__init__(Adaptive(yogi, server_rate, betas, epsilon, initial, bias_correction))
