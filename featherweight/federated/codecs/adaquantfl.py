"""AdaQuantFL and its relatives: quantisation whose number of levels changes during training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from featherweight.federated.codecs.codec import Message, Stateful
from featherweight.federated.codecs.qsgd import QSGD
from featherweight.federated.codecs.quantise import MOST_LEVELS, check_levels, full_bits
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.wire import Refused

LEAST_LOSS = 1e-12  # of an interpolating model; the cap on levels acts long before


def loss_rule(start: float, first: float, loss: float, rate: float = 1.0) -> float:
    """Return AdaQuantFL's s = s_0 (rate / rate_0) sqrt(f(w_0) / f(w)), before rounding.

    Args:
        start: s_0.
        first: f(w_0).
        loss: f(w); values below 1e-12 count as that.
        rate: learning rate over the first one; 1 for a constant rate.

    Source:
        Jhunjhunwala, Gadhikar, Joshi and Eldar 2021, arXiv:2102.04487.
    """
    return start * rate * math.sqrt(max(first, LEAST_LOSS) / max(loss, LEAST_LOSS))


def best_levels(bits: float, per_bit: float, per_square: float) -> float:
    """Return the s that minimises A1 log2(4 s) / B + A2 / s^2, on which the rule rests.

    Args:
        bits: B, what a client may send in all.
        per_bit: A1.
        per_square: A2.
    """
    return math.sqrt(2 * math.log(2) * per_square * bits / per_bit)


def client_levels(levels: int, weights: Sequence[float]) -> list[int]:
    """Return DAdaQuant's levels by client: heavier ones get finer, at the same expected variance.

    q_i = max(1, round(sqrt(a / b) w_i^(2/3))), a = sum of w^(2/3), b = sum of w^2 / q^2.

    Args:
        levels: q, of all clients if they were treated alike.
        weights: in the mean, of the clients of a round; summing to 1.

    Source:
        Hoenig, Zhao and Mullins 2022, arXiv:2111.00465, section 3.3.
    """
    shares = np.asarray(weights, np.float64)
    powers = shares ** (2 / 3)
    factor = math.sqrt(powers.sum() / (shares**2 / levels**2).sum())
    return [max(1, round(factor * power)) for power in powers.tolist()]


class AdaptiveQSGD(QSGD):
    """QSGD whose messages say how many levels they use, up to a cap.

    Args:
        levels: s_0, of the first round.
        most: cap; a server refuses messages beyond it.
        full_bits: round up to 2^b - 1, which costs no more bits in fixed coding.
        monotone: levels never fall.
        smoothing: of the loss, psi in f <- psi f + (1 - psi) loss; 0 for none.
        every_rounds: rounds between changes.
        every_bits: bits that a client sends, on average, between changes; 0 for no such interval.
        bucket: as of QSGD.
        norm: as of QSGD.
        seed: of the rounding.

    Raises:
        ValueError: an option is out of range.
    """

    stateful: Stateful = "server"

    def __init__(
        self,
        levels: int = 2,
        *,
        most: int = 255,
        full_bits: bool = True,
        monotone: bool = False,
        smoothing: float = 0.0,
        every_rounds: int = 1,
        every_bits: int = 0,
        bucket: int = 0,
        norm: str = "l2",
        seed: int = 0,
    ) -> None:
        super().__init__(levels, bucket=bucket, norm=norm, seed=seed)
        self.most = check_levels(most, "most")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {smoothing!r}")
        if every_rounds < 1 or every_bits < 0:
            raise ValueError(
                "every_rounds must be at least 1 and every_bits at least 0, "
                f"got {every_rounds!r} and {every_bits!r}"
            )
        self.start = levels
        self.full_bits = full_bits
        self.monotone = monotone
        self.smoothing = smoothing
        self.every_rounds = every_rounds
        self.every_bits = every_bits
        self.levels = self._allowed(levels)
        self._numbers: dict[str, float] = {}

    def observe(self, loss: float, round: int, learning_rate: float | None = None) -> None:
        """Hear the mean loss of a round, and set the levels of those to come.

        Args:
            loss: at the model that the round began with.
            round: its number.
            learning_rate: of the next round; levels follow its ratio to the first one heard.

        A loss that is not finite changes nothing but a warning.
        """
        if not math.isfinite(loss):
            warnings.warn(f"loss {loss} of round {round}: levels stay {self.levels}", stacklevel=2)
            return
        held = self._numbers
        smooth = held.get("loss", loss)
        held["loss"] = self.smoothing * smooth + (1 - self.smoothing) * loss
        held.setdefault("first", held["loss"])
        if learning_rate is not None:
            held.setdefault("first_rate", learning_rate)
            held["rate"] = learning_rate / held["first_rate"]
        held.setdefault("changed", round - self.every_rounds)
        if round - held["changed"] >= self.every_rounds and held.get("bits", 0) >= self.every_bits:
            wanted = self._allowed(self._wanted(round))
            self.levels = max(self.levels, wanted) if self.monotone else wanted
            held["changed"], held["bits"] = round, 0

    def combine(self, messages: Sequence[Message]) -> Tensor:
        """Return the weighted mean, and count the bits."""
        mean = super().combine(messages)
        sent = 8 * sum(message.size for message in messages) / len(messages)
        self._numbers["bits"] = self._numbers.get("bits", 0) + sent
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return the levels and what the rule remembers."""
        return {"levels": self.levels, **self._numbers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: the state is another codec's.
        """
        if "levels" not in state:
            raise ValueError(f"the state has {sorted(state)}, but no levels")
        self.levels = check_levels(int(state["levels"]))
        self._numbers = {n: float(value) for n, value in state.items() if n != "levels"}

    def _wanted(self, round: int) -> float:
        """Return the levels that the rule asks for."""
        raise NotImplementedError

    def _allowed(self, wanted: float) -> int:
        """Round up, to full bits if asked, and clamp to [1, most]."""
        levels = math.ceil(min(max(wanted, 1), MOST_LEVELS))
        return min(full_bits(levels) if self.full_bits else levels, self.most)

    def _most_levels(self) -> int:
        return self.most

    def _check_levels(self, levels: int) -> None:
        if not 1 <= levels <= self.most:
            raise Refused(f"the levels are {levels}, not from 1 to {self.most}")


@CODECS.register(
    "adaquantfl",
    "qsgd whose levels grow as the loss falls",
    "Jhunjhunwala et al. 2021, arXiv:2102.04487",
    needs=("levels",),
)
class AdaQuantFL(AdaptiveQSGD):
    """QSGD with s = s_0 sqrt(f(w_0) / f(w)) levels: coarse and cheap at first, fine at the end.

    The server tells the codec the mean training loss of each round by `observe`; the levels of the
    next round follow. Real deployments send them to clients, which set `levels`; messages say how
    many they use. The rule takes the least possible loss to be 0.

    Args:
        levels: s_0.
        most: cap on the levels, 255 unless told otherwise: the loss may fall to zero.
        full_bits: round up to 2^b - 1, which is free in fixed coding; ours, the paper says nothing.
        monotone: levels never fall, although the loss may rise.
        smoothing: of the loss, for clients that are sampled; 0 is the paper's full participation.
        every_rounds: rounds between changes.
        every_bits: bits that a client sends between changes; 0 for none.
        bucket: entries that share a norm; 0 is the paper's one norm for all.
        norm: "l2", the paper's, or "max".
        seed: of the rounding.

    Raises:
        ValueError: an option is out of range.

    Source:
        Jhunjhunwala, Gadhikar, Joshi and Eldar 2021, arXiv:2102.04487.
    """

    name: ClassVar[str] = "adaquantfl"

    def _wanted(self, round: int) -> float:
        held = self._numbers
        return loss_rule(self.start, held["first"], held["loss"], held.get("rate", 1.0))


@CODECS.register(
    "dadaquant",
    "qsgd whose levels double when the loss stops falling",
    "Hoenig et al. 2022, arXiv:2111.00465",
    needs=("levels",),
)
class DAdaQuant(AdaptiveQSGD):
    """QSGD whose levels double whenever the smoothed loss has not improved for some rounds.

    The rule in time of DAdaQuant; that over clients is `client_levels`.

    Args:
        levels: of the first round.
        patience: rounds without improvement before the levels double; a tenth of the training in
            the paper.
        most: cap on the levels.
        smoothing: of the loss, 0.9 in the paper.
        full_bits: round up to 2^b - 1.
        bucket: entries that share a norm; 0 for one norm.
        norm: "l2" or "max".
        seed: of the rounding.

    Raises:
        ValueError: an option is out of range.

    Source:
        Hoenig, Zhao and Mullins 2022, arXiv:2111.00465, section 3.2.
    """

    name: ClassVar[str] = "dadaquant"

    def __init__(
        self,
        levels: int = 1,
        *,
        patience: int = 50,
        most: int = 255,
        smoothing: float = 0.9,
        full_bits: bool = False,
        bucket: int = 0,
        norm: str = "l2",
        seed: int = 0,
    ) -> None:
        super().__init__(
            levels,
            most=most,
            smoothing=smoothing,
            full_bits=full_bits,
            bucket=bucket,
            norm=norm,
            seed=seed,
        )
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience!r}")
        self.patience = patience

    def _wanted(self, round: int) -> float:
        held = self._numbers
        held.setdefault("wanted", self.start)
        if held["loss"] < held.get("best", math.inf):
            held["best"], held["since"] = held["loss"], round
        elif round - held["since"] >= self.patience:
            held["wanted"], held["since"] = min(2 * held["wanted"], self.most), round
        return held["wanted"]
