"""Stateless seeds: the same parts give the same random numbers, in any process and any order."""

import hashlib

import torch

from featherweight.common import Generator


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) that depends on every part and on their order.

    Python's ``hash`` differs between processes, so BLAKE2b of the parts' text is used.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def derive_generator(*parts: int | str) -> Generator:
    """Return a new CPU generator started from ``derive_seed(*parts)``."""
    return torch.Generator().manual_seed(derive_seed(*parts))
