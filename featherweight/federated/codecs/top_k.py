"""Top-k: every client sends its k largest entries."""

from __future__ import annotations

from typing import ClassVar

from featherweight.federated.codecs.codec import Body, Origin
from featherweight.federated.codecs.count import Count, check_count, count_of
from featherweight.federated.codecs.indexed import IndexedCodec, largest
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.wire import Floats, Header, Refused


@CODECS.register(
    "top-k",
    "the k entries of largest magnitude; biased, meant for error feedback",
    "Stich et al. 2018, arXiv:1809.07599",
    needs=("k",),
)
class TopK(IndexedCodec):
    """Sends the k entries of largest magnitude as they are; of equal ones those that come first.

    Biased: entries that are never among the largest never arrive, unless what was left out is sent
    later, by `ErrorFeedback`. The squared error is at most 1 - k / length of the squared norm.

    Args:
        k: a count (int) or a fraction (float).
        values: "float32", "float16" or "bfloat16".
        seed: taken for uniformity; nothing is random.

    Raises:
        TypeError: ``k`` is no number.
        ValueError: an option is out of range.

    Source:
        Stich, Cordonnier and Jaggi 2018, arXiv:1809.07599.
    """

    name: ClassVar[str] = "top-k"
    number: ClassVar[int] = 2
    unbiased: ClassVar[bool] = False
    contractive: ClassVar[bool] = True

    def __init__(self, k: Count, *, values: str = "float32", seed: int = 0) -> None:
        super().__init__(values=values, seed=seed)
        check_count(k)
        self.k = k

    def _most_count(self, length: int) -> int:
        return count_of(self.k, length)

    def _check_count(self, header: Header) -> None:
        count = expected_count(self.k, header)
        if header.count != count:
            raise Refused(f"the count is {header.count}, not {count}")

    def _body(self, vector: Floats, origin: Origin) -> Body:
        chosen = largest(vector, count_of(self.k, len(vector)))
        return self._packed(chosen, vector[chosen], len(vector))


def expected_count(k: Count, header: Header) -> int:
    """Return how many entries a message must have.

    Raises:
        Refused: its vector is too short for so many.
    """
    try:
        return count_of(k, header.length)
    except ValueError as error:
        raise Refused(str(error)) from None
