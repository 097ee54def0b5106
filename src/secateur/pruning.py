"""The whole flow in one call: trace, score, allocate, cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur._internal.batches import Inputs
from secateur._internal.checks import check_seed
from secateur._internal.errors import SecateurError, unknown
from secateur._internal.files import file_at
from secateur.allocation.api import allocate
from secateur.allocation.budget import Budget, Meter
from secateur.allocation.latency.clock import check_clock, check_reachable
from secateur.allocation.latency.model import Timing
from secateur.allocation.search.search import Search, check_search
from secateur.allocation.strategies import BANDIT, STRATEGIES, Strategy
from secateur.curvature.kronecker import Curvature, kronecker_factors
from secateur.plan import Plan
from secateur.repair.directed import check_mode, directed
from secateur.repair.refit import refit as refit_layers
from secateur.scoring.api import CRITERIA, Criterion, Loss, score
from secateur.scoring.directional import projector
from secateur.surgery.channels import cut
from secateur.surgery.channels import recalibrate as recalibrate_norms
from secateur.surgery.zero_channels import zero_channels
from secateur.tracing.api import trace
from secateur.tracing.graph import ChannelGraph

FACTORED = ("obs", "kron_obd", "kron_obs")
"""The criteria whose Kronecker factors can also make up for what goes."""
DIRECTIONAL = "directional"
"""The method that also moves what stays (:func:`secateur.cut.directed`)."""
DEAD = "dead"
"""The method that reads the plan off the weights: what training has driven to exact zero goes."""
WITHOUT_DATA = ("magnitude", "bn_scale", "random", DEAD)
"""The methods that never look at data."""


@dataclass(frozen=True)
class Counts:
    """What a model costs.

    Attributes:
        macs: multiply-accumulates of one forward on the example inputs.
        params: parameters, shared ones once.
        channels: removable channels.
    """

    macs: int
    params: int
    channels: int


@dataclass(frozen=True, eq=False)
class Result:
    """What :func:`prune` returns.

    Attributes:
        model: the smaller model.
        plan: what was removed.
        graph: the channel graph of the original.
        before: counts of the original.
        after: counts of the smaller model.
        scores: group name to one score a channel; empty for ``"dead"``.
        facts: what else is to be known: ``flat`` of ``"directional"`` (how many directions are steep, and where
            curvature was cut off), ``search`` of strategy ``"bandit"`` (:meth:`secateur.Search.facts`),
            ``latency_ms`` of a budget in it (``allowed``, what the whole network takes ``before``, measured in the
            end ``after``, and the fit's ``error``), and ``not refitted`` (path of a layer -> why it stays as it was).
    """

    model: nn.Module
    plan: Plan
    graph: ChannelGraph
    before: Counts
    after: Counts
    scores: dict[str, Tensor] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Counts before and after, and what every group kept, as text."""
        kept = self.graph.kept(self.plan)
        lines = [("", "before", "after", "kept")]
        lines += [_row(u, getattr(self.before, u), getattr(self.after, u)) for u in ("macs", "params", "channels")]
        lines += [_row(g.name, len(g), int(k)) for g, k in zip(self.graph.groups, kept, strict=True)]
        wide = [max(len(line[i]) for line in lines) for i in range(4)]
        return "\n".join(
            f"{name.ljust(wide[0])}  {'  '.join(c.rjust(w) for c, w in zip(cells, wide[1:], strict=True))}"
            for name, *cells in lines
        )


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%}"


