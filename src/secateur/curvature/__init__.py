"""How the loss bends: Kronecker factors of the Fisher and their eigenbasis."""

from secateur.curvature.eigenbasis import Eigenbasis, eigenbasis_of, identity_basis, second_moments
from secateur.curvature.kronecker import Curvature, Factors, kronecker_factors

__all__ = [
    "Curvature",
    "Eigenbasis",
    "Factors",
    "eigenbasis_of",
    "identity_basis",
    "kronecker_factors",
    "second_moments",
]
