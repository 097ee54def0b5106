"""Convolutions that do not compute their weight times their input, each with the reason that must be told."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize


class Standardised(nn.Conv2d):
    """Its weight is standardised before it is used."""

    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Padded(nn.Conv2d):
    """It pads its input itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrised(*args, **options):
    layer = nn.Conv2d(*args, **options)
    parametrize.register_parametrization(layer, "weight", Half())
    return layer


STRANGE, COMPUTED = "its forward is not its weight times its input", "its weight is computed from other parameters"
ODD = {"standardised": (Standardised, STRANGE), "padded": (Padded, STRANGE), "parametrised": (parametrised, COMPUTED)}
