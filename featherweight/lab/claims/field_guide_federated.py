"""Claims of Wang et al. 2021, "A Field Guide to Federated Optimization"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from math import inf

from featherweight.federated.algorithms import Algorithm, FedAdam, FedAvg
from featherweight.federated.tuning import Grid, grid, half_decades
from featherweight.lab.claims.claim import CLAIMS, Claim
from featherweight.lab.claims.federated_task import (
    ByWriter,
    Federation,
    OnDigits,
    Work,
    accuracy,
    gain,
    longer,
)

PAPER = "Wang et al. 2021, arXiv:2107.06917"

PLAIN_RATES = half_decades(-1, 1)
ADAM_RATES = half_decades(-3, -1)
"""Two decades of server rates, each around the method's best."""


def tuned(
    federation: Federation,
    seed: int,
    algorithm: Callable[[float], Algorithm],
    client_rates: Sequence[float],
    server_rates: Sequence[float],
    work: Work,
) -> Grid:
    """Train at every pair of rates, and return the grid of test accuracies."""

    def score(client: float, server: float) -> float:
        chosen = Work(
            partial(algorithm, server),
            client,
            work.rounds,
            work.cohort,
            work.epochs,
            work.batch_size,
        )
        return accuracy(federation, chosen, seed)

    return grid(score, client_rates, server_rates)


def spans(work: Work, client_rate: float) -> Callable[[Federation, int], float]:
    """Make the effect "span over server rates of plain averaging minus that of Adam"."""

    def effect(federation: Federation, seed: int) -> float:
        plain = tuned(federation, seed, FedAvg, [client_rate], PLAIN_RATES, work)
        adam = tuned(federation, seed, FedAdam, [client_rate], ADAM_RATES, work)
        return plain.span(client_rate) - adam.span(client_rate)

    return effect


def coupling(federation: Federation, seed: int, work: Work) -> float:
    """Return how the best server rate of plain averaging moves with the client rate.

    Returns:
        Slope of its logarithm over that of the client rate; -1: their product is what counts.
    """
    client_rates = half_decades(-2, -0.5)
    found = tuned(federation, seed, FedAvg, client_rates, half_decades(-1, 1), work)
    x = [math.log10(rate) for rate in client_rates]
    y = [math.log10(rate) for rate in found.best_server_rates()]
    middle = sum(x) / len(x)
    squares = sum((a - middle) ** 2 for a in x)
    return sum((a - middle) * b for a, b in zip(x, y, strict=True)) / squares


TUNING = Work(FedAvg, rate=0.01, rounds=100)

CLAIMS.add(
    Claim(
        name="adaptive-servers-are-easier-to-tune",
        paper=PAPER,
        sentence="At a small client rate plain averaging depends far more on the server's rate "
        "than Adam on the server does.",
        measured="largest minus smallest test accuracy over two decades of server rates at client "
        "rate 0.01, FedAvg minus FedAdam, points",
        experiment=OnDigits(spans(TUNING, 0.01)),
    )
)
CLAIMS.add(
    Claim(
        name="client-and-server-rates-are-coupled",
        paper=PAPER,
        sentence="For plain averaging the best server rate falls as the client rate grows: the "
        "good cells of the grid lie on an anti-diagonal.",
        measured="slope of the best server rate over the client rate, both in decades",
        experiment=OnDigits(partial(coupling, work=TUNING), seeds=(0, 1, 2)),
        region=(-inf, 0.0),
        scale=1.0,
    )
)

SHORT = Work(FedAvg, rate=0.03, rounds=20)
MANY_EPOCHS = Work(FedAvg, rate=0.03, rounds=20, epochs=8)
SMALL_COHORT = Work(FedAvg, rate=0.1, rounds=25, cohort=5)
LARGE_COHORT = Work(FedAvg, rate=0.1, rounds=25, cohort=40)

