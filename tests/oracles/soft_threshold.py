"""The soft threshold of one number and its derivatives, in plain Python floats."""

import math


def slow_soft_threshold(theta, s):
    """Return the value and its derivatives by theta and by s."""
    threshold = 1 / (1 + math.exp(-s))
    if abs(theta) <= threshold:
        return 0.0, 0.0, 0.0
    sign = math.copysign(1.0, theta)
    return sign * (abs(theta) - threshold), 1.0, -sign * threshold * (1 - threshold)
