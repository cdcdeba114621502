"""The server of a simulation, its clients being Flower's nodes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from logging import WARNING

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from featherweight.federated.algorithms.base import GRADIENT, UPDATE
from featherweight.federated.codecs.adaquantfl import AdaptiveQSGD
from featherweight.federated.codecs.codec import Codec
from featherweight.federated.codecs.identity import Identity
from featherweight.federated.flower.client import codec_of
from featherweight.federated.flower.gather import Gathered
from featherweight.federated.flower.records import ASK, DOWN, Answer, Ask, pack
from featherweight.federated.flower.roll import GRADIENT_ACTION, Roll, exchange
from featherweight.federated.flower.split import BUFFERS, kinds, shared
from featherweight.federated.record import RoundRecord
from featherweight.federated.simulate import Simulation
from featherweight.federated.tally import Tally
from featherweight.federated.wire import Refused

WEIGHTS = "weights"
TRAIN = "train"
# codes of Flower's errors behind which the node is lost, not what it computed
LOST = (3, 4, 5, 8)


class FlowerStrategy(Strategy):  # type: ignore[misc]
    """Runs the rounds of a simulation on the nodes of a Flower grid.

    The server's side is the simulation's own: cohorts, weights, decoding of all messages together,
    the algorithm, the state. What clients do is done by nodes that run `client_app` with a
    simulation of the same options. After the same rounds both have the same weights, to rounding.

    Args:
        simulation: as `simulate` makes it; it holds the state and moves on with each round, so that
            ``simulation.state_dict()`` is a checkpoint.
        down: codec of what goes down; None: float32. Any stateless one will do, such as
            ``Identity(values="float16")``; clients then train from what they decode.
        attempts: how many times a client whose node was lost is asked in a round.
        patience: seconds to wait for the nodes of a cohort to be there, and for replies to a second
            question.
        on_round: called with the record of each round.

    Attributes:
        records: of the rounds so far.

    Raises:
        ValueError: the algorithm can't be divided between machines, ``down`` keeps a state, or
            ``attempts`` is below 1.

    Example:
        ```python
        strategy = FlowerStrategy(simulate(model, population, FedAvg(), sampler=..., local=...))
        strategy.start(grid, strategy.arrays(), num_rounds=100, timeout=600)
        strategy.simulation.model
        ```
    """

    def __init__(
        self,
        simulation: Simulation,
        *,
        down: Codec | None = None,
        attempts: int = 2,
        patience: float = 60.0,
        on_round: Callable[[RoundRecord], None] | None = None,
    ) -> None:
        self._shared = shared(simulation.algorithm)
        if down is not None and down.stateful != "no":
            raise ValueError(f"down must keep no state, got {down.name}")
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {attempts}")
        self.simulation, self.attempts, self.patience = simulation, attempts, patience
        self.records: list[RoundRecord] = []
        self._down = Identity() if down is None else down
        self._on_round = on_round
        self._roll = Roll(len(simulation.population))

    def arrays(self) -> ArrayRecord:
        """Return the server's weights, one flat array named "weights"."""
        return ArrayRecord({WEIGHTS: Array(self.simulation.weights.float().cpu().numpy())})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the cohort, wait for its nodes, and return what they are sent.

        The weights are the simulation's, ``arrays`` and ``config`` are not looked at.
        """
        self._began, self._grid = time.perf_counter(), grid
        self._tally = self.simulation._plan(self.simulation.round)[0]
        self._tally.bytes_down.zero_()
        if self.simulation.algorithm.sends_gradient:
            self._ask_gradients()
        self._sent = self._messages(TRAIN, self._tally.cohort.tolist())
        return list(self._sent.values())

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Ask the lost clients anew, decode all messages together, and move the weights."""
        simulation, tally = self.simulation, self._tally
        clients = {m.metadata.message_id: client for client, m in self._sent.items()}
        found = {clients[r.metadata.reply_to_message_id]: r for r in replies}
        gathered = self._gather(
            kinds(simulation.algorithm, len(simulation._buffers) > 0), self._all_replies(found)
        )
        means = self._means(gathered) if len(gathered) else {}
        if BUFFERS in means:
            simulation._buffers = means.pop(BUFFERS).to(simulation._buffers)
        simulation._finish(means, tally)
        record = self._record()
        return self.arrays(), MetricRecord(
            {
                "train-loss": record.train_loss,
                "bytes-up": int(record.bytes_up.sum()),
                "refused": len(record.refused),
            }
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return no message: the server evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> None:
        """Return nothing."""

    def summary(self) -> None:
        """Say nothing; the options are the simulation's."""

    def _record(self) -> RoundRecord:
        simulation = self.simulation
        for client, reason in self._tally.refused.items():
            log(WARNING, "round %s: client %s left out: %s", simulation.round, client, reason)
        rate = simulation.algorithm.rate(simulation.round)
        seconds = time.perf_counter() - self._began
        record = self._tally.record(simulation.round, {}, seconds, rate)
        simulation.round += 1
        self.records.append(record)
        if self._on_round is not None:
            self._on_round(record)
        return record

    def _all_replies(self, found: dict[int, Message]) -> dict[int, Message]:
        """Return a reply for each client that has one after all attempts."""
        for _ in range(self.attempts - 1):
            lost = [c for c in self._tally.cohort.tolist() if c not in found or _is_lost(found[c])]
            if not lost:
                break
            self._roll.strike(lost)
            found |= exchange(self._grid, self._messages(TRAIN, lost), self.patience)
        return found

    def _gather(self, names: Iterable[str], replies: Mapping[int, Message]) -> Gathered:
        """Take in the replies that are in order, and note why the others are not."""
        simulation, tally = self.simulation, self._tally
        codecs = {k: self._codec(k) for k in names}
        lengths = {k: len(simulation._buffers) for k in names if k == BUFFERS}
        lengths = dict.fromkeys(codecs, len(simulation._weights)) | lengths
        cohort = tally.cohort.tolist()
        weights = dict(zip(cohort, tally.weights.tolist(), strict=True))
        gathered = Gathered(codecs, lengths, simulation.round, weights)
        for place, client in enumerate(cohort):
            try:
                if client not in replies:
                    raise Refused("no reply from it")
                answer = Answer.read(replies[client])
                tally.bytes_up[place] += gathered.add(client, answer.payloads)
            except Refused as error:
                tally.kept[place] = False
                tally.refused[client] = str(error)
                continue
            tally.examples[place] += answer.examples
            tally.losses[place], tally.first[place] = answer.loss, answer.first
        return gathered

    def _means(self, gathered: Gathered) -> dict[str, Tensor]:
        simulation = self.simulation
        mechanism, aggregator = simulation._mechanism, simulation.options.aggregator
        found = {}
        for kind in kinds(simulation.algorithm, len(simulation._buffers) > 0):
            if mechanism is not None and kind == UPDATE:
                found[kind] = mechanism.clipped(gathered.vectors(kind)).mean(0)
            else:
                found[kind] = gathered.reduced(kind, None if kind == BUFFERS else aggregator)
        return {kind: mean.to(simulation._weights) for kind, mean in found.items()}

    def _ask_gradients(self) -> None:
        questions = self._messages(f"{TRAIN}.{GRADIENT_ACTION}", self._tally.cohort.tolist())
        gathered = self._gather((GRADIENT,), exchange(self._grid, questions, self.patience))
        if len(gathered):
            mean = gathered.reduced(GRADIENT, self.simulation.options.aggregator)
            self.simulation.algorithm.begin(mean.to(self.simulation._weights))
        self._tally.refused.clear()  # who sent no gradient may train all the same
        self._tally.kept.fill_(True)

    def _codec(self, kind: str) -> Codec:
        fresh = codec_of(self.simulation, kind)
        if kind == BUFFERS or self.simulation.options.codec is None:
            return fresh
        return self.simulation._codecs.setdefault(kind, fresh)

    def _messages(self, kind: str, clients: Collection[int]) -> dict[int, Message]:
        """Return a message to each client that has a node."""
        nodes = self._roll.find(self._grid, clients, self.patience)
        model = self._down.encode(self._vector(), round=self.simulation.round, client=0)
        found = {}
        for place, client in enumerate(self._tally.cohort.tolist()):
            if client in nodes:
                ask = self._ask(place).record()
                content = RecordDict({DOWN: pack({"model": model}), ASK: ask})
                found[client] = Message(content, dst_node_id=nodes[client], message_type=kind)
                self._tally.bytes_down[place] += len(model)
        return found

    def _vector(self) -> Tensor:
        """Return weights, buffers and the algorithm's vectors, one after another."""
        simulation = self.simulation
        vectors = [getattr(simulation.algorithm, name) for name in self._shared]
        parts = [simulation._weights, simulation._buffers, *vectors]
        return torch.cat([part.float().cpu() for part in parts])

    def _ask(self, place: int) -> Ask:
        tally: Tally = self._tally
        return Ask(
            round=self.simulation.round,
            client=int(tally.cohort[place]),
            weight=float(tally.weights[place]),
            steps=int(tally.steps[place]),
            rate=tally.rate,
            levels={
                kind: codec.levels
                for kind, codec in self.simulation._codecs.items()
                if isinstance(codec, AdaptiveQSGD)
            },
        )


def _is_lost(reply: Message) -> bool:
    return bool(reply.has_error()) and reply.error.code in LOST
