"""Which channels go: scores and a strategy make a plan that meets a budget."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from secateur._internal.errors import SecateurError, unknown
from secateur.allocation.budget import LATENCY, Budget, Meter
from secateur.allocation.latency.clock import Clock, by_the_clock, check_clock, checked
from secateur.allocation.strategies import BANDIT, STRATEGIES, Problem, Strategy, fill
from secateur.plan import CannotCut, Plan, make_plan
from secateur.tracing.graph import ChannelGraph
from secateur.tracing.probe import Chosen, unbearable


def allocate(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    budget: Budget,
    *,
    strategy: str | Strategy = "global",
    approximate: bool = False,
    timing: Clock | None = None,
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
        approximate: also cut groups whose removal changes more than the removed channels.
        timing: for a budget in ``latency_ms``, how long networks take (a :class:`secateur.Timing`).

    Returns:
        A plan within the budget; giving back any one channel (block of ``round_to``) would break it. With
        ``latency_ms`` the answer was cut and measured: that was within the budget, and most of it is used.

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
    if not isinstance(strategy, str) and not callable(strategy):
        raise SecateurError(f"strategy={strategy!r}: {', '.join(STRATEGIES)} or a callable is expected")
    if not isinstance(budget, Budget):
        raise SecateurError(f"allocate(budget): a Budget is expected, for instance Budget(macs=0.5), not {budget!r}")
    if timing is not None and budget.latency_ms is None:
        raise SecateurError("allocate(timing=...): the budget does not limit latency_ms; leave the timing out")
    check_clock(timing, graph)
    choose = STRATEGIES[strategy] if isinstance(strategy, str) else strategy
    return _allocate(graph, scores, budget, choose, approximate, timing, {})


def _allocate(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    budget: Budget,
    choose: Strategy,
    approximate: bool,
    timing: Clock | None,
    without: Mapping[str, str],
) -> Plan:
    """Allocate without some groups, whose reasons go into the plan."""
    skipped = dict(without)
    skipped |= {g.name: f"not exact: {g.reason}" for g in graph.groups if not g.exact and not approximate}
    skipped |= {g.name: "has no scores" for g in graph.groups if g.name not in scores and g.name not in skipped}
    ranked = {name: _ranked(graph, name, values) for name, values in scores.items() if name not in skipped}
    meter = Meter(graph, budget, timing)
    floors = budget.floors(graph)
    problem, orders = _problem(graph, meter, ranked, floors, budget.round_to)
    meter.check_feasible(problem.widths(problem.count), approximate=approximate)
    plain: dict[str, list[int]] = {}

    def plan_of(taken: np.ndarray) -> Plan:
        nonlocal plain
        gone = problem.start - problem.widths(taken)
        plain = {group.name: orders[i][: gone[i]].tolist() for i, group in enumerate(graph.groups) if gone[i] > 0}
        return make_plan(graph, plain, skipped=skipped, approximate=approximate)

    try:
        if timing is not None and LATENCY in meter.allowed:
            return plan_of(by_the_clock(problem, choose, timing, plan_of))
        return plan_of(fill(problem, checked(problem, choose(problem))))
    except CannotCut:  # what tracing did not meet: do without the groups that it takes
        guilty = unbearable([graph.group(name) for name in plain], lambda some: graph.verify(Chosen(plain).of(some)))
        if not guilty:
            raise
        reasons = {**without, **{g.name: f"this combination cannot be cut: {reason}" for g, reason in guilty}}
        return _allocate(graph, scores, budget, choose, approximate, timing, reasons)


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
