"""Networks for measurements: ResNet-50- and DenseNet-121-like ones, written the way people write them.

The blocks are those of torchvision (which is not needed at run time); depths of about 50, 100 and 200 layers make the
growth of a tool's time with depth visible.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RESNETS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 200: (3, 24, 36, 3)}
DENSENETS = {51: (4, 6, 8, 5), 101: (6, 12, 20, 10), 201: (6, 12, 48, 32)}


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the last one is ``expansion`` times wider."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """One residual block, ``[n, c, h, w]``."""
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A bottleneck ResNet with four stages (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, blocks: tuple[int, ...], classes: int = 1000) -> None:
        super().__init__()
        self.inputs = 64
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = self._stage(64, blocks[0], 1)
        self.layer2 = self._stage(128, blocks[1], 2)
        self.layer3 = self._stage(256, blocks[2], 2)
        self.layer4 = self._stage(512, blocks[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * Bottleneck.expansion, classes)

    def _stage(self, width: int, blocks: int, stride: int) -> nn.Sequential:
        outputs = width * Bottleneck.expansion
        shortcut = nn.Sequential(nn.Conv2d(self.inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        layers = [Bottleneck(self.inputs, width, stride, shortcut)]
        self.inputs = outputs
        layers += [Bottleneck(outputs, width) for _ in range(blocks - 1)]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 3, h, w]`` to logits ``[n, classes]``."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class DenseLayer(nn.Module):
    """Norm, ReLU, 1x1, norm, ReLU, 3x3: adds ``growth`` channels to everything before it."""

    def __init__(self, inputs: int, growth: int, bottleneck: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Add new channels, ``[n, growth, h, w]``, from all earlier ones."""
        out = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(out)))


class DenseBlock(nn.ModuleDict):
    """Layers that each read all the layers before."""

    def __init__(self, layers: int, inputs: int, growth: int) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", DenseLayer(inputs + i * growth, growth))

    def forward(self, x: Tensor) -> Tensor:
        """All channels, old and new, ``[n, inputs + layers * growth, h, w]``."""
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """A DenseNet-BC (Huang et al. 2017, arXiv:1608.06993)."""

    def __init__(self, blocks: tuple[int, ...], growth: int = 32, classes: int = 1000) -> None:
        super().__init__()
        width = 2 * growth
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        for i, layers in enumerate(blocks):
            self.features.add_module(f"denseblock{i + 1}", DenseBlock(layers, width, growth))
            width += layers * growth
            if i < len(blocks) - 1:
                self.features.add_module(f"transition{i + 1}", _transition(width))
                width //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[n, 3, h, w]`` to logits ``[n, classes]``."""
        out = F.relu(self.features(x), inplace=True)
        out = F.adaptive_avg_pool2d(out, (1, 1))
        return self.classifier(torch.flatten(out, 1))


def _transition(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2, 2)
    )


def resnet(depth: int) -> ResNet:
    """Build a ResNet of 50, 101 or 200 layers."""
    return ResNet(RESNETS[depth])


def densenet(depth: int) -> DenseNet:
    """Build a DenseNet of 51, 101 or 201 layers (201 is DenseNet-201)."""
    return DenseNet(DENSENETS[depth])


ZOO: dict[str, Callable[[], nn.Module]] = {
    **{f"resnet-{depth}": (lambda depth=depth: resnet(depth)) for depth in RESNETS},
    **{f"densenet-{depth}": (lambda depth=depth: densenet(depth)) for depth in DENSENETS},
}
