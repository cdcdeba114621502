"""Wangni et al.: entries are kept with probabilities that minimise the variance."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from featherweight.federated.codecs.codec import Body, Origin
from featherweight.federated.codecs.count import Count, check_count, count_of
from featherweight.federated.codecs.indexed import IndexedCodec
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.indices import generator
from featherweight.federated.wire import Floats, check_range

CHOICE = 4  # sub-stream of the seed


@CODECS.register(
    "wangni",
    "entries kept with the probabilities that minimise the variance, k expected",
    "Wangni et al. 2018, arXiv:1710.09854",
    needs=("k",),
)
class Wangni(IndexedCodec):
    """Keeps entry j with probability p_j and sends x_j / p_j; k entries are expected.

    p_j is min(1, c |x_j|) with the c for which the probabilities sum to k, or as near as there are
    nonzero entries: of all independent choices the one of least variance. Unbiased; the number of
    entries varies, and their indices travel too.

    Args:
        k: expected entries, a count (int) or a fraction (float).
        values: "float32", "float16" or "bfloat16".
        seed: of the choice.

    Raises:
        TypeError: ``k`` is no number.
        ValueError: an option is out of range.

    Source:
        Wangni, Wang, Liu and Zhang 2018, arXiv:1710.09854, algorithm 3.
    """

    name: ClassVar[str] = "wangni"
    number: ClassVar[int] = 4
    unbiased: ClassVar[bool] = True
    contractive: ClassVar[bool] = False

    def __init__(self, k: Count, *, values: str = "float32", seed: int = 0) -> None:
        super().__init__(values=values, seed=seed)
        check_count(k)
        self.k = k

    def excess(self, length: int) -> float:
        """Return length / k - 1, that of even probabilities."""
        return length / count_of(self.k, length) - 1

    def _most_count(self, length: int) -> int:
        return length

    def _body(self, vector: Floats, origin: Origin) -> Body:
        kept = probabilities(vector, count_of(self.k, len(vector)))
        drawn = generator(self.seed, CHOICE, *origin).random(len(vector)) < kept
        chosen = np.flatnonzero(drawn)
        values = (vector[chosen] / kept[chosen]).astype(np.float32)
        check_range(values, "a value over its probability")
        return self._packed(chosen, values, len(vector))


def probabilities(vector: Floats, count: int) -> NDArray[np.float64]:
    """Return the probability with which each entry is kept, [length].

    Args:
        vector: [length].
        count: sum of the probabilities; less if fewer entries are not zero.

    Source:
        Wangni et al. 2018, arXiv:1710.09854, algorithm 3, run until nothing changes.
    """
    magnitudes = np.abs(vector).astype(np.float64)
    total = magnitudes.sum()
    if total == 0:
        return magnitudes
    kept: NDArray[np.float64] = np.minimum(count * magnitudes / total, 1.0)
    while True:
        active = kept < 1
        held = kept[active].sum()
        if held == 0:
            return kept
        factor = (count - len(vector) + np.count_nonzero(active)) / held
        if factor <= 1 + 1e-12:
            return kept
        kept = np.minimum(factor * kept, 1.0)
