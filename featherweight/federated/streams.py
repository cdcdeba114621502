"""Seeds: one number in, independent streams out, the same on every platform.

Batches are shuffled by hashes of (seed, client, round, epoch, position), so that a client's batches
depend neither on the algorithm, nor on who else trains in the round, nor on how clients are
grouped, and no generator is made for each client.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]

# the constants of splitmix64: Guy Steele, Doug Lea, Christine Flood 2014
GOLDEN, FIRST, SECOND = (
    np.array(word, np.uint64)
    for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def stream(seed: int, *path: str | int) -> int:
    """Return the seed of a sub-stream: 63 bits of a hash of the seed and the names.

    Args:
        seed: any integer.
        path: what the stream is for, ``stream(0, "noise", round)``.
    """
    text = "/".join([str(int(seed)), *(str(part) for part in path)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix(words: Words) -> Words:
    """Return the output of splitmix64 for each state: a bijection of 64-bit words.

    Source:
        Steele, Lea, Flood, *Fast splittable pseudorandom number generators*, OOPSLA 2014.
    """
    words = words + GOLDEN
    words = (words ^ (words >> np.uint64(30))) * FIRST
    words = (words ^ (words >> np.uint64(27))) * SECOND
    return words ^ (words >> np.uint64(31))


def shuffles(seed: int, round: int, clients: Tensor, sizes: Tensor, epochs: int) -> Tensor:
    """Return for each client and epoch an order of its examples.

    Args:
        seed: of the stream of batches.
        round: from 0.
        clients: ids, int64, [C].
        sizes: their numbers of examples, int64, [C].
        epochs: how many orders a client.

    Returns:
        int64, [C, epochs, max(sizes)]: the first ``sizes[i]`` entries of a row are a permutation of
        ``range(sizes[i])``, the rest are the positions behind.
    """
    width = int(sizes.max())
    words = mix(np.full(1, seed, np.uint64) + np.full(1, round, np.uint64) * GOLDEN)
    words = mix(words ^ clients.numpy().astype(np.uint64))[:, None, None]
    words = mix(words ^ np.arange(epochs, dtype=np.uint64)[:, None])
    words = mix(words ^ np.arange(width, dtype=np.uint64))
    behind = np.arange(width) >= sizes.numpy()[:, None, None]
    keys = np.where(behind, np.iinfo(np.uint64).max, words)
    return torch.from_numpy(np.argsort(keys, axis=-1, kind="stable"))
