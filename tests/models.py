"""Small models that tests of several rooms use."""

import torch
from torch import nn


def mlp(width: int = 24, norm: bool = True, seed: int = 0) -> nn.Sequential:
    """Return a small classifier of 16 inputs and 4 classes."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (16, width):
        layers += (
            [nn.Linear(inputs, width)] + ([nn.BatchNorm1d(width)] if norm else []) + [nn.ReLU()]
        )
    return nn.Sequential(*layers, nn.Linear(width, 4))


class ConvNet(nn.Module):
    """Groups, dilation, a residual sum, pooling, a norm, an embedding and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 5)
        self.twin = nn.Linear(8, 5)
        self.twin.weight = self.head.weight
        self.words = nn.Embedding(7, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.grouped(self.depthwise(x)).relu()
        x = self.pool(x).mean((2, 3))
        return self.head(x) + self.twin(x)


def train_steps(model, optimizer, steps=5, seed=1, inputs=(8, 16), scale=1.0):
    """Take optimizer steps on random data; returns the last loss."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(inputs, generator=generator)
        optimizer.zero_grad()
        loss = scale * model(x).square().mean()
        loss.backward()
        optimizer.step()
    return loss.detach()
