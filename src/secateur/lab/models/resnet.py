"""Residual networks for 32x32 images: ResNet-8/20/32/56 (arXiv 1512.03385, section 4.2) and WRN-28-10 (1605.07146).

Where the width changes, the shortcut is a 1x1 convolution with batch norm, not the paper's zero padding: so every
residual stream has a producer of its own and can lose channels. ``width=4`` makes EigenDamage's "ResNet32" 64/128/256.
"""

from __future__ import annotations

from torch import Tensor, nn

from secateur.lab.models.init import kaiming


class BasicBlock(nn.Module):
    """``relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))``."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut.append(nn.Conv2d(inner, outer, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        """[n, inner, h, w] to [n, outer, h/stride, w/stride]."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


class PreActivationBlock(nn.Module):
    """``conv(relu(bn(conv(relu(bn(x)))))) + shortcut``, the wide residual network's block, without dropout."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module | None = None
        if stride != 1 or inner != outer:
            self.shortcut = nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inner, h, w] to [n, outer, h/stride, w/stride]."""
        active = self.relu(self.bn1(x))
        y = self.conv2(self.relu(self.bn2(self.conv1(active))))
        return y + (x if self.shortcut is None else self.shortcut(active))


def stages(block: type[nn.Module], first: int, widths: tuple[int, int, int], blocks: int) -> nn.Sequential:
    """Three stages of ``blocks`` blocks; the second and the third begin with stride 2."""
    result = nn.Sequential()
    inner = first
    for index, outer in enumerate(widths):
        stage = nn.Sequential()
        for position in range(blocks):
            stage.append(block(inner, outer, 2 if index and not position else 1))
            inner = outer
        result.append(stage)
    return result


def resnet(depth: int, classes: int, in_channels: int, width: float) -> nn.Module:
    """``6n + 2`` layers in three stages of widths 16, 32, 64 times ``width``."""
    w1, w2, w3 = (max(1, round(base * width)) for base in (16, 32, 64))
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(in_channels, w1, 3, padding=1, bias=False))
    model.add_module("bn", nn.BatchNorm2d(w1))
    model.add_module("relu", nn.ReLU())
    model.add_module("stages", stages(BasicBlock, w1, (w1, w2, w3), (depth - 2) // 6))
    model.add_module("average", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(w3, classes))
    return kaiming(model)


def resnet8(classes: int = 10, in_channels: int = 3, width: float = 1) -> nn.Module:
    """ResNet-8: one block a stage."""
    return resnet(8, classes, in_channels, width)


def resnet20(classes: int = 10, in_channels: int = 3, width: float = 1) -> nn.Module:
    """ResNet-20: three blocks a stage."""
    return resnet(20, classes, in_channels, width)


def resnet32(classes: int = 10, in_channels: int = 3, width: float = 1) -> nn.Module:
    """ResNet-32: five blocks a stage."""
    return resnet(32, classes, in_channels, width)


def resnet56(classes: int = 10, in_channels: int = 3, width: float = 1) -> nn.Module:
    """ResNet-56: nine blocks a stage."""
    return resnet(56, classes, in_channels, width)


def wrn_28_10(classes: int = 10, in_channels: int = 3, width: float = 10) -> nn.Module:
    """Wide ResNet 28-10: four pre-activation blocks a stage, widths 160, 320, 640."""
    w1, w2, w3 = (max(1, round(base * width)) for base in (16, 32, 64))
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(in_channels, 16, 3, padding=1, bias=False))
    model.add_module("stages", stages(PreActivationBlock, 16, (w1, w2, w3), 4))
    model.add_module("bn", nn.BatchNorm2d(w3))
    model.add_module("relu", nn.ReLU())
    model.add_module("average", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(w3, classes))
    return kaiming(model)
