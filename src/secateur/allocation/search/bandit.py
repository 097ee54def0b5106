r"""Factored bandits: the best combination of atoms, one of every factor, from noisy rewards of whole combinations.

The temporary-elimination algorithm of arXiv 1807.01488 (only its abstract is public; the constants are a
reconstruction). Rounds go in blocks. In a block every factor plays each of its active atoms at least once, in an order
drawn for itself alone, so that what the other factors play is noise of mean zero between any two of its atoms::

    D_ij += m (mean_i - mean_j),    N_ij += m           m = min(plays of i, plays of j) in the block
    f(t) = (t + 1) log^2(t + 1)
    radius_ij = spread sqrt(radius log(2 |A| f(t)) / N_ij)
    j is active unless some i has D_ij / N_ij > radius_ij; all atoms are while some N_ij = 0

What is eliminated comes back when ``f(t)`` has grown enough: the algorithm needs no horizon. It asks that a factor's
best atom is best whatever the others play (uniform identifiability); its regret then grows with the *sum* of the
factors' sizes and the logarithm of time. A problem ``u_i v_j`` of rank one with positive parts is a special case.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur._internal.checks import check_seed
from secateur._internal.errors import SecateurError

RADIUS = 12.0
"""Twice the variance proxy of a matched difference: noise of variance 1 on both sides, and the partners' effects."""

_ARRAYS = ("known", "favourite", "difference", "matches", "plays", "active")


def log_f(rounds: int) -> float:
    """``log f(t)``, at least 1."""
    return max(1.0, math.log(rounds + 1) + 2 * math.log(max(math.log(rounds + 1), 1e-300)))


