r"""A factored bandit: the best combination of arms, one of every factor, found from noisy rewards.

Only the reward of a whole combination is seen. This is the temporary-elimination algorithm of arXiv 1807.01488. Of that
paper only the abstract is public, so the constants are a reconstruction.

Rounds go in blocks. In a block every factor plays each of its active arms at least once, in a random order of its own.
So what the other factors play is noise, and has the same mean for any two arms of the factor::

    D_ij += m (mean_i - mean_j),    N_ij += m           m = min(plays of i, plays of j) in the block
    f(t) = (t + 1) log^2(t + 1)
    radius_ij = spread sqrt(radius log(2 |A| f(t)) / N_ij)
    j is active unless some i has D_ij / N_ij > radius_ij; all arms are active while some N_ij = 0

An arm that is eliminated comes back when ``f(t)`` has grown enough, so the algorithm needs no horizon. It assumes
*uniform identifiability*: a factor's best arm is best whatever the others play. Its regret then grows with the *sum* of
the factors' sizes and with the logarithm of time, not with the number of combinations. Rewards ``u_i v_j`` of rank one
with positive parts are a special case.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from secateur._internal.checks import check_count, check_flag, check_positive, check_seed
from secateur._internal.errors import SecateurError

THEORY_RADIUS = 12.0
"""Twice the variance proxy of a matched difference: noise of variance 1 on both sides, and the partners' effects."""

_ARRAYS = ("known", "favourite", "difference", "matches", "plays", "active")


def log_f(rounds: int) -> float:
    """``log f(t)``, at least 1."""
    return max(1.0, math.log(rounds + 1) + 2 * math.log(max(math.log(rounds + 1), 1e-300)))


class Player(ABC):
    """Anything that plays combinations of arms: :meth:`ask` gives the next ones, :meth:`tell` takes their rewards.

    Args:
        sizes: how many arms each factor has, two or more.
        seed: of whatever is drawn.

    Attributes:
        sizes: int64 [factors].
        rounds: how many combinations were played.
    """

    def __init__(self, sizes: Sequence[int], seed: int = 0) -> None:
        if isinstance(sizes, str) or not isinstance(sizes, (Sequence, np.ndarray)) or not len(sizes):
            raise SecateurError(
                f"sizes={sizes!r}: the number of arms of every factor, at least one factor, is expected"
            )
        for factor, size in enumerate(sizes):
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
                raise SecateurError(f"factor {factor} has {size!r} arms: a whole number from 2 on is expected")
            if size == 1:
                raise SecateurError(f"factor {factor} has one arm: there is nothing to choose, leave the factor out")
        check_seed(seed)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.rounds = 0
        self.rng = np.random.default_rng(seed)
        self._asked: np.ndarray | None = None

    def combinations(self, most: int) -> int:
        """How many combinations there are, for players to whom each is an arm.

        Raises:
            SecateurError: more than so many.
        """
        count = math.prod(int(size) for size in self.sizes)
        if count > most:
            raise SecateurError(f"{type(self).__name__}: {count:,} combinations are too many; {most:,} are allowed")
        return count

    def ask(self, most: int | None = None) -> np.ndarray:
        """The next combinations, int64 [rounds, factors]; the same ones until their rewards are told.

        Args:
            most: where nothing is left to learn, so many rounds may be planned at once (default: one block).
        """
        if self._asked is None:
            self._asked = self._plan(most)
        return self._asked.copy()

    def tell(self, rewards: Sequence[float] | np.ndarray) -> None:
        """Learn from the rewards of the combinations that were asked for.

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
        sizes: how many arms each factor has, two or more.
        radius: of the confidence intervals, squared; 12 is the theory's. Less explores less and errs more often.
        spread: the scale of the rewards: divided by it they have means in [-1, 1] and sub-Gaussian noise of variance 1
            or less.
        bounds: the least and the largest possible reward, instead of ``spread``, which is half of their distance then;
            rewards outside are refused.
        dueling: play two combinations against each other: ``ask`` gives [rounds, 2, factors], and the reward is by how
            much the first was better.
        dwell: makes a block so many times as long; beyond its active arms each factor then plays its favourite. So few
            factors are away from their favourites at a time, and what the others play disturbs less.
        seed: of the orders.

    Attributes:
        known: a known part of each arm's reward that :meth:`tell` is not told, such as its cost, float64 [factors,
            arms]. It may be changed at any time; what was learned stays right.
        favourite: with ``dwell``, the combination to stay near, int64 [factors]. It may be changed at any time; where
            it is -1 or eliminated, the best-looking arm takes its place.
        difference: ``D``, float64 [factors, arms, arms].
        matches: ``N``, likewise.
        plays: how often each arm was played, int64 [factors, arms].
        active: bool [factors, arms].
    """

    def __init__(
        self, sizes: Sequence[int], *, radius: float = THEORY_RADIUS, spread: float = 1.0,
        bounds: tuple[float, float] | None = None, dueling: bool = False, dwell: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(sizes, seed)
        check_positive("radius", radius)
        check_positive("spread", spread)
        check_flag("dueling", dueling)
        check_count("dwell", dwell)
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
        """Which arms are active if these are the statistics after so many rounds."""
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
        """By how much each arm looks better than each other by its rewards, [factors, arms, arms], or NaN."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.matches > 0, self.difference / self.matches, np.nan)

    def gaps(self) -> np.ndarray:
        """By how much each arm looks worse than its factor's best-looking one, [factors, arms]; NaN: not known."""
        mean, best = self.means() + self._known_differences(), self.best()
        found = np.where(self._real, np.take_along_axis(mean, best[:, None, None], 1)[:, 0], np.nan)
        found[np.arange(len(best)), best] = 0
        return found

    def _wins(self) -> np.ndarray:
        """The mean difference to the other active arms, [factors, arms]; minus infinity for those that are not."""
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
        # each active arm once; a factor with fewer arms than the block has rounds goes round, the best-looking first
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
        """For how many rounds, up to so many, no eliminated arm comes back: one arm alone teaches nothing."""
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
        chosen = played[:, :, None] == np.arange(self.plays.shape[1])  # [rounds, factors, arms]
        count = chosen.sum(0)
        self.plays += count
        mean = np.einsum("rfa,r->fa", chosen, rewards) / np.maximum(count, 1)
        weight = np.minimum(count[:, :, None], count[:, None, :]) * self._pairs
        self.difference += weight * (mean[:, :, None] - mean[:, None, :])
        self.matches += weight

    def table(self) -> list[dict[str, Any]]:
        """A row an arm: ``factor``, ``arm``, ``gap`` to the best (or ``None``), ``plays``, ``active``."""
        active, gaps = self._active_at(self.rounds), self.gaps()
        return [
            {
                "factor": factor, "arm": arm, "gap": None if math.isnan(gap := float(gaps[factor, arm])) else gap,
                "plays": int(self.plays[factor, arm]), "active": bool(active[factor, arm]),
            }
            for factor, size in enumerate(self.sizes)
            for arm in range(size)
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
