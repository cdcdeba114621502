"""Rand-k-Temporal: the server remembers what each client sent last, and clients send Rand-k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from featherweight.common import unknown
from featherweight.federated.codecs.codec import Message, Stateful, shares
from featherweight.federated.codecs.count import Count
from featherweight.federated.codecs.rand_k import RandK
from featherweight.federated.codecs.rand_k_spatial import JointDecoder, Part
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.wire import Floats

MEMORIES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PREFIX = "memory."


@CODECS.register(
    "rand-k-temporal",
    "rand-k of the change since each client's last values, which the server remembers",
    "Jhunjhunwala et al. 2021, arXiv:2110.07751",
    needs=("k",),
)
class RandKTemporal(RandK):
    """Rand-k around a memory that the server keeps of every client.

    With b the memory of a client (zeros at first) its vector is estimated by b plus length / k
    times (value - b) on the entries that arrived. Afterwards the memory of these entries is what
    arrived, unscaled. Unbiased; the error is Rand-k's with the change x - b in place of x. Clients
    keep nothing and send Rand-k's messages to the byte. A client that is absent has no part in the
    mean.

    The server needs room for a vector a client, and to know its clients again: this is for some
    hundred of them. Take the mean once a round: it updates the memory.

    Args:
        k: a count (int) or a fraction (float); a mapping gives each client its own.
        memory: type of the memory: "float32", "float16" or "bfloat16"; any keeps the estimate
            unbiased.
        values: "float32", "float16" or "bfloat16".
        seed: clients and server share it.

    Raises:
        TypeError: ``k`` is no number.
        ValueError: an option is out of range.

    Source:
        Jhunjhunwala, Mallick, Gadhikar, Kadhe and Joshi 2021, arXiv:2110.07751, section 4.
    """

    name: ClassVar[str] = "rand-k-temporal"
    separable: ClassVar[bool] = False
    stateful: Stateful = "server"

    def __init__(
        self,
        k: Count | Mapping[int, Count],
        *,
        memory: str = "float32",
        values: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(k, values=values, seed=seed)
        if memory not in MEMORIES:
            raise ValueError(unknown("type of memory", memory, MEMORIES))
        self.memory = memory
        self._memories: dict[int, Tensor] = {}

    def combine(self, messages: Sequence[Message]) -> Tensor:
        """Return the estimated mean, and remember what arrived."""
        weights = shares(messages)
        length = messages[0].header.length
        parts = []
        total = np.zeros(length, np.float32)
        for message, weight in zip(messages, weights, strict=True):
            values, indices = message.content
            remembered = self._remembered(message.header.client, length)
            total += np.float32(weight) * remembered
            parts.append(Part(indices, values - remembered[indices], float(weight)))
        total += self._change(parts, length)
        for message in messages:
            self._remember(message)
        return torch.from_numpy(total)

    def forget(self, client: int) -> None:
        """Drop the memory of a client that is gone for good."""
        self._memories.pop(client, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of every client."""
        return {f"{PREFIX}{client}": held.clone() for client, held in self._memories.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: the state is another codec's.
        """
        memories = {}
        for name, held in state.items():
            client = name.removeprefix(PREFIX)
            if not (name.startswith(PREFIX) and client.isdecimal() and isinstance(held, Tensor)):
                raise ValueError(f"the state has {name!r}, which is no memory of a client")
            memories[int(client)] = held.to("cpu", MEMORIES[self.memory], copy=True)
        self._memories = memories

    def _change(self, parts: Sequence[Part], length: int) -> Floats:
        """Estimate the mean of the changes."""
        total = np.zeros(length, np.float32)
        for part in parts:
            factor = np.float32(part.weight * length / len(part.indices))
            total[part.indices] += factor * part.values
        return total

    def _remembered(self, client: int, length: int) -> Floats:
        held = self._memories.get(client)
        if held is None:
            return np.zeros(length, np.float32)
        if len(held) != length:
            raise ValueError(f"client {client} sent {length} entries, its memory has {len(held)}")
        found: Floats = held.float().numpy()
        return found

    def _remember(self, message: Message) -> None:
        values, indices = message.content
        kind = MEMORIES[self.memory]
        header = message.header
        held = self._memories.setdefault(header.client, torch.zeros(header.length, dtype=kind))
        largest = torch.finfo(kind).max  # an infinite memory would never leave the mean
        held[torch.from_numpy(indices)] = torch.tensor(values).clamp(-largest, largest).to(kind)


@CODECS.register(
    "rand-k-spatio-temporal",
    "rand-k-temporal whose changes are decoded together",
    "Jhunjhunwala et al. 2021, arXiv:2110.07751",
    needs=("k",),
)
class RandKSpatioTemporal(RandKTemporal):
    """Rand-k-Temporal with Rand-k-Spatial's decoder for the changes.

    Changes are usually far less alike than the vectors themselves, so "adaptive" is the default:
    it finds that out.

    Args:
        k: a count (int) or a fraction (float); a mapping gives each client its own.
        transform: as of Rand-k-Spatial.
        ratio: R2 / R1 of the changes for "opt".
        decay: of the adaptive averages.
        memory: type of the memory.
        values: "float32", "float16" or "bfloat16".
        seed: clients and server share it.

    Raises:
        TypeError: ``k`` is no number.
        ValueError: an option is out of range.

    Source:
        A combination of ours of both decoders of Jhunjhunwala et al. 2021, arXiv:2110.07751.
    """

    name: ClassVar[str] = "rand-k-spatio-temporal"

    def __init__(
        self,
        k: Count | Mapping[int, Count],
        transform: str = "adaptive",
        *,
        ratio: float | None = None,
        decay: float = 0.9,
        memory: str = "float32",
        values: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(k, memory=memory, values=values, seed=seed)
        self.decoder = JointDecoder(transform, ratio, decay)

    def state_dict(self) -> dict[str, Any]:
        """Return the memory of every client and what "adaptive" has learned."""
        return super().state_dict() | self.decoder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        learned = {name: value for name, value in state.items() if not name.startswith(PREFIX)}
        self.decoder.load_state_dict(learned)
        super().load_state_dict({n: v for n, v in state.items() if n.startswith(PREFIX)})

    def _change(self, parts: Sequence[Part], length: int) -> Floats:
        return self.decoder.estimate(parts, length)
