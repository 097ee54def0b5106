"""Changing the model: cutting channels, and what must hold before and after."""

from __future__ import annotations

from secateur.cut.channels import check, cut, masked, recalibrate, record
from secateur.cut.compensation import compensated
from secateur.cut.dead import dead_channels

__all__ = ["check", "compensated", "cut", "dead_channels", "masked", "recalibrate", "record"]
