r"""By how much a unit's penalty changes, from its rank: up for the least important, down for those that shall stay.

With ``r`` the rank (0 is the least important of the units that remain), ``n`` how many are still to be pruned, ``A``
the step at rank 0 (arXiv 1709.06994 and 1811.08390, constants as in their released code)::

    alpha = ln(2 / u) / n,    n1 = -ln(u) / alpha

    centre_symmetric    A exp(-alpha r)                        r <  n1
                        2 u A - A exp(-alpha (2 n1 - r))       r >= n1        point-symmetric about (n1, u A)
    piecewise_linear    A (1 - r / n)                          r <= n
                        -A (r - n) / (m - 1 - n)               r >  n         m units remain, the last gets -A

Both are 0 exactly at ``r = n``: the units that are to be pruned rise, all others fall and recover.

A unit's rank is its mean rank over all updates. Ranks of one moment change places from update to update, and a unit
that has just changed to a high one loses what it has gathered: groups would never be finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur._internal.checks import check_choice
from secateur.methods.units import Units

RankSchedule = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From ranks, how many units are to be pruned and how many remain (by unit, float64) to multiples of ``A``."""
FLATNESS = 0.25
"""The papers' ``u`` in (0, 1): the nearer to 1, the flatter the exponentials."""
COARSE_UPDATES = 200
"""A forecast takes no more updates than this until the first unit is out: of more, several are taken at once."""


def centre_symmetric(rank: Tensor, to_prune: Tensor, remaining: Tensor, flatness: float = FLATNESS) -> Tensor:
    """Two exponentials, steep at both ends."""
    alpha = math.log(2 / flatness) / to_prune.clamp(min=1)
    centre = -math.log(flatness) / alpha
    falling = torch.exp(-alpha * torch.minimum(rank, centre))
    rising = torch.exp(-alpha * (2 * centre - torch.maximum(rank, centre)).clamp(min=-50 / alpha))
    return torch.where(rank < centre, falling, 2 * flatness - rising)


def piecewise_linear(rank: Tensor, to_prune: Tensor, remaining: Tensor) -> Tensor:
    """Two straight lines."""
    to_prune = to_prune.clamp(min=1)
    above = -(rank - to_prune) / (remaining - 1 - to_prune).clamp(min=1)
    return torch.where(rank <= to_prune, 1 - rank / to_prune, above)


RANK_SCHEDULES: dict[str, RankSchedule] = {"centre_symmetric": centre_symmetric, "piecewise_linear": piecewise_linear}
"""All schedules by name."""


def check_rank_schedule(name: object) -> None:
    """Raise if there is no such schedule."""
    check_choice("rank_schedule", name, RANK_SCHEDULES)


class MeanRanks:
    """The mean rank of every unit over all updates, and the change of penalties that a schedule makes of it.

    Args:
        units: the units that are ranked, each within its group.
        schedule: a name in :data:`RANK_SCHEDULES`.

    Attributes:
        mean: the mean rank, float64 [units].
        updates: over how many updates.
    """

    def __init__(self, units: Units, schedule: str) -> None:
        self.units, self.schedule = units, RANK_SCHEDULES[schedule]
        self.mean = torch.zeros(len(units), dtype=torch.float64, device=units.group_of.device)
        self.updates = 0

    def update(self, sizes: Tensor, pruned: Tensor) -> Tensor:
        """One update more.

        Args:
            sizes: of the units now, float64 [units].
            pruned: what is out, bool [units].

        Returns:
            The position of every unit in its group by mean rank, int64 [units]; -1 where it is out.
        """
        self.updates += 1
        rank = self.units.ranks(sizes, pruned)
        self.mean = self.mean + (rank.double() - self.mean) / self.updates
        return self.units.ranks(self.mean, pruned)

    def change(self, position: Tensor, pruned: Tensor) -> Tensor:
        """The change of every unit's penalty in multiples of ``A``, float64 [units]; 0 where its group is finished.

        Args:
            position: of every unit among those of its group that remain, int64 [units].
            pruned: what is out, bool [units].
        """
        units = self.units
        to_prune, remaining = units.to_prune - units.count(pruned), units.count(~pruned)
        of = units.group_of
        change = self.schedule(position.double(), to_prune[of].double(), remaining[of].double())
        return torch.where(pruned | (to_prune[of] <= 0), 0.0, change)

    def updates_needed(self, count: int, to_prune: int, rate: float, limit: float) -> int:
        """See :func:`updates_needed`."""
        return updates_needed(count, to_prune, self.schedule, rate, limit)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"mean": self.mean.clone(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.mean, self.updates = state["mean"].to(self.mean), int(state["updates"])


def updates_needed(count: int, to_prune: int, schedule: RankSchedule, rate: float, limit: float) -> int:
    """How many updates it takes until so many units of a group are out, if ranks stay as they are.

    Of many small updates several are taken at once, so the answer is up to one in 200 too low.

    Args:
        count: units of the group.
        to_prune: how many shall go.
        schedule: the rank schedule.
        rate: ``A``.
        limit: the penalty at which a unit is out.
    """
    at_once = max(1, int(limit / rate) // COARSE_UPDATES)
    penalty = torch.zeros(count, dtype=torch.float64)  # by rank; the first ones go first
    updates = pruned = 0
    while pruned < to_prune:
        remaining = penalty[pruned:]
        rank = torch.arange(len(remaining), dtype=torch.float64)
        numbers = (torch.full_like(rank, to_prune - pruned), torch.full_like(rank, len(remaining)))
        penalty[pruned:] = (remaining + at_once * rate * schedule(rank, *numbers)).clamp(min=0)
        pruned += min(int((penalty[pruned:] >= limit * (1 - 1e-9)).sum()), to_prune - pruned)
        updates += at_once
    return updates - at_once + 1 if updates else 0
