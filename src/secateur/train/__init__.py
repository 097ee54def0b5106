"""Pruning while training."""

from secateur.train.sdprun import SDPrun

__all__ = ["SDPrun"]
