"""Integer codes as a dense stream of bits in 32-bit words, first code in the lowest bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension; codes may straddle words.

    Args:
        codes: integers in ``[0, 2^bits - 1]``, ``[..., n]``.
        bits: of a code, 1 to 8.

    Returns:
        int32, ``[..., ceil(n bits / 32)]``; the last word is filled up with zeros.

    Raises:
        ValueError: a code does not fit.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes must lie in 0..{2**bits - 1}")
    values = codes.to("cpu", torch.uint8).numpy()
    expanded = (values[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = expanded.reshape(*values.shape[:-1], -1)
    padding = [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)]
    packed = np.packbits(np.pad(stream, padding), axis=-1, bitorder="little")
    return torch.from_numpy(packed.view("<i4").astype(np.int32))


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack`.

    Args:
        words: int32, ``[..., w]``.
        bits: of a code.
        count: how many codes the last dimension held.

    Returns:
        uint8, ``[..., count]``.
    """
    octets = np.ascontiguousarray(words.cpu().numpy().astype("<i4")).view(np.uint8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little", count=count * bits)
    codes = np.packbits(stream.reshape(*stream.shape[:-1], count, bits), axis=-1, bitorder="little")
    return torch.from_numpy(codes[..., 0])
