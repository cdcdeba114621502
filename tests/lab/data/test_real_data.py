"""The published counts and statistics of the real sets, where they are on this machine."""

import pytest
import torch

from featherweight.lab.data import load


def test_cifar10(shared_data):
    data = load("cifar10", shared_data, validation=0.0)
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    assert (data.mean * 255).tolist() == pytest.approx([125.30692, 122.95039, 113.86538], rel=1e-6)
    assert (data.std * 255).tolist() == pytest.approx([62.99322, 62.08871, 66.70490], rel=1e-6)
    assert data.train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert data.test.labels[:5].tolist() == [3, 8, 8, 0, 6]


@pytest.mark.parametrize(
    ("name", "mean", "std", "first"),
    [
        ("mnist", 0.1307, 0.3081, [5, 0, 4, 1, 9]),
        ("fashion-mnist", 0.2860, 0.3530, [9, 0, 0, 3, 0]),
    ],
)
def test_mnist_and_fashion_mnist(shared_data, name: str, mean: float, std: float, first: list[int]):
    data = load(name, shared_data, validation=0.0)
    assert (len(data.train), len(data.test), data.shape) == (60000, 10000, (1, 28, 28))
    assert data.mean.item() == pytest.approx(mean, abs=5e-5)
    assert data.std.item() == pytest.approx(std, abs=6e-5)
    assert data.train.labels[:5].tolist() == first


def test_tiny_imagenet(shared_data):
    data = load("image-folder", shared_data / "tiny-imagenet-10", validation=0.1)
    assert data.shape == (3, 64, 64)
    assert torch.bincount(data.train.labels).tolist() == [450] * 10
    assert torch.bincount(data.validation.labels).tolist() == [50] * 10
    assert torch.bincount(data.test.labels).tolist() == [50] * 10
