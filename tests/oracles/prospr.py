"""The loss after a few real training steps that start from masked weights."""

import copy

import torch
from torch.nn.functional import cross_entropy


def slow_meta_loss(model, masks, batches, steps, lr, held=None):
    """Multiply weights by masks, train a copy by `torch.optim.SGD`, return the next batch's loss.

    Args:
        model: in the mode it trains in.
        masks: float masks by name.
        batches: used in turn.
        steps: of training.
        lr: learning rate.
        held: bool masks whose False entries are zeroed after every step.
    """
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].mul_(mask)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for step in range(steps):
        inputs, targets = batches[step % len(batches)]
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        with torch.no_grad():
            for name, mask in (held or {}).items():
                parameters[name].mul_(mask)
    inputs, targets = batches[steps % len(batches)]
    with torch.no_grad():
        return cross_entropy(model(inputs), targets).item()
