"""Networks for measurements: ResNet-50- and DenseNet-121-like ones, written the way people write them.

The blocks are those of torchvision (which is not needed at run time); depths of about 50, 100 and 200 layers make the
growth of a tool's time with depth visible.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

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


class Plain(nn.Module):
    """VGG-16: convolutions one after the other."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for stage in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
            for out in stage:
                layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
                width = out
            layers.append(nn.MaxPool2d(2))
        self.features, self.head = nn.Sequential(*layers), nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for images [n, 3, h, w]."""
        return self.head(self.features(x).mean((2, 3)))


class Inverted(nn.Module):
    """Wide, depthwise, narrow; with a gate from all positions, as in MobileNetV3 and EfficientNet."""

    def __init__(self, inside: int, outside: int, stride: int, gated: bool) -> None:
        super().__init__()
        wide = 6 * inside
        self.wide = nn.Sequential(nn.Conv2d(inside, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU()
        )
        squeezed = max(8, inside // 4)
        self.gate = nn.Sequential(nn.Conv2d(wide, squeezed, 1), nn.SiLU(), nn.Conv2d(squeezed, wide, 1), nn.Sigmoid())
        self.gated, self.shortcut = gated, stride == 1 and inside == outside
        self.narrow = nn.Sequential(nn.Conv2d(wide, outside, 1, bias=False), nn.BatchNorm2d(outside))
        if not gated:
            del self.gate

    def forward(self, x: Tensor) -> Tensor:
        """A map of features for a map [n, c, h, w]."""
        y = self.depthwise(self.wide(x))
        if self.gated:
            y = y * self.gate(y.mean((2, 3), keepdim=True))
        y = self.narrow(y)
        return x + y if self.shortcut else y


class Depthwise(nn.Module):
    """MobileNetV2, or EfficientNet-B0-like with gates."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU())
        blocks, width = [], 32
        for out, count, stride in (
            (16, 1, 1),
            (24, 2, 2),
            (32, 3, 2),
            (64, 4, 2),
            (96, 3, 1),
            (160, 3, 2),
            (320, 1, 1),
        ):
            for i in range(count):
                blocks.append(Inverted(width, out, stride if i == 0 else 1, gated))
                width = out
        self.blocks, self.last = nn.Sequential(*blocks), nn.Sequential(nn.Conv2d(width, 1280, 1), nn.SiLU())
        self.head = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for images [n, 3, h, w]."""
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


class UNet(nn.Module):
    """Down, up, and what was seen on the way down beside it."""

    def __init__(self) -> None:
        super().__init__()

        def double(inside: int, outside: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for n in (inside, outside):
                layers += [nn.Conv2d(n, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)]
            return nn.Sequential(*layers)

        widths = (32, 64, 128, 256)
        self.down = nn.ModuleList(double(a, b) for a, b in zip((3, *widths[:-1]), widths, strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.join = nn.ModuleList(double(2 * a, a) for a in widths[:-1])
        self.head = nn.Conv2d(widths[0], 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for images [n, 3, h, w]."""
        seen = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            seen.append(x)
        for up, join, old in list(zip(self.up, self.join, seen, strict=False))[::-1]:
            x = join(torch.cat([up(x), old], 1))
        return self.head(x)


class Permuted(nn.Module):
    """ConvNeXt-like: depthwise 7x7, then a layer norm and linear layers over the last dim."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        self.between = nn.ModuleList()
        width = 3
        for out, count in ((96, 3), (192, 3), (384, 9), (768, 3)):
            stride = 4 if width == 3 else 2
            self.between.append(nn.Conv2d(width, out, stride, stride))
            self.stages.append(nn.ModuleList(nn.ModuleDict({
                "depthwise": nn.Conv2d(out, out, 7, padding=3, groups=out), "norm": nn.LayerNorm(out),
                "up": nn.Linear(out, 4 * out), "down": nn.Linear(4 * out, out),
            }) for _ in range(count)))  # fmt: skip
            width = out
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for images [n, 3, h, w]."""
        for between, blocks in zip(self.between, self.stages, strict=True):
            x = between(x)
            for m in blocks:
                y = m["norm"](m["depthwise"](x).permute(0, 2, 3, 1))
                x = x + m["down"](F.gelu(m["up"](y))).permute(0, 3, 1, 2)
        return self.head(self.norm(x.mean((2, 3))))


class Transformer(nn.Module):
    """A vision transformer with one weight for queries, keys and values; or a mixer, with a mix of places instead."""

    def __init__(self, *, width: int = 384, heads: int = 6, depth: int = 12, mixes: bool = False) -> None:
        super().__init__()
        self.patches, self.size = nn.Conv2d(3, width, 16, 16), width // heads
        parts = {
            "norm1": lambda: nn.LayerNorm(width), "norm2": lambda: nn.LayerNorm(width),
            "up": lambda: nn.Linear(width, 4 * width), "down": lambda: nn.Linear(4 * width, width),
        }  # fmt: skip
        if mixes:
            parts |= {"wide": lambda: nn.Linear(196, 384), "narrow": lambda: nn.Linear(384, 196)}
        else:
            parts |= {"qkv": lambda: nn.Linear(width, 3 * width), "out": lambda: nn.Linear(width, width)}
            self.positions = nn.Parameter(torch.randn(1, 196, width) * 0.02)
        self.mixes = mixes
        self.blocks = nn.ModuleList(nn.ModuleDict({k: make() for k, make in parts.items()}) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for images [n, 3, h, w]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        if not self.mixes:
            x = x + self.positions
        for m in self.blocks:
            y = m["norm1"](x)
            x = x + (self._mix(m, y) if self.mixes else self._attend(m, y))
            x = x + m["down"](F.gelu(m["up"](m["norm2"](x))))
        return self.head(self.norm(x).mean(1))

    def _mix(self, m: nn.ModuleDict, y: Tensor) -> Tensor:
        return m["narrow"](F.gelu(m["wide"](y.transpose(1, 2)))).transpose(1, 2)

    def _attend(self, m: nn.ModuleDict, y: Tensor) -> Tensor:
        n, t, _ = y.shape
        q, k, v = m["qkv"](y).reshape(n, t, 3, -1, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        return m["out"](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


ZOO: dict[str, Callable[[], nn.Module]] = {
    **{f"resnet-{depth}": (lambda depth=depth: resnet(depth)) for depth in RESNETS},
    **{f"densenet-{depth}": (lambda depth=depth: densenet(depth)) for depth in DENSENETS},
    "vgg-16": Plain,
    "mobilenet": lambda: Depthwise(gated=False),
    "efficientnet": lambda: Depthwise(gated=True),
    "unet": UNet,
    "convnext": Permuted,
    "vit-small": Transformer,
    "mixer": lambda: Transformer(mixes=True),
}
