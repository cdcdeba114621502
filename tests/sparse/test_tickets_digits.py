"""A trained classifier, reproduced by masking a random network."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from featherweight.sparse import hold, magnitude
from featherweight.sparse.tickets import approximate, source_for


def digits():
    data = load_digits()
    x, y = torch.tensor(data.data / 8 - 1, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]


def train(model, x, y, masks=None, steps=400):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(0)
    with hold(model, optimizer, masks or magnitude(model, 1.0)):
        for _ in range(steps):
            batch = torch.randperm(len(x), generator=generator)[:128]
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def accuracy(model, x, y):
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def test_digits_by_pruning_only():
    x, y, test_x, test_y = digits()
    torch.manual_seed(0)
    target = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    train(target, x, y)
    masks = magnitude(target, 0.18)
    masks.apply_(target)
    train(target, x, y, masks)
    source = source_for(target, "2L", 40, seed=0)
    ticket = approximate(target, source)
    reached = accuracy(target, test_x, test_y)
    assert reached > 0.93
    assert abs(accuracy(ticket.network, test_x, test_y) - reached) <= 0.005
    assert sum(layer.out_of_range for layer in ticket.layers) == 0
    error, bound = ticket.error(test_x), ticket.bound(test_x)
    assert error < 0.05 * float(target(test_x).detach().abs().max())
    assert error <= bound
    assert ticket.masks.density < 0.06
    small = approximate(target, source, tolerance=0.01)
    assert abs(accuracy(small.network, test_x, test_y) - reached) <= 0.01
    assert small.masks.nonzeros < 0.5 * ticket.masks.nonzeros
