"""Methods that are more than criterion, strategy and repair: most prune while a network trains."""

from secateur.methods.increg import IncReg
from secateur.methods.spp import SPP

GENTLE = {"increg": IncReg, "spp": SPP}
"""By name: the methods that prune a trained network while it trains on."""
