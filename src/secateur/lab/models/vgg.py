"""VGG with batch norm for 32x32 images, one linear head (as in EigenDamage's code, arXiv 1905.05934)."""

from __future__ import annotations

from torch import nn

from secateur.lab.models.init import kaiming

STAGES = {
    16: ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)),
    19: ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)),
}


def vgg(depth: int, classes: int, in_channels: int, width: float) -> nn.Module:
    """Bias-free 3x3 convolutions in five stages with a max-pool between two, global average, one linear layer."""
    layers: list[nn.Module] = []
    last = in_channels
    for index, (base, repeats) in enumerate(STAGES[depth]):
        if index:
            layers.append(nn.MaxPool2d(2))
        channels = max(1, round(base * width))
        for _ in range(repeats):
            layers += [nn.Conv2d(last, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
            last = channels
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*layers))
    model.add_module("average", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(last, classes))
    return kaiming(model)


def vgg16_bn(classes: int = 10, in_channels: int = 3, width: float = 1) -> nn.Module:
    """VGG-16 with batch norm: 13 convolutions."""
    return vgg(16, classes, in_channels, width)


def vgg19_bn(classes: int = 10, in_channels: int = 3, width: float = 1) -> nn.Module:
    """VGG-19 with batch norm: 16 convolutions."""
    return vgg(19, classes, in_channels, width)
