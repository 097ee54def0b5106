r"""Widths by sensitivity: each group is narrowed alone, and the budget is taken greedily from where it hurts least.

The rises of single groups are thought to add up, as if nothing else were gone::

    rise_gt   what the loss rises by when group g alone loses its first t items
    next      argmin over g of (rise of g's next width - rise of its present one) / what of the budget that frees
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.allocation.problem import Problem

STEPS = 8
"""Widths of each group that are tried, at most: every eighth of what may go."""


def tried_alone(problem: Problem, most: int) -> list[list[tuple[int, int]]]:
    """What to try, a list of (group, items taken) for each group; none if ``most`` does not allow two each."""
    groups = np.flatnonzero(problem.count)
    steps = min(STEPS, most // max(len(groups), 1))
    if steps < 2:
        return []
    shares = np.linspace(0, 1, steps + 1)[1:]
    return [
        [(int(group), taken) for taken in sorted({int(share * problem.count[group]) for share in shares} - {0})]
        for group in groups
    ]


def alone(problem: Problem, group: int, taken: int) -> np.ndarray:
    """Items taken from every group: from one, and none from the others."""
    items = np.zeros(len(problem.count), dtype=np.int64)
    items[group] = taken
    return items


def greedy(
    problem: Problem, tried: Sequence[Sequence[tuple[int, int]]], rises: Sequence[Sequence[float]]
) -> np.ndarray:
    """Items taken from every group, until the budget is met.

    Args:
        problem: groups, items and the budget.
        tried: of :func:`tried_alone`.
        rises: of the loss, one for each.
    """
    group, taken = np.array([one for own in tried for one in own]).T
    rise, meter = np.concatenate(rises).astype(np.float64), problem.meter
    at = zip(group, taken, strict=True)
    channels = np.array([problem.start[g] - problem.widths(alone(problem, g, t))[g] for g, t in at])
    ends = np.cumsum([len(own) for own in tried])
    following = ends - [len(own) for own in tried]  # the next width of each group
    found, gone, risen = np.zeros(len(problem.count), dtype=np.int64), np.zeros(len(ends)), np.zeros(len(ends))
    while not meter.met(widths := problem.widths(found)):
        freed = meter.freed(widths, [unit for unit, over in meter.excess(widths).items() if over > 0])
        left = np.flatnonzero(following < ends)
        option = following[left]
        frees = np.maximum((channels[option] - gone[left]) * freed[group[option]], 1e-12)
        best = int(((rise[option] - risen[left]) / frees).argmin())
        own, chosen = left[best], option[best]
        found[group[chosen]], gone[own], risen[own] = taken[chosen], channels[chosen], rise[chosen]
        following[own] += 1
    return found
