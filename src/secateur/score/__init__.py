"""How much each channel matters: the estimated increase of the loss if it goes."""

from __future__ import annotations

from secateur.score.api import CRITERIA, Criterion, score
from secateur.score.directional import directional, directional_scores
from secateur.score.magnitude import bn_scale, magnitude, random
from secateur.score.taylor import taylor

__all__ = [
    "CRITERIA",
    "Criterion",
    "bn_scale",
    "directional",
    "directional_scores",
    "magnitude",
    "random",
    "score",
    "taylor",
]
