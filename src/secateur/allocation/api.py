"""``allocate``: which channels go. Scores and a strategy make a plan that meets a budget."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.distributed import Group
from secateur._internal.errors import CannotCut, SecateurError, unknown
from secateur._internal.workload import Needs, Workload
from secateur.allocation.alike import Tied, TiedTime, classes, common_stops, left_alone
from secateur.allocation.budget import LATENCY, USED_ENOUGH, Budget, Meter
from secateur.allocation.contract import STRATEGIES, Strategy
from secateur.allocation.latency.clock import Clock, by_the_clock, check_clock, check_same_backend, checked
from secateur.allocation.problem import Problem, fill
from secateur.plan import Plan, make_plan
from secateur.tracing.graph import ChannelGraph, fingerprint
from secateur.tracing.probe import Chosen, unbearable
from secateur.tracing.proof import fault_of


def allocate(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    budget: Budget,
    *,
    strategy: str | Strategy = "uniform",
    exclude: Sequence[str] = (),
    approximate: bool = False,
    latency: Clock | None = None,
    model: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    loss: Any = None,
    group: Group = None,
    progress: bool = False,
    work: Workload | None = None,
) -> Plan:
    """Choose the channels to remove so that a budget is met and used.

    Args:
        graph: the traced graph.
        scores: group name to one score a channel; groups without scores are left alone.
        budget: what may remain.
        strategy: a name (``secateur list strategies`` shows them) for its defaults, or settings such as
            ``Bandit(evaluations=1000)``: ``"uniform"`` (the same fraction everywhere), ``"global"`` (least score per
            unit of the budget that the channel frees), ``"threshold"`` (lowest score), ``"sensitivity"`` (each group
            is narrowed alone on data), ``"bandit"`` (combinations of widths are tried on data).
        exclude: groups that stay whole, by name or pattern.
        approximate: also cut groups whose removal changes more than the removed channels.
        latency: for a budget in ``latency_ms``, how long networks take (what
            :func:`secateur.measure_latency` gives).
        model: the traced model, for strategies that try widths.
        data: batches, likewise; every process gives its shard.
        loss: the loss, likewise.
        group: the processes that work along; rank 0 decides.
        progress: show how far it is.
        work: a table that is laid, instead of the model, data, loss, group and progress. What the strategy learned is
            in ``work.facts`` afterwards, and what it measured of the whole network serves the next budget.

    Returns:
        A plan within the budget; giving back any one channel (block of ``round_to``) would break it. With
        ``latency_ms`` the answer was cut and measured: that was within the budget, and most of it is used.

    Raises:
        SecateurError: unknown strategy or group, scores of the wrong length or NaN.
        InfeasibleBudget: a budget that cannot be met.
    """
    made = STRATEGIES.make(strategy)
    if not isinstance(budget, Budget):
        raise SecateurError(f"allocate(budget): a Budget is expected, for instance Budget(macs=0.5), not {budget!r}")
    if latency is not None and budget.latency_ms is None:
        raise SecateurError("allocate(latency=...): the budget does not limit latency_ms; leave it out")
    check_clock(latency, graph)
    if latency is not None:
        check_same_backend(budget, latency)
    work = _laid(work, graph, model, data, loss, group, progress=progress)
    needs: Needs = getattr(made, "needs", Needs())
    if (needs.data or needs.loss) and work.model is _NO_MODEL:
        raise SecateurError(
            f"allocate(strategy={getattr(made, 'name', made)!r}) tries widths on the model: give model=, "
            "data= and loss=, or call secateur.prune"
        )
    if work.model is not _NO_MODEL and fingerprint(work.model) != graph.fingerprint:
        raise SecateurError("allocate(model=...): the graph is of another model; give the one that was traced")
    work.require(needs, f"strategy {getattr(made, 'name', made)!r}")
    without = dict.fromkeys(matching_groups(graph, exclude), "excluded")
    return allocated(graph, scores, budget, made, work, approximate=approximate, latency=latency, without=without)


_NO_MODEL = nn.Module()
"""In place of a model that was not given."""


def _laid(
    work: Workload | None, graph: ChannelGraph, model: nn.Module | None, data: Any, loss: Any, group: Group, *,
    progress: bool,
) -> Workload:  # fmt: skip
    """The table of :func:`allocate`."""
    if work is None:
        given = _NO_MODEL if model is None else model
        return Workload(given, data, loss, inputs=graph.inputs, group=group, progress=progress)
    if not isinstance(work, Workload):
        raise SecateurError(f"allocate(work={work!r}): a secateur.Workload is expected")
    more = {"model": model, "data": data, "loss": loss, "group": group, "progress": progress or None}
    twice = [f"{name}=" for name, value in more.items() if value is not None]
    if twice:
        raise SecateurError(f"allocate(work=...): it has its own {', '.join(twice)}; leave that out")
    return work


def allocated(
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    budget: Budget,
    strategy: Strategy,
    work: Workload,
    *,
    approximate: bool = False,
    latency: Clock | None = None,
    without: Mapping[str, str] | None = None,
) -> Plan:
    """:func:`allocate` at a table that is laid; the same plan on all processes, which rank 0 decides.

    Args:
        graph: the traced graph.
        scores: by group.
        budget: what may remain.
        strategy: who chooses the widths.
        work: the table.
        approximate: also cut groups that are not exact.
        latency: for a budget in ``latency_ms``.
        without: groups that are left alone -> why, for the plan.
    """
    without = dict(without or {})
    skipped = dict(without)
    skipped |= {g.name: f"not exact: {g.reason}" for g in graph.groups if not g.exact and not approximate}
    reasons, given = getattr(scores, "skipped", {}), graph.by_name(scores)
    skipped |= {
        g.name: f"has no scores: {reasons[g.name]}" if g.name in reasons else "has no scores"
        for g in graph.groups
        if g.name not in given and g.name not in skipped
    }
    skipped = left_alone(graph, budget.alike, skipped)
    ranked = {name: _numbers(graph, name, values) for name, values in given.items() if name not in skipped}
    known = graph.by_name(getattr(scores, "rises", {}))
    rises = {name: _numbers(graph, name, values, 1) for name, values in known.items() if name in ranked}
    # all go by the scores of rank 0, so that all have the same problem to solve
    told = work.agree([{name: values.tolist() for name, values in some.items()} for some in (ranked, rises)])
    ranked, rises = ({name: np.array(values) for name, values in some.items()} for some in told)
    members = classes(graph, budget.alike)
    tied = Tied(graph, members, {name: np.argsort(values, kind="stable") for name, values in ranked.items()})
    timed = None if latency is None else TiedTime(latency.fitted, tied.of)
    meter = Meter(tied.tied, budget, timed, np.bincount(tied.of, minlength=len(members)))

    def problem_of(stops: Sequence[np.ndarray]) -> Problem:
        return _problem(tied, meter, ranked, rises, stops)

    problem = problem_of(budget.stops(graph))
    meter.check_feasible(problem.least, approximate=approximate)
    plain: dict[str, list[int]] = {}

    def plan_of(taken: np.ndarray) -> Plan:
        nonlocal plain
        gone = work.agree((problem.start - problem.widths(taken)).tolist())
        plain = work.agree(tied.removed(gone))
        return make_plan(graph, plain, skipped=skipped, approximate=approximate)

    def choose(some: Problem) -> np.ndarray:
        return checked(some, some.taken(strategy.widths(some, work)))

    try:
        if latency is not None and LATENCY in meter.allowed:
            return plan_of(by_the_clock(problem, choose, latency, plan_of, work.note))
        taken = fill(problem, choose(problem))
        coarse = problem, taken
        for largest in () if tries_widths(strategy) else budget.finer:
            widths = problem.widths(taken)
            if meter.used(widths) >= USED_ENOUGH:
                break
            problem = problem_of(budget.stops(graph, largest))
            taken = fill(problem, problem.taken(widths))
        try:
            return plan_of(taken)
        except CannotCut:
            if problem is coarse[0]:
                raise
        problem, taken = coarse  # the forward does not bear the finer widths
        return plan_of(taken)
    except CannotCut:  # what tracing did not meet: do without the groups that it takes
        groups = [graph.group(name) for name in plain]
        guilty = unbearable(groups, lambda some: fault_of(None, graph, Chosen(plain).of(some)))
        if not guilty:
            raise
        why = {**without, **{g.name: f"this combination cannot be cut: {reason}" for g, reason in guilty}}
        return allocated(graph, scores, budget, strategy, work, approximate=approximate, latency=latency, without=why)


def tries_widths(strategy: Strategy) -> bool:
    """Whether a strategy has tried its answer on data, so that nothing is to be added to it."""
    needs: Needs = getattr(strategy, "needs", Needs())
    return needs.data


def matching_groups(graph: ChannelGraph, patterns: Sequence[str]) -> list[str]:
    """The groups that any of the patterns names.

    Raises:
        SecateurError: a pattern that names none.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        own = [g.name for g in graph.groups if fnmatch.fnmatchcase(g.name, pattern)]
        if not own:
            raise unknown("group", pattern, [g.name for g in graph.groups])
        found += own
    return found


