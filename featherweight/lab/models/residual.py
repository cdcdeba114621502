"""What residual networks are made of: blocks, their shortcuts, norms and scalar parameters.

He, Zhang, Ren and Sun 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385;
scalar biases and multipliers: Zhang, Dauphin and Ma 2019, arXiv:1901.09321, figure 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.lab.models.base import check_choice

NORMS = ("batch", "none", "fixup")
SCALES = ("none", "branch", "both")


@dataclass(frozen=True)
class Variant:
    """What kind of blocks a residual network has.

    Attributes:
        shortcut: "A" or "B" where the shape changes, "C" projects around every block.
        norm: "batch"; "none", layers have biases; "fixup", scalar biases and branch multipliers.
        scale: trained multipliers that start at 1: "none", on each "branch", or on "both" ways.
    """

    shortcut: str = "B"
    norm: str = "batch"
    scale: str = "none"

    def check(self, shortcuts: tuple[str, ...]) -> None:
        """Refuse words that are none of the allowed ones.

        Raises:
            ValueError: names the option, its value, and the allowed ones.
        """
        check_choice("shortcut", self.shortcut, shortcuts)
        check_choice("norm", self.norm, NORMS)
        check_choice("scale", self.scale, SCALES)

    @property
    def bias(self) -> bool:
        """Whether the layers of blocks have biases of their own."""
        return self.norm == "none"

    def behind(self, channels: int) -> nn.Module:
        """Return what stands between a convolution and its ReLU."""
        if self.norm == "batch":
            return nn.BatchNorm2d(channels)
        return shift(self)

    def last(self, channels: int) -> nn.Module:
        """Return what stands behind the last convolution of a branch."""
        return nn.BatchNorm2d(channels) if self.norm == "batch" else nn.Identity()


BATCH = Variant()


class Shift(nn.Module):
    """Adds one trained number, which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        return x + self.bias


class Scale(nn.Module):
    """Multiplies by one trained number, which starts at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        return x * self.scale


def shift(variant: Variant) -> nn.Module:
    """Return Fixup's scalar bias, or nothing where the network has none."""
    return Shift() if variant.norm == "fixup" else nn.Identity()


class Scalars(nn.Module):
    """The scalar parameters of a block, and the sum of its two ways.

    Args:
        layers: of the branch.
        variant: says which scalars there are.
    """

    def __init__(self, layers: int, variant: Variant) -> None:
        super().__init__()
        multiplied = variant.norm == "fixup" or variant.scale != "none"
        self.before = nn.ModuleList(shift(variant) for _ in range(layers))
        self.branch: nn.Module = Scale() if multiplied else nn.Identity()
        self.after = shift(variant)
        self.skip: nn.Module = Scale() if variant.scale == "both" else nn.Identity()

    def forward(self, branch: Tensor, skip: Tensor) -> Tensor:
        """Add [B, ...] and [B, ...]."""
        total: Tensor = self.after(self.branch(branch)) + self.skip(skip)
        return total


def conv3x3(inputs: int, outputs: int, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def project(inputs: int, outputs: int, stride: int, variant: Variant = BATCH) -> nn.Sequential:
    """Return a 1x1 convolution, and a batch norm where the network has them (shortcut B)."""
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=variant.bias)
    norms = [nn.BatchNorm2d(outputs)] if variant.norm == "batch" else []
    return nn.Sequential(conv, *norms)


class PadShortcut(nn.Module):
    """Take every second pixel and pad the channels with zeros on both sides (shortcut A).

    Args:
        added: channels to add, half of them before and half after.
    """

    def __init__(self, added: int) -> None:
        super().__init__()
        self.before = added // 2
        self.after = added - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C + added, ceil(H / 2), ceil(W / 2)]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added.

    Args:
        inputs, outputs: channels.
        stride: of the first convolution.
        variant: shortcuts, norms and scalars.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        variant: Variant = BATCH,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride, bias=variant.bias)
        self.bn1 = variant.behind(outputs)
        self.conv2 = conv3x3(outputs, outputs, bias=variant.bias)
        self.bn2 = variant.last(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        self.changes = stride != 1 or inputs != outputs or variant.shortcut == "C"
        if self.changes:
            self.shortcut = (
                PadShortcut(outputs - inputs)
                if variant.shortcut == "A"
                else project(inputs, outputs, stride, variant)
            )
        self.scalars = Scalars(2, variant)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        before: Tensor = self.scalars.before[0](x)
        out = F.relu(self.bn1(self.conv1(before)))
        out = self.bn2(self.conv2(self.scalars.before[1](out)))
        return F.relu(self.scalars(out, self.shortcut(before) if self.changes else x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added (ResNet-18).

    Args:
        inputs, width: channels.
        stride: of the first convolution.
        variant: as in `CifarBlock`, without shortcut "A".
    """

    expansion = 1

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        variant: Variant = BATCH,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride, bias=variant.bias)
        self.bn1 = variant.behind(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(width, width, bias=variant.bias)
        self.bn2 = variant.last(width)
        changes = stride != 1 or inputs != width or variant.shortcut == "C"
        self.downsample = project(inputs, width, stride, variant) if changes else None
        self.scalars = Scalars(2, variant)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, width, H / stride, W / stride]."""
        before: Tensor = self.scalars.before[0](x)
        out = self.relu(self.bn1(self.conv1(before)))
        out = self.bn2(self.conv2(self.scalars.before[1](out)))
        skip = x if self.downsample is None else self.downsample(before)
        total: Tensor = self.relu(self.scalars(out, skip))
        return total


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input is added; the 3x3 has the stride.

    Args:
        inputs: channels.
        width: channels between; a quarter of the outputs.
        stride, variant: as in `BasicBlock`.
    """

    expansion = 4

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        variant: Variant = BATCH,
    ) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=variant.bias)
        self.bn1 = variant.behind(width)
        self.conv2 = conv3x3(width, width, stride, bias=variant.bias)
        self.bn2 = variant.behind(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=variant.bias)
        self.bn3 = variant.last(outputs)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or inputs != outputs or variant.shortcut == "C"
        self.downsample = project(inputs, outputs, stride, variant) if changes else None
        self.scalars = Scalars(3, variant)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, 4 width, H / stride, W / stride]."""
        before: Tensor = self.scalars.before[0](x)
        out = self.relu(self.bn1(self.conv1(before)))
        out = self.relu(self.bn2(self.conv2(self.scalars.before[1](out))))
        out = self.bn3(self.conv3(self.scalars.before[2](out)))
        skip = x if self.downsample is None else self.downsample(before)
        total: Tensor = self.relu(self.scalars(out, skip))
        return total