CLAIMS.add(
    Claim(
        name="local-steps-help-per-round",
        paper=PAPER,
        sentence="At equally many rounds, more local steps make plain averaging better.",
        measured="test accuracy after 20 rounds, 8 local epochs minus 1, points",
        experiment=OnDigits(gain(MANY_EPOCHS, SHORT)),
    )
)
CLAIMS.add(
    Claim(
        name="local-steps-do-not-help-per-example",
        paper=PAPER,
        sentence="At equally many examples, more local steps make plain averaging no better.",
        measured="test accuracy of 8 local epochs over 20 rounds minus 1 over 160, points",
        experiment=OnDigits(gain(MANY_EPOCHS, longer(SHORT, 8))),
        region=(-inf, 0.0),
    )
)
CLAIMS.add(
    Claim(
        name="large-cohorts-help-per-round",
        paper=PAPER,
        sentence="At equally many rounds, larger cohorts make plain averaging better.",
        measured="test accuracy after 25 rounds, 40 clients a round minus 5, points",
        experiment=OnDigits(gain(LARGE_COHORT, SMALL_COHORT)),
    )
)
CLAIMS.add(
    Claim(
        name="large-cohorts-cost-examples",
        paper=PAPER,
        sentence="At equally many examples, larger cohorts make plain averaging worse.",
        measured="test accuracy of 40 clients a round over 25 rounds minus 5 over 200, points",
        experiment=OnDigits(gain(LARGE_COHORT, longer(SMALL_COHORT, 8))),
        region=(-inf, 0.0),
    )
)

WRITERS = Work(FedAvg, rate=0.01, rounds=30, batch_size=16)
WRITERS_EPOCHS = Work(FedAvg, rate=0.01, rounds=30, epochs=4, batch_size=16)
WRITERS_SMALL = Work(FedAvg, rate=0.05, rounds=30, cohort=5, batch_size=16)
WRITERS_LARGE = Work(FedAvg, rate=0.05, rounds=30, cohort=40, batch_size=16)

CLAIMS.add(
    Claim(
        name="adaptive-servers-are-easier-to-tune-by-writer",
        paper=PAPER,
        sentence="On MNIST by writer, at a small client rate, plain averaging depends far more on "
        "the server's rate than Adam on the server does.",
        measured="largest minus smallest test accuracy over two decades of server rates at client "
        "rate 0.01, FedAvg minus FedAdam, points",
        experiment=ByWriter(spans(WRITERS, 0.01)),
    )
)
CLAIMS.add(
    Claim(
        name="local-steps-help-per-round-by-writer",
        paper=PAPER,
        sentence="On MNIST by writer, at equally many rounds, more local steps make plain "
        "averaging better.",
        measured="test accuracy after 30 rounds, 4 local epochs minus 1, points",
        experiment=ByWriter(gain(WRITERS_EPOCHS, WRITERS)),
    )
)
CLAIMS.add(
    Claim(
        name="local-steps-do-not-help-per-example-by-writer",
        paper=PAPER,
        sentence="On MNIST by writer, at equally many examples, more local steps make plain "
        "averaging no better.",
        measured="test accuracy of 4 local epochs over 30 rounds minus 1 over 120, points",
        experiment=ByWriter(gain(WRITERS_EPOCHS, longer(WRITERS, 4))),
        region=(-inf, 0.0),
    )
)
CLAIMS.add(
    Claim(
        name="large-cohorts-help-per-round-by-writer",
        paper=PAPER,
        sentence="On MNIST by writer, at equally many rounds, larger cohorts make plain averaging "
        "better.",
        measured="test accuracy after 30 rounds, 40 clients a round minus 5, points",
        experiment=ByWriter(gain(WRITERS_LARGE, WRITERS_SMALL)),
    )
)
CLAIMS.add(
    Claim(
        name="large-cohorts-cost-examples-by-writer",
        paper=PAPER,
        sentence="On MNIST by writer, at equally many examples, larger cohorts make plain "
        "averaging worse.",
        measured="test accuracy of 40 clients a round over 30 rounds minus 5 over 240, points",
        experiment=ByWriter(gain(WRITERS_LARGE, longer(WRITERS_SMALL, 8))),
        region=(-inf, 0.0),
    )
)
