"""Residual networks: the thin ones for CIFAR and the wide ones for ImageNet.

He, Zhang, Ren and Sun 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385:
section 4.2 for CIFAR (shortcuts A and B: section 3.3), table 1 for ImageNet.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.lab.models.base import MODELS, Shape, check_choice, check_positive, he_

PAPER = "He, Zhang, Ren and Sun 2016, arXiv:1512.03385"


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size at stride 1, without bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def project(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Return a 1x1 convolution and a batch norm (shortcut B)."""
    conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


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
    """Two 3x3 convolutions around which the input is added."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or inputs != outputs:
            added = outputs - inputs
            self.shortcut = (
                PadShortcut(added) if shortcut == "A" else project(inputs, outputs, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride]."""
        out: Tensor = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of ``blocks`` blocks, mean over pixels, a linear layer."""

    def __init__(self, blocks: int, classes: int, channels: int, width: int, shortcut: str) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, width), nn.BatchNorm2d(width)
        self.layer1 = self._stage(blocks, width, width, 1, shortcut)
        self.layer2 = self._stage(blocks, width, 2 * width, 2, shortcut)
        self.layer3 = self._stage(blocks, 2 * width, 4 * width, 2, shortcut)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int, stride: int, shortcut: str) -> nn.Sequential:
        first = CifarBlock(inputs, outputs, stride, shortcut)
        rest = [CifarBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input is added (ResNet-18)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        changes = stride != 1 or inputs != width
        self.downsample = project(inputs, width, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, width, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        total: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return total


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input is added; the 3x3 has the stride."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        changes = stride != 1 or inputs != outputs
        self.downsample = project(inputs, outputs, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, 4 width, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        total: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return total


class ResNet(nn.Module):
    """A stem, four stages, mean over pixels, a linear layer; parameters named as torchvision's."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: tuple[int, int, int, int],
        classes: int,
        channels: int,
        width: int,
        stem: str,
    ) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.conv1 = (
            nn.Conv2d(channels, width, 7, 2, padding=3, bias=False)
            if large
            else conv3x3(channels, width)
        )
        self.bn1, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        outputs = [2**stage * width for stage in range(4)]
        inputs = [width, *(block.expansion * output for output in outputs)]
        self.layer1 = self._stage(block, blocks[0], inputs[0], outputs[0], 1)
        self.layer2 = self._stage(block, blocks[1], inputs[1], outputs[1], 2)
        self.layer3 = self._stage(block, blocks[2], inputs[2], outputs[2], 2)
        self.layer4 = self._stage(block, blocks[3], inputs[3], outputs[3], 2)
        self.fc = nn.Linear(inputs[4], classes)

    @staticmethod
    def _stage(
        block: type[BasicBlock | Bottleneck], blocks: int, inputs: int, width: int, stride: int
    ) -> nn.Sequential:
        rest = [block(block.expansion * width, width, 1) for _ in range(blocks - 1)]
        return nn.Sequential(block(inputs, width, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


@MODELS.register("resnet20", "thin residual network for CIFAR, 3 blocks a stage", PAPER)
def resnet20(classes: int, shape: Shape, shortcut: str = "B", width: int = 16) -> nn.Module:
    """ResNet-20 for images of about 32x32.

    Args:
        classes: number of outputs.
        shape: channels, height and width of the images.
        shortcut: where the shape changes, "A" pads with zeros, "B" has a 1x1 convolution.
        width: channels of the first stage.

    Raises:
        ValueError: an option is out of range.
    """
    return _cifar(3, classes, shape, shortcut, width)


@MODELS.register("resnet32", "thin residual network for CIFAR, 5 blocks a stage", PAPER)
def resnet32(classes: int, shape: Shape, shortcut: str = "B", width: int = 16) -> nn.Module:
    """ResNet-32; arguments as ``resnet20``."""
    return _cifar(5, classes, shape, shortcut, width)


@MODELS.register("resnet56", "thin residual network for CIFAR, 9 blocks a stage", PAPER)
def resnet56(classes: int, shape: Shape, shortcut: str = "B", width: int = 16) -> nn.Module:
    """ResNet-56; arguments as ``resnet20``."""
    return _cifar(9, classes, shape, shortcut, width)


@MODELS.register("resnet18", "wide residual network of basic blocks", PAPER)
def resnet18(classes: int, shape: Shape, stem: str = "cifar", width: int = 64) -> nn.Module:
    """ResNet-18.

    Args:
        classes: number of outputs.
        shape: channels, height and width of the images.
        stem: "cifar" is a 3x3 convolution; "imagenet" is 7x7 with stride 2 and a max-pooling.
        width: channels of the first stage.

    Raises:
        ValueError: an option is out of range.
    """
    return _wide(BasicBlock, (2, 2, 2, 2), classes, shape, stem, width)


@MODELS.register("resnet50", "wide residual network of bottleneck blocks", PAPER)
def resnet50(classes: int, shape: Shape, stem: str = "cifar", width: int = 64) -> nn.Module:
    """ResNet-50 (stride in the 3x3 convolution); arguments as ``resnet18``."""
    return _wide(Bottleneck, (3, 4, 6, 3), classes, shape, stem, width)


def _cifar(blocks: int, classes: int, shape: Shape, shortcut: str, width: int) -> nn.Module:
    check_choice("shortcut", shortcut, ("A", "B"))
    check_positive(width=width)
    model = CifarResNet(blocks, classes, shape[0], width, shortcut)
    he_(model)
    return model


def _wide(
    block: type[BasicBlock | Bottleneck],
    blocks: tuple[int, int, int, int],
    classes: int,
    shape: Shape,
    stem: str,
    width: int,
) -> nn.Module:
    check_choice("stem", stem, ("cifar", "imagenet"))
    check_positive(width=width)
    model = ResNet(block, blocks, classes, shape[0], width, stem)
    he_(model)
    return model
