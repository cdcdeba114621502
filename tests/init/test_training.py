"""What isometry is for: fifty blocks without a norm learn from the first epoch."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from featherweight import init
from featherweight.lab import data, models

EPOCHS = 2


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", validation=0)


def accuracy(model, digits, lr):
    """Train for two epochs; return the accuracy on the test images, and the last loss."""
    options = {"mean": digits.mean, "std": digits.std, "seed": 0, "augment": "none"}
    batches = data.Batches(digits.train, batch_size=64, shuffle=True, **options)
    test = data.Batches(digits.test, batch_size=800, shuffle=False, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for epoch in range(EPOCHS):
        for images, labels, _ in batches.epoch("train", epoch):
            loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ((images, labels, _),) = test.epoch("test", 0)
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item(), loss.item()


@pytest.mark.parametrize("shortcut", ["B", "C"])
def test_fifty_blocks_without_norms_learn_with_risotto_and_explode_with_he(digits, shortcut):
    def network():
        options = {"width": 64, "shortcut": shortcut}
        return models.build("residual-mlp", classes=10, shape=digits.shape, seed=0, **options)

    he, loss = accuracy(network(), digits, lr=1e-3)
    assert he < 0.2
    assert not loss < 2
    model = network()
    init.risotto_(model, seed=0)
    learned, loss = accuracy(model, digits, lr=1e-3)
    assert learned > 0.8
    assert loss < 1
