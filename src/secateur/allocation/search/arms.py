r"""What a search of widths chooses among: for each group a few widths, what they are worth and what they cost.

What an atom is worth is fitted to all plays at once, so that what the other factors played, and how much the batch
minds any cut, is taken off, not averaged; the price of the budget is the least at which the best-looking combination
meets it::

    reward ~ c + hard_b + sum_l worth_la     least squares, with ``RIDGE`` plays of worth zero for every atom,
                                             and ``ALIKE`` of hardness zero for every batch b
    best     argmax over a of worth_la - price * cost_la, for each factor l          cost_la = over / full, of all units
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import linalg

from secateur._internal.errors import SecateurError
from secateur.allocation.problem import Problem
from secateur.allocation.search.bandit import FactoredBandit

RIDGE, ALIKE = 1.0, 3.0
NEAR, TRIED, SLACK = 64, 1000, 0.05
"""How many changes are looked at together, how many of these are measured exactly, and by how much of the budget's unit
what they cost, which is not quite a sum, may be wrong."""


class Effects:
    """What every atom is worth, fitted to plays.

    Args:
        sizes: atoms of each factor.

    Attributes:
        plays: how many there were.
        explained: the part of the rewards' variance, but for that between batches, that the fit of the last
            :meth:`table` explains, less what any fit to so few plays would: 1 where what a width is worth does not
            depend on the others, less with noise and where it does; 0 with fewer plays than unknowns.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.plays, self.explained = list(sizes), 0, 0.0
        self.first = np.cumsum([0, *sizes[:-1]]).astype(np.int64)
        count = sum(sizes) + 1  # the last is the constant
        self.gram, self.moment = np.zeros((count, count)), np.zeros(count)
        self.squares = 0.0
        self.batches: dict[int, np.ndarray] = {}  # of each that was played, its row of the Gram matrix and its moment

    def add(self, played: np.ndarray, rewards: np.ndarray, batches: Sequence[int]) -> None:
        """Plays [n, factors], rewards [n], batches [n]; of duels [n, 2, factors] and by how much the first was better.

        In a duel a batch's hardness cancels, and ``batches`` are not looked at.
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

    def table(self) -> np.ndarray:
        """The worth of each atom, [factors, most atoms], zero where there is none."""
        penalty = np.full(len(self.moment), RIDGE)
        penalty[-1] = 1e-9
        own = np.array(list(self.batches.values())).reshape(-1, len(self.moment) + 1)
        cross, times, sums = own[:, :-1], own[:, -2], own[:, -1]
        # a batch's unknown meets no other's: they are taken out of the system before it is solved
        system = self.gram + np.diag(penalty) - cross.T @ (cross / (times + ALIKE)[:, None])
        found = linalg.solve(system, self.moment - cross.T @ (sums / (times + ALIKE)), assume_a="pos")
        hard = (sums - cross @ found) / (times + ALIKE)
        left = self.squares - 2 * (found @ self.moment + hard @ sums) + found @ self.gram @ found
        left += 2 * hard @ cross @ found + times @ hard**2
        self.explained = self._explained(float(left), times, sums)
        worth = np.zeros((len(self.sizes), max(self.sizes, default=0)))
        for row, first, size in zip(worth, self.first, self.sizes, strict=True):
            row[:size] = found[first : first + size]
        return worth

    def _explained(self, left: float, times: np.ndarray, sums: np.ndarray) -> float:
        """What is left, against what batches alone would leave, both per degree of freedom."""
        mean = sums.sum() / max(times.sum(), 1)
        shrunk = times / (times + ALIKE)
        about = sums - times * mean  # of each batch, the sum of what differs from the mean
        without = self.squares - mean * sums.sum() - ((2 - shrunk) * about**2 / (times + ALIKE)).sum()
        before = self.plays - bool(len(times)) - (shrunk * (2 - shrunk)).sum()
        free = before - sum(size - 1 for size in self.sizes)
        return float(np.clip(1 - (left / free) / (without / before), 0, 1)) if free > 0 and without > 0 else 0.0


class Factors:
    """The groups that have a choice, their atoms as items taken, and what each costs.

    Args:
        problem: groups, items and the budget.
        base: items taken at the start, within the budget.
        ratios: widths as multiples of those at the start.

    Attributes:
        groups: indices of those that have a choice.
        atoms: of each, the items taken, from narrow to wide.
        sizes: how many atoms each has.
        start: the atoms that are taken at the start.
        cost: of every atom, beyond that of the start, [factors, most atoms].
    """

    def __init__(self, problem: Problem, base: np.ndarray, ratios: Sequence[float]) -> None:
        self.problem, self.base = problem, base
        self.groups: list[int] = []
        self.atoms: list[list[int]] = []
        for group, count in enumerate(problem.count):
            widths = np.array([problem.widths(_with(base, group, taken))[group] for taken in range(count + 1)])
            wanted = {int(np.abs(widths - ratio * widths[base[group]]).argmin()) for ratio in ratios}
            if len(wanted) > 1:
                self.groups.append(group)
                self.atoms.append(sorted(wanted, reverse=True))  # from narrow to wide
        self.sizes = [len(atoms) for atoms in self.atoms]
        most = max(self.sizes, default=0)
        self._items = np.array([atoms + [0] * (most - len(atoms)) for atoms in self.atoms], dtype=np.int64)
        self._items = self._items.reshape(len(self.sizes), most)
        self.start = np.array([own.index(base[group]) for group, own in zip(self.groups, self.atoms, strict=True)])
        zero = self._used(base)
        self.cost = np.zeros((len(self.groups), most))
        for factor, (group, atoms) in enumerate(zip(self.groups, self.atoms, strict=True)):
            for atom, taken in enumerate(atoms):
                self.cost[factor, atom] = self._used(_with(base, group, taken)) - zero

    def _used(self, taken: np.ndarray) -> float:
        meter = self.problem.meter
        return sum(over / meter.full[unit] for unit, over in meter.excess(self.problem.widths(taken)).items())

    def taken(self, atoms: Sequence[int] | np.ndarray) -> np.ndarray:
        """The items that combinations [..., factors] take from every group, [..., groups]."""
        atoms = np.asarray(atoms)
        taken = np.broadcast_to(self.base, (*atoms.shape[:-1], len(self.base))).copy()
        taken[..., self.groups] = self._items[np.arange(len(self.groups)), atoms]
        return taken

    def best(self, worth: np.ndarray, price: float) -> np.ndarray:
        """The combination that looks best at a price."""
        real = np.arange(worth.shape[1]) < np.array(self.sizes)[:, None]
        return np.where(real, worth - price * self.cost, -np.inf).argmax(1)

    def price(self, worth: np.ndarray) -> float:
        """The least price at which the best-looking combination meets the budget."""

        def met(price: float) -> bool:
            return self.problem.meter.met(self.problem.widths(self.taken(self.best(worth, price))))

        if met(0.0):
            return 0.0
        high = 0.01
        while not met(high):
            high *= 2
            if high > 1e9:
                raise SecateurError("no combination of these widths meets the budget; give ratios below 1")
        low = high / 2 if high > 0.01 else 0.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (low, middle) if met(middle) else (middle, high)
        return high

    def nominated(self, worth: np.ndarray, price: float, count: int) -> list[np.ndarray]:
        """Combinations that look best of those that meet the budget, the best-looking first, at most so many.

        A price finds no combination between two of its steps: from its own on, one or two widths are changed at a
        time, those that lose least at the price, as long as something looks better that meets the budget.
        """
        best, pool = self.best(worth, price), dict[tuple[int, ...], float]()
        pool[tuple(best.tolist())] = at = float(np.take_along_axis(worth, best[:, None], 1).sum())
        while True:
            met = sorted(self._around(best, worth, price, count), key=lambda found: -found[0])
            pool |= {tuple(atoms.tolist()): at + gain for gain, atoms in met}
            if not met or met[0][0] <= 1e-9:
                break
            at, best = at + met[0][0], met[0][1]
        found = sorted(pool, key=lambda atoms: (-pool[atoms], atoms))
        return [np.array(atoms) for atoms in found[:count]]

    def _around(self, best: np.ndarray, worth: np.ndarray, price: float, count: int) -> list[tuple[float, np.ndarray]]:
        """What one or two changes gain, and the combination, for at most ``count`` that meet the budget."""
        here = best[:, None]
        gain, cost = (t - np.take_along_axis(t, here, 1) for t in (worth, self.cost))
        real = (np.arange(worth.shape[1]) < np.array(self.sizes)[:, None]) & (np.arange(worth.shape[1]) != here)
        factor, atom = np.nonzero(real)
        near = np.argsort((price * cost - gain)[factor, atom], kind="stable")[:NEAR]
        factor, atom = factor[near], atom[near]
        gains, costs = gain[factor, atom], cost[factor, atom]
        one, two = np.triu_indices(len(near))  # with itself: a single change
        fits = (one == two) | (factor[one] != factor[two])
        one, two = one[fits], two[fits]
        both = np.where(one == two, 0.5, 1.0)
        total, used = both * (gains[one] + gains[two]), both * (costs[one] + costs[two])
        likely = np.flatnonzero(used <= SLACK - self._used(self.taken(best)))
        likely = likely[np.argsort(-total[likely], kind="stable")][:TRIED]
        found: list[tuple[float, np.ndarray]] = []
        for some in np.split(likely, range(NEAR, len(likely), NEAR)):
            changed = np.repeat(best[None], len(some), 0)
            for option in (one[some], two[some]):
                changed[np.arange(len(some)), factor[option]] = atom[option]
            met = self.problem.meter.which_met(self.problem.widths(self.taken(changed)))
            found += [(float(total[number]), atoms) for number, atoms in zip(some[met], changed[met], strict=True)]
            if len(found) >= count:
                break
        return found[:count]

    def learned(self, bandit: FactoredBandit, worth: np.ndarray, price: float) -> list[dict[str, Any]]:
        """What was learned of each width, a row an atom.

        Returns:
            ``group``; ``width`` in channels, ``of`` how many; ``gap``, how much worse it looks than the group's best at
            this price, in rewards; ``plays``; ``active``, whether the bandit has not ruled it out; ``found``, whether
            it is the best-looking one.
        """
        graph, value, best = self.problem.meter.graph, worth - price * self.cost, self.best(worth, price)
        rows = []
        for row in bandit.table():
            factor, atom = row["factor"], row["atom"]
            group = self.groups[factor]
            width = int(self.problem.widths(_with(self.base, group, self.atoms[factor][atom]))[group])
            rows.append(
                {
                    "group": graph.groups[group].name,
                    "width": width,
                    "of": len(graph.groups[group]),
                    "gap": float(value[factor, best[factor]] - value[factor, atom]),
                    "plays": row["plays"],
                    "active": row["active"],
                    "found": bool(atom == best[factor]),
                }
            )
        return rows

    def doubts(self, log: Sequence[Any]) -> dict[str, tuple[int, int]]:
        """Groups whose best width differs, beyond chance, between weak and strong combinations of the others."""
        if len(log) < 20:
            return {}
        played = np.array([entry[0] for entry in log])
        rewards = np.array([entry[1] for entry in log])
        means = []
        for factor, size in enumerate(self.sizes):
            own = [rewards[played[:, factor] == atom] for atom in range(size)]
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
            if a != b and all(lead > 3 for lead in ahead):  # either half is sure, by three standard errors
                group = self.groups[factor]
                widths = [
                    int(self.problem.widths(_with(self.base, group, self.atoms[factor][atom]))[group])
                    for atom in (a, b)
                ]
                found[self.problem.meter.graph.groups[group].name] = (widths[0], widths[1])
        return found


def _halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(values, kind="stable")
    return order[: len(order) // 2], order[len(order) // 2 :]


def _summary(rewards: np.ndarray, atoms: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error by atom; NaN and infinity where there are fewer than three."""
    mean, error = np.full(size, np.nan), np.full(size, np.inf)
    for atom in range(size):
        own = rewards[atoms == atom]
        if len(own) >= 3:
            mean[atom], error[atom] = own.mean(), own.std(ddof=1) / math.sqrt(len(own)) + 1e-12
    return (mean if not np.isnan(mean).all() else np.zeros(size)), error


def _with(taken: np.ndarray, group: int, value: int) -> np.ndarray:
    changed = taken.copy()
    changed[group] = value
    return changed
