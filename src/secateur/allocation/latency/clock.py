r"""A limit on the latency, kept by measuring: the clock decides, and a fitted model only proposes.

A latency model is wrong by some per cent. Near an answer it is nearly always wrong by the same factor. So where an
answer was measured, it is known what the model says at the widths where the clock would show the limit::

    aim = limit fitted(k) / measured(k)

Widths that the model expects to take that long are cut and measured next. Uniform widths find the aim first; then the
strategy answers to it; and its answer is made narrower or wider by scores, until it is within the limit and uses most
of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from secateur._internal.errors import CannotCut, InfeasibleBudget, SecateurError
from secateur.allocation.budget import LATENCY, Budget, Timed
from secateur.allocation.problem import Problem, fill, narrowed
from secateur.allocation.strategies import uniform_items
from secateur.measure.backends import EAGER
from secateur.plan import Plan, make_plan
from secateur.tracing.graph import ChannelGraph

Choose = Callable[[Problem], np.ndarray]
"""Items taken from every group of a problem, int64 [groups]."""
USED_ENOUGH = 0.97
"""An answer that uses so much of the limit is wide enough."""
MOST_MEASUREMENTS = 10
"""Answers that are measured, at most, before the narrowest one is."""
MOST_GIVEN_BACK = 8
"""Wider answers that are measured, at most, where an answer leaves room."""
FAR = 1.02
"""Nothing is tried that the model expects to take so many times the limit."""
AIM_MARGIN = 0.99
"""Which part of an aim is aimed at: an answer just above the limit is of no use."""


class Clock(Protocol):
    """What knows how long a network takes, and what is cut from it: a :class:`secateur.LatencyClock`, say."""

    @property
    def graph(self) -> ChannelGraph:
        """The graph of the network that it measures."""

    @property
    def fitted(self) -> Timed:
        """About how long networks of any widths take."""

    def measured(self, plan: Plan) -> float:
        """The milliseconds that the cut network takes."""


def check_same_backend(budget: Budget, latency: Any) -> None:
    """Raise if a clock, or settings for one, times with something else than what a budget's milliseconds are of."""
    backend = budget.backend if latency is None else getattr(latency, "backend", EAGER)
    if budget.backend not in (EAGER, backend):
        raise SecateurError(
            f"latency=...: it times with {backend!r}, the budget's milliseconds are of {budget.backend!r}; name the "
            "same backend"
        )


def check_clock(clock: Clock | None, graph: ChannelGraph) -> None:
    """Raise if this cannot tell how long plans of a graph take."""
    if clock is None:
        return
    if not all(hasattr(clock, name) for name in ("graph", "fitted", "measured")):
        raise SecateurError(f"latency={clock!r}: what secateur.measure_latency gives is expected")
    own, other = ([(g.name, len(g)) for g in some.groups] for some in (clock.graph, graph))
    timed, asked = (
        some.macs_terms.each(some.lengths(some.widths)) / max(some.macs(), 1) for some in (clock.graph, graph)
    )
    alike = own == other and timed.shape == asked.shape and np.allclose(timed, asked)
    if clock.graph.fingerprint != graph.fingerprint or not alike:
        raise SecateurError("latency: it is of another model, or was traced with other inputs; measure this one")


def by_the_clock(
    problem: Problem, choose: Choose, clock: Clock, plan_of: Callable[[np.ndarray], Plan], tell: Callable[[str], None]
) -> np.ndarray:
    """Items taken from every group, so that the measured time is within the limit and most of it is used.

    Args:
        problem: groups, items and a budget that limits the latency.
        choose: the strategy.
        clock: measures, and says what it expects.
        plan_of: the plan of an answer.
        tell: tells the user what was substituted.

    Raises:
        InfeasibleBudget: the clock shows more than the limit however little stays.
    """
    limit = problem.meter.allowed[LATENCY]
    uniform, aim, least = _settled(problem, fill(problem, uniform_items(problem)), limit, clock, plan_of)
    if uniform is None:
        raise _unreachable(limit, least)
    aimed = _aiming(problem, aim)
    answer = checked(aimed, choose(aimed))
    if (answer == uniform_items(aimed)).all():
        return uniform
    found, _, _ = _settled(aimed, fill(aimed, answer), limit, clock, plan_of)
    if found is None:
        tell(
            f"latency_ms={limit!r}: the clock showed more however narrow the strategy's answer was, and less for "
            "uniform widths before: it is not steady, and the answer is uniform widths; measure on a quieter machine, "
            "or allow more",
        )
        return uniform
    return found


