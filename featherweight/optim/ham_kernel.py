# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""AdamW's step and HAM's in one pass over memory, for `ham_adamw`; importing this needs numba.

The pass waits for memory, so a few operations an entry cost nothing, but an exponential would.
Where the exponents of a block are small, as they are nearly always, three terms of its series are
exact to rounding; the largest gradient of the block tells. Elsewhere ten terms of an eighth of the
exponent, and three squarings, exact to 1e-6 of the weight.
"""

import numpy as np
from numba import njit

BLOCK = 512  # entries, two kilobytes of each array: the next block's gradient stays in the cache
SMALL = np.float32(1 / 32)  # exponents up to here: the fourth term is under half a rounding
LARGEST = 5.0  # exponents up to here

VECTORS = {"contract", "nsz"}  # what may be changed about rounding: products may be fused with sums


@njit(nogil=True, error_model="numpy")
def step(
    weights, gradient, first, second,
    rest1, beta2, rest2, rate, scale, eps, decay, sign, alpha, beta, clamp,
):  # fmt: skip
    """Step flat float32 arrays of one length.

    Args:
        weights, gradient, first, second: first and second are the moments.
        rest1, rest2: 1 - beta1, 1 - beta2.
        rate, scale: learning rate and root of the second moment, corrected for their bias.
        decay: 1 - lr * weight_decay.
        sign: -1 to ascend.
        alpha, beta: of the exponent, ``alpha sign(weight) gradient + beta``.
        clamp: bound of its size, from `SMALL` to `LARGEST`.
    """
    bits = gradient.view(np.int32)
    largest = _largest(bits[:BLOCK])
    for low in range(0, len(weights), BLOCK):
        high = min(low + BLOCK, len(weights))
        end = min(high + BLOCK, len(weights))
        whole = end - high == high - low  # the next block is as long as this one
        if abs(alpha) * largest + abs(beta) <= SMALL:
            largest = _small(
                weights[low:high], gradient[low:high], first[low:high], second[low:high],
                bits[high:end] if whole else bits[low:high],
                rest1, beta2, rest2, rate, scale, eps, decay, sign, alpha, beta,
            )  # fmt: skip
        else:
            whole = False
            _any(
                weights[low:high], gradient[low:high], first[low:high], second[low:high],
                rest1, beta2, rest2, rate, scale, eps, decay, sign, alpha, beta, clamp,
            )  # fmt: skip
        if not whole:
            largest = _largest(bits[high:end])


@njit(nogil=True, error_model="numpy")
def _largest(bits):
    """Return the largest size of floats given by their bits; NaN is larger than all."""
    largest = np.int32(0)
    for i in range(len(bits)):
        largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    return np.int32(largest).view(np.float32)


@njit(nogil=True, error_model="numpy", fastmath=VECTORS)
def _small(
    weights, gradient, first, second, bits,
    rest1, beta2, rest2, rate, scale, eps, decay, sign, alpha, beta,
):  # fmt: skip
    """Step a block; return the largest gradient of the next, whose memory is then on its way."""
    largest = np.int32(0)
    for i in range(len(weights)):
        g = sign * gradient[i]
        m = first[i] + rest1 * (g - first[i])
        v = beta2 * second[i] + rest2 * (g * g)
        first[i] = m
        second[i] = v
        w = decay * weights[i] - rate * m / (np.sqrt(v) * scale + eps)
        s = alpha * g
        e = (-s if w < np.float32(0) else s) + beta
        series = e * (np.float32(1) + e * (np.float32(1 / 2) + e * np.float32(1 / 6)))
        weights[i] = w + w * series
        largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
    return np.int32(largest).view(np.float32)


@njit(nogil=True, error_model="numpy", fastmath=VECTORS)
def _any(
    weights, gradient, first, second,
    rest1, beta2, rest2, rate, scale, eps, decay, sign, alpha, beta, clamp,
):  # fmt: skip
    for i in range(len(weights)):
        g = sign * gradient[i]
        m = first[i] + rest1 * (g - first[i])
        v = beta2 * second[i] + rest2 * (g * g)
        first[i] = m
        second[i] = v
        w = decay * weights[i] - rate * m / (np.sqrt(v) * scale + eps)
        s = alpha * g
        e = (-s if w < np.float32(0) else s) + beta
        e = min(max(e, -clamp), clamp) * np.float32(1 / 8)
        u = np.float32(1 / 362880)
        u = u * e + np.float32(1 / 40320)
        u = u * e + np.float32(1 / 5040)
        u = u * e + np.float32(1 / 720)
        u = u * e + np.float32(1 / 120)
        u = u * e + np.float32(1 / 24)
        u = u * e + np.float32(1 / 6)
        u = u * e + np.float32(1 / 2)
        u = u * e + np.float32(1)
        u = u * e + np.float32(1)
        u *= u
        u *= u
        u *= u
        weights[i] = w * u
