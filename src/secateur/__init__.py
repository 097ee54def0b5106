"""Structured pruning for PyTorch: smaller networks that are really faster, by a budget, provably exact."""

from __future__ import annotations

from secateur.allocate import Budget, allocate
from secateur.allocate.search import Search
from secateur.curvature import flat_projector, kronecker_factors
from secateur.cut import (
    check,
    compensated,
    cut,
    dead_channels,
    directed,
    masked,
    merge_bases,
    pack,
    pivot,
    recalibrate,
    record,
    refit,
    separate,
)
from secateur.eigendamage import eigendamage
from secateur.errors import SecateurError
from secateur.plan import Plan, make_plan
from secateur.prune import Result, prune
from secateur.score import directional_scores, score
from secateur.store import load, save
from secateur.timing import Timing
from secateur.trace import ChannelGraph, ChannelGroup, trace
from secateur.train import SPP, IncReg, Pivoting, SDPrun

__version__ = "0.1.0"

__all__ = [
    "SPP",
    "Budget",
    "ChannelGraph",
    "ChannelGroup",
    "IncReg",
    "Pivoting",
    "Plan",
    "Result",
    "SDPrun",
    "Search",
    "SecateurError",
    "Timing",
    "allocate",
    "check",
    "compensated",
    "cut",
    "dead_channels",
    "directed",
    "directional_scores",
    "eigendamage",
    "flat_projector",
    "kronecker_factors",
    "load",
    "make_plan",
    "masked",
    "merge_bases",
    "pack",
    "pivot",
    "prune",
    "recalibrate",
    "record",
    "refit",
    "save",
    "score",
    "separate",
    "trace",
]
