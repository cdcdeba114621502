"""Which of an algorithm's vectors travel, and which stay with their client.

An algorithm of the simulator holds the server's and all clients' state in one object. Between
machines each side has a copy: the server's is right in all but the clients' own vectors, a client's
is made right before each use, by what came down and by what it kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from featherweight.federated.algorithms import Algorithm, Mime, MimeLite, Scaffold
from featherweight.federated.algorithms.base import UPDATE, VARIATE

BUFFERS = "buffers"  # kind of message: batch norm's statistics and the like


def shared(algorithm: Algorithm) -> tuple[str, ...]:
    """Return the names of the vectors that clients need beside the weights.

    Raises:
        ValueError: the algorithm is one that this module doesn't know how to divide.
    """
    names: tuple[str, ...] = ()
    if isinstance(algorithm, Scaffold):
        names = ("variate",)
    elif isinstance(algorithm, Mime):
        names = ("gradient", "momentum") if algorithm.beta else ("gradient",)
    elif isinstance(algorithm, MimeLite):
        names = ("momentum",) if algorithm.beta else ()
    lost = algorithm.stateful and not hasattr(algorithm, "own")
    if lost or len(names) != algorithm.downlink - 1:
        raise ValueError(
            f"{type(algorithm).__name__} can't run on Flower: which of its vectors clients need is "
            "not known"
        )
    return names


def give(algorithm: Algorithm, vectors: Mapping[str, Tensor], own: Mapping[str, Any]) -> None:
    """Make a client's copy of an algorithm right.

    Args:
        algorithm: to be changed.
        vectors: what came down, by name.
        own: what the client kept, see `kept`; empty at first.
    """
    for name, vector in vectors.items():
        setattr(algorithm, name, vector)
    if algorithm.stateful:
        blank = algorithm.own.state_dict()  # type: ignore[attr-defined]
        nobody = {name: values[:0] for name, values in blank.items()}
        algorithm.own.load_state_dict(own or nobody)  # type: ignore[attr-defined]


def kept(algorithm: Algorithm) -> dict[str, Any]:
    """Return what a client has to keep for its next round."""
    if not algorithm.stateful:
        return {}
    found: dict[str, Any] = algorithm.own.state_dict()  # type: ignore[attr-defined]
    return found


def kinds(algorithm: Algorithm, buffers: bool) -> tuple[str, ...]:
    """Return the kinds of vectors that a client sends after training, in order."""
    vectors = algorithm.uplink - int(algorithm.sends_gradient)
    found = (UPDATE, VARIATE)[:vectors]
    return (*found, BUFFERS) if buffers else found
