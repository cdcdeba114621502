"""Hessian times gradient as the change of the gradient along itself, with plain backward passes."""

import copy

import torch


def slow_gradient(model, names, loss):
    """Return the gradient of ``loss(model)`` by the named parameters."""
    model.zero_grad()
    loss(model).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if n in names}


def slow_hessian_gradient(model, names, loss, step=1e-4):
    """Return ``H g`` by central differences of the gradient along ``g``."""
    model = copy.deepcopy(model)
    gradient = slow_gradient(model, names, loss)
    length = torch.cat([g.flatten() for g in gradient.values()]).norm()
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in names:
                    parameter += sign * step / length * gradient[name]
        ends.append(slow_gradient(moved, names, loss))
    return {n: (ends[0][n] - ends[1][n]) * length / (2 * step) for n in gradient}
