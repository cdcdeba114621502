"""Convolution and batch norm by their definitions, entry by entry, in numpy."""

import itertools

import numpy as np


def conv2d(x, weight, stride, padding):
    """Sum over channels and taps; zeros stand outside. All (N, C, H, W), float64."""
    batch, _, height, width = x.shape
    outputs, _, down, right = weight.shape
    size = [
        (n + 2 * p - k) // s + 1
        for n, k, s, p in zip((height, width), (down, right), stride, padding, strict=True)
    ]
    y = np.zeros((batch, outputs, *size))
    for place, taken in taps(x.shape, weight.shape, size, stride, padding):
        o, i, tap = place
        for out, source in taken:
            y[:, o, out[0], out[1]] += weight[o, i, tap[0], tap[1]] * x[:, i, source[0], source[1]]
    return y


def conv2d_gradients(x, weight, gradient, stride, padding):
    """Gradients of ``(y * gradient).sum()``, of the input and of the weight."""
    of_x, of_weight = np.zeros_like(x), np.zeros_like(weight)
    for (o, i, tap), taken in taps(x.shape, weight.shape, gradient.shape[2:], stride, padding):
        for out, source in taken:
            g = gradient[:, o, out[0], out[1]]
            of_x[:, i, source[0], source[1]] += g * weight[o, i, tap[0], tap[1]]
            of_weight[o, i, tap[0], tap[1]] += (g * x[:, i, source[0], source[1]]).sum()
    return of_x, of_weight


def taps(shape, weight, size, stride, padding):
    """Yield (output channel, input channel, tap) and the pairs of pixels that it connects."""
    outputs, inputs, *kernel = weight
    for o, i, *tap in itertools.product(*(range(n) for n in (outputs, inputs, *kernel))):
        pairs = []
        for out in itertools.product(*(range(n) for n in size)):
            source = [y * s + t - p for y, s, t, p in zip(out, stride, tap, padding, strict=True)]
            if all(0 <= n < m for n, m in zip(source, shape[2:], strict=True)):
                pairs.append((out, source))
        yield (o, i, tap), pairs


def batch_norm(x, weight, bias, eps):
    """Normalise each channel by its own moments: the result, mean and biased variance."""
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
    shape = (1, -1, 1, 1)
    y = (x - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + eps)
    return y * weight.reshape(shape) + bias.reshape(shape), mean, variance
