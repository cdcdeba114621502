"""Networks for the tests of initialisations, written as users' own code is."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from featherweight.lab.models.residual import BasicBlock, Bottleneck, Variant


def conv_net(block, blocks, variant, channels=3, width=8, hidden=None):
    """Return a residual network of constant size: no stride, no pooling before the state."""
    inner = [block(width, hidden or width, 1, variant) for _ in range(blocks)]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        *inner,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 5),
    )


def basic_net(blocks, shortcut, scale="branch", norm="none", **options):
    return conv_net(BasicBlock, blocks, Variant(shortcut, norm, scale), **options)


def bottleneck_net(blocks, shortcut, width=16, scale="branch"):
    variant = Variant(shortcut, "none", scale)
    return conv_net(Bottleneck, blocks, variant, width=width, hidden=width // 4)


class UserBlock(nn.Module):
    """A residual block in the form most repositories have, with in-place sums."""

    def __init__(self, inputs, outputs, stride=1, groups=1, kernel=3, mode="zeros"):
        super().__init__()
        options = {"padding": kernel // 2, "groups": groups, "bias": False, "padding_mode": mode}
        self.conv1 = nn.Conv2d(inputs, outputs, kernel, stride, **options)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, 1, **options)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class PreActivation(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class NoActivation(nn.Module):
    """relu(conv(conv(x)) + x)."""

    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return F.relu(self.conv2(self.conv1(x)) + x)


class Halved(NoActivation):
    """relu(0.5 * conv(x) + x): a factor that is no parameter."""

    def forward(self, x):
        return F.relu(0.5 * self.conv1(x) + x)


class Gelu(NoActivation):
    def forward(self, x):
        return F.relu(self.conv2(F.gelu(self.conv1(x))) + x)


class Tied(NoActivation):
    def forward(self, x):
        return F.relu(self.conv1(F.relu(self.conv1(x))) + x)


class Dense(nn.Module):
    """Concatenates instead of adding."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width // 2, 3, padding=1)

    def forward(self, x):
        return F.relu(torch.cat([self.conv(x), x[:, : x.shape[1] // 2]], 1))


def framed(*blocks, channels=3, width=8, inner=None):
    """Put blocks between a first layer with norm and in-place ReLU, and a head."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        *blocks,
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(inner or width, 5),
    )


def without_eps(model):
    """Make batch norms exact identities in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = 0.0
    return model


def perceptron(*widths, bias=True, relu_last=False):
    """Return linear layers with ReLUs between."""
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs, bias), nn.ReLU()]
    return nn.Sequential(*(layers if relu_last else layers[:-1]))
