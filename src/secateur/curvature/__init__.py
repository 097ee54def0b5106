"""How the loss bends: Kronecker factors of the Fisher, their eigenbasis, and which directions are flat."""

from secateur.curvature.completing import columns_made_up, made_up, rows_made_up
from secateur.curvature.eigenbasis import Eigenbasis, eigenbasis_of, identity_basis, second_moments
from secateur.curvature.flat import FlatProjector, flat_projector
from secateur.curvature.kronecker import Curvature, Factors, kronecker_factors
from secateur.curvature.solving import check_damping, damped, inverse, root

__all__ = [
    "Curvature",
    "Eigenbasis",
    "Factors",
    "FlatProjector",
    "check_damping",
    "columns_made_up",
    "damped",
    "eigenbasis_of",
    "flat_projector",
    "identity_basis",
    "inverse",
    "kronecker_factors",
    "made_up",
    "root",
    "rows_made_up",
    "second_moments",
]
