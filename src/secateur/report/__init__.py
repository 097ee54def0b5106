"""Figures of what was measured."""

from secateur.report.search import draw_search
from secateur.report.valley import draw_curve, draw_plane, draw_spectrum

__all__ = ["draw_curve", "draw_plane", "draw_search", "draw_spectrum"]
