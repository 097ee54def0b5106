"""From scores to a plan under a budget."""

from __future__ import annotations

from secateur.allocate.api import allocate
from secateur.allocate.budget import Budget, Meter, budget_from
from secateur.allocate.strategies import BANDIT, STRATEGIES, Problem

__all__ = ["BANDIT", "STRATEGIES", "Budget", "Meter", "Problem", "allocate", "budget_from"]
