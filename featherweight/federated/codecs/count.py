"""How many entries travel: a count or a fraction, for all clients or for each."""

from __future__ import annotations

from collections.abc import Mapping

Count = int | float


def check_count(k: Count | Mapping[int, Count], name: str = "k") -> None:
    """Raise unless a number is a count of at least 1 or a fraction in (0, 1].

    Args:
        k: the number, or one for each client.
        name: of the argument.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of range, or a mapping is empty.
    """
    if isinstance(k, Mapping):
        if not k:
            raise ValueError(f"{name} is a mapping without clients")
        for one in k.values():
            check_count(one, name)
    elif isinstance(k, bool) or not isinstance(k, (int, float)):
        raise TypeError(f"{name} must be an int (count) or a float (fraction), got {k!r}")
    elif not (k >= 1 if isinstance(k, int) else 0 < k <= 1):
        raise ValueError(f"{name} must be a count >= 1 or a fraction in (0, 1], got {k!r}")


def count_of(k: Count | Mapping[int, Count], length: int, client: int = 0, name: str = "k") -> int:
    """Return how many of ``length`` entries a client sends: of a fraction, the nearest, at least 1.

    Raises:
        ValueError: it is more than there are, or the client has no number.
    """
    if isinstance(k, Mapping):
        if client not in k:
            raise ValueError(f"{name} has no entry for client {client}")
        return count_of(k[client], length, client, name)
    count = k if isinstance(k, int) else max(1, round(k * length))
    if count > length:
        raise ValueError(f"{name} is {count}, but the vector has {length} entries")
    return count
