"""A small federation of Gaussian blobs, the same wherever it is made."""

import torch
from torch import nn

from featherweight.federated.algorithms import FedAvg
from featherweight.federated.local import Local
from featherweight.federated.population import Population
from featherweight.federated.sampling import SAMPLERS
from featherweight.federated.simulate import simulate

CLIENTS = 6


def make_population():
    generator = torch.Generator().manual_seed(3)
    sizes = [5, 9, 12, 7, 16, 4]
    labels = torch.randint(3, (sum(sizes),), generator=generator)
    inputs = torch.randn(len(labels), 8, generator=generator)
    inputs[:, :3] += 2 * nn.functional.one_hot(labels, 3)
    return Population(inputs, labels, torch.arange(sum(sizes)).split(sizes))


def make_model(batch_norm=False):
    torch.manual_seed(5)
    middle = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
    return nn.Sequential(nn.Linear(8, 16), middle, nn.ReLU(), nn.Linear(16, 3))


def make_simulation(algorithm=None, *, size=4, batch_norm=False, population=None, **options):
    given = {
        "sampler": SAMPLERS["uniform"].method(clients=CLIENTS, size=size, seed=1),
        "local": Local(learning_rate=0.1, epochs=2, batch_size=4),
        "seed": 7,
    }
    return simulate(
        make_model(batch_norm),
        make_population() if population is None else population,
        FedAvg() if algorithm is None else algorithm,
        **{**given, **options},
    )
