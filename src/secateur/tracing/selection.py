"""Which groups are left alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from secateur.tracing.graph import ChannelGraph

Exclude = str | Sequence[Any]


def excluded(model: nn.Module, graph: ChannelGraph, exclude: Exclude = (), *, frozen: bool = True) -> dict[str, str]:
    """Group name -> why it is left alone."""
    return {}
