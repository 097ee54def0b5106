"""Players that a factored bandit is compared with: uniform play, UCB1 by factor or by combination, elimination."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from secateur.allocation.search.bandit import THEORY_RADIUS, Player, log_f


class Uniform(Player):
    """Every combination alike."""

    def _plan(self, most: int | None) -> np.ndarray:
        return self.rng.integers(0, self.sizes, size=(most or 1, len(self.sizes)))

    def _learn(self, played: np.ndarray, rewards: np.ndarray) -> None:
        pass

    def best(self) -> np.ndarray:
        """Nothing is learned: any combination."""
        return np.zeros(len(self.sizes), dtype=np.int64)


class FactorUCB(Player):
    """UCB1 (Auer and others, 2002) for every factor on its own, as if the others were noise.

    Args:
        sizes: see :class:`Player`.
        spread: as for :class:`FactoredBandit`.
        seed: not used.
    """

    def __init__(self, sizes: Sequence[int], *, spread: float = 1.0, seed: int = 0) -> None:
        super().__init__(sizes, seed)
        most = int(self.sizes.max())
        self.spread = spread
        self.total, self.plays = np.zeros((len(self.sizes), most)), np.zeros((len(self.sizes), most))
        self._real = np.arange(most) < self.sizes[:, None]

    def _plan(self, most: int | None) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            bonus = 2 * self.spread * np.sqrt(2 * math.log(self.rounds + 1) / self.plays)
            index = np.where(self.plays > 0, self.total / self.plays + bonus, np.inf)
        return np.where(self._real, index, -np.inf).argmax(1)[None]

    def _learn(self, played: np.ndarray, rewards: np.ndarray) -> None:
        factor = np.arange(len(self.sizes))
        for combination, reward in zip(played, rewards, strict=True):
            self.total[factor, combination] += reward
            self.plays[factor, combination] += 1

    def best(self) -> np.ndarray:
        """The best means, factor by factor."""
        mean = np.divide(self.total, self.plays, out=np.full_like(self.total, -np.inf), where=self.plays > 0)
        return mean.argmax(1)


class JointUCB(Player):
    """UCB1 with an arm for every combination: for small problems.

    Args:
        sizes: see :class:`Player`.
        spread: as for :class:`FactoredBandit`.
        seed: not used.
    """

    def __init__(self, sizes: Sequence[int], *, spread: float = 1.0, seed: int = 0) -> None:
        super().__init__(sizes, seed)
        self.arms = FactorUCB([self.combinations(10**6)], spread=spread)

    def _plan(self, most: int | None) -> np.ndarray:
        return np.stack(np.unravel_index(self.arms.ask()[:, 0], self.sizes), 1)

    def _learn(self, played: np.ndarray, rewards: np.ndarray) -> None:
        self.arms.tell(rewards)

    def best(self) -> np.ndarray:
        """The combination with the best mean."""
        return np.array(np.unravel_index(int(self.arms.best()[0]), self.sizes))


class SuccessiveElimination(Player):
    """Successive elimination: every combination is an arm; a block plays each that is left once; what is beaten is out.

    Args:
        sizes: see :class:`Player`.
        radius: as for :class:`FactoredBandit`; ``spread`` likewise.
        spread: likewise.
        seed: of the order within a block.
    """

    def __init__(
        self, sizes: Sequence[int], *, radius: float = THEORY_RADIUS, spread: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__(sizes, seed)
        arms = self.combinations(10**4)
        self.radius, self.spread = radius, spread
        self.left, self.total, self.blocks = np.arange(arms), np.zeros(arms), 0

    def _plan(self, most: int | None) -> np.ndarray:
        if len(self.left) == 1 and most is not None:
            return np.stack(np.unravel_index(np.repeat(self.left, most), self.sizes), 1)
        self._order = self.rng.permutation(self.left)
        return np.stack(np.unravel_index(self._order, self.sizes), 1)

    def _learn(self, played: np.ndarray, rewards: np.ndarray) -> None:
        if len(self.left) == 1:
            return
        self.total[self._order] += rewards
        self.blocks += 1
        mean = self.total[self.left] / self.blocks
        level = math.log(2 * len(self.total)) + log_f(self.rounds)
        reach = self.spread * math.sqrt(self.radius * level / self.blocks)
        self.left = self.left[mean >= mean.max() - reach]

    def best(self) -> np.ndarray:
        """The combination with the best mean among those left."""
        return np.array(np.unravel_index(int(self.left[self.total[self.left].argmax()]), self.sizes))
