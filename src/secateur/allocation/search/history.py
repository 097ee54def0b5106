"""The state of a search of widths, as data: what a checkpoint holds, and from where an interrupted search goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.allocation.search.arms import Effects
from secateur.allocation.search.bandit import FactoredBandit
from secateur.allocation.sensitivity import Rises


@dataclass
class Plays:
    """What was played around a start.

    Attributes:
        bandit: decides what is played next.
        effects: the fit to the plays.
        scale: what the rises of the loss are divided by to be rewards.
        log: of each play the arms, the reward and the batch.
        fitted: how many plays there were when the price and the favourite were last computed.
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
        done: forwards so far, of all processes; those of the whole network are not counted.
        rises: what the loss rose by where single groups were narrowed.
        plays: what was played, once the start is known.
    """

    done: int = 0
    rises: Rises = field(default_factory=dict)
    plays: Plays | None = None

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        plays = None if self.plays is None else self.plays.to_dict()
        rises = [[group, batch, own] for (group, batch), own in self.rises.items()]
        return {"done": self.done, "rises": rises, "plays": plays}

    @staticmethod
    def from_dict(state: Mapping[str, Any]) -> History:
        """What :meth:`to_dict` gave."""
        plays = None if state["plays"] is None else Plays.from_dict(state["plays"])
        rises = {(int(group), int(batch)): [float(r) for r in own] for group, batch, own in state["rises"]}
        return History(int(state["done"]), rises, plays)
