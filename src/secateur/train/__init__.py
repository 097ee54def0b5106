"""Pruning while training."""

from secateur.train.increg import IncReg
from secateur.train.pivoting import Pivoting
from secateur.train.sdprun import SDPrun
from secateur.train.spp import SPP

GENTLE = {"increg": IncReg, "spp": SPP}
"""By name: the methods that prune a trained network while it trains on."""

__all__ = ["GENTLE", "SPP", "IncReg", "Pivoting", "SDPrun"]