def prune(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    method: str | Criterion = "taylor",
    budget: Budget | None = None,
    data: Iterable[Any] | None = None,
    loss_fn: Loss | str | None = None,
    strategy: str | Strategy = "global",
    approximate: bool = False,
    recalibrate: bool = False,
    compensate: bool = False,
    refit: bool = False,
    search: Mapping[str, Any] | None = None,
    timing: Timing | None = None,
    **options: Any,
) -> Result:
    """Make a model smaller.

    Args:
        model: the model; it is left untouched.
        example_inputs: as for :func:`secateur.trace`; counts refer to their shapes.
        method: a criterion (a name or a callable), or ``"dead"`` for the channels that are exactly zero.
        budget: what may remain; not for ``"dead"``, where the weights decide.
        data: batches, for criteria that need them, for ``recalibrate`` and for ``refit``.
        loss_fn: the loss, for criteria that need it: a callable, or ``"cross_entropy"``, ``"mse"``.
        strategy: as for :func:`secateur.allocate`, or ``"bandit"``: widths that a :class:`secateur.Search` finds with
            ``data`` and ``loss_fn``.
        approximate: also cut groups whose removal changes more than the removed channels.
        recalibrate: re-estimate the running statistics of the smaller model's batch norms on ``data``.
        compensate: for ``"obs"``, ``"kron_obd"`` and ``"kron_obs"``: what stays makes up for what goes, by the same
            factors.
        refit: fit the smaller model's layers to what the original computes on ``data``, in closed form, and
            re-estimate its batch norms (:func:`secateur.repair.refit`).
        search: settings of ``"bandit"``, see :class:`secateur.Search`.
        timing: for a budget in ``latency_ms``; if none is given, forwards of the example inputs are timed, with the
            threads that are set.
        **options: the criterion's own; of ``"directional"`` those of :func:`secateur.null_space_projector` (or
        ``flat``) and
            ``mode``, ``shift``, ``damping`` of :func:`secateur.cut.directed`.

    Raises:
        SecateurError: what the steps refuse; a budget that cannot be met is told before any work.
    """
    _check(method, budget, strategy, options)
    known = method in WITHOUT_DATA or not isinstance(method, str) or {"flat", "curvature"} & set(options)
    if not known and (data is None or loss_fn is None):
        raise SecateurError(f"{method} needs data= (batches of inputs and targets) and loss_fn=")
    if data is None and (recalibrate or refit):
        raise SecateurError(f"prune({'recalibrate' if recalibrate else 'refit'}=True) needs data= (batches)")
    _check_search(strategy, search, data, loss_fn)
    _check_time(budget, timing, strategy, search)
    passes = (method not in WITHOUT_DATA) + recalibrate + refit + (strategy == BANDIT)
    if passes > 1 and isinstance(data, Iterator):
        raise SecateurError("prune(data=...): an iterator ends after one pass, and more are needed: give a list")
    if compensate and method not in FACTORED:
        raise SecateurError(
            f"prune(compensate=True): the methods {', '.join(FACTORED)} have factors, {method!r} has none"
        )
    moving = method == DIRECTIONAL
    if moving and "mode" in options:
        check_mode(options["mode"])
    graph = trace(model, example_inputs)
    scores: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    curvature: Curvature | None = None
    source = model
    if budget is None:
        plan = zero_channels(model, graph, approximate=approximate)
    else:
        timing = _timing(model, graph, budget, approximate, timing)
        check_feasible(graph, budget, approximate=approximate, timing=timing)
        if compensate:
            curvature, options = _factors(model, data, loss_fn, options)
        moves = {name: options.pop(name) for name in ("mode", "shift", "damping") if name in options and moving}
        if moving and "flat" not in options:
            options = {"flat": projector(model, data, loss_fn, **options)}
        scores = score(model, graph, method, data=data, loss_fn=loss_fn, **options)
        if strategy == BANDIT:
            assert data is not None
            assert loss_fn is not None
            strategy = Search(model, data, loss_fn, **(search or {}))
        plan = allocate(graph, scores, budget, strategy=strategy, approximate=approximate, timing=timing)
        if isinstance(strategy, Search):
            facts["search"] = strategy.facts()
        if moving:
            source = directed(model, plan, options["flat"], **moves)
            facts["flat"] = dict(options["flat"].facts)
    small = cut(source, plan, compensate=curvature)
    if refit and data is not None:
        facts["not refitted"] = refit_layers(model, small, plan, data)
    if recalibrate:
        recalibrate_norms(small, data)
    if budget is not None and timing is not None:
        facts["latency_ms"] = {"allowed": budget.latency_ms, **timing.facts(plan)}
    return Result(small, plan, graph, counts(graph), counts(graph, plan), scores, facts)


