"""Structured pruning for PyTorch: smaller networks that are really faster, by a budget, provably exact."""

from __future__ import annotations

from secateur._internal.errors import (
    BadBatch,
    BadFile,
    CannotCut,
    InfeasibleBudget,
    NothingToPrune,
    SecateurError,
    SecateurWarning,
)
from secateur._internal.workload import Needs, Workload
from secateur.allocation.api import allocate
from secateur.allocation.budget import Budget
from secateur.allocation.contract import STRATEGIES
from secateur.allocation.latency.api import LatencyClock, measure_latency
from secateur.allocation.latency.model import LatencyModel
from secateur.allocation.latency.sampler import LatencySettings
from secateur.allocation.search.strategy import Bandit
from secateur.allocation.sensitivity import Sensitivity
from secateur.allocation.strategies import Global, Threshold, Uniform
from secateur.curvature.kronecker import kronecker_factors
from secateur.curvature.null_space import null_space_projector
from secateur.methods.eigendamage import eigendamage
from secateur.methods.increg import IncReg
from secateur.methods.pivoting import Pivoting
from secateur.methods.sdprun import SDPrun
from secateur.methods.spp import SPP
from secateur.plan import Plan, make_plan
from secateur.pruning import prune
from secateur.repair.api import apply_repair
from secateur.repair.compensate import Compensate
from secateur.repair.contract import REPAIRS
from secateur.repair.directed import Directed
from secateur.repair.recalibrate import Recalibrate, recalibrate
from secateur.repair.refit import Refit, refit
from secateur.result import Counts, Result
from secateur.scoring.api import score
from secateur.scoring.contract import CRITERIA, Scores
from secateur.scoring.directional import Directional, directional_scores
from secateur.scoring.hessian import OBD, OBS, KronOBD, KronOBS
from secateur.scoring.magnitude import BNScale, Magnitude, Random
from secateur.scoring.taylor import Taylor
from secateur.storage import load, save
from secateur.surgery.blocks.packing import pack
from secateur.surgery.blocks.pivots import pivot
from secateur.surgery.channels import check, cut, masked
from secateur.surgery.low_rank.bottleneck import merge_bases
from secateur.surgery.low_rank.separable import separate
from secateur.surgery.records import record
from secateur.surgery.zero_channels import zero_channels
from secateur.tracing.api import trace
from secateur.tracing.graph import ChannelGraph, ChannelGroup

__version__ = "0.1.0"

__all__ = [
    "CRITERIA",
    "OBD",
    "OBS",
    "REPAIRS",
    "SPP",
    "STRATEGIES",
    "BNScale",
    "BadBatch",
    "BadFile",
    "Bandit",
    "Budget",
    "CannotCut",
    "ChannelGraph",
    "ChannelGroup",
    "Compensate",
    "Counts",
    "Directed",
    "Directional",
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
    "Random",
    "Recalibrate",
    "Refit",
    "Result",
    "SDPrun",
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
    "cut",
    "directional_scores",
    "eigendamage",
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
