r"""The loop of a search of widths: find a start, play around it, compare what looks best.

A search has so many forwards of one mini-batch, and spends them in three parts:

1. One of ``START_PART`` finds a start that is within the budget (:mod:`secateur.allocation.sensitivity`).
2. The bandit plays around it. A play is one forward of the whole network on one mini-batch, with zeros at the producers
   of the channels that go. Its reward is how much of the loss is kept. What a width costs is known and need not be
   learned::

       reward = -tanh((L(masked, batch) - L(whole, batch)) / scale)          known_la = -price * cost_la

   The price is the least at which the best-looking combination is within the budget. It is computed anew as plays come
   in. That combination is the bandit's favourite, near which it stays.
3. One of ``FINAL_PART`` compares the start and the best-looking combinations on the same batches, by successive
   halving; :mod:`secateur.allocation.search.arms` says how these combinations are found. So on these batches the answer
   is never worse than the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from secateur.allocation.contract import STRATEGIES
from secateur.allocation.least_rise import least_rise
from secateur.allocation.problem import Problem, fill
from secateur.allocation.search.arms import ArmTable, Effects
from secateur.allocation.search.bandit import FactoredBandit
from secateur.allocation.search.checkpoint import SearchFile
from secateur.allocation.search.evaluator import Evaluator
from secateur.allocation.search.found import Found
from secateur.allocation.search.history import History, Plays
from secateur.allocation.sensitivity import batches_to_try, mean_rises, measured, trials, tried_alone

if TYPE_CHECKING:
    from secateur.allocation.search.bandit_strategy import Bandit

SENSITIVITY = "sensitivity"
START_PART, FINAL_PART = 3, 4
"""One of so many forwards is for the start, and one of so many for the last comparison."""
MOST_NOMINEES = 15
"""Combinations that take part in the last comparison beside the start, at most."""
REFIT_GROWTH = 1.2
"""The worth of the arms is fitted again when there are so many times as many plays."""
MOST_DWELL = 4
"""Blocks are at most so many times as long as needed, so that of a dozen groups three or four are away from their
favourite at a time."""
SCALE_PLAYS = 16
"""Random combinations that set the scale of the rewards, at most."""
SPENT_PART = 8
"""No more than one of so many forwards is spent on the scale, and on the bandit's first block."""


