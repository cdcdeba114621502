"""Reads the GPTQ v2 layout bit by bit, from its description alone."""

import torch


def bits_of(words):
    return [(int(word) >> place) & 1 for word in words for place in range(32)]


def number(stream, place, bits):
    return sum(bit << i for i, bit in enumerate(stream[place * bits : (place + 1) * bits]))


def dequantise(qweight, qzeros, scales, g_idx, bits):
    """Return ``w[n, k] = scales[g_idx[k], n] (q[k, n] - zero[g_idx[k], n])`` in float32."""
    columns, rows = len(g_idx), scales.shape[1]
    weight = torch.zeros(rows, columns)
    zeros = [bits_of(line) for line in qzeros]
    for n in range(rows):
        stream = bits_of(qweight[:, n])
        for k in range(columns):
            group = int(g_idx[k])
            code, zero = number(stream, k, bits), number(zeros[group], n, bits)
            weight[n, k] = scales[group, n].float() * (code - zero)
    return weight
