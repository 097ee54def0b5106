"""How the loss bends: Kronecker factors of the Fisher and their eigenbasis."""

from secateur.curvature.eigenbasis import Eigenbasis, eigenbasis_of, identity_basis, second_moments
from secateur.curvature.kronecker import Curvature, Factors, kronecker_factors
from secateur.curvature.solving import check_damping, damped, inverse, root

__all__ = [
    "Curvature",
    "Eigenbasis",
    "Factors",
    "check_damping",
    "damped",
    "eigenbasis_of",
    "identity_basis",
    "inverse",
    "kronecker_factors",
    "root",
    "second_moments",
]
