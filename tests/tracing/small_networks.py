"""Parts that tests of tracing build their networks from."""

from __future__ import annotations

from torch import nn


class Run(nn.Module):
    """A network whose forward is a function of its named parts."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def conv(i, o, k=3, **kw):
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)
