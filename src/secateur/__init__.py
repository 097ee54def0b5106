"""Structured pruning for PyTorch: smaller networks that are really faster, by a budget, provably exact."""

from __future__ import annotations

from secateur.allocate import Budget, allocate
from secateur.cut import check, cut, dead_channels, masked, recalibrate, record
from secateur.errors import SecateurError
from secateur.plan import Plan, make_plan
from secateur.score import score
from secateur.trace import ChannelGraph, ChannelGroup, trace

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ChannelGraph",
    "ChannelGroup",
    "Plan",
    "SecateurError",
    "allocate",
    "check",
    "cut",
    "dead_channels",
    "make_plan",
    "masked",
    "recalibrate",
    "record",
    "score",
    "trace",
]
