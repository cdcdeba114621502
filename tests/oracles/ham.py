"""HAM with SGD and AdamW, one weight at a time, in Python's own floats."""

import math


def hyperbolic(theta, gradient, lr, alpha, beta, clamp):
    sign = (theta > 0) - (theta < 0)
    exponent = -lr * (alpha * sign * gradient + beta)
    if clamp is not None:
        exponent = min(max(exponent, -clamp), clamp)
    return theta * math.exp(exponent)


class Sgd:
    def __init__(self, lr, momentum=0.0, weight_decay=0.0, dampening=0.0, nesterov=False):
        self.lr, self.momentum, self.decay = lr, momentum, weight_decay
        self.dampening, self.nesterov = dampening, nesterov
        self.buffers = {}

    def step(self, index, theta, gradient):
        gradient = gradient + self.decay * theta
        if self.momentum:
            if index in self.buffers:
                old = self.buffers[index]
                self.buffers[index] = self.momentum * old + (1 - self.dampening) * gradient
            else:
                self.buffers[index] = gradient
            look = self.momentum * self.buffers[index]
            gradient = gradient + look if self.nesterov else self.buffers[index]
        return theta - self.lr * gradient


class AdamW:
    def __init__(self, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, weight_decay
        self.state = {}

    def step(self, index, theta, gradient):
        first, second, count = self.state.get(index, (0.0, 0.0, 0))
        first = self.betas[0] * first + (1 - self.betas[0]) * gradient
        second = self.betas[1] * second + (1 - self.betas[1]) * gradient**2
        self.state[index] = first, second, count + 1
        unbiased = first / (1 - self.betas[0] ** (count + 1))
        spread = math.sqrt(second / (1 - self.betas[1] ** (count + 1)))
        return theta * (1 - self.lr * self.decay) - self.lr * unbiased / (spread + self.eps)


def train(base, weights, gradients, alpha, beta, clamp=5.0, direction="gradient"):
    """Return the weights after one step for each row of gradients."""
    weights = list(weights)
    for row in gradients:
        for i, gradient in enumerate(row):
            half = base.step(i, weights[i], gradient)
            if direction == "update":  # lr times the gradient that would have made this step
                gradient = (weights[i] - half) / base.lr
            weights[i] = hyperbolic(half, gradient, base.lr, alpha, beta, clamp)
    return weights
