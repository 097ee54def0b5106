"""Structured pruning for PyTorch: smaller networks that are really faster, by a budget, provably exact."""

from __future__ import annotations

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
