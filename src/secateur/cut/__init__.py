"""Changing the model: cutting channels, and what must hold before and after."""

from __future__ import annotations

from secateur.cut.bottleneck import Bottleneck, merge_bases
from secateur.cut.channels import check, cut, masked, recalibrate
from secateur.cut.compensation import compensated
from secateur.cut.dead import dead_channels
from secateur.cut.directional import directed
from secateur.cut.packing import pack
from secateur.cut.pivots import pivot
from secateur.cut.record import record
from secateur.cut.refit import refit
from secateur.cut.separable import separate

__all__ = [
    "Bottleneck",
    "check",
    "compensated",
    "cut",
    "dead_channels",
    "directed",
    "masked",
    "merge_bases",
    "pack",
    "pivot",
    "recalibrate",
    "record",
    "refit",
    "separate",
]
