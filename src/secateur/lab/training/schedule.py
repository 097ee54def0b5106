"""Learning-rate schedules: pure functions from progress in [0, 1) to a factor of the initial learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable

from secateur._internal.errors import unknown

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def one_cycle(progress: float, warm: float = 0.25, start: float = 0.04) -> float:
    """Linear from ``start`` to 1 while ``progress < warm``, then linear to 0 (after arXiv 1708.07120)."""
    if progress < warm:
        return start + (1 - start) * progress / warm
    return (1 - progress) / (1 - warm)


def cosine(progress: float) -> float:
    """Half a cosine from 1 to 0 (arXiv 1608.03983, without restarts)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def steps(progress: float, at: tuple[float, ...] = (0.5, 0.75), factor: float = 0.1) -> float:
    """Times ``factor`` at each of the given fractions."""
    return factor ** sum(progress >= fraction for fraction in at)


def grda(progress: float, last: float = 0.1) -> float:
    """1 until half, linear to ``last`` at 90 %, then ``last`` (the schedule of gRDA, arXiv 2006.09358)."""
    if progress < 0.5:
        return 1.0
    return max(last, 1 - (1 - last) * (progress - 0.5) / 0.4)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "one_cycle": one_cycle,
    "cosine": cosine,
    "steps": steps,
    "grda": grda,
}


def named(schedule: str | Schedule) -> Schedule:
    """The schedule of that name; a function is returned as it is."""
    if callable(schedule):
        return schedule
    if schedule not in SCHEDULES:
        raise unknown("schedule", schedule, SCHEDULES)
    return SCHEDULES[schedule]
