"""Small networks and a small population of unequal clients."""

import torch
from torch import nn

from featherweight.federated.population import Population

SIZES = (3, 8, 5, 12, 5, 1)


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def digits_like(sizes=SIZES, dtype: torch.dtype = torch.float32, shape=(6,)) -> Population:
    generator = torch.Generator().manual_seed(5)
    count = sum(sizes)
    targets = torch.randint(3, (count,), generator=generator)
    inputs = torch.randn(count, *shape, generator=generator) + targets.view(-1, *[1] * len(shape))
    return Population(inputs.to(dtype), targets, torch.arange(count).split(list(sizes)))
