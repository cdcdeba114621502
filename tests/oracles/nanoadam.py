"""NanoAdam entry by entry: dense state, Python loops, sorting for the selection."""

import math
from fractions import Fraction


def smallest(weights, density, chunk=None, skip_zeros=False):
    """Return the set of selected positions of a list of numbers; density as a decimal string."""
    chunk = chunk or len(weights)
    chosen = set()
    for begin in range(0, len(weights), chunk):
        places = range(begin, min(begin + chunk, len(weights)))
        places = [i for i in places if not (skip_zeros and weights[i] == 0)]
        keep = math.ceil(Fraction(density) * len(places))
        chosen |= set(sorted(places, key=lambda i: (abs(weights[i]), i))[:keep])
    return chosen


class Entries:
    """Weights, moments, ages and membership of each entry of one tensor, as Python floats."""

    def __init__(self, weights, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, carry=True,
                 bias_correction=True):  # fmt: skip
        self.weights = list(weights)
        self.first = [0.0] * len(self.weights)
        self.second = [0.0] * len(self.weights)
        self.age = [0] * len(self.weights)
        self.selected = set()
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.carry, self.bias_correction = carry, bias_correction

    def refresh(self, density, chunk=None, skip_zeros=False):
        chosen = smallest(self.weights, density, chunk, skip_zeros)
        for i in range(len(self.weights)):
            if not self.carry or i not in chosen or i not in self.selected:
                self.first[i] = self.second[i] = 0.0
                self.age[i] = 0
        self.selected = chosen

    def step(self, gradient):
        b1, b2 = self.betas
        for i in self.selected:
            self.age[i] += 1
            self.first[i] = b1 * self.first[i] + (1 - b1) * gradient[i]
            self.second[i] = b2 * self.second[i] + (1 - b2) * gradient[i] ** 2
            m, v = self.first[i], self.second[i]
            if self.bias_correction:
                m, v = m / (1 - b1 ** self.age[i]), v / (1 - b2 ** self.age[i])
            self.weights[i] *= 1 - self.lr * self.decay
            self.weights[i] -= self.lr * m / (math.sqrt(v) + self.eps)
