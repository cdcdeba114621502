"""Residual networks: the thin ones for CIFAR and the wide ones for ImageNet.

He, Zhang, Ren and Sun 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385:
section 4.2 for CIFAR (shortcuts A, B and C: section 3.3), table 1 for ImageNet.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.lab.models.base import MODELS, Shape, check_choice, check_positive, he_
from featherweight.lab.models.residual import (
    BATCH,
    BasicBlock,
    Bottleneck,
    CifarBlock,
    Variant,
    conv3x3,
    shift,
)

PAPER = "He, Zhang, Ren and Sun 2016, arXiv:1512.03385"


class CifarResNet(nn.Module):
    """A 3x3 convolution, three stages of ``blocks`` blocks, mean over pixels, a linear layer."""

    def __init__(
        self,
        blocks: int,
        classes: int,
        channels: int,
        width: int,
        variant: Variant = BATCH,
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, width, bias=variant.bias)
        self.bn1 = variant.behind(width)
        self.layer1 = self._stage(blocks, width, width, 1, variant)
        self.layer2 = self._stage(blocks, width, 2 * width, 2, variant)
        self.layer3 = self._stage(blocks, 2 * width, 4 * width, 2, variant)
        self.shift = shift(variant)
        self.linear = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(
        blocks: int, inputs: int, outputs: int, stride: int, variant: Variant
    ) -> nn.Sequential:
        first = CifarBlock(inputs, outputs, stride, variant)
        rest = [CifarBlock(outputs, outputs, 1, variant) for _ in range(blocks - 1)]
        return nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.shift(x.mean((2, 3))))
        return logits


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
        variant: Variant = BATCH,
    ) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.conv1 = (
            nn.Conv2d(channels, width, 7, 2, padding=3, bias=variant.bias)
            if large
            else conv3x3(channels, width, bias=variant.bias)
        )
        self.bn1, self.relu = variant.behind(width), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if large else nn.Identity()
        outputs = [2**stage * width for stage in range(4)]
        inputs = [width, *(block.expansion * output for output in outputs)]
        self.layer1 = self._stage(block, blocks[0], inputs[0], outputs[0], 1, variant)
        self.layer2 = self._stage(block, blocks[1], inputs[1], outputs[1], 2, variant)
        self.layer3 = self._stage(block, blocks[2], inputs[2], outputs[2], 2, variant)
        self.layer4 = self._stage(block, blocks[3], inputs[3], outputs[3], 2, variant)
        self.shift = shift(variant)
        self.fc = nn.Linear(inputs[4], classes)

    @staticmethod
    def _stage(
        block: type[BasicBlock | Bottleneck],
        blocks: int,
        inputs: int,
        width: int,
        stride: int,
        variant: Variant,
    ) -> nn.Sequential:
        rest = [block(block.expansion * width, width, 1, variant) for _ in range(blocks - 1)]
        return nn.Sequential(block(inputs, width, stride, variant), *rest)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.shift(x.mean((2, 3))))
        return logits


@MODELS.register("resnet20", "thin residual network for CIFAR, 3 blocks a stage", PAPER)
def resnet20(
    classes: int,
    shape: Shape,
    shortcut: str = "B",
    width: int = 16,
    norm: str = "batch",
    scale: str = "none",
) -> nn.Module:
    """ResNet-20 for images of about 32x32.

    Args:
        classes: number of outputs.
        shape: channels, height and width of the images.
        shortcut: where the shape changes, "A" pads with zeros, "B" has a 1x1 convolution; "C" has
            one around every block.
        width: channels of the first stage.
        norm: "batch"; "none", biases instead; "fixup", scalar biases and a multiplier on each
            branch instead (Zhang et al. 2019, arXiv:1901.09321; ``init.fixup_`` starts them).
        scale: trained multipliers that start at 1: "none", on each "branch", or on "both", branch
            and shortcut.

    Raises:
        ValueError: an option is out of range.
    """
    return _cifar(3, classes, shape, width, Variant(shortcut, norm, scale))


@MODELS.register("resnet32", "thin residual network for CIFAR, 5 blocks a stage", PAPER)
def resnet32(
    classes: int,
    shape: Shape,
    shortcut: str = "B",
    width: int = 16,
    norm: str = "batch",
    scale: str = "none",
) -> nn.Module:
    """ResNet-32; arguments as ``resnet20``."""
    return _cifar(5, classes, shape, width, Variant(shortcut, norm, scale))


@MODELS.register("resnet56", "thin residual network for CIFAR, 9 blocks a stage", PAPER)
def resnet56(
    classes: int,
    shape: Shape,
    shortcut: str = "B",
    width: int = 16,
    norm: str = "batch",
    scale: str = "none",
) -> nn.Module:
    """ResNet-56; arguments as ``resnet20``."""
    return _cifar(9, classes, shape, width, Variant(shortcut, norm, scale))


@MODELS.register("resnet-deep", "thin residual network of any depth, without norms", PAPER)
def resnet_deep(
    classes: int,
    shape: Shape,
    blocks: int = 17,
    width: int = 16,
    shortcut: str = "B",
    norm: str = "none",
    scale: str = "none",
) -> nn.Module:
    """Three stages of ``blocks`` blocks, 6 blocks + 2 layers; other arguments as ``resnet20``."""
    check_positive(blocks=blocks)
    return _cifar(blocks, classes, shape, width, Variant(shortcut, norm, scale))


@MODELS.register("resnet18", "wide residual network of basic blocks", PAPER)
def resnet18(
    classes: int,
    shape: Shape,
    stem: str = "cifar",
    width: int = 64,
    shortcut: str = "B",
    norm: str = "batch",
    scale: str = "none",
) -> nn.Module:
    """ResNet-18.

    Args:
        classes: number of outputs.
        shape: channels, height and width of the images.
        stem: "cifar" is a 3x3 convolution; "imagenet" is 7x7 with stride 2 and a max-pooling.
        width: channels of the first stage.
        shortcut: a 1x1 convolution where the shape changes ("B") or around every block ("C").
        norm, scale: as in ``resnet20``.

    Raises:
        ValueError: an option is out of range.
    """
    variant = Variant(shortcut, norm, scale)
    return _wide(BasicBlock, (2, 2, 2, 2), classes, shape, stem, width, variant)


@MODELS.register("resnet50", "wide residual network of bottleneck blocks", PAPER)
def resnet50(
    classes: int,
    shape: Shape,
    stem: str = "cifar",
    width: int = 64,
    shortcut: str = "B",
    norm: str = "batch",
    scale: str = "none",
) -> nn.Module:
    """ResNet-50 (stride in the 3x3 convolution); arguments as ``resnet18``."""
    variant = Variant(shortcut, norm, scale)
    return _wide(Bottleneck, (3, 4, 6, 3), classes, shape, stem, width, variant)


def _cifar(blocks: int, classes: int, shape: Shape, width: int, variant: Variant) -> nn.Module:
    variant.check(("A", "B", "C"))
    check_positive(width=width)
    model = CifarResNet(blocks, classes, shape[0], width, variant)
    he_(model)
    return model


def _wide(
    block: type[BasicBlock | Bottleneck],
    blocks: tuple[int, int, int, int],
    classes: int,
    shape: Shape,
    stem: str,
    width: int,
    variant: Variant,
) -> nn.Module:
    check_choice("stem", stem, ("cifar", "imagenet"))
    variant.check(("B", "C"))
    check_positive(width=width)
    model = ResNet(block, blocks, classes, shape[0], width, stem, variant)
    he_(model)
    return model