def _check_search(strategy: Any, search: Any, data: Any, loss_fn: Any) -> None:
    if search is not None and strategy != BANDIT:
        raise SecateurError(f"prune(search=...): strategy {strategy!r} searches nothing; give strategy='bandit'")
    given = {} if search is None else search
    check_search(given, ("seed", "progress", "checkpoint"))
    check_seed(given.get("seed", 0))
    file_at(given.get("checkpoint"))
    if strategy == BANDIT and (data is None or loss_fn is None):
        raise SecateurError("prune(strategy='bandit') needs data= (batches of inputs and targets) and loss_fn=")


def _check_time(budget: Any, timing: Any, strategy: Any, search: Any) -> None:
    limited = isinstance(budget, Budget) and budget.latency_ms is not None
    if timing is not None and not limited:
        raise SecateurError("prune(timing=...): no budget limits latency_ms; leave the timing out")
    kept = strategy.checkpoint if isinstance(strategy, Search) else (search or {}).get("checkpoint")
    if limited and timing is None and kept is not None:
        raise SecateurError(
            "prune(search={'checkpoint': ...}) with Budget(latency_ms=...): a search that goes on must know the same "
            "times; give timing=secateur.Timing(..., checkpoint=...)"
        )


def _timing(
    model: nn.Module, graph: ChannelGraph, budget: Budget, approximate: bool, timing: Timing | None
) -> Timing | None:
    """How long the model takes, if the budget limits that, once the rest of it is seen to be possible."""
    check_clock(timing, graph)
    if budget.latency_ms is None or timing is not None:
        return timing
    budget.floors(graph)
    if budget.limits:
        check_feasible(graph, replace(budget, latency_ms=None), approximate=approximate)
    return Timing(model, graph, round_to=budget.round_to, approximate=approximate)


def _factors(model: nn.Module, data: Any, loss_fn: Any, options: dict[str, Any]) -> tuple[Curvature, dict[str, Any]]:
    """Factors for scores and compensation both, and the options that are left for the scores."""
    if data is None or loss_fn is None:
        raise SecateurError("prune(compensate=True) needs data= (batches of inputs and targets) and loss_fn=")
    if "curvature" in options:
        return options["curvature"], options
    passing = {k: v for k, v in options.items() if k != "damping"}
    curvature = kronecker_factors(model, data, loss_fn, form="full", **passing)
    return curvature, {"curvature": curvature} | {k: v for k, v in options.items() if k == "damping"}


def counts(graph: ChannelGraph, plan: Plan | None = None) -> Counts:
    """What the traced model costs, after a plan."""
    return Counts(graph.macs(plan), graph.params(plan), int(graph.kept(plan).sum()))


def check_feasible(
    graph: ChannelGraph, budget: Budget, *, approximate: bool = False, timing: Timing | None = None
) -> None:
    """Raise if no plan can meet the budget, with the range that is feasible."""
    movable = np.array([group.exact or approximate for group in graph.groups])
    least = np.where(movable, budget.floors(graph), graph.widths)
    Meter(graph, budget, timing).check_feasible(least, approximate=approximate)
    if timing is not None and budget.latency_ms is not None:
        check_reachable(graph, least, budget.latency_ms, timing, approximate=approximate)


def _check(method: Any, budget: Any, strategy: Any, options: Any) -> None:
    if isinstance(method, str) and method not in CRITERIA and method != DEAD:
        raise unknown("method", method, (*CRITERIA, DEAD))
    if isinstance(strategy, str) and strategy not in (*STRATEGIES, BANDIT):
        raise unknown("strategy", strategy, (*STRATEGIES, BANDIT))
    if not isinstance(strategy, str) and not callable(strategy):
        raise SecateurError(f"strategy={strategy!r}: {', '.join((*STRATEGIES, BANDIT))} or a callable is expected")
    if method == DEAD:
        if budget is not None:
            raise SecateurError("prune(method='dead', budget=...): the weights decide what goes; leave the budget out")
        if options:
            raise unknown("option of method 'dead'", next(iter(options)), ("approximate", "recalibrate", "refit"))
    elif not isinstance(budget, Budget):
        raise SecateurError(f"prune(budget={budget!r}): a Budget is expected, for instance Budget(macs=0.5)")
