r"""By how much a unit's penalty changes, from its rank: up for the least important, down for those that shall stay.

With ``r`` the rank (0 is the least important of the units that are left), ``n`` how many are still to go, ``A`` the
increment at rank 0 (arXiv 1709.06994 and 1811.08390, constants as in their released code)::

    alpha = ln(2 / u) / n,    n1 = -ln(u) / alpha

    centre_symmetric    A exp(-alpha r)                        r <  n1
                        2 u A - A exp(-alpha (2 n1 - r))       r >= n1        point-symmetric about (n1, u A)
    piecewise_linear    A (1 - r / n)                          r <= n
                        -A (r - n) / (m - 1 - n)               r >  n         m units are left, the last gets -A

Both are 0 exactly at ``r = n``: the units that are to go rise, all others fall and recover.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Increment = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From ranks, how many are to go and how many are left (by unit, float64) to multiples of ``A``."""
U = 0.25


def centre_symmetric(rank: Tensor, wanted: Tensor, left: Tensor, u: float = U) -> Tensor:
    """Two exponentials, steep at both ends."""
    alpha = math.log(2 / u) / wanted.clamp(min=1)
    centre = -math.log(u) / alpha
    falling = torch.exp(-alpha * torch.minimum(rank, centre))
    rising = torch.exp(-alpha * (2 * centre - torch.maximum(rank, centre)).clamp(min=-50 / alpha))
    return torch.where(rank < centre, falling, 2 * u - rising)


def piecewise_linear(rank: Tensor, wanted: Tensor, left: Tensor) -> Tensor:
    """Two straight lines."""
    wanted = wanted.clamp(min=1)
    above = -(rank - wanted) / (left - 1 - wanted).clamp(min=1)
    return torch.where(rank <= wanted, 1 - rank / wanted, above)


RANK_SCHEDULES: dict[str, Increment] = {"centre_symmetric": centre_symmetric, "piecewise_linear": piecewise_linear}


def updates_needed(count: int, wanted: int, increment: Increment, rate: float, limit: float) -> int:
    """How many updates it takes until so many units of a group are out, if ranks stay as they are.

    Of many small updates several are taken at once, so the answer is up to one in 200 too low.

    Args:
        count: units of the group.
        wanted: how many shall go.
        increment: the rank rule.
        rate: ``A``.
        limit: the penalty at which a unit is out.
    """
    at_once = max(1, int(limit / rate) // 200)
    penalty = torch.zeros(count, dtype=torch.float64)  # by rank; the first ones go first
    updates = gone = 0
    while gone < wanted:
        left = penalty[gone:]
        rank = torch.arange(len(left), dtype=torch.float64)
        numbers = (torch.full_like(rank, wanted - gone), torch.full_like(rank, len(left)))
        penalty[gone:] = (left + at_once * rate * increment(rank, *numbers)).clamp(min=0)
        gone += min(int((penalty[gone:] >= limit * (1 - 1e-9)).sum()), wanted - gone)
        updates += at_once
    return updates - at_once + 1 if updates else 0
