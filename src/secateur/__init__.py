"""Structured pruning for PyTorch: smaller networks that are really faster, by a budget, provably exact."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur._internal.errors import (
        BadBatch,
        BadFile,
        CannotCut,
        InfeasibleBudget,
        NothingToPrune,
        SecateurError,
        SecateurWarning,
    )
    from secateur._internal.records import record
    from secateur._internal.workload import Needs, Workload
    from secateur.allocation.api import allocate
    from secateur.allocation.budget import Budget
    from secateur.allocation.contract import STRATEGIES
    from secateur.allocation.latency.api import LatencyClock, measure_latency
    from secateur.allocation.latency.model import LatencyModel
    from secateur.allocation.latency.sampler import LatencySettings
    from secateur.allocation.problem import Problem
    from secateur.allocation.search.bandit_strategy import Bandit
    from secateur.allocation.sensitivity import Sensitivity
    from secateur.allocation.strategies import Global, Threshold, Uniform
    from secateur.curvature.kronecker import kronecker_factors
    from secateur.curvature.null_space import null_space_projector
    from secateur.measure.comparison import Comparison, compare_latency
    from secateur.methods.contract import METHODS, TRAINING_METHODS
    from secateur.methods.eigendamage import eigendamage
    from secateur.methods.greg import GReg
    from secateur.methods.hybrid import hybrid
    from secateur.methods.increg import IncReg
    from secateur.methods.pivoting import Pivoting, pivot
    from secateur.methods.sdprun import SDPrun
    from secateur.methods.spp import SPP
    from secateur.plan import Plan, make_plan
    from secateur.pruning import prune
    from secateur.repair.api import apply_repair
    from secateur.repair.compensate import Compensate
    from secateur.repair.contract import REPAIRS
    from secateur.repair.directed import Directed
    from secateur.repair.distill import Distill, distill
    from secateur.repair.recalibrate import Recalibrate, recalibrate
    from secateur.repair.refit import Refit, refit
    from secateur.result import Counts, Result
    from secateur.scoring.api import score
    from secateur.scoring.contract import CRITERIA, Scores
    from secateur.scoring.directional import Directional, directional_scores
    from secateur.scoring.hessian import OBD, OBS, KronOBD, KronOBS
    from secateur.scoring.magnitude import BNScale, Magnitude, Random
    from secateur.scoring.schur import Schur
    from secateur.scoring.taylor import Taylor
    from secateur.shipping.api import Exported, export
    from secateur.storage import load, save
    from secateur.surgery.blocks.packing import pack
    from secateur.surgery.channels import check, cut, masked
    from secateur.surgery.low_rank.bottleneck import merge_bases
    from secateur.surgery.low_rank.separable import separate
    from secateur.surgery.zero_channels import zero_channels
    from secateur.tracing.api import trace
    from secateur.tracing.graph import ChannelGraph, ChannelGroup

__version__ = "0.2.0"

__all__ = [
    "CRITERIA",
    "METHODS",
    "OBD",
    "OBS",
    "REPAIRS",
    "SPP",
    "STRATEGIES",
    "TRAINING_METHODS",
    "BNScale",
    "BadBatch",
    "BadFile",
    "Bandit",
    "Budget",
    "CannotCut",
    "ChannelGraph",
    "ChannelGroup",
    "Comparison",
    "Compensate",
    "Counts",
    "Directed",
    "Directional",
    "Distill",
    "Exported",
    "GReg",
    "Global",
    "IncReg",
    "InfeasibleBudget",
    "KronOBD",
    "KronOBS",
    "LatencyClock",
    "LatencyModel",
    "LatencySettings",
    "Magnitude",
    "Needs",
    "NothingToPrune",
    "Pivoting",
    "Plan",
    "Problem",
    "Random",
    "Recalibrate",
    "Refit",
    "Result",
    "SDPrun",
    "Schur",
    "Scores",
    "SecateurError",
    "SecateurWarning",
    "Sensitivity",
    "Taylor",
    "Threshold",
    "Uniform",
    "Workload",
    "allocate",
    "apply_repair",
    "check",
    "compare_latency",
    "cut",
    "directional_scores",
    "distill",
    "eigendamage",
    "export",
    "hybrid",
    "kronecker_factors",
    "load",
    "make_plan",
    "masked",
    "measure_latency",
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
    "_internal.errors": (
        "BadBatch",
        "BadFile",
        "CannotCut",
        "InfeasibleBudget",
        "NothingToPrune",
        "SecateurError",
        "SecateurWarning",
    ),
    "_internal.workload": ("Needs", "Workload"),
    "allocation.api": ("allocate",),
    "allocation.budget": ("Budget",),
    "allocation.contract": ("STRATEGIES",),
    "allocation.latency.api": ("LatencyClock", "measure_latency"),
    "allocation.latency.model": ("LatencyModel",),
    "allocation.latency.sampler": ("LatencySettings",),
    "allocation.problem": ("Problem",),
    "allocation.search.bandit_strategy": ("Bandit",),
    "allocation.sensitivity": ("Sensitivity",),
    "allocation.strategies": ("Global", "Threshold", "Uniform"),
    "curvature.kronecker": ("kronecker_factors",),
    "curvature.null_space": ("null_space_projector",),
    "measure.comparison": ("Comparison", "compare_latency"),
    "methods.contract": ("METHODS", "TRAINING_METHODS"),
    "methods.eigendamage": ("eigendamage",),
    "methods.hybrid": ("hybrid",),
    "methods.greg": ("GReg",),
    "methods.increg": ("IncReg",),
    "methods.pivoting": ("Pivoting", "pivot"),
    "methods.sdprun": ("SDPrun",),
    "methods.spp": ("SPP",),
    "plan": ("Plan", "make_plan"),
    "pruning": ("prune",),
    "repair.api": ("apply_repair",),
    "repair.compensate": ("Compensate",),
    "repair.contract": ("REPAIRS",),
    "repair.directed": ("Directed",),
    "repair.distill": ("Distill", "distill"),
    "repair.recalibrate": ("Recalibrate", "recalibrate"),
    "repair.refit": ("Refit", "refit"),
    "result": ("Counts", "Result"),
    "scoring.api": ("score",),
    "scoring.contract": ("CRITERIA", "Scores"),
    "scoring.directional": ("Directional", "directional_scores"),
    "scoring.hessian": ("OBD", "OBS", "KronOBD", "KronOBS"),
    "scoring.magnitude": ("BNScale", "Magnitude", "Random"),
    "scoring.schur": ("Schur",),
    "scoring.taylor": ("Taylor",),
    "shipping.api": ("Exported", "export"),
    "storage": ("load", "save"),
    "surgery.blocks.packing": ("pack",),
    "surgery.channels": ("check", "cut", "masked"),
    "surgery.low_rank.bottleneck": ("merge_bases",),
    "surgery.low_rank.separable": ("separate",),
    "_internal.records": ("record",),
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
