"""Simulation of federated optimisation in one process.

The clients of a cohort train side by side where the model allows it, one after the other otherwise;
what they send can pass through a codec as the bytes that would travel.
"""

from __future__ import annotations

import copy

from torch import nn

from featherweight.federated.algorithms.base import Algorithm
from featherweight.federated.codecs.codec import Codec
from featherweight.federated.local import Local
from featherweight.federated.options import Evaluate, Options, Sampler, Weighting
from featherweight.federated.population import Population
from featherweight.federated.privacy import Privacy
from featherweight.federated.robust import Aggregator, as_aggregator
from featherweight.federated.simulation import Simulation

__all__ = ["Simulation", "simulate"]


def simulate(
    model: nn.Module,
    population: Population,
    algorithm: Algorithm,
    *,
    sampler: Sampler,
    local: Local,
    codec: Codec | None = None,
    aggregator: Aggregator | str | None = None,
    privacy: Privacy | None = None,
    weighting: Weighting = "examples",
    evaluate: Evaluate | None = None,
    evaluate_every: int = 1,
    seed: int = 0,
    backend: str = "auto",
    threads: int | None = 1,
    side_by_side: int | None = None,
) -> Simulation:
    """Prepare a simulation; ``rounds`` runs it. No argument is changed: all are copied.

    Args:
        model: where the server's weights start. Its parameters share one floating-point dtype.
        population: clients and their examples.
        algorithm: one of `ALGORITHMS`.
        sampler: who takes part; a client that is named twice counts twice in the mean.
        local: what clients do in a round.
        codec: how each vector travels up; None: as float32, not copied into bytes.
        aggregator: of the clients' vectors; None or "mean": the weighted mean.
        privacy: DP-FedAvg; wants a Poisson sampler and ``weighting="uniform"``.
        weighting: of clients in the mean: "examples", by their numbers of examples, made to sum to
            1 over the cohort; "uniform"; "unbiased", by numbers of examples over those of the whole
            population times clients over cohort, which is unbiased for clients that are sampled
            uniformly; or a function of ids [clients] to weights above 0.
        evaluate: of the model, in evaluation mode, to metrics; called after a round.
        evaluate_every: rounds from one evaluation to the next.
        seed: of batches, dropout and privacy's noise. Samplers and codecs have their own.
        backend: "vectorized", "sequential", or "auto": the first where the model allows it.
        threads: of torch, inside an operation, while a round runs; None: as they are.
        side_by_side: most clients that train side by side; None: by the model's size.

    Raises:
        ValueError: an argument is out of range, or two don't go together.
        TypeError: the model's parameters differ in dtype or device.

    Example:
        ```python
        simulation = simulate(model, population, FedAvg(), sampler=sampler, local=Local(epochs=1))
        for record in simulation.rounds(100):
            print(record.round, record.train_loss)
        ```
    """
    options = Options(
        sampler=copy.deepcopy(sampler),
        codec=codec,
        local=local,
        aggregator=None if aggregator == "mean" else as_aggregator(aggregator),
        privacy=privacy,
        weighting=weighting,
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        seed=int(seed),
        threads=threads,
        side_by_side=side_by_side,
    )
    return Simulation(model, population, algorithm, options, backend)
