"""The strategy ``"bandit"``: widths that a factored bandit finds by trying."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from secateur._internal.checks import check_choice, check_count, check_flag, check_positive, check_seed, is_number
from secateur._internal.distributed import all_gather, rank
from secateur._internal.errors import SecateurError
from secateur._internal.files import file_at
from secateur._internal.progress import progress_bar
from secateur._internal.serial import digest_of
from secateur._internal.workload import Needs, Workload
from secateur.allocation.contract import STRATEGIES
from secateur.allocation.problem import Problem
from secateur.allocation.search.checkpoint import SearchFile, settings_of
from secateur.allocation.search.evaluator import NORMS, Evaluator
from secateur.allocation.search.loop import SENSITIVITY, Loop

STARTS = (SENSITIVITY, "global", "threshold", "uniform")
RATIOS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
LEAST_EVALUATIONS = 32


@STRATEGIES.register("bandit")
@dataclass(frozen=True)
class Bandit:
    """The widths that keep the loss lowest under a budget, found by trying with a factored bandit.

    A combination of widths is tried by one forward of the whole network on one mini-batch, with zeros where channels
    go; nothing is cut and the model is not changed. Groups that are not exact (``approximate=True``) are tried in the
    same way, which is not quite what is cut. :mod:`secateur.allocation.search.loop` says how the forwards are spent,
    and :class:`secateur.allocation.search.found.Found` what is known afterwards.

    The method assumes that a group's best width is best whatever the other groups do (uniform identifiability).
    ``Found.doubts`` tells where what was seen speaks against it.

    All batches of the data are kept in memory. Several processes give a shard each, and find together what one process
    with all of the data finds.

    Attributes:
        evaluations: forwards of a mini-batch, at most, 32 or more (a duel takes two). Those of the whole network, one a
            batch, are not counted.
        minutes: stop after so long, if the evaluations are not spent before; the forwards of the whole network are
            among it. A third is for the start, a quarter for the last comparison. The clock of rank 0 counts.
        start: which widths within the budget others are looked for around: ``"sensitivity"``, which narrows each group
            alone and then takes greedily what costs the least loss, or another strategy.
        ratios: the arms: widths as multiples of those at the start, 1 among them.
        radius: of the bandit's confidence intervals, see
            :class:`secateur.allocation.search.bandit.FactoredBandit`.
        dueling: play two combinations against each other on the same mini-batch.
        norms: ``"batch"``: batch norms use the mini-batch's statistics, as after :func:`secateur.recalibrate`;
            ``"running"``: their running ones, of the whole network.
        seed: of the bandit and of the choice of batches.
        checkpoint: a file; an interrupted search goes on from it, and ends with the same answer. It may hold the
            searches of several budgets; one of another model, data or loss is refused.
    """

    needs: ClassVar[Needs] = Needs(data=True, loss=True)
    evaluations: int = 2000
    minutes: float | None = None
    start: str = SENSITIVITY
    ratios: tuple[float, ...] = RATIOS
    radius: float = 0.1
    dueling: bool = False
    norms: str = "batch"
    seed: int = 0
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        check_count("evaluations", self.evaluations, LEAST_EVALUATIONS)
        check_positive("minutes", self.minutes, optional=True)
        check_choice("start", self.start, STARTS)
        _check_ratios(self.ratios)
        check_positive("radius", self.radius)
        check_flag("dueling", self.dueling)
        check_choice("norms", self.norms, NORMS)
        check_seed(self.seed)
        file_at(self.checkpoint)

    def widths(self, problem: Problem, work: Workload) -> np.ndarray:
        """See the class. What was learned is ``work.facts["search"]``."""
        late = self._timer(work)
        _check_alike(self, work)
        evaluate = Evaluator(work, problem, self.norms)
        file = SearchFile(self, problem, evaluate)
        history = file.read()
        with progress_bar("search of widths", self.evaluations, work.progress and rank(work.group) == 0) as shown:
            taken, found = Loop(self, problem, evaluate, history, file, late, shown).run()
        work.forwards += found.forwards
        work.facts["search"] = found.to_dict()
        work.remarks += found.remarks()
        if found.started != found.start:
            work.note(
                f"bandit: too few evaluations or minutes to try every group alone (start={found.start!r}), so the "
                f"search began at {found.started} widths; give more, or start={found.started!r}"
            )
        return problem.widths(taken)

    def _timer(self, work: Workload) -> Callable[[float], bool]:
        """Whether a share of the minutes is over, by the clock of rank 0."""
        begun = time.monotonic()

        def late(share: float) -> bool:
            if self.minutes is None:
                return False
            return bool(work.agree(time.monotonic() - begun > 60 * self.minutes * share))

        return late


def _check_ratios(ratios: object) -> None:
    listed = ratios if isinstance(ratios, (list, tuple)) else ()
    if not all(is_number(ratio) and ratio > 0 for ratio in listed) or 1 not in listed or len(set(listed)) < 2:
        raise SecateurError(f"ratios={ratios!r}: two or more numbers above 0 are expected, 1.0 among them")


def _check_alike(bandit: Bandit, work: Workload) -> None:
    """Raise if the processes search for different things: each repeats the decisions of the others."""
    if work.processes == 1:
        return
    model = work.once("digest of the model", lambda: digest_of(list(work.model.state_dict().values())))
    settings = json.dumps([settings_of(bandit), bandit.minutes is None, work.loss.name])
    own = torch.tensor([list(digest_of([settings, model.hex()]))], dtype=torch.uint8, device=work.device)
    if any(not torch.equal(other, own) for other in all_gather(own, work.group)):
        raise SecateurError(
            "bandit: the processes differ; give all of them the same model, settings and loss, and each its shard of "
            "the data"
        )
