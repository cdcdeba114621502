"""Federated algorithms as their papers write them: loops over clients, steps and batches.

``F`` is a list of clients; a client is a list of batches for this round, each a function of the
weights to its mean loss, and ``whole[i]`` is the client's loss over all its examples.
"""

import torch


def gradient(loss, y):
    y = y.detach().requires_grad_()
    return torch.autograd.grad(loss(y), y)[0]


def weighted(vectors, weights):
    return sum(w * v for w, v in zip(weights, vectors, strict=True)) / sum(weights)


def fedavg(x, batches, weights, rate, mu=0.0, momentum=0.0):
    updates = []
    for client in batches:
        y, buffer = x.clone(), torch.zeros_like(x)
        for loss in client:
            buffer = momentum * buffer + gradient(loss, y) + mu * (y - x)
            y = y - rate * buffer
        updates.append(y - x)
    return x + weighted(updates, weights)


def fednova(x, batches, weights, rate, mu=0.0, momentum=0.0):
    directions, norms = [], []
    for client in batches:
        y, buffer, tau = x.clone(), torch.zeros_like(x), len(client)
        for loss in client:
            buffer = momentum * buffer + gradient(loss, y) + mu * (y - x)
            y = y - rate * buffer
        if momentum:
            norm = sum((1 - momentum ** (tau - k)) / (1 - momentum) for k in range(tau))
        else:
            norm = sum((1 - rate * mu) ** (tau - 1 - k) for k in range(tau))
        directions.append((y - x) / norm)
        norms.append(norm)
    return x + weighted(norms, weights) * weighted(directions, weights)


def scaffold(x, c, own, cohort, batches, whole, shares, rate, option):
    """Return x, c; ``own`` (clients' variates) changes in place."""
    updates, changes = [], []
    for i, client in zip(cohort, batches, strict=True):
        y = x.clone()
        for loss in client:
            y = y - rate * (gradient(loss, y) - own[i] + c)
        if option == "I":
            new = gradient(whole[i], x)
        else:
            new = own[i] - c + (x - y) / (rate * len(client))
        updates.append(y - x)
        changes.append(new - own[i])
        own[i] = new
    p = [shares[i] for i in cohort]
    moved = sum(w * change for w, change in zip(p, changes, strict=True))
    return x + weighted(updates, p), c + moved


def mime(x, m, cohort, batches, whole, weights, rate, beta, lite):
    """Return x, m."""
    c = weighted([gradient(whole[i], x) for i in cohort], weights)
    updates = []
    for client in batches:
        y = x.clone()
        for loss in client:
            g = gradient(loss, y)
            if not lite:
                g = g - gradient(loss, x) + c
            y = y - rate * ((1 - beta) * g + beta * m)
        updates.append(y - x)
    return x + weighted(updates, weights), (1 - beta) * c + beta * m


def feddyn(x, h, gradients, cohort, batches, shares, rate, alpha):
    """Return x, h as Algorithm 1 of the paper; ``gradients`` (clients') changes in place."""
    thetas = []
    for i, client in zip(cohort, batches, strict=True):
        y = x.clone()
        for loss in client:
            y = y - rate * (gradient(loss, y) - gradients[i] + alpha * (y - x))
        gradients[i] = gradients[i] - alpha * (y - x)
        thetas.append(y)
    p = [shares[i] for i in cohort]
    h = h - alpha * sum(w * (y - x) for w, y in zip(p, thetas, strict=True))
    return weighted(thetas, p) - h / alpha, h


def yogi(updates, rate, betas, epsilon, initial):
    """Return the positions of one number, starting from 0."""
    x, m, v, path = 0.0, 0.0, initial, []
    for d in updates:
        m = betas[0] * m + (1 - betas[0]) * d
        sign = (v > d * d) - (v < d * d)
        v = v - (1 - betas[1]) * d * d * sign
        x = x + rate * m / (v**0.5 + epsilon)
        path.append(x)
    return path


def keras_adam(updates, rate, betas, epsilon):
    x, m, v, path = 0.0, 0.0, 0.0, []
    for t, d in enumerate(updates, 1):
        m = betas[0] * m + (1 - betas[0]) * d
        v = betas[1] * v + (1 - betas[1]) * d * d
        step = rate * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t)
        x = x + step * m / (v**0.5 + epsilon)
        path.append(x)
    return path
