"""The seat of the strategy: how many channels does every group keep?

A strategy is a settings dataclass with one method::

    @STRATEGIES.register("mine")
    @dataclass(frozen=True)
    class Mine:
        needs: ClassVar[Needs] = Needs()

        def widths(self, problem: Problem, work: Workload) -> np.ndarray: ...

It sees scores, costs and the budget in the :class:`~secateur.allocation.problem.Problem`, and gives a width for every
group. It knows nothing of where scores come from, nor of what makes up for channels that go.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np

from secateur._internal.registry import Registry
from secateur._internal.workload import Needs, Workload
from secateur.allocation.problem import Problem


class Strategy(Protocol):
    """What sits there."""

    needs: ClassVar[Needs]

    def widths(self, problem: Problem, work: Workload) -> np.ndarray:
        """How many channels every group keeps, int64 [groups], within the budget.

        Of each group the channels with the lowest scores go. Where widths must be multiples of something, a smaller
        width is taken; room that the answer leaves in the budget is given back, highest scores first.
        """


STRATEGIES: Registry[Strategy] = Registry("strategy", "secateur.allocation", widths=2)
"""All strategies by name."""
