"""``prune``: the whole flow in one call. Criterion, strategy and repair each answer one question."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from secateur import auto
from secateur._internal.batches import Inputs
from secateur._internal.distributed import Group
from secateur._internal.errors import SecateurError
from secateur._internal.workload import Needs, Workload
from secateur.allocation.alike import left_alone
from secateur.allocation.api import allocated, tries_widths
from secateur.allocation.budget import Budget, Meter, unused
from secateur.allocation.contract import Strategy
from secateur.allocation.latency.api import LatencyClock, measure_latency
from secateur.allocation.latency.clock import check_clock, check_reachable, check_same_backend
from secateur.allocation.latency.sampler import LatencySettings
from secateur.measure.backends import EAGER
from secateur.measure.layers import layer_data
from secateur.repair.api import repaired, repairs_of
from secateur.repair.contract import Repair
from secateur.result import Result, counts_of
from secateur.scoring.contract import Criterion
from secateur.surgery.channels import check, cut
from secateur.tracing.api import trace
from secateur.tracing.display import LONGEST, listed
from secateur.tracing.graph import ChannelGraph
from secateur.tracing.selection import Exclude, excluded

BATCHES = 100
"""No step uses more batches than this, unless another number is given."""


def prune(
    model: nn.Module,
    example_inputs: Inputs | list[Inputs],
    budget: Budget,
    *,
    data: Iterable[Any] | None = None,
    loss: Any = None,
    criterion: str | Criterion = auto.AUTO,
    strategy: str | Strategy = auto.AUTO,
    repair: str | Repair | Sequence[str | Repair] = auto.AUTO,
    exclude: Exclude = (),
    outputs: Callable[[Any], Any] | None = None,
    approximate: bool = False,
    latency: LatencyClock | LatencySettings | None = None,
    batches: int | None = BATCHES,
    group: Group = None,
    progress: bool = False,
) -> Result:
    """Make a model smaller.

    Args:
        model: the model; it is left untouched.
        example_inputs: as for :func:`secateur.trace`; counts refer to their shapes.
        budget: what may remain.
        data: batches (:mod:`secateur._internal.batches`); inputs alone will do for all that is ``"auto"``. Where
            ``torch.distributed`` runs, every process gives its shard; sums are added up, rank 0 decides, and all get
            the same network.
        loss: the loss (:mod:`secateur._internal.losses`), for what needs it, with labels; not needed where batches
            have labels for the model's own.
        criterion: which channels matter least: a name or settings, see :func:`secateur.score`; ``"auto"`` is
            ``"schur"`` with data: by how far the outputs move where one tensor of them matters, or there is no loss.
            Where it cannot judge enough channels for the budget, or there is neither, ``"taylor"`` or ``"magnitude"``
            is taken, which is told. Without data it is ``"magnitude"``.
        strategy: how many every group keeps, see :func:`secateur.allocate`; ``"auto"`` is ``"global"`` where the
            criterion predicts by how much the loss rises with every width, as ``"schur"`` does, else ``"uniform"``.
        repair: how what stays makes up for what goes, see :func:`secateur.apply_repair`; one or several; ``"auto"`` is
            ``"refit"`` with data, nothing without.
        exclude: what keeps its channels: patterns of group names or module paths, modules, or types of modules. Layers
            that do not require gradients are left alone too.
        outputs: which of what the forward returns matters, as for :func:`secateur.trace`.
        approximate: also cut groups whose removal changes more than the removed channels; by how much is told.
        latency: for a budget in ``latency_ms``: what :func:`secateur.measure_latency` gave, or settings for it. If none
            is given, forwards of the example inputs are timed.
        batches: no step uses more batches of the data than this; ``None`` for all of them.
        group: the processes that work along; ``None`` for all there are.
        progress: show what is done, how far it is and how long it will take.

    Returns:
        The smaller model and all that is known of it; ``result.facts["chosen"]`` says which seats were taken.

    Raises:
        NothingToPrune: the model has no channel that can go.
        InfeasibleBudget: no plan can meet the budget, which is told before any work.
        SecateurError: what else the steps refuse.
    """
    if not isinstance(budget, Budget):
        raise SecateurError(f"prune(budget={budget!r}): a Budget is expected, for instance Budget(macs=0.5)")
    first = example_inputs[0] if isinstance(example_inputs, list) and example_inputs else example_inputs
    work = Workload(model, data, loss, inputs=first, batches=batches, group=group, progress=progress, outputs=outputs)
    if loss is not None:
        _ = work.loss  # what is none is told, whether or not it is needed
    return pruned(
        work, example_inputs, budget, criterion=criterion, strategy=strategy, repair=repair, exclude=exclude,
        approximate=approximate, latency=latency,
    )  # fmt: skip


def pruned(
    work: Workload, example_inputs: Inputs | list[Inputs], budget: Budget, *, criterion: Any, strategy: Any,
    repair: Any, exclude: Exclude, approximate: bool, latency: LatencyClock | LatencySettings | None,
) -> Result:  # fmt: skip
    """:func:`prune` at a table that is laid."""
    model, outputs = work.model, work.outputs
    ones = auto.criteria(criterion, work)
    three = repairs_of(auto.repair(repair, work))
    for seat in (*ones, auto.strategy(strategy, {}), *three):
        work.require(getattr(seat, "needs", Needs()), _name(seat))

    graph = trace(model, example_inputs, outputs=outputs)
    alone = excluded(model, graph, exclude)
    clock = _clock(graph, budget, latency, work, approximate=approximate, alone=alone)
    check_feasible(graph, budget, approximate=approximate, latency=clock, without=alone)

    def reachable(missing: Mapping[str, str]) -> None:
        check_feasible(graph, budget, approximate=approximate, latency=clock, without={**alone, **missing})

    one, scores = auto.first_that_reaches(ones, graph, work, reachable)
    two = auto.strategy(strategy, scores)
    plan = allocated(graph, scores, budget, two, work, approximate=approximate, latency=clock, without=alone)
    small = cut(model, plan)
    facts = repaired(three, model, small, plan, work)

    if approximate:
        facts |= _approximate(work, graph, plan, outputs)
    if clock is not None:
        facts["latency_ms"] = {"allowed": budget.latency_ms, **clock.facts(plan)}
    facts |= work.facts
    multiple = np.gcd(budget.steps(graph), graph.kept(plan))
    facts["round_to"] = {g.name: int(n) for g, n in zip(graph.groups, multiple, strict=True) if n > 1}
    after = counts_of(graph, plan)
    if facts["round_to"]:
        what = f"widths that are multiples of {max(facts['round_to'].values())}"
        filled = clock is None and not tries_widths(two)
        work.remarks += unused(budget, asdict(counts_of(graph)), asdict(after), what, filled=filled)
    left = zip(graph.groups, graph.kept(plan), strict=True)
    if alone_left := [g.name for g, n in left if n == 1 < len(g) and g.positions == 1]:  # a head is no single number
        work.remarks.append(
            f"one channel is left of {listed(alone_left, LONGEST)}: everything behind it sees a single number; "
            "at_least= keeps more"
        )
    facts["chosen"] = {"criterion": _settings(one), "strategy": _settings(two), "repair": [_settings(r) for r in three]}
    facts |= {"forwards": work.forwards, "notices": list(work.notices), "remarks": list(work.remarks)}
    layers = layer_data(model, small, work.inputs)
    return Result(small, counts_of(graph), after, plan, graph, scores, facts, layers)


def check_feasible(
    graph: ChannelGraph,
    budget: Budget,
    *,
    approximate: bool = False,
    latency: LatencyClock | None = None,
    without: Mapping[str, str] | None = None,
) -> None:
    """Raise if no plan can meet the budget, with the range that is feasible.

    Raises:
        InfeasibleBudget: none can.
    """
    whole = {group.name: group.reason for group in graph.groups if not group.exact and not approximate}
    whole = left_alone(graph, budget.alike, {**whole, **(without or {})})
    movable = np.array([group.name not in whole for group in graph.groups])
    least = np.where(movable, budget.floors(graph), graph.widths)
    Meter(graph, budget, None if latency is None else latency.fitted).check_feasible(least, approximate=approximate)
    if latency is not None and budget.latency_ms is not None:
        check_reachable(graph, least, budget.latency_ms, latency, approximate=approximate)


def _clock(
    graph: ChannelGraph, budget: Budget, latency: LatencyClock | LatencySettings | None, work: Workload, *,
    approximate: bool, alone: Mapping[str, str],
) -> LatencyClock | None:  # fmt: skip
    """How long the model takes, if the budget limits that, once the rest of it is seen to be possible."""
    if latency is not None and budget.latency_ms is None:
        raise SecateurError("prune(latency=...): no budget limits latency_ms; leave it out")
    if budget.latency_ms is None:
        return None
    settings = latency if isinstance(latency, LatencySettings) else None
    clock = None if isinstance(latency, LatencySettings) else latency
    check_clock(clock, graph)
    check_same_backend(budget, latency)
    if clock is not None:
        return clock
    budget.floors(graph)
    if budget.limits:
        check_feasible(graph, replace(budget, latency_ms=None, backend=EAGER), approximate=approximate, without=alone)
    plain = LatencySettings(round_to=budget.round_to, approximate=approximate, backend=budget.backend)
    return measure_latency(work.model, graph, settings or plain, group=work.group, progress=work.progress)


def _name(seat: Any) -> str:
    return str(getattr(seat, "name", type(seat).__name__))


def _settings(seat: Any) -> dict[str, Any]:
    """A seat as what a recipe would say, as what JSON can hold."""
    own = asdict(seat) if is_dataclass(seat) and not isinstance(seat, type) else {}
    own.pop("checkpoint", None)  # where it keeps its state is no part of what it does
    return {"name": _name(seat), **json.loads(json.dumps(own, default=str))}


def _approximate(
    work: Workload, graph: ChannelGraph, plan: Any, outputs: Callable[[Any], Any] | None
) -> dict[str, Any]:
    """How far cut and masked network are apart, where groups that are not exact were cut; it is told."""
    cut_ones = [name for name in plan.removed if not graph.group(name).exact]
    if not cut_ones:
        return {}
    difference = check(work.model, cut(work.model, plan), plan, work.inputs, outputs=outputs)
    work.note(
        f"groups that are not exact were cut ({', '.join(cut_ones[:5])}{' ...' if len(cut_ones) > 5 else ''}): the cut "
        f"network differs from the masked one by {difference:.2g} of its largest output on the example inputs"
    )
    return {"approximate": {"groups": cut_ones, "difference": difference}}
