"""What a strategy sees: groups, their channels in the order of removal, what these cost, and a budget.

Within a group the lowest scores go first, and all channels of a group free the same; so a strategy only chooses how
many each group keeps. Channels go in *items*: single channels, or blocks that keep widths multiples of ``round_to``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from secateur._internal.errors import InfeasibleBudget, SecateurError
from secateur.allocation.budget import Meter


@dataclass(frozen=True, eq=False)
class Problem:
    """Groups, items and a budget.

    Attributes:
        meter: counts widths against the budget.
        start: widths of all groups before anything is removed.
        group: group index of every item.
        rank: position of every item in its group's order of removal.
        size: channels in every item.
        score: summed score of every item.
        orders: by index of a group, the positions of its channels in the order of their removal.
        predicted: whether scores are rises of the loss that are known for every width of some group, not single scores
            that are added up.
    """

    meter: Meter
    start: np.ndarray
    group: np.ndarray
    rank: np.ndarray
    size: np.ndarray
    score: np.ndarray
    orders: Mapping[int, np.ndarray] = field(default_factory=dict)
    predicted: bool = False

    @cached_property
    def count(self) -> np.ndarray:
        """How many items every group has, int64 [groups]."""
        return np.bincount(self.group, minlength=len(self.start))

    @cached_property
    def gone(self) -> np.ndarray:
        """Channels that the first items of every group take, int64 [groups, items + 1]."""
        table = np.zeros((len(self.start), int(self.count.max(initial=0)) + 1), dtype=np.int64)
        table[self.group, self.rank + 1] = self.size
        return table.cumsum(axis=1)

    @cached_property
    def rises(self) -> np.ndarray:
        """What the loss rises by, by their scores, if the first items of every group go, [groups, items + 1]."""
        table = np.zeros(self.gone.shape)
        table[self.group, self.rank + 1] = self.score
        return table.cumsum(axis=1)

    def rise(self, taken: np.ndarray) -> float:
        """The sum of the rises of all groups."""
        return float(self.rises[np.arange(len(self.start)), taken].sum())

    def widths(self, taken: np.ndarray) -> np.ndarray:
        """Widths of all groups when the first ``taken`` items of each are gone."""
        return self.start - self.gone[np.arange(len(self.start)), taken]

    @property
    def least(self) -> np.ndarray:
        """The least widths of all groups."""
        return self.widths(self.count)

    def taken(self, widths: object) -> np.ndarray:
        """The fewest items of each group whose removal leaves no more than these widths.

        Raises:
            SecateurError: no widths, or widths that no removal reaches.
        """
        try:
            wanted = np.asarray(widths)
            whole = wanted.astype(np.int64)
        except (TypeError, ValueError) as error:
            raise SecateurError(f"strategy: it gave no widths: {error}") from error
        if wanted.shape != self.start.shape or (wanted != whole).any() or (whole > self.start).any():
            raise SecateurError("strategy: it must give a whole number from 1 to its width for every group")
        if (whole < self.least).any():
            group = self.meter.graph.groups[int(np.argmax(whole < self.least))]
            raise SecateurError(
                f"strategy: it gave {group.name!r} fewer channels than must stay (at_least=, round_to=, or the forward)"
            )
        return (self.start[:, None] - self.gone <= whole[:, None]).argmax(axis=1)

    def first(self, order: np.ndarray, number: int) -> np.ndarray:
        """How many items each group loses when the first ``number`` of an order go (the order is nested)."""
        return np.bincount(self.group[order[:number]], minlength=len(self.start))

    def least_prefix(self, order: np.ndarray, taken: np.ndarray) -> int:
        """The least number of items of an order, after those taken, that meets the budget."""
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self.meter.met(self.widths(taken + self.first(order, middle))):
                high = middle
            else:
                low = middle + 1
        return low


def narrowed(problem: Problem, taken: np.ndarray) -> np.ndarray:
    """Take more, after these, until the budget is met: least score first per unit of it that the channel frees."""
    meter = problem.meter
    while not meter.met(problem.widths(taken)):
        widths = problem.widths(taken)
        excess = meter.excess(widths)
        over = [unit for unit, n in excess.items() if n > 0]
        freed = meter.freed(widths, over)
        left = (problem.rank >= taken[problem.group]) & (freed[problem.group] > 0)
        items = np.flatnonzero(left)
        if not len(items):
            raise InfeasibleBudget("the budget cannot be met: nothing that is left frees any of it")
        price = problem.score[items] / (problem.size[items] * freed[problem.group[items]])
        order = items[nested(problem, items, price)]
        # as many as free a fifth of what is missing, so that what channels free is never much out of date
        gain = np.cumsum(problem.size[order] * freed[problem.group[order]])
        missing = sum(excess[unit] / meter.full[unit] for unit in over)
        chunk = max(1, int(np.searchsorted(gain, missing / 5)))
        needed = problem.least_prefix(order[:chunk], taken)
        taken = taken + problem.first(order[:chunk], max(1, needed))
    return taken


def nested(problem: Problem, items: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Indices into ``items`` by ascending key, no item before an earlier one of its group, ties by group and rank."""
    by_rank = np.lexsort((problem.rank[items], problem.group[items]))
    group, sorted_key = problem.group[items][by_rank], key[by_rank]
    begins = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    for begin, end in zip(begins, np.r_[begins[1:], len(group)], strict=True):
        sorted_key[begin:end] = np.maximum.accumulate(sorted_key[begin:end])
    raised = np.empty_like(key, dtype=np.float64)
    raised[by_rank] = sorted_key
    return np.lexsort((problem.rank[items], problem.group[items], raised))


def fill(problem: Problem, taken: np.ndarray) -> np.ndarray:
    """Give back what the budget leaves room for, highest score first, until no single item fits any more."""
    taken, meter = taken.copy(), problem.meter
    offset = np.cumsum(problem.count) - problem.count  # items are stored group by group
    while True:
        widths = problem.widths(taken)
        room = {unit: -over / meter.full[unit] for unit, over in meter.excess(widths).items()}
        groups = np.flatnonzero(taken > 0)
        items = offset[groups] + taken[groups] - 1
        for unit, space in room.items():  # what an item costs is at least what its channels cost at these widths
            cost = problem.size[items] * meter.freed(widths, [unit])[groups]
            groups, items = groups[cost <= space * (1 + 1e-9)], items[cost <= space * (1 + 1e-9)]
        for item in items[np.argsort(-problem.score[items], kind="stable")]:
            taken[problem.group[item]] -= 1
            if meter.met(problem.widths(taken)):
                break
            taken[problem.group[item]] += 1
        else:
            return taken
