"""From scores to widths: which channels go so that a budget is met.

Within a group the lowest scores go first, and all channels of a group free the same; so a strategy only chooses how
many each group keeps. Channels go in *items*: single channels, or blocks that keep widths multiples of ``round_to``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from secateur.allocate.budget import Budget, Meter
from secateur.errors import SecateurError, unknown
from secateur.plan import Plan, UnbearableError, make_plan
from secateur.trace import ChannelGraph
from secateur.trace.probe import Chosen, unbearable

Strategy = Callable[["Problem"], np.ndarray]
"""Gives the number of items taken from every group (int64)."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What a strategy sees.

    Attributes:
        meter: counts widths against the budget.
        start: widths of all groups before anything is removed.
        group: group index of every item.
        rank: position of every item in its group's order of removal.
        size: channels in every item.
        score: summed score of every item.
        orders: by index of a group, the positions of its channels in the order of their removal.
    """

    meter: Meter
    start: np.ndarray
    group: np.ndarray
    rank: np.ndarray
    size: np.ndarray
    score: np.ndarray
    orders: Mapping[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        count = np.bincount(self.group, minlength=len(self.start))
        object.__setattr__(self, "count", count)
        table = np.zeros((len(self.start), int(count.max(initial=0)) + 1), dtype=np.int64)
        table[self.group, self.rank + 1] = self.size
        object.__setattr__(self, "_channels", table.cumsum(axis=1))

    count: np.ndarray = None  # type: ignore[assignment]  # items of every group
    _channels: np.ndarray = None  # type: ignore[assignment]

    def widths(self, taken: np.ndarray) -> np.ndarray:
        """Widths of all groups when the first ``taken`` items of each are gone."""
        return self.start - self._channels[np.arange(len(self.start)), taken]

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


def global_order(problem: Problem) -> np.ndarray:
    """Least score per unit of the budget that the channel frees, what it frees kept current as widths shrink."""
    meter, taken = problem.meter, np.zeros(len(problem.start), dtype=np.int64)
    while not meter.met(problem.widths(taken)):
        widths = problem.widths(taken)
        excess = meter.excess(widths)
        over = [unit for unit, n in excess.items() if n > 0]
        freed = meter.freed(widths, over)
        left = (problem.rank >= taken[problem.group]) & (freed[problem.group] > 0)
        items = np.flatnonzero(left)
        if not len(items):
            raise SecateurError("the budget cannot be met: nothing that is left frees any of it")
        price = problem.score[items] / (problem.size[items] * freed[problem.group[items]])
        order = items[_nested(problem, items, price)]
        # as many as free a fifth of what is missing, so that what channels free is never much out of date
        gain = np.cumsum(problem.size[order] * freed[problem.group[order]])
        missing = sum(excess[unit] / meter.full[unit] for unit in over)
        chunk = max(1, int(np.searchsorted(gain, missing / 5)))
        needed = problem.least_prefix(order[:chunk], taken)
        taken = taken + problem.first(order[:chunk], max(1, needed))
    return taken


def threshold_order(problem: Problem) -> np.ndarray:
    """Raw global order: the lowest mean score goes first, whatever it frees."""
    order = _nested(problem, np.arange(len(problem.group)), problem.score / problem.size)
    nothing = np.zeros(len(problem.start), dtype=np.int64)
    return problem.first(order, problem.least_prefix(order, nothing))


def uniform_order(problem: Problem) -> np.ndarray:
    """The same fraction of every group."""
    order = _nested(problem, np.arange(len(problem.group)), (problem.rank + 1) / problem.count[problem.group])
    nothing = np.zeros(len(problem.start), dtype=np.int64)
    return problem.first(order, problem.least_prefix(order, nothing))


def _nested(problem: Problem, items: np.ndarray, key: np.ndarray) -> np.ndarray:
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


BANDIT = "bandit"
"""The strategy that looks at the model (:class:`secateur.allocate.search.Search`)."""
STRATEGIES: dict[str, Strategy] = {"global": global_order, "threshold": threshold_order, "uniform": uniform_order}


def allocate(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    budget: Budget,
    *,
    strategy: str | Strategy = "global",
    inexact: bool = False,
) -> Plan:
    """Choose the channels to remove so that a budget is met and used.

    Args:
        graph: the traced graph.
        scores: group name to one score a channel; groups without scores are left alone.
        budget: what may remain.
        strategy: ``"global"`` (least score per unit of the budget that the channel frees), ``"threshold"`` (lowest
            score),
            ``"uniform"`` (the same fraction everywhere), or a callable from :class:`Problem` to items taken per group,
            such as a :class:`secateur.Search`.
        inexact: also cut groups whose removal changes more than the removed channels.

    Returns:
        A plan within the budget; giving back any one channel (block of ``round_to``) would break it.

    Raises:
        SecateurError: unknown strategy or group, scores of the wrong length or NaN, a budget that cannot be met.
    """
    if strategy == BANDIT:
        raise SecateurError(
            "allocate(strategy='bandit') tries widths on the model: give strategy=secateur.Search(model, data, "
            "loss_fn), or call secateur.prune(..., strategy='bandit')"
        )
    if isinstance(strategy, str) and strategy not in STRATEGIES:
        raise unknown("strategy", strategy, STRATEGIES)
    if not isinstance(budget, Budget):
        raise SecateurError(f"allocate(budget): a Budget is expected, for instance Budget(macs=0.5), not {budget!r}")
    return _allocate(
        graph, scores, budget, STRATEGIES[strategy] if isinstance(strategy, str) else strategy, inexact, {}
    )


def _allocate(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    budget: Budget,
    choose: Strategy,
    inexact: bool,
    without: Mapping[str, str],
) -> Plan:
    """Allocate without some groups, whose reasons go into the plan."""
    skipped = dict(without)
    skipped |= {g.name: f"not exact: {g.reason}" for g in graph.groups if not g.exact and not inexact}
    skipped |= {g.name: "has no scores" for g in graph.groups if g.name not in scores and g.name not in skipped}
    ranked = {name: _ranked(graph, name, values) for name, values in scores.items() if name not in skipped}
    meter = Meter(graph, budget)
    floors = budget.floors(graph)
    problem, orders = _problem(graph, meter, ranked, floors, budget.round_to)
    meter.check_feasible(problem.widths(problem.count), inexact=inexact)
    taken = np.asarray(choose(problem), dtype=np.int64)
    if taken.shape != problem.start.shape or (taken < 0).any() or (taken > problem.count).any():
        raise SecateurError("allocate(strategy): the callable must give 0 to problem.count items for every group")
    if not meter.met(problem.widths(taken)):
        raise SecateurError("allocate(strategy): the callable's answer does not meet the budget")
    taken = fill(problem, taken)
    gone = problem.start - problem.widths(taken)
    removed = {group.name: orders[i][: gone[i]] for i, group in enumerate(graph.groups) if gone[i] > 0}
    plain = {name: positions.tolist() for name, positions in removed.items()}
    try:
        return make_plan(graph, plain, skipped=skipped, inexact=inexact)
    except UnbearableError:  # what tracing did not meet: do without the groups that it takes
        guilty = unbearable([graph.group(name) for name in plain], lambda some: graph.verify(Chosen(plain).of(some)))
        if not guilty:
            raise
        reasons = {**without, **{g.name: f"this combination cannot be cut: {reason}" for g, reason in guilty}}
        return _allocate(graph, scores, budget, choose, inexact, reasons)


def _ranked(graph: ChannelGraph, name: str, values: Tensor) -> np.ndarray:
    group = graph.group(name)
    array = torch.as_tensor(values).detach().double().cpu().numpy()
    if array.shape != (len(group),):
        raise SecateurError(
            f"scores[{name!r}]: one score for each of {len(group)} channels is expected, not shape {array.shape}"
        )
    if np.isnan(array).any():
        raise SecateurError(f"scores[{name!r}] holds NaN: check the criterion and the data")
    return array


def _problem(
    graph: ChannelGraph, meter: Meter, scores: Mapping[str, np.ndarray], floors: np.ndarray, step: int
) -> tuple[Problem, dict[int, np.ndarray]]:
    """Items of all groups; a group's first item brings its width to a multiple of ``step``, the others keep it one."""
    orders: dict[int, np.ndarray] = {}
    columns: list[tuple[np.ndarray, ...]] = []
    for i, group in enumerate(graph.groups):
        if group.name not in scores:
            continue
        values = scores[group.name]
        orders[i] = np.argsort(values, kind="stable")
        widths = np.arange(len(group) - 1, floors[i] - 1, -1)
        stops = widths[widths % step == 0]
        ends = len(group) - stops
        begins = np.r_[0, ends[:-1]].astype(np.int64)[: len(ends)]
        total = np.add.reduceat(values[orders[i]], begins) if len(ends) else np.zeros(0)
        if len(ends):  # reduceat sums the last block to the end of the group
            total[-1] = values[orders[i]][begins[-1] : ends[-1]].sum()
        columns.append((np.full(len(ends), i), np.arange(len(ends)), ends - begins, total))
    stacked = [np.concatenate(c) for c in zip(*columns, strict=True)] if columns else [np.zeros(0, dtype=np.int64)] * 4
    return Problem(meter, graph.widths, stacked[0], stacked[1], stacked[2], stacked[3], orders), orders
