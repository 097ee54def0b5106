"""How far a search of widths has come, as data: one that was interrupted goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.allocation.search.arms import Effects
from secateur.allocation.search.bandit import FactoredBandit


@dataclass
class Plays:
    """What was played around a start.

    Attributes:
        bandit: what it knows.
        effects: what is fitted to the plays.
        scale: of the rewards.
        log: of each play the atoms, the reward and the batch.
        fitted: how many plays there were when price and favourite were last found.
    """

    bandit: FactoredBandit
    effects: Effects
    scale: float
    log: list[Any] = field(default_factory=list)
    fitted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {"bandit": self.bandit.to_json(), "scale": self.scale, "log": self.log, "fitted": self.fitted}

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> Plays:
        """What :meth:`to_dict` gave."""
        bandit, log = FactoredBandit.from_json(state["bandit"]), state["log"]
        effects = Effects(bandit.sizes.tolist())
        if log:
            asked, rewards, batches = zip(*log, strict=True)
            effects.add(np.array(asked), np.array(rewards), batches)
        return Plays(bandit, effects, float(state["scale"]), log, int(state["fitted"]))


@dataclass
class History:
    """How far a search has come.

    Attributes:
        whole: the whole network's loss on every batch.
        done: forwards.
        rises: of the loss when a group is narrowed alone, for each width, a list a batch and group (the next group's
            comes next).
        plays: what was played, once the start is known.
    """

    whole: list[float]
    done: int = 0
    rises: list[list[float]] = field(default_factory=list)
    plays: Plays | None = None

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        plays = None if self.plays is None else self.plays.to_dict()
        return {"whole": self.whole, "done": self.done, "rises": self.rises, "plays": plays}

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> History:
        """What :meth:`to_dict` gave."""
        plays = None if state["plays"] is None else Plays.from_dict(state["plays"])
        return History([float(loss) for loss in state["whole"]], int(state["done"]), list(state["rises"]), plays)

    def alone(self, groups: int) -> list[list[float]]:
        """The mean rises, a list a group, over the batches that all groups were tried on; none if there is no such."""
        batches = len(self.rises) // max(groups, 1)
        if not batches:
            return []
        return [np.mean(self.rises[group : batches * groups : groups], 0).tolist() for group in range(groups)]

    def fits(self, whole: np.ndarray) -> bool:
        """Whether it is of these losses of the whole network (a loss function has no better name)."""
        return len(self.whole) == len(whole) and np.allclose(self.whole, whole, rtol=1e-4, atol=1e-6)
