"""A small vision transformer: pre-norm, class token, learned positions.

Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", arXiv:2010.11929, equations 1 to 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherweight.lab.models.base import MODELS, Shape, check_positive

START_STD = 0.02


class Attention(nn.Module):
    """Multi-head self-attention with one linear layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, D] to [B, N, D]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # B N 3 heads D/heads
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each on normalised tokens and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens [B, N, D] to [B, N, D]."""
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Vit(nn.Module):
    """Patches to tokens, blocks, and a linear layer on the class token."""

    def __init__(
        self, classes: int, shape: Shape, patch: int, width: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        patches = (shape[1] // patch) * (shape[2] // patch)
        self.patches = nn.Conv2d(shape[0], width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, patches + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, classes]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.positions
        logits: Tensor = self.classifier(self.norm(self.blocks(tokens)[:, 0]))
        return logits


@MODELS.register(
    "vit",
    "small vision transformer: pre-norm, class token, learned positions",
    "Dosovitskiy et al. 2021, arXiv:2010.11929",
)
def vit(
    classes: int, shape: Shape, patch: int = 4, width: int = 192, depth: int = 6, heads: int = 3
) -> nn.Module:
    """A vision transformer. Weights start small, N(0, 0.02^2) cut at two deviations, not He's.

    Args:
        classes: number of outputs.
        shape: channels, height and width of the images.
        patch: side of the square patches; divides height and width.
        width: size of a token; the perceptrons are four times as wide.
        depth: number of blocks.
        heads: attention heads; divides the width.

    Raises:
        ValueError: an option is out of range or does not divide.
    """
    check_positive(patch=patch, width=width, depth=depth, heads=heads)
    if shape[1] % patch or shape[2] % patch:
        raise ValueError(f"patch must divide height and width of {tuple(shape)}, got {patch}")
    if width % heads:
        raise ValueError(f"heads must divide width={width}, got {heads}")
    model = Vit(classes, shape, patch, width, depth, heads)
    _start_small_(model)
    return model


def _start_small_(model: Vit) -> None:
    weights = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for tensor in (model.token, model.positions, *(module.weight for module in weights)):
        nn.init.trunc_normal_(tensor, std=START_STD, a=-2 * START_STD, b=2 * START_STD)
    for module in weights:
        if module.bias is not None:
            nn.init.zeros_(module.bias)
