r"""Widths by sensitivity: each group is narrowed alone, and the loss is measured.

That makes a table, which never falls: what the loss rises by when group ``g`` alone loses its first ``t`` items. The
layers that read what goes make up for it (:mod:`secateur.allocation.search.local_repair`). The rises of single groups
are assumed to add up; then :mod:`secateur.allocation.least_rise` knows the widths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import isotonic_regression

from secateur._internal.checks import check_choice, check_count, check_flag, check_seed
from secateur._internal.distributed import rank
from secateur._internal.errors import SecateurError
from secateur._internal.progress import progress_bar
from secateur._internal.workload import Needs, Workload
from secateur.allocation.contract import STRATEGIES
from secateur.allocation.least_rise import least_rise
from secateur.allocation.problem import Problem
from secateur.allocation.search.evaluator import NORMS, Evaluator

STEPS = 8
"""Widths of each group that are tried, at most: every eighth of what may go."""
Rises = dict[tuple[int, int], list[float]]
"""(place of a group in what is tried, batch) -> what the loss rises by at each width of the group that is tried."""


@STRATEGIES.register("sensitivity")
@dataclass(frozen=True)
class Sensitivity:
    """Each group is narrowed alone and the loss is measured; then the widths are those at which it rises least.

    Attributes:
        evaluations: forwards of a mini-batch, at most; those of the whole network, one a batch, and the pass for the
            repair are not counted. Every width is tried on as many batches as that allows.
        steps: widths of each group that are tried, at most.
        norms: ``"batch"``: batch norms use the mini-batch's statistics, as after :func:`secateur.recalibrate`;
            ``"running"``: their running ones.
        repair: the layers that read what goes make up for it while it is tried.
        seed: of the choice of batches.
    """

    needs: ClassVar[Needs] = Needs(data=True, loss=True)
    evaluations: int = 500
    steps: int = STEPS
    norms: str = "batch"
    repair: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("evaluations", self.evaluations)
        check_count("steps", self.steps, 2)
        check_choice("norms", self.norms, NORMS)
        check_flag("repair", self.repair)
        check_seed(self.seed)

    def widths(self, problem: Problem, work: Workload) -> np.ndarray:
        """See the class."""
        if not problem.count.any():
            return problem.start
        tried = tried_alone(problem, self.evaluations, self.steps)
        if not tried:
            least = 2 * int((problem.count > 0).sum())
            raise SecateurError(
                f"sensitivity: evaluations={self.evaluations} are too few to try two widths of every group; give "
                f"{least} or more"
            )
        evaluate = Evaluator(work, problem, self.norms, repair=self.repair)
        batches = batches_to_try(tried, self.evaluations, len(evaluate.batches), self.seed)
        rises: Rises = {}
        forwards = 0
        on = work.progress and rank(work.group) == 0
        with progress_bar("sensitivity", len(batches) * sum(map(len, tried)), on) as shown:
            for count in trials(evaluate, problem, tried, batches, rises):
                forwards += count
                shown(forwards)
        work.forwards += forwards
        means = mean_rises(rises, len(tried), batches)
        found: dict[str, Any] = {"rises": curves(problem, tried, means)}
        if evaluate.repair is not None and evaluate.repair.left:
            found["tried without repair"] = evaluate.repair.left
        work.facts["sensitivity"] = found
        return problem.widths(least_rise(measured(problem, tried, means)))


# --------------------------------------------------------------------------------------------------------- what to try


def tried_alone(problem: Problem, most: int, steps: int = STEPS) -> list[list[tuple[int, int]]]:
    """What to try: for each group a list of (group, items taken); none if ``most`` does not allow two each."""
    groups = np.flatnonzero(problem.count)
    steps = min(steps, most // max(len(groups), 1))
    if steps < 2:
        return []
    shares = np.linspace(0, 1, steps + 1)[1:]
    return [
        [(int(group), taken) for taken in sorted({int(share * problem.count[group]) for share in shares} - {0})]
        for group in groups
    ]


def batches_to_try(tried: Sequence[Sequence[tuple[int, int]]], most: int, batches: int, seed: int) -> list[int]:
    """On which batches all of it is tried with so many forwards, in a random order."""
    often = most // max(sum(map(len, tried)), 1)
    found: list[int] = np.random.default_rng(seed).permutation(batches)[::-1][:often].tolist()
    return found


def alone(problem: Problem, group: int, taken: int) -> np.ndarray:
    """Items taken from every group: from one, and none from the others."""
    items = np.zeros(len(problem.count), dtype=np.int64)
    items[group] = taken
    return items


# --------------------------------------------------------------------------------------------------------- what it does


def trials(
    evaluate: Evaluator, problem: Problem, tried: Sequence[Sequence[tuple[int, int]]], batches: Sequence[int],
    rises: Rises,
) -> Iterator[int]:  # fmt: skip
    """Narrow each group alone, batch by batch; gives after each step how many forwards it took.

    Args:
        evaluate: measures.
        problem: groups and items.
        tried: of :func:`tried_alone`.
        batches: on which.
        rises: what was found; what is in it beforehand is not tried again.
    """
    at_once = evaluate.work.processes  # a batch is evaluated by one process: so many batches keep all of them busy
    for begin in range(0, len(batches), at_once):
        for place, own in enumerate(tried):
            some = [batch for batch in batches[begin : begin + at_once] if (place, batch) not in rises]
            if some:
                found = evaluate.on([alone(problem, *one) for one in own], some)
                rises.update({(place, batch): found[:, i].tolist() for i, batch in enumerate(some)})
                yield found.size


def mean_rises(rises: Rises, groups: int, batches: Sequence[int]) -> list[list[float]]:
    """The mean over the batches on which all groups were tried, a list a group; none if there is no such batch."""
    whole = [batch for batch in batches if all((place, batch) in rises for place in range(groups))]
    if not whole:
        return []
    return [np.mean([rises[place, batch] for batch in whole], 0).tolist() for place in range(groups)]


def curves(
    problem: Problem, tried: Sequence[Sequence[tuple[int, int]]], rises: Sequence[Sequence[float]]
) -> dict[str, list[list[float]]]:
    """What was measured of every group, for whoever reads it: [channels that went, rise of the loss]."""
    found = {}
    for own, some in zip(tried, rises, strict=True):
        name = problem.meter.graph.groups[own[0][0]].name
        gone = [int(problem.gone[group, taken]) for group, taken in own]
        rows = [[n, float(f"{rise:.4g}")] for n, rise in zip(gone, some, strict=True)]
        found[name] = [[0, 0.0], *(row for row in rows if math.isfinite(row[1]))]
    return found


def measured(problem: Problem, tried: Sequence[Sequence[tuple[int, int]]], rises: Sequence[Sequence[float]]) -> Problem:
    """The problem with the rises of the loss as they were measured: never falling, and linear between what was tried.

    Args:
        problem: groups, items and the budget.
        tried: of :func:`tried_alone`.
        rises: of the loss, one for each.
    """
    score = np.zeros(len(problem.score))
    for own, some in zip(tried, rises, strict=True):
        group, taken = own[0][0], [0, *(items for _, items in own)]
        grown = np.maximum(isotonic_regression(np.asarray(some, dtype=np.float64)).x, 0.0)
        channels = problem.gone[group]
        table = np.interp(channels, channels[taken], np.r_[0.0, grown])
        score[problem.group == group] = np.diff(table)[: problem.count[group]]
    return replace(problem, score=score)
