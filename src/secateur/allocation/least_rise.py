r"""The widths at which the loss is predicted to rise least, within a budget.

A table says by how much the loss rises if the first ``t`` items of a group go; rises of groups add up::

    min over t of  sum_g table[g, t_g]        so that what is left costs no more than the budget allows

With a price ``p`` on what the budget counts, and with what a channel of group ``g`` frees held fixed at ``f_g``, groups
can be answered one by one (a Lagrangian)::

    t_g(p) = argmin over t of  table[g, t] - p f_g channels(g, t)

For all prices these are corners of the lower convex hull of ``table[g]``. So they are prefixes of one order: sections
of all hulls, by their slope per unit that they free. The shortest prefix that meets the budget, counted exactly, is the
answer. MACs are products of widths, so ``f`` is taken at the answer and all is done again; the best answer counts.
At last channels are exchanged between two groups, over stretches where a table is not convex as well, as long as that
lets the rise fall. With two limits the price is split between them in several ways.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.optimize import isotonic_regression

from secateur.allocation.problem import Problem, fill, narrowed, nested

ROUNDS = 8
"""How often what channels free is taken anew, at most."""
SPLITS = 9
"""Ways to split the price between two limits."""
FEW = 16
"""With so few groups there is time for more beginnings, and to exchange from every answer: a product of widths has many
places where nothing near is better."""
MOST_EXCHANGES = 500
TRIED_EXCHANGES = 32
"""So many of the best-looking exchanges are counted exactly at a time."""
MOST_PARTNERS = 64
"""So many of what is cheapest to take and dearest to have lost are looked at in pairs, so that more groups do not take
longer."""


def least_rise(problem: Problem) -> np.ndarray:
    """Items to take from every group, int64 [groups]."""
    slopes = hull_slopes(problem)
    best = fill(problem, narrowed(problem, np.zeros_like(problem.count)))
    few = np.count_nonzero(problem.count) <= FEW
    best = exchanged(problem, best) if few else best
    seen = set[tuple[int, ...]]()
    for widths in _starts(problem, problem.widths(best)):
        for share in _shares(list(problem.meter.allowed)):
            at = widths
            for _ in range(ROUNDS):
                answers = [a for a in _priced(problem, slopes, at, share) if tuple(a.tolist()) not in seen]
                for answer in answers:
                    seen.add(tuple(answer.tolist()))
                    filled = fill(problem, answer)
                    best = min(best, exchanged(problem, filled) if few else filled, key=problem.rise)
                if not answers:
                    break
                at = problem.widths(answers[0])
    return exchanged(problem, best)


def _starts(problem: Problem, widths: np.ndarray) -> Iterator[np.ndarray]:
    """Widths at which what channels free is taken first: some given ones, all, and of few groups one that is least."""
    yield widths
    yield problem.start
    groups = np.flatnonzero(problem.count)
    if len(groups) <= FEW:
        for group in groups:
            for of in (problem.least, problem.start):
                other = widths.copy()
                other[group] = of[group]
                yield other


def hull_slopes(problem: Problem) -> np.ndarray:
    """For every item, the slope per channel of its group's lower convex hull, float64 [items].

    The slopes of the greatest convex function below a table are the isotonic regression of the table's own slopes.
    """
    slopes = problem.score / problem.size
    ends = np.cumsum(problem.count)
    for begin, end in zip(ends - problem.count, ends, strict=True):
        if end > begin:
            own = slice(begin, end)
            slopes[own] = isotonic_regression(slopes[own], weights=problem.size[own].astype(np.float64)).x
    return slopes


def _shares(units: list[str]) -> Iterator[dict[str, float]]:
    """Mixes of the limited units: one if there is one, and one for each of several and between any two."""
    if len(units) == 1:
        yield {units[0]: 1.0}
    for i, one in enumerate(units):
        for other in units[i + 1 :]:
            for part in np.linspace(0, 1, SPLITS):
                yield {one: float(part), other: float(1 - part)}


def _priced(problem: Problem, slopes: np.ndarray, widths: np.ndarray, share: dict[str, float]) -> list[np.ndarray]:
    """The shortest prefix of the hulls' sections that meets the budget, cut within a section and at its end."""
    freed = np.zeros(len(widths))
    for unit, part in share.items():
        freed += part * problem.meter.freed(widths, [unit])
    of_items = freed[problem.group]
    with np.errstate(divide="ignore", invalid="ignore"):
        price = np.where(of_items > 0, slopes / of_items, np.where(slopes > 0, np.inf, 0.0))
    order = nested(problem, np.arange(len(price)), price)
    number = problem.least_prefix(order, np.zeros_like(problem.count))
    taken = problem.first(order, number)
    if not problem.meter.met(problem.widths(taken)):
        return []
    last = order[number - 1] if number else 0
    rest = order[number:]
    section = rest[(problem.group[rest] == problem.group[last]) & (price[rest] == price[last])]
    return [taken, taken + problem.first(section, len(section))]


