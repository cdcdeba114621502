"""Rand-k-Spatial: Rand-k's messages, a decoder that looks at all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featherweight.common import unknown
from featherweight.federated.codecs import spatial
from featherweight.federated.codecs.codec import Message, shares
from featherweight.federated.codecs.count import Count
from featherweight.federated.codecs.rand_k import RandK
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.wire import Floats


class Part(NamedTuple):
    """What one client sent.

    Attributes:
        indices: [k].
        values: [k].
        weight: in the mean; weights sum to 1.
    """

    indices: NDArray[np.int64]
    values: Floats
    weight: float


class JointDecoder:
    """Divides every entry's sum by T(number of clients that sent it).

    Args:
        transform: "avg", "max", "opt" or "adaptive".
        ratio: R2 / R1 for "opt", from whoever knows the vectors.
        decay: of the moving averages that "adaptive" learns the ratio from, in [0, 1).

    Raises:
        ValueError: an argument is out of range, or "opt" lacks its ratio.
    """

    def __init__(self, transform: str, ratio: float | None, decay: float) -> None:
        if transform not in spatial.TRANSFORMS:
            raise ValueError(unknown("transform", transform, spatial.TRANSFORMS))
        if (ratio is None) == (transform == "opt"):
            raise ValueError(f"ratio= goes with transform='opt', got {ratio!r} and {transform!r}")
        if ratio is not None and not ratio >= -1:
            raise ValueError(f"ratio must be at least -1, got {ratio!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay!r}")
        self.transform = transform
        self.ratio = ratio
        self.decay = decay
        self.own = 0.0
        self.cross = 0.0
        self.rounds = 0

    def slope(self, clients: int) -> float:
        """Return the slope of T for so many clients."""
        if self.transform != "adaptive":
            return spatial.slope(self.transform, clients, self.ratio or 0.0)
        alike = self.cross / self.own if self.own > 0 else 0.0
        return float(np.clip(alike, 0.0, 1.0)) if clients > 1 else 0.0

    def estimate(self, parts: Sequence[Part], length: int) -> Floats:
        """Return the estimate of the weighted mean, [length], and learn from it if adaptive."""
        values = spatial.transform_values(self.slope(len(parts)), len(parts))
        factors = spatial.scales(values, [len(part.indices) / length for part in parts])
        total = np.zeros(length, np.float32)
        received = np.zeros(length, np.int32)
        for part, factor in zip(parts, factors, strict=True):
            total[part.indices] += np.float32(part.weight * factor) * part.values
            received[part.indices] += 1
        table = np.concatenate([[0.0], 1.0 / values]).astype(np.float32)
        total *= table[received]
        if self.transform == "adaptive" and len(parts) > 1:
            self._learn(parts, length)
        return total

    def _learn(self, parts: Sequence[Part], length: int) -> None:
        """Move the averages towards this round's; decoding used those of earlier rounds.

        Averages are of the squared norm and of the inner product of a pair, so that rounds with
        different numbers of clients go together.
        """
        own, cross = estimated(parts, length)
        clients = len(parts)
        self.own = self.decay * self.own + (1 - self.decay) * own / clients
        pairs = clients * (clients - 1)
        self.cross = self.decay * self.cross + (1 - self.decay) * cross / pairs
        self.rounds += 1

    def __repr__(self) -> str:
        return f"JointDecoder({self.transform!r}, {self.ratio!r}, {self.decay!r})"

    def state_dict(self) -> dict[str, Any]:
        """Return the moving averages, if there are any."""
        if self.transform != "adaptive":
            return {}
        return {"own": self.own, "cross": self.cross, "rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the moving averages.

        Raises:
            ValueError: the state is another decoder's.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(f"the state has {sorted(state)}, not {sorted(self.state_dict())}")
        if state:
            self.own, self.cross = float(state["own"]), float(state["cross"])
            self.rounds = int(state["rounds"])


def estimated(parts: Sequence[Part], length: int) -> tuple[float, float]:
    """Return unbiased estimates of R1 and R2 of the clients' vectors, from what they sent.

    The vectors are taken times their weight and the number of clients, which is 1 for the plain
    mean.
    """
    total, squares, own = np.zeros(length), np.zeros(length), 0.0
    for part in parts:
        scaled = part.values * np.float64(len(parts) * part.weight)
        share = len(part.indices) / length
        own += float(np.square(scaled).sum()) / share
        total[part.indices] += scaled / share
        squares[part.indices] += np.square(scaled / share)
    return own, float(np.square(total).sum() - squares.sum())


@CODECS.register(
    "rand-k-spatial",
    "rand-k, decoded with the number of clients that sent each entry",
    "Jhunjhunwala et al. 2021, arXiv:2110.07751",
    needs=("k",),
)
class RandKSpatial(RandK):
    """Rand-k whose server weighs an entry by how many clients sent it.

    The messages are Rand-k's to the byte, so clients need no change. Entry j of the mean is
    beta / T(M_j) times the weighted sum of what arrived, M_j being the number of clients that sent
    it; an entry that nobody sent is 0. Unbiased for every T. Where clients are alike its error is
    smaller than Rand-k's; where they are not, "avg" and "max" lose.

    Args:
        k: a count (int) or a fraction (float); a mapping gives each client its own.
        transform: "avg": T for clients that are half alike, the paper's practical choice; "max":
            for equal vectors; "opt": for a known ratio R2 / R1; "adaptive": for the ratio estimated
            in earlier rounds (ours), Rand-k in the first.
        ratio: R2 / R1 for "opt", at least -1.
        decay: of the adaptive averages, in [0, 1).
        values: "float32", "float16" or "bfloat16".
        seed: clients and server share it.

    Raises:
        TypeError: ``k`` is no number.
        ValueError: an option is out of range.

    Source:
        Jhunjhunwala, Mallick, Gadhikar, Kadhe and Joshi 2021, arXiv:2110.07751, section 3.
    """

    name: ClassVar[str] = "rand-k-spatial"
    separable: ClassVar[bool] = False

    def __init__(
        self,
        k: Count | Mapping[int, Count],
        transform: str = "avg",
        *,
        ratio: float | None = None,
        decay: float = 0.9,
        values: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__(k, values=values, seed=seed)
        self.decoder = JointDecoder(transform, ratio, decay)
        self.stateful = "server" if transform == "adaptive" else "no"

    def combine(self, messages: Sequence[Message]) -> Tensor:
        """Return the estimated mean of all messages together."""
        weights = shares(messages)
        parts = [
            Part(indices, values, float(weight))
            for (values, indices), weight in zip(
                (message.content for message in messages), weights, strict=True
            )
        ]
        return torch.from_numpy(self.decoder.estimate(parts, messages[0].header.length))

    def state_dict(self) -> dict[str, Any]:
        """Return what "adaptive" has learned."""
        return self.decoder.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self.decoder.load_state_dict(state)
