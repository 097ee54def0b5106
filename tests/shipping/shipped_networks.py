"""Small networks of the kinds that are shipped, and inputs."""

from __future__ import annotations

import torch
from torch import nn


class Separable(nn.Module):
    """Depthwise and pointwise convolutions, with a squeeze and an excitation; several outputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.Hardswish(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6(), nn.Conv2d(12, 16, 1),
        )  # fmt: skip
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.classes, self.boxes = nn.Conv2d(16, 5, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.body(x)
        x = x * self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]
        return {"classes": self.classes(x), "boxes": self.boxes(x).exp(), "best": self.classes(x).argmax(1)}


class UNet(nn.Module):
    """Two levels, with a transposed convolution and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up, self.last = nn.ConvTranspose2d(12, 8, 2, stride=2), nn.Conv2d(16, 2, 1)

    def forward(self, x):
        first = self.down(x).relu()
        return self.last(torch.cat([first, self.up(self.deep(first).relu())], 1))


class Tagger(nn.Module):
    """A bidirectional LSTM over the ids of tokens, with a mask by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(30, 12), nn.LSTM(12, 8, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        x = x if mask is None else x * mask[..., None]
        return self.head(self.lstm(x)[0])


class Attentive(nn.Module):
    """A layer of PyTorch's own transformer, of which heads may go."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids)).mean(1))


IMAGES, IDS = torch.randn(4, 3, 16, 16), torch.randint(0, 30, (4, 7))
NETWORKS = {
    "separable": (Separable, IMAGES),
    "u-net": (UNet, torch.randn(2, 1, 8, 8)),
    "tagger": (Tagger, {"ids": IDS, "mask": torch.ones(4, 7)}),
    "attention": (Attentive, IDS),
}
