r"""The arms of a search of widths, what each is worth and what it costs.

Each group of channels that has a choice is a *factor* of the bandit, and each width of it that may be played is an
*arm*. A play chooses one arm of every factor.

What an arm is worth is fitted to all plays at once by least squares. So what the other factors played, and how much a
batch minds any cut, is subtracted rather than averaged::

    reward ~ c + hard_b + sum_l worth_la          for the arm a of each factor l that was played, on batch b

The fit is a ridge regression: it is as if every arm had also been played ``RIDGE`` times with worth zero, and every
batch ``BATCH_RIDGE`` times with hardness zero. What an arm costs is known. A price on the cost (a Lagrange multiplier)
makes the budget a part of the objective, and separates the factors::

    best_l = argmax over a of worth_la - price * cost_la          cost_la = what the arm uses, as a part of the whole

The price is the least at which this combination is within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import linalg

from secateur._internal.errors import InfeasibleBudget
from secateur.allocation.problem import Problem
from secateur.allocation.search.bandit import FactoredBandit

RIDGE = 1.0
"""Plays of worth zero that every arm has beforehand."""
BATCH_RIDGE = 3.0
"""Plays of hardness zero that every batch has beforehand."""
CHANGES_IN_PAIRS = 64
"""Single changes of an arm that are combined in pairs to find better combinations: the best-looking ones."""
PAIRS_COUNTED = 1000
"""Pairs of changes that are counted exactly against the budget, at most."""
COST_SLACK = 0.05
"""By how much the sum of the costs may be over the budget (a part of the whole) before a pair is not even counted:
costs do not quite add up."""
PRICE_STEPS = 12
"""Bisections of the price."""
PLAYS_FOR_DOUBTS = 20
"""With fewer plays than this nothing is said about interactions."""


class Effects:
    """What every arm is worth, fitted to plays.

    The normal equations are kept up to date, so that a fit costs the same after any number of plays.

    Args:
        sizes: how many arms each factor has.

    Attributes:
        plays: how many there were.
        explained: which part of the rewards' variance within batches the last :meth:`fit` explains, per degree of
            freedom, so that a fit to pure noise explains nothing. It is 1 where the worth of a width does not depend on
            the others, and less with noise and where it does; 0 with fewer plays than unknowns.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.plays, self.explained = list(sizes), 0, 0.0
        self.first = np.cumsum([0, *sizes[:-1]]).astype(np.int64)
        count = sum(sizes) + 1  # the last is the constant
        self.gram, self.moment = np.zeros((count, count)), np.zeros(count)
        self.squares = 0.0
        self.batches: dict[int, np.ndarray] = {}  # of each that was played, its row of the Gram matrix and its moment

    def add(self, played: np.ndarray, rewards: np.ndarray, batches: Sequence[int]) -> None:
        """Take in plays.

        Args:
            played: the arm of every factor, int64 [plays, factors]; in duels [plays, 2, factors].
            rewards: float64 [plays]; in duels by how much the first combination was better than the second.
            batches: on which batch each was played. In a duel its hardness cancels, and they are not used.
        """
        # one by one, so that it does not matter how many come at once
        for play, reward, batch in zip(played, rewards, batches, strict=True):
            if played.ndim == 2:
                at, sign = np.append(self.first + play, len(self.moment) - 1), np.ones(len(play) + 1)
                own = self.batches.setdefault(int(batch), np.zeros(len(self.moment) + 1))
                own[at] += 1
                own[-1] += reward
            else:
                differ = play[0] != play[1]
                at = np.concatenate([(self.first + side)[differ] for side in play])
                sign = np.repeat((1.0, -1.0), differ.sum())
            self.gram[np.ix_(at, at)] += np.outer(sign, sign)
            self.moment[at] += sign * reward
            self.squares += reward**2
        self.plays += len(played)

    def fit(self) -> np.ndarray:
        """The worth of each arm, float64 [factors, most arms]; zero where a factor has no such arm."""
        penalty = np.full(len(self.moment), RIDGE)
        penalty[-1] = 1e-9
        own = np.array(list(self.batches.values())).reshape(-1, len(self.moment) + 1)
        cross, times, sums = own[:, :-1], own[:, -2], own[:, -1]
        # a batch's unknown meets no other batch's: they are eliminated from the system before it is solved
        system = self.gram + np.diag(penalty) - cross.T @ (cross / (times + BATCH_RIDGE)[:, None])
        found = linalg.solve(system, self.moment - cross.T @ (sums / (times + BATCH_RIDGE)), assume_a="pos")
        hard = (sums - cross @ found) / (times + BATCH_RIDGE)
        left = self.squares - 2 * (found @ self.moment + hard @ sums) + found @ self.gram @ found
        left += 2 * hard @ cross @ found + times @ hard**2
        self.explained = self._explained(float(left), times, sums)
        worth = np.zeros((len(self.sizes), max(self.sizes, default=0)))
        for row, first, size in zip(worth, self.first, self.sizes, strict=True):
            row[:size] = found[first : first + size]
        return worth

    def _explained(self, left: float, times: np.ndarray, sums: np.ndarray) -> float:
        """The residuals, against those of a fit to batches alone, both per degree of freedom."""
        mean = sums.sum() / max(times.sum(), 1)
        shrunk = times / (times + BATCH_RIDGE)
        about = sums - times * mean  # of each batch, the sum of what differs from the mean
        without = self.squares - mean * sums.sum() - ((2 - shrunk) * about**2 / (times + BATCH_RIDGE)).sum()
        before = self.plays - bool(len(times)) - (shrunk * (2 - shrunk)).sum()
        free = before - sum(size - 1 for size in self.sizes)
        return float(np.clip(1 - (left / free) / (without / before), 0, 1)) if free > 0 and without > 0 else 0.0


