"""One simulation: its state, and how a round goes."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.federated.algorithms.base import (
    GRADIENT,
    UPDATE,
    Algorithm,
    Federation,
    Summary,
)
from featherweight.federated.backends import choose, seeded, threads
from featherweight.federated.codecs.codec import Codec
from featherweight.federated.collect import FLOAT_BYTES, Coded, Collector, Running, Stacked
from featherweight.federated.layout import Layout, read_buffers, write_buffers_
from featherweight.federated.local import Correction, Trained, full_gradients, train
from featherweight.federated.options import Options
from featherweight.federated.population import Population
from featherweight.federated.record import RoundRecord
from featherweight.federated.schedules import rate_at
from featherweight.federated.sequential import Sequential
from featherweight.federated.streams import stream
from featherweight.federated.tally import Tally, usable_rows
from featherweight.federated.work import Work, plan

SIDE_BY_SIDE = 1 << 26  # entries of all clients' weights that are held at a time


class Simulation:
    """A federation in training; made by `simulate`.

    Attributes:
        population: its clients and their examples.
        algorithm: a copy of the one given.
        options: the other choices.
        round: number of rounds done.
        backend: "vectorized" or "sequential".
        reason: why, in one line.
    """

    def __init__(
        self,
        model: nn.Module,
        population: Population,
        algorithm: Algorithm,
        options: Options,
        backend: str,
    ) -> None:
        options.check_algorithm(algorithm)
        self._layout = Layout.of(model)
        chosen = choose(model, options.local.loss, population, backend)
        self._gradients, self.backend, self.reason = chosen
        self.population, self.options, self.round = population, options, 0
        self.algorithm = copy.deepcopy(algorithm)
        self._model = copy.deepcopy(model)
        self._weights, self._buffers = self._layout.read(model), read_buffers(model)
        self._client_weights = options.weights(population)
        self._shares = self._client_weights / self._client_weights.sum()
        self._mechanism = options.mechanism(population)
        self._codecs: dict[str, Codec] = {}
        like = self._weights.new_empty(0)
        federation = Federation(self._layout.length, self._shares, options.local, like)
        self.algorithm.start(federation)

    @property
    def model(self) -> nn.Module:
        """The model, with the server's weights in it."""
        self._layout.write_(self._model, self._weights)
        write_buffers_(self._model, self._buffers)
        return self._model

    @property
    def weights(self) -> Tensor:
        """A copy of the server's weights, one vector."""
        return self._weights.clone()

    def rounds(self, count: int) -> Iterator[RoundRecord]:
        """Run rounds, and yield the record of each when it is done.

        Args:
            count: how many more.
        """
        for _ in range(count):
            with threads(self.options.threads):
                record = self._round()
            yield record

    def _round(self) -> RoundRecord:
        started = time.perf_counter()
        number = self.round
        tally, groups = self._plan(number)
        with seeded(stream(self.options.seed, "dropout", number)):
            if self.algorithm.sends_gradient:
                self._ask_gradients(tally, groups)
            means = self._train(tally, groups)
        self._finish(means, tally)
        self.round += 1
        seconds = time.perf_counter() - started
        return tally.record(number, self._metrics(), seconds, self.algorithm.rate(number))

    def _plan(self, number: int) -> tuple[Tally, list[Work]]:
        options, sampler = self.options, self.options.sampler
        cohort, counts = self._once(sampler.cohort(number), number)
        rate = rate_at(options.local.learning_rate, number)
        steps = options.local.steps_of(number, cohort, self.population)
        tally = Tally(cohort, counts * self._client_weights[cohort], steps, rate, self._weights)
        groups = plan(
            self.population,
            cohort,
            steps,
            batch_size=options.local.batch_size,
            round=number,
            seed=stream(options.seed, "batches"),
            limit=self._limit(),
        )
        tally.bytes_down += FLOAT_BYTES * (
            self.algorithm.downlink * self._layout.length + len(self._buffers)
        )
        tally.factor = self._factor(cohort, counts)
        return tally, groups

    def _once(self, cohort: Tensor, number: int) -> tuple[Tensor, Tensor]:
        if len(cohort) and not 0 <= int(cohort.min()) <= int(cohort.max()) < len(self.population):
            raise ValueError(
                f"round {number}: ids must lie in [0, {len(self.population)}), got "
                f"{int(cohort.min())} to {int(cohort.max())}"
            )
        unique, counts = cohort.unique(return_counts=True)
        if len(unique) == len(cohort):
            return cohort, torch.ones_like(cohort)
        if self.algorithm.stateful:
            raise ValueError(
                f"round {number} names a client twice; {type(self.algorithm).__name__} needs a "
                "sampler without replacement"
            )
        return unique, counts

    def _factor(self, cohort: Tensor, counts: Tensor) -> float:
        if self.options.weighting != "unbiased" or not len(cohort):
            return 1.0
        share = float((counts * self._shares[cohort]).sum())
        return share * len(self.population) / int(counts.sum())

    def _limit(self) -> int:
        if isinstance(self._gradients, Sequential):
            return 1  # clients have buffers of their own
        return self.options.side_by_side or max(1, SIDE_BY_SIDE // self._layout.length)

    def _collector(self, kind: str, tally: Tally) -> Collector:
        options = self.options
        if options.codec is not None:
            codec = self._codecs.setdefault(kind, copy.deepcopy(options.codec))
            length = self._layout.length
            number, cohort = self.round, tally.cohort
            return Coded(codec, number, length, cohort, self._weights, options.aggregator)
        return Running() if options.aggregator is None else Stacked(options.aggregator)

    def _send(
        self, kind: str, vectors: Tensor, places: Tensor, tally: Tally, into: dict[str, Collector]
    ) -> None:
        if not len(places):
            return
        collector = into.get(kind) or self._collector(kind, tally)
        into[kind] = collector
        sizes = collector.add(tally.cohort[places], vectors, tally.weights[places])
        tally.bytes_up[places] += sizes

    def _ask_gradients(self, tally: Tally, groups: list[Work]) -> None:
        collectors: dict[str, Collector] = {}
        for work in groups:
            gradients = self._full_gradients(work, tally)
            usable = usable_rows(gradients)
            self._send(GRADIENT, gradients[usable], work.places[usable.cpu()], tally, collectors)
        if collectors:
            self.algorithm.begin(collectors[GRADIENT].mean())

    def _full_gradients(self, work: Work, tally: Tally) -> Tensor:
        tally.examples[work.places] += work.sizes
        width = self.options.local.batch_size or int(work.sizes.max())
        return full_gradients(self._gradients, work, self._weights, width)

    def _train(self, tally: Tally, groups: list[Work]) -> dict[str, Tensor]:
        collectors: dict[str, Collector] = {}
        buffers = Running()
        for work in groups:
            correction = self.algorithm.correction(work)
            trained = self._local(work, correction, tally.rate)
            tally.take(trained, 2 if correction.anchored else 1)
            kept = tally.usable(trained)
            if kept is None:
                continue
            gradients = None
            if self.algorithm.wants_gradient:
                gradients = self._full_gradients(kept.work, tally)
            for kind, vectors in self._messages(kept, gradients).items():
                self._send(kind, vectors, kept.work.places, tally, collectors)
            self._keep_buffers(buffers, kept.work, tally)
        if len(self._buffers) and collectors:
            self._buffers = buffers.mean()
        return {kind: collector.mean() for kind, collector in collectors.items()}

    def _local(self, work: Work, correction: Correction, rate: float) -> Trained:
        if isinstance(self._gradients, Sequential):
            self._gradients.begin(self._buffers)
        optimizer = self.algorithm.optimizer(self.options.local)
        return train(self._gradients, work, self._weights, correction, optimizer, rate)

    def _messages(self, trained: Trained, gradients: Tensor | None) -> dict[str, Tensor]:
        found = self.algorithm.messages(trained, gradients)
        if self._mechanism is not None:
            found[UPDATE] = self._mechanism.clipped(found[UPDATE])
        return found

    def _keep_buffers(self, buffers: Running, work: Work, tally: Tally) -> None:
        if len(self._buffers) and isinstance(self._gradients, Sequential):
            own = self._gradients.buffers()[None]
            sizes = buffers.add(tally.cohort[work.places], own, tally.weights[work.places])
            tally.bytes_up[work.places] += sizes

    def _finish(self, means: dict[str, Tensor], tally: Tally) -> None:
        kept = tally.kept
        if self._mechanism is not None:
            mean = means.get(UPDATE, torch.zeros_like(self._weights))
            means = {UPDATE: self._mechanism.noised(mean * int(kept.sum()), self.round)}
        if not means:
            return
        means[UPDATE] = means[UPDATE] * tally.factor
        share = float(self._shares[tally.cohort[kept]].sum())
        weights, steps = tally.weights[kept], tally.steps[kept]
        summary = Summary(self.round, weights, steps, share, tally.rate)
        self._weights = self.algorithm.finish(self._weights, means, summary)
        for codec in self._codecs.values():
            codec.observe(tally.start_loss(), self.round)

    def _metrics(self) -> Mapping[str, Any]:
        evaluate = self.options.evaluate
        if evaluate is None or self.round % self.options.evaluate_every:
            return {}
        return evaluate(self.model.eval())

    def epsilon(self, delta: float, accountant: str = "pld") -> float:
        """Return the epsilon that the rounds so far have spent; see `Privacy.epsilon`.

        Raises:
            ValueError: the simulation has no privacy.
        """
        if self._mechanism is None or self.options.privacy is None:
            raise ValueError("the simulation has no privacy=, so that no epsilon is finite")
        rate = self._mechanism.expected / len(self.population)
        privacy = self.options.privacy
        return privacy.epsilon(rounds=self.round, delta=delta, rate=rate, accountant=accountant)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next rounds depend on: nested dicts of tensors and plain numbers."""
        sampler = getattr(self.options.sampler, "state_dict", dict)
        return {
            "round": self.round,
            "seed": self.options.seed,
            "weights": self._weights.clone(),
            "buffers": self._buffers.clone(),
            "algorithm": self.algorithm.state_dict(),
            "codecs": {kind: codec.state_dict() for kind, codec in self._codecs.items()},
            "privacy": self._mechanism.state_dict() if self._mechanism else {},
            "sampler": sampler(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, in a simulation made with the same arguments.

        Raises:
            ValueError: the state is of another model or seed.
        """
        if state["weights"].shape != self._weights.shape or state["seed"] != self.options.seed:
            raise ValueError(
                f"state must be of {len(self._weights)} weights and seed {self.options.seed}, got "
                f"{len(state['weights'])} and {state['seed']}"
            )
        self.round = int(state["round"])
        self._weights = state["weights"].to(self._weights, copy=True)
        self._buffers = state["buffers"].to(self._buffers, copy=True)
        self.algorithm.load_state_dict(state["algorithm"])
        for kind, kept in state["codecs"].items():
            self._codecs[kind] = copy.deepcopy(self.options.codec)  # type: ignore[assignment]
            self._codecs[kind].load_state_dict(kept)
        if self._mechanism:
            self._mechanism.load_state_dict(state["privacy"])
        if state["sampler"]:
            self.options.sampler.load_state_dict(state["sampler"])  # type: ignore[attr-defined]