def _numbers(graph: ChannelGraph, name: str, values: Tensor, more: int = 0) -> np.ndarray:
    """A number for each channel of a group, or for each and so many more; float64."""
    group, what = graph.group(name), f"scores.rises[{name!r}]" if more else f"scores[{name!r}]"
    array = torch.as_tensor(values).detach().double().cpu().numpy()
    if array.shape != (len(group) + more,):
        for_each = f"{more} for nothing and one" if more else "one score"
        raise SecateurError(
            f"{what}: {for_each} for each of {len(group)} channels is expected, not shape {array.shape}"
        )
    if np.isnan(array).any():
        raise SecateurError(f"{what} holds NaN: check the criterion and the data")
    return array


def _problem(
    tied: Tied, meter: Meter, scores: Mapping[str, np.ndarray], rises: Mapping[str, np.ndarray],
    stops: Sequence[np.ndarray],
) -> Problem:  # fmt: skip
    """Items of all groups that can go: each brings its group's width to the next of the widths that it may be given.

    Args:
        tied: the groups, and their orders of removal.
        meter: of the graph in which groups that are alike are one.
        scores: of every channel, by group of the original graph.
        rises: of every number of channels, likewise; of groups that have none the sum of the scores.
        stops: the widths that the original's groups may be given.
    """
    ascending = tied.summed({name: values[tied.orders[name]] for name, values in scores.items()})
    tables = tied.summed(rises)
    orders: dict[int, np.ndarray] = {}
    columns: list[tuple[np.ndarray, ...]] = []
    for i, (group, own) in enumerate(zip(meter.graph.groups, common_stops(tied.members, stops), strict=True)):
        if group.name not in ascending:
            continue
        values = ascending[group.name]
        orders[i] = tied.orders[group.name]
        ends = len(group) - own
        begins = np.r_[0, ends[:-1]].astype(np.int64)[: len(ends)]
        if (table := tables.get(group.name)) is not None:
            total = table[ends] - table[begins]
        else:
            total = np.add.reduceat(values, begins) if len(ends) else np.zeros(0)
            if len(ends):  # reduceat sums the last block to the end of the group
                total[-1] = values[begins[-1] : ends[-1]].sum()
        columns.append((np.full(len(ends), i), np.arange(len(ends)), ends - begins, total))
    stacked = [np.concatenate(c) for c in zip(*columns, strict=True)] if columns else [np.zeros(0, dtype=np.int64)] * 4
    return Problem(meter, meter.graph.widths, stacked[0], stacked[1], stacked[2], stacked[3], orders, bool(rises))
