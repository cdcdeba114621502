"""Methods that change masks, written out slowly: lists and sorting, masks in the forward pass."""

import math

import torch


def best(values, keep, allowed):
    """Return indices of the ``keep`` largest among the allowed, earlier ones first among equals."""
    return sorted(sorted(allowed, key=lambda i: (-values[i], i))[:keep])


def exchange(mask, weight, gradient, count, support=None):
    """Drop the smallest weights and grow the largest gradients, on flat lists."""
    everywhere = range(len(mask))
    active = [i for i in everywhere if mask[i]]
    kept = best([abs(w) for w in weight], len(active) - count, active)
    free = [i for i in everywhere if i not in kept and (support is None or support[i])]
    grown = best([abs(g) for g in gradient], count, free)
    return [i in kept or i in grown for i in everywhere]


def rewire(mask, worth, draw, count, support=None):
    """Drop those of least worth; grow among those masked before, where the draws are largest."""
    everywhere = range(len(mask))
    active = [i for i in everywhere if mask[i]]
    free = [i for i in everywhere if not mask[i] and (support is None or support[i])]
    count = min(count, len(free))
    chosen = best(worth, len(active) - count, active) + best(draw, count, free)
    return [i in chosen for i in everywhere]


def keep_largest(weights, keep, masks):
    """Keep the ``keep`` largest of all tensors together, among those in the masks."""
    entries = [
        (-abs(float(value)), position, name, index)
        for position, (name, weight) in enumerate(weights.items())
        for index, value in enumerate(weight.flatten())
        if masks[name].flatten()[index]
    ]
    kept = {(name, index) for _, _, name, index in sorted(entries)[:keep]}
    return {
        name: torch.tensor([(name, i) in kept for i in range(w.numel())]).view(w.shape)
        for name, w in weights.items()
    }


def cosine(step, steps, start, end):
    """Return a cosine by its formula."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / steps))


def on_lists(function, *tensors, count, support=None):
    """Call a function of flat lists on tensors."""
    flat = [t.flatten().tolist() for t in tensors]
    extra = None if support is None else support.flatten().tolist()
    found = function(*flat, count, support=extra)
    return torch.tensor(found).view(tensors[0].shape)


class Training:
    """SGD with momentum and decay on ``mask * weight``; the loss is the mean squared output."""

    def __init__(self, model, masks, lr=0.05, momentum=0.9, decay=1e-3):
        self.model, self.lr, self.momentum, self.decay = model, lr, momentum, decay
        self.theta = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.velocity = {n: torch.zeros_like(p) for n, p in self.theta.items()}
        self.masks = {n: m.clone() for n, m in masks.items()}
        self.put(self.masks)

    def gradients(self, inputs):
        """Return the gradient by every effective parameter: dense."""
        theta = {n: t.clone().requires_grad_() for n, t in self.theta.items()}
        loss = torch.func.functional_call(self.model, theta, inputs).square().mean()
        return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))

    def step(self, gradients):
        """Move weights inside the masks."""
        for n, theta in self.theta.items():
            mask = self.masks.get(n, torch.ones_like(theta, dtype=torch.bool))
            self.velocity[n] = self.momentum * self.velocity[n] + (
                gradients[n] * mask + self.decay * theta
            )
            theta -= self.lr * self.velocity[n]

    def put(self, masks):
        """Change masks: dropped entries lose weight and velocity, grown ones have none."""
        for n, mask in masks.items():
            stays = mask & self.masks[n]
            self.theta[n] = torch.where(stays, self.theta[n], 0)
            self.velocity[n] = torch.where(stays, self.velocity[n], 0)
        self.masks = masks