class Player(ABC):
    """Anything that plays combinations: :meth:`ask` for the next ones, :meth:`tell` what they brought.

    Args:
        sizes: how many atoms each factor has, two or more.
        seed: of whatever is drawn.

    Attributes:
        sizes: int64 [factors].
        rounds: how many combinations were played.
    """

    def __init__(self, sizes: Sequence[int], seed: int = 0) -> None:
        if isinstance(sizes, str) or not isinstance(sizes, (Sequence, np.ndarray)) or not len(sizes):
            raise SecateurError(
                f"sizes={sizes!r}: the number of atoms of every factor, at least one factor, is expected"
            )
        for factor, size in enumerate(sizes):
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
                raise SecateurError(f"factor {factor} has {size!r} atoms: a whole number from 2 on is expected")
            if size == 1:
                raise SecateurError(f"factor {factor} has one atom: there is nothing to choose, leave the factor out")
        check_seed(seed)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.rounds = 0
        self.rng = np.random.default_rng(seed)
        self._asked: np.ndarray | None = None

    def combinations(self, most: int) -> int:
        """How many combinations there are, for players that have an arm for each.

        Raises:
            SecateurError: more than so many.
        """
        count = math.prod(int(size) for size in self.sizes)
        if count > most:
            raise SecateurError(f"{type(self).__name__}: {count:,} combinations are too many; {most:,} are allowed")
        return count

    def ask(self, most: int | None = None) -> np.ndarray:
        """The next combinations, int64 [rounds, factors]; the same again until they are answered.

        Args:
            most: rounds that may be planned at once where more would bring the same (default: one block).
        """
        if self._asked is None:
            self._asked = self._plan(most)
        return self._asked.copy()

    def tell(self, rewards: Sequence[float] | np.ndarray) -> None:
        """What the combinations that were asked for have brought.

        Args:
            rewards: one finite number a combination.

        Raises:
            SecateurError: nothing was asked for, a wrong number of rewards, one that is not finite; nothing is changed.
        """
        if self._asked is None:
            raise SecateurError("tell() without ask(): nothing is played at the moment")
        try:
            values = np.asarray(rewards, dtype=np.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise SecateurError(f"tell(): one number a combination is expected ({error})") from error
        if values.shape[:1] != (len(self._asked),):
            raise SecateurError(f"tell(): {len(self._asked)} rewards are expected, not shape {list(values.shape)}")
        self._check(values)
        asked, self._asked = self._asked, None
        self.rounds += len(asked)
        self._learn(asked, values)

    def _check(self, values: np.ndarray) -> None:
        if values.ndim != 1 or not np.isfinite(values).all():
            raise SecateurError("tell(): finite rewards are expected, one number a combination; NaN or infinite is not")

    @abstractmethod
    def _plan(self, most: int | None) -> np.ndarray: ...

    @abstractmethod
    def _learn(self, played: np.ndarray, rewards: np.ndarray) -> None: ...

    @abstractmethod
    def best(self) -> np.ndarray:
        """The combination that looks best by now, int64 [factors]."""


def _pair(bounds: Any) -> tuple[float, float]:
    try:
        low, high = (float(value) for value in bounds)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not -math.inf < low < high < math.inf:
        raise SecateurError(f"bounds={bounds!r}: the least and the largest reward are expected")
    return low, high


class FactoredBandit(Player):
    """Temporary elimination, factor by factor.

    Args:
        sizes: how many atoms each factor has, two or more.
        radius: of the confidence intervals, squared; 12 is the theory's. Less explores less and errs more often.
        spread: rewards are thought of as ``spread`` times something with means in [-1, 1] and noise of variance 1 or
            less (sub-Gaussian).
        bounds: instead, the least and the largest reward there can be: ``spread`` is half of their distance then, and
            rewards outside are refused.
        dueling: two combinations are played against each other, and the reward is what the first has brought beyond the
            second: ``ask`` gives [rounds, 2, factors].
        dwell: a block is so many times as long, and what each factor plays beyond its active atoms is its favourite:
            then few factors at a time are away from it, and what the others play disturbs less.
        seed: of the orders.

    Attributes:
        known: a part of every atom's reward that is known and not in what :meth:`tell` is told (what it costs, say),
            float64 [factors, atoms]; it may be set to other values at any time, what was learned stays right.
        favourite: with ``dwell``, the combination to stay near, int64 [factors], which may be set at any time; where
            it is -1 or ruled out, the best-looking atom.
        difference: ``D``, float64 [factors, atoms, atoms].
        matches: ``N``, likewise.
        plays: how often each atom was played, int64 [factors, atoms].
        active: bool [factors, atoms].
    """

    def __init__(
        self, sizes: Sequence[int], *, radius: float = RADIUS, spread: float = 1.0,
        bounds: tuple[float, float] | None = None, dueling: bool = False, dwell: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(sizes, seed)
        for name, value in (("radius", radius), ("spread", spread)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise SecateurError(f"{name}={value!r}: a number above 0 is expected")
        if not isinstance(dueling, bool):
            raise SecateurError(f"dueling={dueling!r}: true or false is expected")
        if isinstance(dwell, bool) or not isinstance(dwell, int) or dwell < 1:
            raise SecateurError(f"dwell={dwell!r}: a whole number from 1 on is expected")
        if bounds is not None and spread != 1.0:
            raise SecateurError("spread and bounds: the one follows from the other; give one of them")
        self.radius, self.bounds, self.dueling = float(radius), None if bounds is None else _pair(bounds), dueling
        self.dwell = dwell
        self.spread = float(spread) if self.bounds is None else (self.bounds[1] - self.bounds[0]) / 2
        count, most = len(self.sizes), int(self.sizes.max())
        self.difference, self.matches = np.zeros((count, most, most)), np.zeros((count, most, most))
        self.plays = np.zeros((count, most), dtype=np.int64)
        self.known = np.zeros((count, most))
        self.favourite = np.full(count, -1, dtype=np.int64)
        self._real = np.arange(most) < self.sizes[:, None]
        self._pairs = self._real[:, :, None] & self._real[:, None, :] & ~np.eye(most, dtype=bool)
        self.active = self._real.copy()

    def _active_at(self, rounds: int) -> np.ndarray:
        """Which atoms are active if these are the statistics after so many rounds."""
        level = self.radius * self.spread**2 * (np.log(2 * self.sizes) + log_f(rounds))[:, None, None]
        # D / N > sqrt(level / N), without a division by zero
        total = self.difference + self.matches * self._known_differences()
        beats = self._pairs & (total > 0) & (total**2 > level * self.matches)
        unknown = (self._pairs & (self.matches == 0)).any((1, 2))
        active = self._real & (~beats.any(1) | unknown[:, None])
        return np.where(active.any(1, keepdims=True), active, self._real)

    def _known_differences(self) -> np.ndarray:
        return self.known[:, :, None] - self.known[:, None, :]

    def means(self) -> np.ndarray:
        """Of what was told, how much better each atom looks than each other, [factors, atoms, atoms], or NaN."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.matches > 0, self.difference / self.matches, np.nan)

    def gaps(self) -> np.ndarray:
        """By how much each atom looks worse than its factor's best-looking one, [factors, atoms]; NaN: not known."""
        mean, best = self.means() + self._known_differences(), self.best()
        found = np.where(self._real, np.take_along_axis(mean, best[:, None, None], 1)[:, 0], np.nan)
        found[np.arange(len(best)), best] = 0
        return found

    def _wins(self) -> np.ndarray:
        """The mean difference to the other active atoms, [factors, atoms]; minus infinity for those that are not."""
        both = self._pairs & self.active[:, :, None] & self.active[:, None, :] & (self.matches > 0)
        mean = np.divide(self.difference, self.matches, out=np.zeros_like(self.difference), where=both)
        mean += self._known_differences() * both
        return np.where(self.active, mean.sum(2) / np.maximum(both.sum(2), 1), -np.inf)

    def best(self) -> np.ndarray:
        """The combination that looks best by now, int64 [factors]."""
        return self._wins().argmax(1)

    def _plan(self, most: int | None) -> np.ndarray:
        self.active = self._active_at(self.rounds)
        counts = self.active.sum(1)
        least = int(counts.max())
        if least == 1 and most is not None and most > 1:
            only = self.active.argmax(1)
            return np.repeat((np.stack([only, only]) if self.dueling else only)[None], self._unchanged(most), 0)
        # each active atom once; where a factor has fewer than the block has rounds, round again, the best-looking first
        order = np.argsort(-self._wins(), axis=1, kind="stable")
        turns = np.take_along_axis(order, np.arange(least * self.dwell)[None] % counts[:, None], 1)
        if self.dwell > 1:
            stays = np.take_along_axis(self.active, self.favourite[:, None], 1) & (self.favourite[:, None] >= 0)
            turns[:, least:] = np.where(stays, self.favourite[:, None], order[:, :1])
        if self.dueling:
            both = [self.rng.permuted(turns, axis=1).T for _ in range(2)]
            return np.stack(both, 1)
        return self.rng.permuted(turns, axis=1).T

    def _unchanged(self, most: int) -> int:
        """For how many rounds, up to so many, no eliminated atom comes back: nothing is learnt by one atom alone."""
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if np.array_equal(self._active_at(self.rounds + middle - 1), self.active):
                low = middle
            else:
                high = middle - 1
        return low

    def _check(self, values: np.ndarray) -> None:
        super()._check(values)
        if self.bounds is not None:
            width = self.bounds[1] - self.bounds[0]
            low, high = (-width, width) if self.dueling else self.bounds
            wrong = values[(values < low) | (values > high)]
            if len(wrong):
                raise SecateurError(f"tell(): the reward {wrong[0]:g} is outside of [{low:g}, {high:g}]")

    def _learn(self, played: np.ndarray, rewards: np.ndarray) -> None:
        if self.dueling:  # what the first brought beyond the second, the second brought less
            played, rewards = played.reshape(-1, len(self.sizes)), np.stack([rewards, -rewards], 1).flatten()
        chosen = played[:, :, None] == np.arange(self.plays.shape[1])  # [rounds, factors, atoms]
        count = chosen.sum(0)
        self.plays += count
        mean = np.einsum("rfa,r->fa", chosen, rewards) / np.maximum(count, 1)
        weight = np.minimum(count[:, :, None], count[:, None, :]) * self._pairs
        self.difference += weight * (mean[:, :, None] - mean[:, None, :])
        self.matches += weight

    def table(self) -> list[dict[str, Any]]:
        """A row an atom: ``factor``, ``atom``, ``gap`` to the best (or ``None``), ``plays``, ``active``."""
        active, gaps = self._active_at(self.rounds), self.gaps()
        return [
            {
                "factor": factor, "atom": atom, "gap": None if math.isnan(gap := float(gaps[factor, atom])) else gap,
                "plays": int(self.plays[factor, atom]), "active": bool(active[factor, atom]),
            }
            for factor, size in enumerate(self.sizes)
            for atom in range(size)
        ]  # fmt: skip

    def to_json(self) -> str:
        """Everything, as JSON text; a bandit made of it goes on bit for bit."""
        arrays = {name: getattr(self, name).tolist() for name in (*_ARRAYS, "sizes")}
        settings = {name: getattr(self, name) for name in ("radius", "spread", "bounds", "dueling", "dwell", "rounds")}
        asked = None if self._asked is None else self._asked.tolist()
        return json.dumps({**arrays, **settings, "asked": asked, "rng": self.rng.bit_generator.state})

    @staticmethod
    def from_json(text: str) -> FactoredBandit:
        """What :meth:`to_json` gave.

        Raises:
            SecateurError: damaged data.
        """
        try:
            data = json.loads(text)
            own = {"bounds": data["bounds"]} if data["bounds"] is not None else {"spread": data["spread"]}
            own |= {name: data[name] for name in ("radius", "dueling", "dwell")}
            made = FactoredBandit(data["sizes"], **own)
            for name in _ARRAYS:
                value = np.array(data[name], dtype=getattr(made, name).dtype)
                if value.shape != getattr(made, name).shape:
                    raise SecateurError(f"the bandit's state is damaged: {name} has shape {list(value.shape)}")
                setattr(made, name, value)
            made.rounds = int(data["rounds"])
            made._asked = None if data["asked"] is None else np.array(data["asked"], dtype=np.int64)
            made.rng.bit_generator.state = data["rng"]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, SecateurError):
                raise
            raise SecateurError(f"the bandit's state is damaged ({type(error).__name__}: {error})") from error
        return made
