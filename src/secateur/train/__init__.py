"""Pruning while training."""

from secateur.train.increg import IncReg
from secateur.train.sdprun import SDPrun
from secateur.train.spp import SPP

__all__ = ["SPP", "IncReg", "SDPrun"]
