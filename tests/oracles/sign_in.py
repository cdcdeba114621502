"""Sign-In on single numbers: two factors, written out, in plain Python floats."""

import math


def slow_split(theta, beta):
    """Return m and w from the two root formulas; the sign of theta goes to w."""
    root = math.sqrt(beta * beta + 4 * theta * theta)
    m = math.sqrt((root + beta) / 2)
    return m, math.copysign(math.sqrt(max(root - beta, 0) / 2), theta)


def slow_descent(theta, beta, gradient, lr, decay, steps):
    """Descend on m and w of one weight; ``gradient`` maps a weight to dL/dtheta.

    Returns:
        The weight and ``m^2 - w^2`` at the end.
    """
    m, w = slow_split(theta, beta)
    for _ in range(steps):
        g = gradient(m * w)
        m, w = m - lr * (w * g + decay * m), w - lr * (m * g + decay * w)
    return m * w, m * m - w * w
