"""A budget: what may remain of a network, in real units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self

import numpy as np

from secateur._internal.checks import is_number
from secateur._internal.errors import InfeasibleBudget, SecateurError, unknown
from secateur.allocation.alike import Alike, check_alike, classes, common_stops
from secateur.measure.backends import EAGER, check_backend
from secateur.tracing.graph import ChannelGraph

UNITS = ("macs", "params", "channels")
LATENCY = "latency_ms"
OTHER_WORDS = {
    "flops": "macs", "ops": "macs", "parameters": "params", "weights": "params", "size": "params",
    "filters": "channels", "neurons": "channels", "latency": LATENCY, "ms": LATENCY, "time": LATENCY,
}  # fmt: skip
"""What others call our units."""
AUTO = "auto"
MULTIPLE = 8
"""Kernels take so many channels at a time, on CPUs (AVX registers, blocked layouts) and on GPUs (tensor cores)."""
LEVELS = 4
"""``round_to="auto"`` leaves every group at least so many widths to choose from, or all that it has."""


class Timed(Protocol):
    """What knows how long a forward takes at any widths (a :class:`secateur.LatencyModel` does)."""

    def ms(self, widths: np.ndarray) -> np.ndarray:
        """Milliseconds at widths [..., groups], never less where any is larger."""

    def slope(self, widths: np.ndarray) -> np.ndarray:
        """What one channel more of each group takes at widths [groups], in milliseconds."""

    def key(self) -> str:
        """What tells one such thing from another."""


class _KnownKeywords:
    """Refuses a keyword that a budget does not have in our words; of a dataclass alone it would be a TypeError."""

    def __new__(cls, *args: object, **given: object) -> Self:
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name, value in given.items():
            if name in OTHER_WORDS:
                raise SecateurError(f"Budget({name}={value!r}): the word here is {OTHER_WORDS[name]}=")
            if name not in known:
                raise unknown("budget", name, known)
        return super().__new__(cls)


@dataclass(frozen=True, repr=False)
class Budget(_KnownKeywords):
    """What may remain, as fractions of the original in (0, 1]; several hold together.

    A fraction of the FLOPs is the same fraction of the MACs: ``macs=0.5``.

    Attributes:
        macs: multiply-accumulates of one forward.
        params: parameters.
        channels: removable channels.
        latency_ms: milliseconds of one forward, no fraction, as :func:`secateur.measure_latency` measures them.
        backend: what these milliseconds are of: ``"eager"`` PyTorch, ``"compile"`` or ``"onnxruntime"`` (on the CPU).
        round_to: every layer that is cut ends with a multiple of this many channels. ``"auto"`` is 8, which kernels are
            made for; of groups of fewer than 32 channels it is 4, 2 or 1, so that they have four widths to choose from
            still. Below that a group may have 4, 2 or 1 channels, so that every budget can be met that ``1`` can meet;
            and where such widths would leave more than a twentieth of the budget unused, some groups get multiples of
            4, 2 or 1 (but not from a strategy that tries widths on data, nor within ``latency_ms``).
        at_least: no group ends with fewer: a whole number of channels, a fraction of its width in (0, 1), ``"all"``, or
            any of these by group name. 1 is one channel; 1.0, which could mean all as well, is refused.
        alike: groups end with equally many channels, as configurations of `transformers` and serving engines want:
            ``True`` for all whose layers have one name (``gate_proj`` of every layer), or patterns of groups' names,
            each for those that are alike. Only groups of one width are. Which channels go each decides for itself; if
            one has to stay whole, so do the others.
    """

    macs: float | None = None
    params: float | None = None
    channels: float | None = None
    latency_ms: float | None = None
    round_to: int | str = AUTO
    at_least: float | str | Mapping[str, float | str] = 1
    backend: str = EAGER
    alike: Alike = False

    def __post_init__(self) -> None:
        for unit in UNITS:
            _check_fraction(unit, getattr(self, unit))
        if self.latency_ms is not None and not (is_number(self.latency_ms) and self.latency_ms > 0):
            raise SecateurError(f"Budget(latency_ms={self.latency_ms!r}): milliseconds, a number above 0, are expected")
        if not self.limits and self.latency_ms is None:
            raise SecateurError(
                "Budget(): nothing is limited; give at least one of macs=, params=, channels=, latency_ms="
            )
        check_backend(self.backend)
        if self.backend != EAGER and self.latency_ms is None:
            raise SecateurError(f"Budget(backend={self.backend!r}): it is that of latency_ms=, which is not given")
        check_round_to("Budget", self.round_to)
        floors = self.at_least.values() if isinstance(self.at_least, Mapping) else [self.at_least]
        for floor in floors:
            _check_floor(floor)
        check_alike(self.alike)

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in given)})"

    @property
    def limits(self) -> dict[str, float]:
        """The units that are limited to fractions, with these."""
        return {unit: getattr(self, unit) for unit in UNITS if getattr(self, unit) is not None}

    def refuse_latency(self, where: str) -> None:
        """Raise if the time is limited, which not everything can count."""
        if self.latency_ms is not None:
            raise SecateurError(
                f"Budget(latency_ms=...) with {where}: only prune() and allocate() know how long networks take; limit "
                "macs=, params= or channels= here"
            )

    def refuse_alike(self, where: str) -> None:
        """Raise if groups are to be alike, which not everything can do."""
        if self.alike:
            raise SecateurError(
                f"Budget(alike=...) with {where}: that gives every layer a width of its own; leave alike= out, or "
                "prune with secateur.prune"
            )

    @property
    def finer(self) -> tuple[int, ...]:
        """The largest steps to go on with, where those of ``"auto"`` leave much of the budget unused."""
        return tuple(MULTIPLE >> n for n in range(1, MULTIPLE.bit_length())) if self.round_to == AUTO else ()

    def steps(self, graph: ChannelGraph, largest: int = MULTIPLE) -> np.ndarray:
        """What the width of every group is to be a multiple of, int64; of ``"auto"`` no more than the largest."""
        if self.round_to != AUTO:
            return np.full(len(graph.groups), self.round_to, dtype=np.int64)
        return np.array([auto_step(len(group), group.positions, largest) for group in graph.groups], dtype=np.int64)

    def stops(self, graph: ChannelGraph, largest: int = MULTIPLE) -> list[np.ndarray]:
        """The widths that every group may be given, but all its channels: the largest first, int64 [stops]."""
        named = graph.by_name(self.at_least) if isinstance(self.at_least, Mapping) else {}
        found = []
        for group, step in zip(graph.groups, self.steps(graph, largest), strict=True):
            wanted = named.get(group.name, 1) if isinstance(self.at_least, Mapping) else self.at_least
            least = max(group.least, floor_of(wanted, len(group)))
            found.append(multiples(len(group) - 1, least, int(step), halves=self.round_to == AUTO))
        return found

    def floors(self, graph: ChannelGraph) -> np.ndarray:
        """The least width of every group (int64), ``round_to`` and ``alike`` respected."""
        members, least = classes(graph, self.alike), graph.widths
        for own, stops in zip(members, common_stops(members, self.stops(graph)), strict=True):
            least[own] = stops[-1] if len(stops) else least[own]
        return least


USED_ENOUGH = 0.95
"""Rounded sizes that use a smaller part of a budget make room for finer ones, or are told."""


def used_of(allowed: Mapping[str, float], now: Mapping[str, float]) -> float:
    """The part that is used of the limit that is used most; 1 if nothing is limited."""
    return max((now[unit] / max(limit, 1) for unit, limit in allowed.items()), default=1.0)


def unused(
    budget: Budget, before: Mapping[str, int], after: Mapping[str, int], what: str, *, filled: bool = True
) -> list[str]:
    """What is to be told where rounded sizes leave much of a budget: a remark, or none.

    Args:
        budget: what was allowed.
        before: unit -> what the whole network costs.
        after: unit -> what is left.
        what: the sizes, in words.
        filled: whether what those of ``"auto"`` left has been filled by finer ones.
    """
    used = used_of({unit: part * before[unit] for unit, part in budget.limits.items()}, after)
    if budget.round_to == 1 or (filled and budget.finer) or used >= USED_ENOUGH:
        return []
    return [f"{what} use {used:.0%} of what the budget allows: Budget(round_to=1) would use more of it"]


def check_round_to(who: str, value: object) -> None:
    """Raise if it is no width to round to."""
    if value == AUTO or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return
    raise SecateurError(f"{who}(round_to={value!r}): a whole number from 1 on, or 'auto', is expected")


def auto_step(width: int, positions: int = 1, largest: int = MULTIPLE) -> int:
    """What ``round_to="auto"`` makes the width of a group a multiple of.

    Args:
        width: of the whole group.
        positions: how many positions of an axis each of its channels is, such as the size of a head.
        largest: no step is larger.
    """
    step = largest
    while step > 1 and step * LEVELS > width:
        step //= 2
    return step // math.gcd(step, positions)


def multiples(most: int, least: int, step: int, *, halves: bool) -> np.ndarray:
    """The multiples of a step from the most down to the least, int64; below the step its halves too, if wanted."""
    widths = np.arange(most // step * step, 0, -step)
    if halves:
        powers = step >> np.arange(1, step.bit_length())
        widths = np.r_[widths, powers[powers <= most]]
    return widths[widths >= least].astype(np.int64)


def in_round(budget: Budget, number: int, rounds: int, full: Mapping[str, int], now: Mapping[str, int]) -> Budget:
    """The budget of one of several rounds, every one of which keeps the same share.

    Args:
        budget: what may remain after the last round, as fractions of the original.
        number: which round, from 1 on.
        rounds: how many there are.
        full: unit -> what the original costs.
        now: unit -> what the model costs by now, of which the fractions of the result are.

    Raises:
        SecateurError: see :func:`check_rounds`.
    """
    check_rounds(budget, rounds)
    fractions: dict[str, Any] = {}
    for unit, fraction in budget.limits.items():
        allowed = math.floor(fraction ** (number / rounds) * full[unit] + 1e-9)
        fractions[unit] = min(1.0, math.nextafter(allowed / max(now[unit], 1), 2.0))  # never a unit less by rounding
    return replace(budget, **fractions)


def check_rounds(budget: Budget, rounds: int) -> None:
    """Raise if something in the budget has no meaning over several rounds."""
    if rounds == 1:
        return
    budget.refuse_latency(f"rounds={rounds}")
    if budget.channels is not None:
        raise SecateurError(
            f"Budget(channels=...) with rounds={rounds}: a group that has one channel left is none any more, and would "
            "not be counted; limit macs= or params="
        )
    if not isinstance(budget.at_least, int):
        raise SecateurError(
            f"Budget(at_least={budget.at_least!r}) with rounds={rounds}: groups and their widths are others in every "
            "round; give one number of channels"
        )


def _check_floor(floor: object) -> None:
    counts = isinstance(floor, int) and not isinstance(floor, bool) and floor >= 1
    fraction = isinstance(floor, float) and 0 < floor < 1
    if floor == "all" or counts or fraction:
        return
    trap = "at_least=1 is one channel, at_least='all' is every channel; " if floor in (1.0, True) else ""
    raise SecateurError(
        f"Budget(at_least={floor!r}): {trap}a whole number of channels (1, 2, ...), a fraction in (0, 1) or 'all' is "
        "expected"
    )


def floor_of(wanted: float | str, width: int) -> int:
    """How many of so many channels must stay at least."""
    if isinstance(wanted, str):
        return width
    return math.ceil(wanted * width) if wanted < 1 else int(wanted)


def _check_fraction(unit: str, value: object) -> None:
    if value is None:
        return
    wrong = f"Budget({unit}={value!r}): a fraction of the original in (0, 1] is expected"
    if not isinstance(value, (int, float)) or isinstance(value, bool) or math.isnan(value):
        raise SecateurError(f"{wrong}; {value!r} is not a number")
    if value > 1:
        raise SecateurError(f"{wrong}; {value!r} keeps more than everything")
    if value <= 0:
        raise SecateurError(f"{wrong}; {value!r} keeps nothing")


class Meter:
    """Counts widths of groups against a budget.

    Args:
        graph: the channel graph.
        budget: what may remain.
        latency: how long forwards take; needed where the budget limits that, and only there.
        members: how many groups of the original each group stands for, int64 [groups]; one, if not given.

    Attributes:
        full: unit -> what the whole network has of it.
        allowed: limited unit -> how much of it may remain.
    """

    def __init__(
        self, graph: ChannelGraph, budget: Budget, latency: Timed | None = None, members: np.ndarray | None = None
    ) -> None:
        self.graph, self.budget, self.latency = graph, budget, latency
        self.members = np.ones(len(graph.groups), dtype=np.int64) if members is None else members
        units = UNITS if latency is None else (*UNITS, LATENCY)
        self.full: dict[str, float] = {unit: self._count(unit, graph.widths) for unit in units}
        for unit in budget.limits:
            if not self.full[unit]:
                raise SecateurError(f"Budget({unit}=...): the model has no {unit} to count; limit something else")
        self.allowed: dict[str, float] = {
            unit: math.floor(f * self.full[unit] + 1e-9) for unit, f in budget.limits.items()
        }
        if budget.latency_ms is not None:
            if latency is None:
                raise SecateurError(
                    "Budget(latency_ms=...): how long networks take is to be measured first; call prune(), or "
                    "allocate(..., latency=secateur.measure_latency(model, graph)); what prunes while it trains cannot "
                    "limit it"
                )
            self.allowed[LATENCY] = float(budget.latency_ms)

    def at(self, ms: float) -> Meter:
        """The same with another latency allowed."""
        other = copy(self)
        other.allowed = self.allowed | {LATENCY: ms}
        return other

    def _count(self, unit: str, widths: np.ndarray) -> float:
        return self._counts(unit, widths).item()

    def _counts(self, unit: str, widths: np.ndarray) -> np.ndarray:
        if unit == "channels":
            return (widths * self.members).sum(-1)
        if unit == LATENCY:
            assert self.latency is not None
            return self.latency.ms(widths)
        terms = self.graph.macs_terms if unit == "macs" else self.graph.params_terms
        return terms.totals(self.graph.lengths(widths))

    def excess(self, widths: np.ndarray) -> dict[str, float]:
        """How far every limited unit is above what is allowed (negative: room left)."""
        return {unit: self._count(unit, widths) - limit for unit, limit in self.allowed.items()}

    def met(self, widths: np.ndarray) -> bool:
        """Whether these widths are within the budget."""
        return bool(self.which_met(widths))

    def used(self, widths: np.ndarray) -> float:
        """The part that these widths use of the limit that they use most."""
        return used_of(self.allowed, {unit: self._count(unit, widths) for unit in self.allowed})

    def which_met(self, widths: np.ndarray) -> np.ndarray:
        """Which widths [..., groups] are within the budget, bool [...]."""
        return np.all([self._counts(unit, widths) <= limit for unit, limit in self.allowed.items()], axis=0)

    def freed(self, widths: np.ndarray, units: list[str]) -> np.ndarray:
        """What one channel less of each group frees, in fractions of the original summed over units (first order)."""
        total = np.zeros(len(widths))
        for unit in units:
            if unit == "channels":
                total += self.members / self.full[unit]
                continue
            if unit == LATENCY:
                assert self.latency is not None
                total += self.latency.slope(widths) / self.full[unit]
                continue
            terms = self.graph.macs_terms if unit == "macs" else self.graph.params_terms
            slope = terms.gradient(self.graph.lengths(widths))
            total += (self.graph.multiplicity.T @ slope) / self.full[unit]
        return total

    def check_feasible(self, least: np.ndarray, *, approximate: bool) -> None:
        """Raise if even the least widths are over the budget, with the range that is feasible.

        Whether a latency can be met the fit does not know well enough; the clock decides.
        """
        over = [unit for unit, n in self.excess(least).items() if n > 0 and unit != LATENCY]
        if not over:
            return
        parts = []
        for unit in over:
            low = self._count(unit, least)
            parts.append(asked(unit, self.budget.limits[unit], self.allowed[unit], low, self.full[unit]))
        advice = (
            ""
            if approximate or all(g.exact for g in self.graph.groups)
            else " (approximate=True would allow more groups)"
        )
        raise InfeasibleBudget(
            f"the budget cannot be met: {'; '.join(parts)}: raise it, or lower at_least= or round_to={advice}"
        )


def asked(unit: str, fraction: float, allowed: float, least: float, full: float) -> str:
    """What a limit that cannot be met asks for, and what would be feasible."""
    return (
        f"{unit}={fraction!r} asks for at most {allowed:,} of {full:,} {unit}; feasible are {least:,} "
        f"({rounded_up(least / full)}) to {full:,} (1)"
    )


def rounded_up(fraction: float) -> str:
    """A fraction, rounded up to four digits, so that it is feasible as printed."""
    digits = 4 - math.floor(math.log10(fraction)) if fraction > 0 else 4
    return f"{min(1.0, math.ceil(fraction * 10**digits) / 10**digits):.{digits}g}"


def budget_from(given: Mapping[str, Any]) -> Budget:
    """A budget from keyword arguments in a mapping, as a recipe has them."""
    return Budget(**given)
