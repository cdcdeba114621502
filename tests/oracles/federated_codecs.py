"""Slow, plain versions of the codecs' mathematics, written from the papers' definitions."""

import itertools
import math
from fractions import Fraction


def hash64(*numbers):
    state = 0
    for number in numbers:
        z = ((state ^ number) + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        state = z ^ (z >> 31)
    return state


def mix(number, key):
    z = (number + key) % 2**32
    z ^= z >> 16
    z = z * 0x7FEB352D % 2**32
    z ^= z >> 15
    z = z * 0x846CA68B % 2**32
    return z ^ (z >> 16)


def choose(length, count, seed):
    """The index construction, number by number."""
    bits = max(12, (length - 1).bit_length())
    low_bits = (bits + 1) // 2
    keys = [hash64(seed, r) % 2**32 for r in range(6)]
    found = []
    for number in range(2**bits):
        if len(found) == count:
            break
        low, high = number % 2**low_bits, number >> low_bits
        for r in (0, 2, 4):
            low = (low ^ mix(high, keys[r])) % 2**low_bits
            high = (high ^ mix(low, keys[r + 1])) % 2 ** (bits - low_bits)
        value = (high << low_bits) | low
        if value < length:
            found.append(value)
    return found


def subsets(length, count):
    return list(itertools.combinations(range(length), count))


def spatial_decode(vectors, chosen, weights, transform, beta):
    """Rand-k-Spatial's estimate in exact arithmetic; ``chosen`` is a subset a client."""
    length = len(vectors[0])
    estimate = []
    for j in range(length):
        senders = [i for i, subset in enumerate(chosen) if j in subset]
        total = sum((beta[i] * weights[i] * vectors[i][j] for i in senders), Fraction(0))
        estimate.append(total / transform(len(senders)) if senders else Fraction(0))
    return estimate


def spatial_beta(clients, probability, transform):
    """beta by the definition: one client sends, each other one does or does not."""
    total = Fraction(0)
    for others in itertools.product((0, 1), repeat=clients - 1):
        chance = Fraction(1)
        for sent in others:
            chance *= probability if sent else 1 - probability
        total += chance / transform(1 + sum(others))
    return 1 / (probability * total)


def omega(number):
    """Elias's omega code as a string of bits."""
    code = "0"
    while number > 1:
        binary = format(number, "b")
        code = binary + code
        number = len(binary) - 1
    return code


def rice_bits(gap, parameter):
    return ((gap - 1) >> parameter) + 1 + parameter


def quantised(value, norm, levels):
    """The two grid points around a value and the chance of the larger magnitude."""
    ratio = abs(value) * levels / norm
    low = min(math.floor(ratio), levels)
    sign = math.copysign(1.0, value)
    return sign * norm * low / levels, sign * norm * (low + 1) / levels, ratio - low


def wangni(vector, count):
    """The probabilities, by bisection for the factor c of p_j = min(1, c |x_j|)."""
    magnitudes = [abs(x) for x in vector]
    nonzero = sum(x > 0 for x in magnitudes)
    if nonzero <= count:
        return [float(x > 0) for x in magnitudes]
    low, high = 0.0, 1.0 / min(x for x in magnitudes if x > 0)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(min(1.0, middle * x) for x in magnitudes) < count:
            low = middle
        else:
            high = middle
    return [min(1.0, high * x) for x in magnitudes]
