r"""The clock decides: an answer that a fitted time says meets the budget is measured, and made narrower or wider.

What is fitted is wrong by some per cent, near an answer nearly always by the same factor::

    aim = limit fitted(k) / measured(k)         what the fit says where the clock would show the limit
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from secateur.allocate.budget import LATENCY, Timed
from secateur.allocate.strategies import Problem, fill, narrowed
from secateur.errors import SecateurError
from secateur.plan import Plan
from secateur.trace import ChannelGraph

ENOUGH, TRIES, SAFE = 0.97, 10, 0.99
"""How much of the limit is to be used, how often the clock is asked, and the part of an aim that is aimed at."""


class Clock(Timed, Protocol):
    """What can also measure (a :class:`secateur.Timing` does).

    Attributes:
        graph: of the model that it measures.
    """

    graph: ChannelGraph

    def measured(self, plan: Plan) -> float:
        """The milliseconds that the cut network takes."""


def by_the_clock(
    problem: Problem, taken: np.ndarray, clock: Clock, plan_of: Callable[[np.ndarray], Plan]
) -> np.ndarray:
    """Items taken from every group, so that the measured time is within the budget and most of it is used.

    Args:
        problem: groups, items and a budget that limits the latency.
        taken: the answer so far.
        clock: measures, and says what it thinks without.
        plan_of: the plan of an answer.

    Raises:
        SecateurError: the clock shows more than the budget however little stays.
    """
    limit, found, least = problem.meter.allowed[LATENCY], None, np.inf
    for attempt in range(TRIES):
        took = clock.measured(plan_of(taken))
        least = min(least, took)
        if took <= limit and (found is None or taken.sum() < found.sum()):
            found = taken
        if found is not None and ((took <= limit and took >= ENOUGH * limit) or attempt >= TRIES // 2):
            break
        aim = SAFE * limit * clock.ms(problem.widths(taken)).item() / took
        aimed = replace(problem, meter=problem.meter.at(aim))
        if took <= limit:
            changed = fill(aimed, taken)
        elif aimed.meter.met(aimed.widths(problem.count)):
            changed = fill(aimed, narrowed(aimed, taken))
        else:
            changed = problem.count
        if (changed == taken).all():
            break
        taken = changed
    if found is None:
        raise SecateurError(
            f"the budget cannot be met: latency_ms={limit:.4g} is asked for, and the least that was measured is "
            f"{least:.4g}: raise it, or lower at_least= or round_to="
        )
    return found
