"""Error feedback: what a codec left out is added to what the client sends next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from featherweight.federated.codecs.codec import Body, Codec, Message, Origin, Stateful
from featherweight.federated.codecs.count import Count
from featherweight.federated.codecs.registry import CODECS
from featherweight.federated.codecs.top_k import TopK
from featherweight.federated.wire import Array, Floats, Header, Reader

PREFIX = "residual."


class ErrorFeedback(Codec):
    """Keeps what each client has not said yet, and says it with the next vector.

    A client sends C(e + x) and keeps e <- e + x - C(e + x). C must be contractive. An unbiased
    codec is made so by the factor 1 / (1 + w), w being its `Codec.excess`, applied on decoding: its
    messages stay what they are. Without the factor residuals would grow without bound.

    The residuals live with the codec that encodes, one a client.

    Args:
        codec: stateless, decodes messages one by one, and is contractive or has a known excess.

    Raises:
        ValueError: the codec is none of that.

    Source:
        Karimireddy et al. 2019, arXiv:1901.09847; Stich and Karimireddy 2020, arXiv:1909.05350.
    """

    name: ClassVar[str] = "error-feedback"
    unbiased: ClassVar[bool] = False
    contractive: ClassVar[bool] = False
    stateful: Stateful = "client"

    def __init__(self, codec: Codec) -> None:
        super().__init__(values=codec.values, seed=codec.seed)
        known = codec.contractive or codec.excess(2**31) is not None
        if codec.stateful != "no" or not codec.separable or not known:
            raise ValueError(
                f"{codec.name} can't have error feedback: it must be stateless, decode messages "
                "one by one, and be contractive or have a known excess"
            )
        self.codec = codec
        self._residuals: dict[int, Tensor] = {}

    @property
    def linear(self) -> bool:
        """Whether messages of one round may be summed value by value: if the codec's may."""
        return self.codec.linear

    def encode(self, tensor: Tensor, *, round: int, client: int, weight: float = 1.0) -> bytes:
        """Return the message for a vector and what its client still owes; see `Codec.encode`."""
        vector = tensor.detach().to("cpu", torch.float32)
        if client in self._residuals:
            if self._residuals[client].shape != vector.shape:
                owed = list(self._residuals[client].shape)
                raise ValueError(f"tensor has shape {list(vector.shape)}, the residual {owed}")
            vector = vector + self._residuals[client]
        message = self.codec.encode(vector, round=round, client=client, weight=weight)
        self._residuals[client] = vector - self.decode_mean([message])
        return message

    def read(self, message: bytes) -> Message:
        """Check a message whole; see `Codec.read`."""
        return self.codec.read(message)

    def combine(self, messages: Sequence[Message]) -> Tensor:
        """Return the weighted mean of what the messages say."""
        mean = self.codec.combine(messages)
        return mean.mul_(self._factor(len(mean)))

    def forget(self, client: int) -> None:
        """Drop the residual of a client that is gone for good."""
        self._residuals.pop(client, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the residual of every client."""
        return {f"{PREFIX}{client}": held.clone() for client, held in self._residuals.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned.

        Raises:
            ValueError: the state is another codec's.
        """
        residuals = {}
        for name, held in state.items():
            client = name.removeprefix(PREFIX)
            if not (name.startswith(PREFIX) and client.isdecimal() and isinstance(held, Tensor)):
                raise ValueError(f"the state has {name!r}, which is no residual of a client")
            residuals[int(client)] = held.to("cpu", torch.float32, copy=True)
        self._residuals = residuals

    def expected_bytes(self, length: int, client: int = 0) -> int | None:
        """Return the size of the codec's messages."""
        return self.codec.expected_bytes(length, client)

    def most_bytes(self, length: int) -> int:
        """Return the largest size of the codec's messages."""
        return self.codec.most_bytes(length)

    def key(self) -> int:
        """Return the codec's fingerprint."""
        return self.codec.key()

    def _factor(self, length: int) -> float:
        if self.codec.contractive:
            return 1.0
        return 1.0 / (1.0 + (self.codec.excess(length) or 0.0))

    def _body(self, vector: Floats, origin: Origin) -> Body:
        return self.codec._body(vector, origin)

    def _content(self, header: Header, reader: Reader) -> tuple[Array, ...]:
        return self.codec._content(header, reader)


@CODECS.register(
    "top-k-feedback",
    "top-k; what was left out is sent later",
    "Stich et al. 2018, arXiv:1809.07599",
    needs=("k",),
)
class TopKFeedback(ErrorFeedback):
    """Top-k with error feedback, the way Top-k is meant to be used.

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

    name: ClassVar[str] = "top-k-feedback"

    def __init__(self, k: Count, *, values: str = "float32", seed: int = 0) -> None:
        super().__init__(TopK(k, values=values, seed=seed))