class Loop:
    """One search under one budget.

    Args:
        settings: of the search.
        problem: groups, items and the budget.
        evaluate: measures.
        history: how far the search has come; it goes on from there, and is changed.
        file: keeps the history.
        late: called with a share of the minutes; says whether it is over.
        shown: called with the number of forwards so far.
    """

    def __init__(
        self, settings: Bandit, problem: Problem, evaluate: Evaluator, history: History, file: SearchFile,
        late: Callable[[float], bool], shown: Callable[[float], None],
    ) -> None:  # fmt: skip
        self.settings, self.problem, self.evaluate, self.history = settings, problem, evaluate, history
        self.file, self.late, self.shown = file, late, shown
        self.sides = 2 if settings.dueling else 1

    def run(self) -> tuple[np.ndarray, Found]:
        """The items to take from every group, and what was learned."""
        base, started = self._find_start()
        arms = ArmTable(self.problem, base, sorted(set(self.settings.ratios)))
        if not arms.groups:
            return base, Found(self.settings.start, started, self.history.done)
        plays = self.history.plays = self.history.plays or self._begin(arms)
        late = self._play_on(arms, plays)
        self.file.save(self.history)
        return self._answer(arms, plays, started, late)

    # ------------------------------------------------------------------------------------------------------- the start

    def _find_start(self) -> tuple[np.ndarray, str]:
        """Items taken at the start, within the budget, and by which strategy."""
        settings, started = self.settings, self.settings.start
        if started == SENSITIVITY and self.problem.count.any():
            tried = tried_alone(self.problem, settings.evaluations // START_PART)
            batches = batches_to_try(
                tried, settings.evaluations // START_PART, len(self.evaluate.batches), settings.seed
            )
            if self.history.plays is None:
                self._try_alone(tried, batches)
            rises = mean_rises(self.history.rises, len(tried), batches)
            if rises:
                return least_rise(measured(self.problem, tried, rises)), started
            started = "uniform"
        elif started == SENSITIVITY:
            return np.zeros_like(self.problem.count), started
        widths = STRATEGIES.make(started).widths(self.problem, self.evaluate.work)
        return self.problem.taken(widths), started

    def _try_alone(self, tried: Sequence[Sequence[tuple[int, int]]], batches: Sequence[int]) -> None:
        steps = trials(self.evaluate, self.problem, tried, batches, self.history.rises)
        while not self.late(1 / START_PART):
            forwards = next(steps, 0)
            if not forwards:
                return
            self._count(forwards)

    def _count(self, forwards: int) -> None:
        """So many more forwards are done."""
        self.history.done += forwards
        self.shown(self.history.done)
        self.file.save_now_and_then(self.history)

    # ------------------------------------------------------------------------------------------------------- the plays

    def _begin(self, arms: ArmTable) -> Plays:
        """Some random combinations set the scale of the rewards."""
        settings, done = self.settings, self.history.done
        rng, count = np.random.default_rng(settings.seed), min(SCALE_PLAYS, settings.evaluations // SPENT_PART)
        drawn = [
            (arms.taken(rng.integers(0, arms.sizes)), self._batch_of(number)) for number in range(done, done + count)
        ]
        scale = max(float(np.median(np.abs(self.evaluate.rises(drawn)))), 1e-6)
        self.history.done += count
        dwell = min(MOST_DWELL, max(1, settings.evaluations // SPENT_PART // max(arms.sizes)))
        bandit = FactoredBandit(
            arms.sizes, radius=settings.radius, bounds=(-1.0, 1.0), dueling=settings.dueling, dwell=dwell,
            seed=settings.seed,
        )  # fmt: skip
        bandit.favourite = arms.start_arms
        return Plays(bandit, Effects(arms.sizes), scale)

    def _play_on(self, arms: ArmTable, plays: Plays) -> bool:
        """Play until the forwards for it are spent; whether the minutes were up before."""
        limit = self.settings.evaluations - self.settings.evaluations // FINAL_PART
        while self.history.done + self.sides * len(plays.bandit.ask()) <= limit:
            if self.late(1 - 1 / FINAL_PART):
                return True
            self._count(self._play(arms, plays))
        return False

    def _play(self, arms: ArmTable, plays: Plays) -> int:
        """Play the bandit's next block; gives how many forwards it took."""
        bandit, effects, sides = plays.bandit, plays.effects, self.sides
        asked = bandit.ask()
        combinations = [arms.taken(chosen) for chosen in asked.reshape(-1, len(arms.sizes))]
        # both sides of a duel are played on one batch
        batches = [self._batch_of(self.history.done + sides * play) for play in range(len(asked))]
        on = np.repeat(batches, sides).tolist()
        rises = self.evaluate.rises(list(zip(combinations, on, strict=True))).reshape(-1, sides)
        rewards = np.tanh((rises[:, 1] - rises[:, 0] if self.settings.dueling else -rises[:, 0]) / plays.scale)
        bandit.tell(rewards)
        effects.add(asked, rewards, batches)
        plays.log += [list(play) for play in zip(asked.tolist(), rewards.tolist(), batches, strict=True)]
        if effects.plays >= REFIT_GROWTH * plays.fitted:
            plays.fitted = effects.plays
            worth = effects.fit()
            price = arms.price(worth)
            bandit.known = -price * arms.cost
            if effects.plays >= sum(arms.sizes):  # with fewer plays than unknowns the favourite would be a guess
                bandit.favourite = arms.nominated(worth, price, 1)[0]
        return rises.size

    def _batch_of(self, number: int) -> int:
        """The batch on which the play of this number is played."""
        return int(np.random.default_rng([self.settings.seed, number]).integers(len(self.evaluate.batches)))

    # -------------------------------------------------------------------------------------------------- the comparison

    def _answer(self, arms: ArmTable, plays: Plays, started: str, late: bool) -> tuple[np.ndarray, Found]:
        """The best of the start and of what looks best, by trying."""
        done, total = self.history.done, self.settings.evaluations
        worth = plays.effects.fit()
        price = arms.price(worth)
        plays.bandit.known = -price * arms.cost
        forwards = done // (FINAL_PART - 1) if late else total - done
        candidates = self._candidates(arms, worth, price, min(forwards // SPENT_PART, MOST_NOMINEES) * bool(plays.log))
        best, losses, spent = self._compare(candidates, forwards)
        found = Found(
            start=self.settings.start, started=started, forwards=done + spent, late=late,
            table=arms.learned(plays.bandit, worth, price), price=price, explained=plays.effects.explained,
            doubts={} if self.settings.dueling else arms.doubts(plays.log), losses=losses,
        )  # fmt: skip
        return candidates[best if found.better else 0], found

    def _candidates(self, arms: ArmTable, worth: np.ndarray, price: float, nominees: int) -> list[np.ndarray]:
        """Items of the start and of the best-looking combinations; what the budget leaves room for is given back."""
        start = fill(self.problem, arms.start)
        distinct = {start.tobytes(): start}  # with what was given back, several may be the same
        for chosen in arms.nominated(worth, price, 4 * nominees):
            answer = fill(self.problem, arms.taken(chosen))
            distinct[answer.tobytes()] = answer
            if len(distinct) > nominees:
                break
        return list(distinct.values())

    def _compare(self, candidates: Sequence[np.ndarray], forwards: int) -> tuple[int, tuple[float, float], int]:
        """Successive halving: on ever more batches, ever half of the candidates; the first stays in to the end.

        Returns:
            The best but the first (the first if it is alone), the mean rises of the first and of the best, and how many
            forwards it took.
        """
        order = np.random.default_rng(self.settings.seed).permutation(len(self.evaluate.batches))
        rises: list[list[float]] = [[] for _ in candidates]
        left, used, spent = list(range(1, len(candidates))), 0, 0

        def mean(number: int) -> float:
            return float(np.mean(rises[number]))

        while used < len(order):
            rounds, share = max(1, math.ceil(math.log2(max(len(left), 1)))), len(left) + 1
            more = order[used : used + max(1, (forwards - spent) // rounds // share)]
            found = self.evaluate.on([candidates[number] for number in (0, *left)], more.tolist())
            for number, own in zip((0, *left), found.tolist(), strict=True):
                rises[number] += own
            used, spent = used + len(more), spent + found.size
            self.shown(self.history.done + spent)
            if len(left) <= 2:
                break
            left = sorted(left, key=mean)[: math.ceil(len(left) / 2)]
        best = min(left, key=mean, default=0)
        return best, (mean(0), mean(best)), spent
