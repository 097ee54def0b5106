"""Widths from scores alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur._internal.workload import Needs, Workload
from secateur.allocation.contract import STRATEGIES
from secateur.allocation.least_rise import least_rise
from secateur.allocation.problem import Problem, narrowed, nested


@STRATEGIES.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """The same fraction of every group."""

    needs: ClassVar[Needs] = Needs()

    def widths(self, problem: Problem, work: Workload) -> np.ndarray:
        """See the class."""
        return problem.widths(uniform_items(problem))


@STRATEGIES.register("threshold")
@dataclass(frozen=True)
class Threshold:
    """One threshold for all: the lowest mean score goes first, whatever it frees."""

    needs: ClassVar[Needs] = Needs()

    def widths(self, problem: Problem, work: Workload) -> np.ndarray:
        """See the class."""
        return problem.widths(threshold_items(problem))


@STRATEGIES.register("global")
@dataclass(frozen=True)
class Global:
    """Least score per unit of the budget that the channel frees, what it frees kept current as widths shrink.

    Where the criterion predicts by how much the loss rises at every width, it is the widths at which it rises least
    (:mod:`secateur.allocation.least_rise`).
    """

    needs: ClassVar[Needs] = Needs()

    def widths(self, problem: Problem, work: Workload) -> np.ndarray:
        """See the class."""
        return problem.widths(global_items(problem))


# ------------------------------------------------------------------------------- items taken from every group, [groups]


def global_items(problem: Problem) -> np.ndarray:
    """Of :class:`Global`."""
    return least_rise(problem) if problem.predicted else narrowed(problem, np.zeros_like(problem.count))


def threshold_items(problem: Problem) -> np.ndarray:
    """Of :class:`Threshold`."""
    return _prefix(problem, nested(problem, np.arange(len(problem.group)), problem.score / problem.size))


def uniform_items(problem: Problem) -> np.ndarray:
    """Of :class:`Uniform`."""
    share = (problem.rank + 1) / problem.count[problem.group]
    return _prefix(problem, nested(problem, np.arange(len(problem.group)), share))


def _prefix(problem: Problem, order: np.ndarray) -> np.ndarray:
    nothing = np.zeros(len(problem.start), dtype=np.int64)
    return problem.first(order, problem.least_prefix(order, nothing))
