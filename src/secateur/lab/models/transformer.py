"""A vision transformer that trains in minutes."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, PATCH, HEADS, DEPTH = 28, 4, 4, 3


class Block(nn.Module):
    """Attention and a perceptron, each behind a layer norm and beside a shortcut (arXiv 2010.11929)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = HEADS
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``[n, tokens, width]``."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.fc2(F.gelu(self.fc1(self.norm2(x)))))


class VisionTransformer(nn.Module):
    """Patches, blocks, a norm, and a head on the mean of the tokens."""

    def __init__(self, classes: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, in_channels, 28, 28]``."""
        tokens = self.patches(x).flatten(2).mT + self.positions
        return cast(Tensor, self.head(self.norm(self.blocks(tokens)).mean(1)))


def small_vit(classes: int = 10, in_channels: int = 1, width: float = 1) -> nn.Module:
    """A transformer for 28x28 images: 49 patches of 4x4, 3 blocks of 4 heads, 64 times ``width`` wide."""
    return VisionTransformer(classes, in_channels, HEADS * max(1, round(16 * width)))
