"""Structured pruning for PyTorch: smaller networks that are really faster, by a budget, provably exact."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur._internal.errors import SecateurError
    from secateur.allocation.api import allocate
    from secateur.allocation.budget import Budget
    from secateur.allocation.latency.model import Timing
    from secateur.allocation.search.search import Search
    from secateur.curvature.kronecker import kronecker_factors
    from secateur.curvature.null_space import null_space_projector
    from secateur.methods.eigendamage import eigendamage
    from secateur.methods.increg import IncReg
    from secateur.methods.pivoting import Pivoting
    from secateur.methods.sdprun import SDPrun
    from secateur.methods.spp import SPP
    from secateur.plan import Plan, make_plan
    from secateur.pruning import Result, prune
    from secateur.repair.compensate import compensated
    from secateur.repair.directed import directed
    from secateur.repair.refit import refit
    from secateur.scoring.api import score
    from secateur.scoring.directional import directional_scores
    from secateur.storage import load, save
    from secateur.surgery.blocks.packing import pack
    from secateur.surgery.blocks.pivots import pivot
    from secateur.surgery.channels import check, cut, masked, recalibrate
    from secateur.surgery.low_rank.bottleneck import merge_bases
    from secateur.surgery.low_rank.separable import separate
    from secateur.surgery.records import record
    from secateur.surgery.zero_channels import zero_channels
    from secateur.tracing.api import trace
    from secateur.tracing.graph import ChannelGraph, ChannelGroup

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
    "directed",
    "directional_scores",
    "eigendamage",
    "kronecker_factors",
    "load",
    "make_plan",
    "masked",
    "merge_bases",
    "null_space_projector",
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
    "zero_channels",
]

_ROOMS = {
    "_internal.errors": ("SecateurError",),
    "allocation.api": ("allocate",),
    "allocation.budget": ("Budget",),
    "allocation.latency.model": ("Timing",),
    "allocation.search.search": ("Search",),
    "curvature.kronecker": ("kronecker_factors",),
    "curvature.null_space": ("null_space_projector",),
    "methods.eigendamage": ("eigendamage",),
    "methods.increg": ("IncReg",),
    "methods.pivoting": ("Pivoting",),
    "methods.sdprun": ("SDPrun",),
    "methods.spp": ("SPP",),
    "plan": ("Plan", "make_plan"),
    "pruning": ("Result", "prune"),
    "repair.compensate": ("compensated",),
    "repair.directed": ("directed",),
    "repair.refit": ("refit",),
    "scoring.api": ("score",),
    "scoring.directional": ("directional_scores",),
    "storage": ("load", "save"),
    "surgery.blocks.packing": ("pack",),
    "surgery.blocks.pivots": ("pivot",),
    "surgery.channels": ("check", "cut", "masked", "recalibrate"),
    "surgery.low_rank.bottleneck": ("merge_bases",),
    "surgery.low_rank.separable": ("separate",),
    "surgery.records": ("record",),
    "surgery.zero_channels": ("zero_channels",),
    "tracing.api": ("trace",),
    "tracing.graph": ("ChannelGraph", "ChannelGroup"),
}
"""Where each public name lives. It is imported when it is first used, so that ``import secateur`` takes no time and
``secateur --help`` needs no PyTorch."""
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
