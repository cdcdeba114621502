"""What a client computes between two messages, with the means of the simulator."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featherweight.federated.algorithms.base import GRADIENT
from featherweight.federated.backends import seeded, threads
from featherweight.federated.codecs.adaquantfl import AdaptiveQSGD
from featherweight.federated.codecs.codec import Codec
from featherweight.federated.codecs.identity import Identity
from featherweight.federated.flower.records import Answer, Ask
from featherweight.federated.flower.split import BUFFERS, give, kept, shared
from featherweight.federated.local import Trained, full_gradients, train
from featherweight.federated.sequential import Sequential
from featherweight.federated.simulation import Simulation
from featherweight.federated.streams import stream
from featherweight.federated.tally import usable_rows
from featherweight.federated.work import Work, plan

State = dict[str, Any]


class Client:
    """One client while it answers one message.

    Args:
        simulation: says what clients do; its algorithm is changed.
        ask: what is asked.
        vector: what came down: weights, buffers, and the algorithm's vectors, one after another.
        state: what the client kept; empty at first.
    """

    def __init__(
        self, simulation: Simulation, ask: Ask, vector: Tensor, state: Mapping[str, Any]
    ) -> None:
        self.simulation, self.ask, self.algorithm = simulation, ask, simulation.algorithm
        self.codecs: dict[str, Codec] = {}
        self._kept_by_codecs = dict(state.get("codecs", {}))
        weights, buffers = simulation.weights, simulation._buffers
        names = shared(self.algorithm)
        sizes = [len(weights), len(buffers), *[len(weights)] * len(names)]
        if len(vector) != sum(sizes):
            raise ValueError(f"{len(vector)} values came down, the model wants {sum(sizes)}")
        parts = [part.to(weights) for part in vector.split(sizes)]
        self.weights, self.buffers = parts[:2]
        vectors = dict(zip(names, parts[2:], strict=True))
        give(self.algorithm, vectors, state.get("algorithm", {}))

    def train(self) -> Answer:
        """Take the local steps, and return what goes up.

        Raises:
            ValueError: the update is not finite.
        """
        work = self._work()
        correction = self.algorithm.correction(work)
        with self._alone():
            trained = self._local(work)
            if not bool(usable_rows(trained.delta).all()):
                raise ValueError("its update is not finite")
            gradients = self._gradient(work) if self.algorithm.wants_gradient else None
        vectors = self.algorithm.messages(trained, gradients)
        payloads = {kind: self._encode(kind, rows[0]) for kind, rows in vectors.items()}
        if len(self.buffers):
            payloads[BUFFERS] = self._encode(BUFFERS, self._left_buffers())
        passes = 2 if correction.anchored else 1
        examples = passes * int(work.counts()) + (0 if gradients is None else int(work.sizes))
        return Answer(payloads, float(trained.losses), float(trained.first), examples)

    def gradient(self) -> Answer:
        """Return the gradient over all examples."""
        work = self._work()
        with self._alone():
            found = self._gradient(work)[0]
        payloads = {GRADIENT: self._encode(GRADIENT, found)}
        return Answer(payloads, 0.0, 0.0, int(work.sizes))

    def state(self) -> State:
        """Return what has to be kept; empty where nothing has."""
        codecs = {
            kind: codec.state_dict()
            for kind, codec in self.codecs.items()
            if codec.stateful == "client"
        }
        return {"algorithm": kept(self.algorithm), "codecs": {**self._kept_by_codecs, **codecs}}

    def _alone(self) -> Any:
        """Seed what dropout draws from; the simulator's clients share one stream a round."""
        seed = self.simulation.options.seed
        return seeded(stream(seed, "dropout", self.ask.round, self.ask.client))

    def _work(self) -> Work:
        options = self.simulation.options
        work = plan(
            self.simulation.population,
            torch.tensor([self.ask.client]),
            torch.tensor([self.ask.steps]),
            batch_size=options.local.batch_size,
            round=self.ask.round,
            seed=stream(options.seed, "batches"),
            limit=1,
        )
        return work[0]

    def _local(self, work: Work) -> Trained:
        backend, local = self.simulation._gradients, self.simulation.options.local
        if isinstance(backend, Sequential):
            backend.begin(self.buffers)
        correction, optimizer = self.algorithm.correction(work), self.algorithm.optimizer(local)
        with threads(self.simulation.options.threads):
            return train(backend, work, self.weights, correction, optimizer, self.ask.rate)

    def _gradient(self, work: Work) -> Tensor:
        width = self.simulation.options.local.batch_size or int(work.sizes)
        with threads(self.simulation.options.threads):
            return full_gradients(self.simulation._gradients, work, self.weights, width)

    def _left_buffers(self) -> Tensor:
        backend = self.simulation._gradients
        assert isinstance(backend, Sequential)  # a model with buffers has no other
        return backend.buffers()

    def _encode(self, kind: str, vector: Tensor) -> bytes:
        codec = self.codecs[kind] = codec_of(self.simulation, kind)
        if kind in self._kept_by_codecs:
            codec.load_state_dict(self._kept_by_codecs[kind])
        if isinstance(codec, AdaptiveQSGD) and kind in self.ask.levels:
            codec.levels = self.ask.levels[kind]
        ask = self.ask
        return codec.encode(vector, round=ask.round, client=ask.client, weight=ask.weight)


def codec_of(simulation: Simulation, kind: str) -> Codec:
    """Return a fresh codec for a kind of vector."""
    codec = simulation.options.codec
    return Identity() if codec is None or kind == BUFFERS else copy.deepcopy(codec)
