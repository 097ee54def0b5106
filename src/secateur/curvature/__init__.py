"""How the loss bends: Kronecker factors of the Fisher and their eigenbasis."""

from secateur.curvature.kronecker import Curvature, Factors, kronecker_factors

__all__ = ["Curvature", "Factors", "kronecker_factors"]
