"""Networks that train in seconds: the two LeNets and a convolutional net for the 8x8 digits."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from secateur.lab.models.init import kaiming


def lenet_300_100(classes: int = 10, in_channels: int = 1) -> nn.Module:
    """LeNet-300-100 for 28x28 images: 784-300-100-10, ReLU (LeCun 1998)."""
    layers = [
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(in_channels * 28 * 28, 300)),
        ("relu1", nn.ReLU()),
        ("fc2", nn.Linear(300, 100)),
        ("relu2", nn.ReLU()),
        ("head", nn.Linear(100, classes)),
    ]
    return kaiming(nn.Sequential(OrderedDict(layers)))


def lenet5(classes: int = 10, in_channels: int = 1) -> nn.Module:
    """LeNet-5 as in Caffe, for 28x28 images: convolutions 20 and 50 of 5x5, max-pools, 500 hidden, ReLU.

    Caffe has a ReLU after the hidden layer only; here the convolutions have one too.
    """
    layers = [
        ("conv1", nn.Conv2d(in_channels, 20, 5)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(20, 50, 5)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(50 * 4 * 4, 500)),
        ("relu3", nn.ReLU()),
        ("head", nn.Linear(500, classes)),
    ]
    return kaiming(nn.Sequential(OrderedDict(layers)))


def digits_cnn(classes: int = 10, in_channels: int = 1, width: float = 1) -> nn.Module:
    """Three 3x3 convolutions with batch norm (32, 64, 64 times ``width``) for the 8x8 digits."""
    w1, w2, w3 = (max(1, round(base * width)) for base in (32, 64, 64))
    layers = [
        ("conv1", nn.Conv2d(in_channels, w1, 3, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(w1)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(w1, w2, 3, padding=1, bias=False)),
        ("bn2", nn.BatchNorm2d(w2)),
        ("relu2", nn.ReLU()),
        ("pool", nn.MaxPool2d(2)),
        ("conv3", nn.Conv2d(w2, w3, 3, padding=1, bias=False)),
        ("bn3", nn.BatchNorm2d(w3)),
        ("relu3", nn.ReLU()),
        ("average", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
        ("head", nn.Linear(w3, classes)),
    ]
    return kaiming(nn.Sequential(OrderedDict(layers)))