def exchanged(problem: Problem, taken: np.ndarray) -> np.ndarray:
    """Take from one group and give back to another while the rise falls, within the budget."""
    taken = taken.copy()
    for _ in range(MOST_EXCHANGES):
        better = _exchange(problem, taken)
        if better is None:
            break
        taken = better
    return taken


def _cheapest(
    from_: np.ndarray, more: np.ndarray, extra: np.ndarray, channels: np.ndarray, freed: np.ndarray
) -> tuple[np.ndarray, ...]:
    """What may be taken: nothing at all, and what adds least for what it frees."""
    price = np.where(more > 0, extra / np.maximum(channels * freed[from_], 1e-300), -np.inf)
    order = np.argsort(price, kind="stable")
    nothing = int((more == 0).sum())
    at = np.sort(np.r_[order[:2], order[nothing : nothing + MOST_PARTNERS]])  # nothing, of two groups, for any third
    return from_[at], more[at], extra[at], channels[at]


def _dearest(problem: Problem, taken: np.ndarray, groups: np.ndarray, freed: np.ndarray) -> np.ndarray:
    """The groups whose last item adds most for what it frees."""
    some = groups[taken[groups] > 0]
    last = problem.rises[some, taken[some]] - problem.rises[some, taken[some] - 1]
    size = problem.gone[some, taken[some]] - problem.gone[some, taken[some] - 1]
    price = last / np.maximum(size * freed[some], 1e-300)
    return np.sort(some[np.argsort(-price, kind="stable")[:MOST_PARTNERS]])


def _exchange(problem: Problem, taken: np.ndarray) -> np.ndarray | None:
    """The best exchange that lets the rise fall, or None; what is given back is estimated, then counted."""
    table, gone, count = problem.rises, problem.gone, problem.count
    groups = np.flatnonzero(count)
    if not len(groups):
        return None
    own = np.arange(len(table))
    widths = problem.widths(taken)
    steps = np.unique(np.r_[0, 2 ** np.arange(int(count.max()).bit_length()), count.max()])
    from_, more = np.repeat(groups, len(steps)), np.tile(steps, len(groups))
    more = np.minimum(more, count[from_] - taken[from_])
    keep = (more > 0) | (np.tile(steps, len(groups)) == 0)
    from_, more = from_[keep], more[keep]
    extra = table[from_, taken[from_] + more] - table[from_, taken[from_]]
    channels = gone[from_, taken[from_] + more] - gone[from_, taken[from_]]
    excess = problem.meter.excess(widths)
    total = problem.meter.freed(widths, list(excess))
    from_, more, extra, channels = _cheapest(from_, more, extra, channels, total)
    groups = _dearest(problem, taken, groups, total)
    given = np.full((len(from_), len(groups)), np.iinfo(np.int64).max)  # channels that may be given back, by each unit
    for unit, over in excess.items():
        freed = problem.meter.freed(widths, [unit])
        room = channels * freed[from_] - over / problem.meter.full[unit]
        with np.errstate(divide="ignore"):
            most = np.where(freed[groups] > 0, room[:, None] / freed[groups], np.inf)
        given = np.minimum(given, np.floor(np.minimum(most, 1e12) + 1e-9).astype(np.int64))
    back = np.zeros_like(given)
    for column, group in enumerate(groups):  # the most items whose channels are no more than that
        sizes = gone[group, taken[group]] - gone[group, taken[group] :: -1] if taken[group] else np.zeros(1)
        back[:, column] = np.searchsorted(sizes, given[:, column], "right") - 1
    back = np.maximum(back, 0)
    less = table[groups, taken[groups]] - table[groups, taken[groups] - back]
    change = extra[:, None] - less
    change[from_[:, None] == groups] = np.inf
    order = np.argsort(change, axis=None, kind="stable")[:TRIED_EXCHANGES]
    order = order[change.flat[order] < -1e-12 * max(abs(problem.rise(taken)), 1e-300)]
    if not len(order):
        return None
    rows, columns = np.unravel_index(order, change.shape)
    tried = np.repeat(taken[None], len(order), 0)
    tried[np.arange(len(order)), from_[rows]] += more[rows]
    tried[np.arange(len(order)), groups[columns]] -= back[rows, columns]
    left = problem.start - gone[own, tried]
    met = np.flatnonzero(problem.meter.which_met(left))
    return tried[met[0]] if len(met) else None