def check_reachable(graph: ChannelGraph, least: np.ndarray, limit: float, clock: Clock, *, approximate: bool) -> None:
    """Raise if a network of the least widths takes longer than that; of one that cannot be cut nothing is known."""
    gone = {g.name: range(k, len(g)) for g, k in zip(graph.groups, least.tolist(), strict=True) if k < len(g)}
    try:
        took = clock.measured(make_plan(graph, gone, approximate=approximate))
    except CannotCut:
        return
    if took > limit:
        raise _unreachable(limit, took)


def _unreachable(limit: float, least: float) -> InfeasibleBudget:
    return InfeasibleBudget(
        f"the budget cannot be met: latency_ms={limit!r} is asked for, and the least that was measured is "
        f"{least:.4g}: raise it, or lower at_least= or round_to="
    )


def checked(problem: Problem, taken: np.ndarray) -> np.ndarray:
    """A strategy's answer, or an error if it does not meet the budget."""
    if not problem.meter.met(problem.widths(taken)):
        raise SecateurError("allocate(strategy): the strategy's answer does not meet the budget")
    return taken


def _aiming(problem: Problem, aim: float) -> Problem:
    return replace(problem, meter=problem.meter.at(aim))


def _settled(
    problem: Problem, taken: np.ndarray, limit: float, clock: Clock, plan_of: Callable[[np.ndarray], Plan]
) -> tuple[np.ndarray | None, float, float]:
    """Measure an answer, and others near it that are narrower or wider, until one uses enough of the limit.

    Returns:
        The widest answer that was measured within the limit, or None; the aim there; the least time that was measured.
    """
    expected = problem.meter.latency
    assert expected is not None
    found, aim_there, found_took, least = None, 0.0, np.inf, np.inf
    for attempt in range(MOST_MEASUREMENTS + 1):
        if attempt == MOST_MEASUREMENTS:  # nothing so far: what is narrowest decides
            taken = problem.count
        took = clock.measured(plan_of(taken))
        least = min(least, took)
        aim = limit * expected.ms(problem.widths(taken)).item() / took
        if took <= limit and (found is None or taken.sum() < found.sum()):
            found, aim_there, found_took = taken, aim, took
        if found is not None and (USED_ENOUGH * limit <= took <= limit or attempt >= MOST_MEASUREMENTS // 2):
            break
        aimed = _aiming(problem, AIM_MARGIN * aim)
        if took <= limit:
            changed = fill(aimed, taken)
        elif aimed.meter.met(aimed.widths(problem.count)):
            changed = fill(aimed, narrowed(aimed, taken))
        else:
            changed = problem.count
        if (changed == taken).all():
            if found is not None or (taken == problem.count).all():
                break
            changed = problem.count
        taken = changed
    if found is not None:
        found = _given_back(problem, found, found_took, limit, clock, plan_of)
    # where what is narrowest takes more than the aim, a strategy would have no answer
    return found, max(aim_there, expected.ms(problem.widths(problem.count)).item()), least


def _given_back(
    problem: Problem, found: np.ndarray, took: float, limit: float, clock: Clock,
    plan_of: Callable[[np.ndarray], Plan],
) -> np.ndarray:  # fmt: skip
    """What the clock leaves room for where the model saw none: single items, the highest score first."""
    expected = problem.meter.latency
    assert expected is not None
    offset = np.cumsum(problem.count) - problem.count
    refused = np.zeros(len(found), dtype=bool)
    for _ in range(MOST_GIVEN_BACK):
        groups = np.flatnonzero((found > 0) & ~refused)
        if took >= USED_ENOUGH * limit or not len(groups):
            break
        wider = np.repeat(found[None], len(groups), 0)
        wider[np.arange(len(groups)), groups] -= 1
        widths = np.stack([problem.widths(own) for own in wider])
        more = expected.ms(widths) - expected.ms(problem.widths(found))
        fits = _others_met(problem, widths) & (took + more <= FAR * limit)
        if not fits.any():
            break
        scores = np.where(fits, problem.score[offset[groups] + found[groups] - 1], -np.inf)
        chosen = int(scores.argmax())
        try:
            now = clock.measured(plan_of(wider[chosen]))
        except CannotCut:
            now = np.inf
        if now <= limit:
            found, took = wider[chosen], now
        else:
            refused[groups[chosen]] = True
    return found


def _others_met(problem: Problem, widths: np.ndarray) -> np.ndarray:
    """Whether what else is limited allows widths [..., groups]."""
    return problem.meter.at(np.inf).which_met(widths)
