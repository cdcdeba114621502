"""rTop-k: k entries chosen at random among the r largest."""

from __future__ import annotations

from typing import ClassVar

from featherweight.federated.codecs.codec import Body, Origin
from featherweight.federated.codecs.count import Count, check_count, count_of
from featherweight.federated.codecs.indexed import largest
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.codecs.top_k import TopK
from featherweight.federated.indices import choose, hash64
from featherweight.federated.wire import Floats

CHOICE = 3  # sub-stream of the seed


@CODECS.register(
    "r-top-k",
    "k random entries of the r largest; biased",
    "Barnes et al. 2020, arXiv:2005.10761",
    needs=("k",),
)
class RTopK(TopK):
    """Sends k entries drawn evenly from the r of largest magnitude, as they are.

    Between Top-k (r = k) and Rand-k without its scale (r = length). Biased; use `ErrorFeedback`.

    Args:
        k: a count (int) or a fraction (float).
        r: a count or a fraction, at least k; None for four times k, or all if there are fewer.
        values: "float32", "float16" or "bfloat16".
        seed: of the choice.

    Raises:
        TypeError: ``k`` or ``r`` is no number.
        ValueError: an option is out of range; on encoding, ``r`` is less than ``k``.

    Source:
        Barnes, Inan, Isik and Ozgur 2020, arXiv:2005.10761.
    """

    name: ClassVar[str] = "r-top-k"
    number: ClassVar[int] = 3

    def __init__(
        self, k: Count, r: Count | None = None, *, values: str = "float32", seed: int = 0
    ) -> None:
        super().__init__(k, values=values, seed=seed)
        if r is not None:
            check_count(r, "r")
        self.r = r

    def _pool(self, length: int) -> int:
        count = count_of(self.k, length)
        pool = min(4 * count, length) if self.r is None else count_of(self.r, length, name="r")
        if pool < count:
            raise ValueError(f"r must be at least k, got {pool} and {count}")
        return pool

    def _body(self, vector: Floats, origin: Origin) -> Body:
        pool = largest(vector, self._pool(len(vector)))
        seed = hash64(self.seed, CHOICE, *origin)
        places = choose(len(pool), count_of(self.k, len(vector)), seed)
        places.sort()
        chosen = pool[places]
        return self._packed(chosen, vector[chosen], len(vector))
