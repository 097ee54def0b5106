"""What ``"auto"`` means in :func:`secateur.prune`: the best that was measured with what was given (bench/ablation.py).

With data, the criterion that knows of the repair, the widths of least predicted rise, and that repair. What rises is
how far the outputs move, where one tensor of them matters; it was never clearly worse than the Fisher of a loss,
which a trained model makes small and noisy, and with little left it was better. Of several tensors the loss says which
count; without one they all do. Without data, what needs none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from secateur._internal.batches import call_model, copied
from secateur._internal.distributed import rank
from secateur._internal.errors import CannotMeasure, InfeasibleBudget
from secateur._internal.losses import outputs_of
from secateur._internal.progress import length_of
from secateur._internal.state import preserved
from secateur._internal.workload import Workload
from secateur.allocation.contract import STRATEGIES, Strategy
from secateur.curvature.fisher import quiet_kind
from secateur.scoring.api import scored
from secateur.scoring.contract import CRITERIA, Criterion, Scores
from secateur.tracing.graph import ChannelGraph

AUTO = "auto"


def is_auto(given: Any) -> bool:
    """Whether a seat was left open."""
    return isinstance(given, str) and given == AUTO


def criteria(given: str | Criterion, work: Workload) -> list[Criterion]:
    """The criteria that come into question, the best first. About how long the best takes is told, if that is long."""
    if not is_auto(given):
        return [CRITERIA.make(given)]
    plain = CRITERIA.make("taylor" if work.has_data and work.has_loss else "magnitude")
    if not work.has_data:
        return [plain]
    try:
        return [CRITERIA.make("schur", {"fisher": fisher(work)}), plain]
    except CannotMeasure as error:
        work.note(f"criterion='auto': {plain.name!r} is taken and not 'schur': {error}")  # type: ignore[attr-defined]
        return [plain]


def fisher(work: Workload) -> str:
    """Of what the Fisher is: of the outputs where one tensor of them matters, else of the loss, if there is one.

    Raises:
        CannotMeasure: no tensor matters, and there is no loss.
    """
    outputs = work.together(lambda: _first_outputs(work))  # what fails on one process is an error of all
    matter = len(work.that_matter(outputs))
    if matter == 1 or (matter and not work.has_loss):
        return "outputs"
    if not work.has_loss:
        raise CannotMeasure("the forward returns no tensor of real numbers, and there is no loss; give loss=")
    return quiet_kind(work.loss)


WEIGHT = 5.0
"""What the default takes for each batch, in forwards of it (ResNet-20 5.0, LeNet-5 5.1)."""
LONG = 60.0
"""What takes more seconds is told before it begins."""


def _first_outputs(work: Workload) -> Any:
    """What the forward of the first batch returns."""
    with preserved(work.model), torch.no_grad():
        start = time.perf_counter()
        batch = replace(work.first, inputs=copied(work.first.inputs))
        outputs = outputs_of(partial(call_model, work.model), batch, work.loss if work.has_loss else None)
        if work.device.type == "cuda":
            torch.cuda.synchronize(work.device)
        _tell_cost(time.perf_counter() - start, work)
    return outputs


def _tell_cost(forward: float, work: Workload) -> None:
    """Tell about how long the default will take, if that is long."""
    number = length_of(work.data, work.most)
    seconds = WEIGHT * (number or 0) * forward
    if seconds > LONG and rank(work.group) == 0:
        work.note(
            f"this will take about {seconds / 60:.0f} minutes, by a forward of the first of {number} batches: fewer "
            "batches= take less; prune(criterion='magnitude', strategy='uniform', repair='recalibrate') takes seconds"
        )


def strategy(given: str | Strategy, scores: Mapping[str, Tensor]) -> Strategy:
    """The strategy: widths of least rise where a criterion knows rises; others are hard to compare between groups."""
    if not is_auto(given):
        return STRATEGIES.make(given)
    return STRATEGIES.make("global" if getattr(scores, "rises", {}) else "uniform")


def repair(given: Any, work: Workload) -> Any:
    """The repair or repairs, as they were given or by name."""
    if not is_auto(given):
        return given
    return "refit" if work.has_data else "none"


def first_that_reaches(
    some: list[Criterion], graph: ChannelGraph, work: Workload, check: Callable[[Mapping[str, str]], None]
) -> tuple[Criterion, Scores]:
    """The first criterion that scores enough groups for the budget, and its scores; the last one in any case.

    Args:
        some: the criteria.
        graph: the traced graph.
        work: the table.
        check: raises if the budget cannot be met without some groups, which are given with the reasons.
    """
    for criterion, following in pairwise(some):
        try:
            scores = _scored_once(criterion, graph, work)
            check({g.name: "has no scores" for g in graph.groups if g.name not in scores})
            return criterion, scores
        except CannotMeasure as error:
            why = str(error)
        except InfeasibleBudget:
            missing = [g.name for g in graph.groups if g.name not in scores]
            reason = scores.skipped.get(missing[0], "")
            why = (
                f"it has no scores for {len(missing)} of {len(graph.groups)} groups ({missing[0]}: {reason}), and the "
                "others cannot meet the budget"
            )
        one, other = (getattr(seat, "name", type(seat).__name__) for seat in (criterion, following))
        work.note(f"criterion='auto': {other!r} is taken and not {one!r}: {why}")
    return some[-1], _scored_once(some[-1], graph, work)


def _scored_once(criterion: Criterion, graph: ChannelGraph, work: Workload) -> Scores:
    """The scores; runs that share what a workload finds share them too, where its settings are all of a criterion."""
    if not is_dataclass(criterion):
        return scored(criterion, graph, work)
    groups = tuple((group.name, len(group)) for group in graph.groups)
    return work.once(("scores", repr(criterion), groups), lambda: scored(criterion, graph, work))