class ArmTable:
    """The arms of all groups that have a choice: items taken, and what each costs.

    Args:
        problem: groups, items and the budget.
        start: items taken from every group at the start, within the budget.
        ratios: widths as multiples of those at the start.

    Attributes:
        groups: the factors: indices of the groups that have a choice.
        items: of each factor, the items that its arms take, from narrow to wide.
        sizes: how many arms each factor has.
        start_arms: the arms that are the start, int64 [factors].
        cost: what every arm uses more than that of the start, float64 [factors, most arms].
    """

    def __init__(self, problem: Problem, start: np.ndarray, ratios: Sequence[float]) -> None:
        self.problem, self.start = problem, start
        self.groups: list[int] = []
        self.items: list[list[int]] = []
        for group, count in enumerate(problem.count):
            widths = np.array([problem.widths(_with(start, group, taken))[group] for taken in range(count + 1)])
            wanted = {int(np.abs(widths - ratio * widths[start[group]]).argmin()) for ratio in ratios}
            if len(wanted) > 1:
                self.groups.append(group)
                self.items.append(sorted(wanted, reverse=True))  # from narrow to wide
        self.sizes = [len(items) for items in self.items]
        most_arms = max(self.sizes, default=0)
        self._items = np.array([items + [0] * (most_arms - len(items)) for items in self.items], dtype=np.int64)
        self._items = self._items.reshape(len(self.sizes), most_arms)
        self._real = np.arange(most_arms) < np.array(self.sizes, dtype=np.int64)[:, None]
        self.start_arms = np.array([own.index(start[g]) for g, own in zip(self.groups, self.items, strict=True)])
        zero = self._used(start)
        self.cost = np.zeros((len(self.groups), most_arms))
        for factor, (group, items) in enumerate(zip(self.groups, self.items, strict=True)):
            for arm, taken in enumerate(items):
                self.cost[factor, arm] = self._used(_with(start, group, taken)) - zero

    def _used(self, taken: np.ndarray) -> float:
        """How far above the budget these items leave the network, as a part of the whole, summed over its units."""
        meter = self.problem.meter
        return sum(over / meter.full[unit] for unit, over in meter.excess(self.problem.widths(taken)).items())

    def taken(self, arms: Sequence[int] | np.ndarray) -> np.ndarray:
        """The items that combinations of arms [..., factors] take from every group, int64 [..., groups]."""
        arms = np.asarray(arms)
        taken = np.broadcast_to(self.start, (*arms.shape[:-1], len(self.start))).copy()
        taken[..., self.groups] = self._items[np.arange(len(self.groups)), arms]
        return taken

    def best(self, worth: np.ndarray, price: float) -> np.ndarray:
        """The combination that looks best at a price, int64 [factors]."""
        return np.where(self._real, worth - price * self.cost, -np.inf).argmax(1)

    def price(self, worth: np.ndarray) -> float:
        """The least price at which the best-looking combination is within the budget.

        Raises:
            InfeasibleBudget: no price makes it so.
        """

        def met(price: float) -> bool:
            return self.problem.meter.met(self.problem.widths(self.taken(self.best(worth, price))))

        if met(0.0):
            return 0.0
        high = 0.01
        while not met(high):
            high *= 2
            if high > 1e9:
                raise InfeasibleBudget("no combination of these widths is within the budget; give ratios below 1")
        low = high / 2 if high > 0.01 else 0.0
        for _ in range(PRICE_STEPS):
            middle = (low + high) / 2
            low, high = (low, middle) if met(middle) else (middle, high)
        return high

    def nominated(self, worth: np.ndarray, price: float, count: int) -> list[np.ndarray]:
        """The best-looking combinations within the budget, the best first, at most so many.

        A price alone misses combinations: those between two of its steps are best at no price. So this is a local
        search from the price's own combination: the best exchange of one or two arms is made, as long as one looks
        better within the budget. All that were seen on the way are candidates.
        """
        best, pool = self.best(worth, price), dict[tuple[int, ...], float]()
        pool[tuple(best.tolist())] = at = float(np.take_along_axis(worth, best[:, None], 1).sum())
        while True:
            met = sorted(self._exchanges(best, worth, price, count), key=lambda found: -found[0])
            pool |= {tuple(arms.tolist()): at + gain for gain, arms in met}
            if not met or met[0][0] <= 1e-9:
                break
            at, best = at + met[0][0], met[0][1]
        found = sorted(pool, key=lambda arms: (-pool[arms], arms))
        return [np.array(arms) for arms in found[:count]]

    def _exchanges(
        self, best: np.ndarray, worth: np.ndarray, price: float, count: int
    ) -> list[tuple[float, np.ndarray]]:
        """What an exchange of one or two arms gains, and the combination; at most ``count`` within the budget."""
        here = best[:, None]
        gain, cost = (t - np.take_along_axis(t, here, 1) for t in (worth, self.cost))
        factor, arm = np.nonzero(self._real & (np.arange(worth.shape[1]) != here))
        near = np.argsort((price * cost - gain)[factor, arm], kind="stable")[:CHANGES_IN_PAIRS]
        factor, arm = factor[near], arm[near]
        gains, costs = gain[factor, arm], cost[factor, arm]
        one, two = np.triu_indices(len(near))  # with itself: a single change
        fits = (one == two) | (factor[one] != factor[two])
        one, two = one[fits], two[fits]
        both = np.where(one == two, 0.5, 1.0)
        total, used = both * (gains[one] + gains[two]), both * (costs[one] + costs[two])
        likely = np.flatnonzero(used <= COST_SLACK - self._used(self.taken(best)))
        likely = likely[np.argsort(-total[likely], kind="stable")][:PAIRS_COUNTED]
        found: list[tuple[float, np.ndarray]] = []
        for some in np.split(likely, range(CHANGES_IN_PAIRS, len(likely), CHANGES_IN_PAIRS)):
            changed = np.repeat(best[None], len(some), 0)
            for option in (one[some], two[some]):
                changed[np.arange(len(some)), factor[option]] = arm[option]
            met = self.problem.meter.which_met(self.problem.widths(self.taken(changed)))
            found += [(float(total[number]), arms) for number, arms in zip(some[met], changed[met], strict=True)]
            if len(found) >= count:
                break
        return found[:count]

    def learned(self, bandit: FactoredBandit, worth: np.ndarray, price: float) -> list[dict[str, Any]]:
        """What was learned of each width, a row an arm.

        Returns:
            ``group``; ``width`` in channels, ``of`` how many; ``gap``, how much worse it looks than the group's best at
            this price, in rewards; ``plays``; ``active``, whether the bandit has not ruled it out; ``found``, whether
            it is the best-looking one.
        """
        graph, value, best = self.problem.meter.graph, worth - price * self.cost, self.best(worth, price)
        rows = []
        for row in bandit.table():
            factor, arm = row["factor"], row["arm"]
            group = self.groups[factor]
            rows.append(
                {
                    "group": graph.groups[group].name,
                    "width": self._width(factor, arm),
                    "of": len(graph.groups[group]),
                    "gap": float(value[factor, best[factor]] - value[factor, arm]),
                    "plays": row["plays"],
                    "active": row["active"],
                    "found": bool(arm == best[factor]),
                }
            )
        return rows

    def doubts(self, log: Sequence[Any]) -> dict[str, tuple[int, int]]:
        """Groups whose best width depends on what the other groups do, beyond chance.

        The plays are divided into two halves by how well the arms of the *other* factors did in the mean: weak and
        strong. A group is in doubt where the best arm of one half is another than that of the other half, and beats it
        there by more than three standard errors; in both halves.

        Args:
            log: of each play the arms, the reward and the batch.

        Returns:
            By the name of the group, the best width among weak and among strong others.
        """
        if len(log) < PLAYS_FOR_DOUBTS:
            return {}
        played = np.array([entry[0] for entry in log])
        rewards = np.array([entry[1] for entry in log])
        means = []
        for factor, size in enumerate(self.sizes):
            own = [rewards[played[:, factor] == arm] for arm in range(size)]
            means.append(
                np.array([values.mean() if len(values) else rewards.mean() for values in own]) - rewards.mean()
            )
        parts = np.stack([mean[played[:, factor]] for factor, mean in enumerate(means)], 1)
        found = {}
        for factor, size in enumerate(self.sizes):
            others = parts.sum(1) - parts[:, factor]
            halves = [_summary(rewards[side], played[side, factor], size) for side in _halves(others)]
            (weak, weak_error), (strong, strong_error) = halves
            a, b = int(np.nanargmax(weak)), int(np.nanargmax(strong))
            ahead = [(weak[a] - weak[b]) / math.hypot(weak_error[a], weak_error[b])]
            ahead += [(strong[b] - strong[a]) / math.hypot(strong_error[a], strong_error[b])]
            if a != b and all(lead > 3 for lead in ahead):
                name = self.problem.meter.graph.groups[self.groups[factor]].name
                found[name] = (self._width(factor, a), self._width(factor, b))
        return found

    def _width(self, factor: int, arm: int) -> int:
        """How many channels of its group an arm keeps."""
        group = self.groups[factor]
        return int(self.problem.widths(_with(self.start, group, self.items[factor][arm]))[group])


def _halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(values, kind="stable")
    return order[: len(order) // 2], order[len(order) // 2 :]


def _summary(rewards: np.ndarray, arms: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error by arm; NaN and infinity where there are fewer than three plays."""
    mean, error = np.full(size, np.nan), np.full(size, np.inf)
    for arm in range(size):
        own = rewards[arms == arm]
        if len(own) >= 3:
            mean[arm], error[arm] = own.mean(), own.std(ddof=1) / math.sqrt(len(own)) + 1e-12
    return (mean if not np.isnan(mean).all() else np.zeros(size)), error


def _with(taken: np.ndarray, group: int, value: int) -> np.ndarray:
    changed = taken.copy()
    changed[group] = value
    return changed
