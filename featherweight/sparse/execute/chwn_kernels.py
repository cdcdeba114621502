# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202
"""Batch norm of activations with the batch innermost; importing this needs numba.

A channel lies in one piece and is finished before the next is begun: it is read from memory once,
and from the cache after that. Sums are taken over blocks, and of blocks in double precision.
"""

from numba import njit

BLOCK = 2048  # entries, a few rounding errors in a sum of them
VECTORS = {"contract", "nsz", "reassoc"}  # what may be changed about rounding


@njit(nogil=True, error_model="numpy", cache=True)
def train(x, out, weight, bias, eps, relu, means, variances, low, high):
    """Normalise channels ``low`` to ``high`` by their own moments.

    Args:
        x, out: (channels, entries).
        weight, bias: (channels,).
        eps: added to the variance.
        relu: what is negative becomes 0.
        means, variances: (channels,), written; the variance is the biased one.
    """
    size = x.shape[1]
    for c in range(low, high):
        mean = _sum(x[c]) / size
        variance = _squares(x[c], x.dtype.type(mean)) / size
        means[c], variances[c] = mean, variance
        scale = weight[c] / (variance + eps) ** 0.5
        _affine(x[c], out[c], x.dtype.type(scale), x.dtype.type(bias[c] - mean * scale), relu)


@njit(nogil=True, error_model="numpy", cache=True)
def evaluate(x, out, weight, bias, eps, relu, means, variances, low, high):
    """Normalise channels by given moments; arguments as in `train`."""
    for c in range(low, high):
        scale = weight[c] / (float(variances[c]) + eps) ** 0.5
        _affine(x[c], out[c], x.dtype.type(scale), x.dtype.type(bias[c] - means[c] * scale), relu)


@njit(nogil=True, error_model="numpy", cache=True)
def backward(
    x, gradient, weight, bias, eps, relu, means, variances, trained, of_x, of_weight, of_bias,
    low, high,
):  # fmt: skip
    """Compute the gradients of `train` or `evaluate` for channels ``low`` to ``high``.

    Args:
        x, gradient, of_x: (channels, entries).
        weight, bias, eps, relu, means, variances: as they were.
        trained: the moments were those of ``x``.
        of_weight, of_bias: (channels,), written.
    """
    size, kind = x.shape[1], x.dtype.type
    for c in range(low, high):
        mean, inverse = float(means[c]), 1.0 / (float(variances[c]) + eps) ** 0.5
        scale = weight[c] * inverse
        shift = kind(bias[c] - mean * scale)
        total, product = _products(x[c], gradient[c], kind(mean), kind(scale), shift, relu)
        of_weight[c], of_bias[c] = product * inverse, total
        slope = -scale * inverse * inverse * product / size if trained else 0.0
        offset = -scale * total / size - slope * mean if trained else 0.0
        _combine(
            x[c], gradient[c], of_x[c], kind(slope), kind(offset), kind(scale), shift, relu
        )  # fmt: skip


@njit(nogil=True, error_model="numpy")
def _sum(x):
    total = 0.0
    for begin in range(0, len(x), BLOCK):
        total += _sum_block(x[begin : begin + BLOCK])
    return total


@njit(nogil=True, error_model="numpy", fastmath=VECTORS)
def _sum_block(x):
    total = x.dtype.type(0)
    for i in range(len(x)):
        total += x[i]
    return total


@njit(nogil=True, error_model="numpy")
def _squares(x, mean):
    total = 0.0
    for begin in range(0, len(x), BLOCK):
        total += _squares_block(x[begin : begin + BLOCK], mean)
    return total


@njit(nogil=True, error_model="numpy", fastmath=VECTORS)
def _squares_block(x, mean):
    total = x.dtype.type(0)
    for i in range(len(x)):
        total += (x[i] - mean) * (x[i] - mean)
    return total


@njit(nogil=True, error_model="numpy")
def _products(x, gradient, mean, scale, shift, relu):
    total, product = 0.0, 0.0
    for begin in range(0, len(x), BLOCK):
        end = begin + BLOCK
        if relu:
            both = _products_relu(x[begin:end], gradient[begin:end], mean, scale, shift)
        else:
            both = _products_block(x[begin:end], gradient[begin:end], mean)
        total += both[0]
        product += both[1]
    return total, product


@njit(nogil=True, error_model="numpy", fastmath=VECTORS)
def _products_block(x, gradient, mean):
    total = product = x.dtype.type(0)
    for i in range(len(x)):
        total += gradient[i]
        product += gradient[i] * (x[i] - mean)
    return total, product


@njit(nogil=True, error_model="numpy", fastmath=VECTORS)
def _products_relu(x, gradient, mean, scale, shift):
    total = product = zero = x.dtype.type(0)
    for i in range(len(x)):
        passed = gradient[i] if x[i] * scale + shift > zero else zero
        total += passed
        product += passed * (x[i] - mean)
    return total, product


@njit(nogil=True, error_model="numpy", fastmath=VECTORS)
def _affine(x, out, scale, shift, relu):
    zero = x.dtype.type(0)
    if relu:
        for i in range(len(x)):
            y = x[i] * scale + shift
            out[i] = zero if y < zero else y  # not a number stays what it is
    else:
        for i in range(len(x)):
            out[i] = x[i] * scale + shift


@njit(nogil=True, error_model="numpy", fastmath=VECTORS)
def _combine(x, gradient, of_x, slope, offset, scale, shift, relu):
    zero = x.dtype.type(0)
    if relu:
        for i in range(len(x)):
            passed = gradient[i] if x[i] * scale + shift > zero else zero
            of_x[i] = scale * passed + slope * x[i] + offset
    else:
        for i in range(len(x)):
            of_x[i] = scale * gradient[i] + slope * x[i] + offset
