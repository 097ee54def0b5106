"""From scores to a plan under a budget."""

from __future__ import annotations

from secateur.allocate.budget import Budget, Meter, budget_from
from secateur.allocate.strategies import STRATEGIES, Problem, allocate

__all__ = ["STRATEGIES", "Budget", "Meter", "Problem", "allocate", "budget_from"]
