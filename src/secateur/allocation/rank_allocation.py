r"""How many rotated rows and columns each layer keeps, so that a budget is met (for EigenDamage).

A layer whose rows and columns are sorted by damage keeps a *box*: its first ``r`` rows and ``c`` columns. What it loses
is exact under the model of the curvature, a look-up in a double cumulative sum; what it costs is linear in ``r``, ``c``
and ``r c`` (a rotation in, a core, a rotation out), where a rotation that keeps all costs nothing: the core takes it
up. Leaving the layer alone is one more choice, without loss.

Ours: for a price per unit of cost every layer takes the box with the least loss plus price times cost; the price is
found by bisection, and what room the budget leaves is filled up. Layers then take a box of the hull of what they could
take; with one limit dynamic programming over all boxes, their costs in so many steps of the budget, is tried as well,
and the better one counts. Published (arXiv 1905.05934): one threshold on the damages of all rows and columns; a layer
that would not become smaller is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from secateur._internal.errors import InfeasibleBudget, SecateurError
from secateur._internal.workload import Workload
from secateur.allocation.budget import (
    AUTO,
    MULTIPLE,
    USED_ENOUGH,
    Budget,
    asked,
    auto_step,
    floor_of,
    multiples,
    used_of,
)
from secateur.curvature.eigenbasis import Eigenbasis
from secateur.result import Counts
from secateur.surgery.low_rank.bottleneck import three, width
from secateur.surgery.low_rank.replaceable import Candidate

STEPS, STEPS_A_LAYER = 4096, 64
"""Of a budget, in dynamic programming."""
Box = tuple[int, int] | None
"""Rows and columns kept, or None for a layer that is left alone."""


@dataclass(frozen=True, eq=False)
class Shape:
    """What a layer and its boxes cost in one unit.

    Attributes:
        whole: the layer as it is.
        row: each row kept (of the rotation out).
        column: each column kept (of the rotation in).
        both: each pair of a kept row and column (of the core).
        wide: so many rows and so many columns need no rotation.
    """

    whole: int
    row: int
    column: int
    both: int
    wide: tuple[int, int] = (0, 0)

    def of(self, rows: np.ndarray | int, columns: np.ndarray | int) -> np.ndarray | int:
        """The cost of boxes."""
        out, into = self.row * rows * (rows != self.wide[0]), self.column * columns * (columns != self.wide[1])
        return out + into + self.both * rows * columns


@dataclass(frozen=True, eq=False)
class Choice:
    """One layer's damages and costs.

    Attributes:
        name: the layer.
        damage: what each coordinate's removal costs, [rows, columns], both sorted by their sums, the largest first.
        cost: unit -> what it costs.
    """

    name: str
    damage: np.ndarray
    cost: Mapping[str, Shape]

    def costs(self, unit: str, box: Box) -> int:
        """What the layer costs with this box."""
        return int(self.cost[unit].of(*box)) if box is not None else self.cost[unit].whole

    @cached_property
    def loss(self) -> np.ndarray:
        """What is lost by every box, [rows + 1, columns + 1]."""
        kept = np.zeros((self.damage.shape[0] + 1, self.damage.shape[1] + 1))
        kept[1:, 1:] = self.damage.cumsum(0).cumsum(1)
        return np.maximum(kept[-1, -1] - kept, 0.0)


class Room:
    """What a budget allows, and what choices use of it.

    Args:
        choices: the layers that may become boxes.
        totals: unit -> what the whole network costs.
        budget: what may remain, in MACs or parameters.
        of: unit -> what the budget is a part of, where that is no longer the whole network.
        largest: of sizes by ``round_to="auto"``, the largest step.
    """

    def __init__(
        self, choices: Sequence[Choice], totals: Mapping[str, int], budget: Budget, of: Mapping[str, int] | None = None,
        largest: int = MULTIPLE,
    ) -> None:  # fmt: skip
        if "channels" in budget.limits:
            raise SecateurError("Budget(channels=...): rotated channels are no channels; limit macs= or params=")
        budget.refuse_latency("rotated layers")
        budget.refuse_alike("rotated layers")
        if isinstance(budget.at_least, Mapping):
            raise SecateurError("Budget(at_least={...}): one floor for all layers is expected here")
        self.choices, self.totals, self.budget = list(choices), dict(totals), budget
        self.of, self.largest = dict(of or totals), largest
        for unit in budget.limits:
            if not totals[unit]:
                raise SecateurError(f"Budget({unit}=...): the model has no {unit} to count; limit something else")
        self.fixed = {u: totals[u] - sum(c.cost[u].whole for c in choices) for u in budget.limits}
        self.allowed = {u: math.floor(f * self.of[u] + 1e-9) for u, f in budget.limits.items()}

    def sides(self, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of rows and of columns that a layer may keep."""
        return tuple(self._side(n) for n in choice.damage.shape)  # type: ignore[return-value]

    def _side(self, size: int) -> np.ndarray:
        least = floor_of(self.budget.at_least, size)  # type: ignore[arg-type]
        auto = self.budget.round_to == AUTO
        step = auto_step(size, 1, self.largest) if auto else int(self.budget.round_to)
        allowed = multiples(size, least, step, halves=auto)[::-1]
        return np.union1d(allowed, [size])

    def used(self, boxes: Sequence[Box]) -> dict[str, int]:
        """What the network costs with these boxes."""
        pairs = list(zip(self.choices, boxes, strict=True))
        return {u: fixed + sum(c.costs(u, box) for c, box in pairs) for u, fixed in self.fixed.items()}

    def finer(self, largest: int) -> Room:
        """The same with smaller steps of sizes."""
        return Room(self.choices, self.totals, self.budget, self.of, largest)

    def lost(self, boxes: Sequence[Box]) -> float:
        """What is lost with these boxes."""
        return float(sum(c.loss[b] if b else 0.0 for c, b in zip(self.choices, boxes, strict=True)))

    def met(self, boxes: Sequence[Box]) -> bool:
        """Whether the budget allows them."""
        return all(used <= self.allowed[u] for u, used in self.used(boxes).items())

    def smallest(self) -> list[Box]:
        """The cheapest choice of every layer, in any mix of the units: one that meets the budget, or comes nearest."""
        found = [[self._cheapest(choice, share) for choice in self.choices] for share in self.shares(65)]
        return min(found, key=self._excess)

    def shares(self, number: int) -> list[dict[str, float]]:
        """Mixes of the limited units, as weights that add up to 1; with one unit there is one."""
        units = list(self.allowed)
        if len(units) == 1:
            return [{units[0]: 1.0}]
        return [dict(zip(units, (s, 1 - s), strict=True)) for s in np.linspace(0, 1, number)]

    def _excess(self, boxes: Sequence[Box]) -> float:
        return max(0.0, *((used - self.allowed[u]) / self.totals[u] for u, used in self.used(boxes).items()))

    def _cheapest(self, choice: Choice, share: Mapping[str, float]) -> Box:
        rows, columns = self.sides(choice)
        of = [
            (s / self.totals[u], choice.cost[u].of(rows[:, None], columns[None]) - choice.cost[u].whole)
            for u, s in share.items()
        ]
        less = np.asarray(sum(weight * extra for weight, extra in of))
        row, column = divmod(int(less.argmin()), len(columns))
        return (int(rows[row]), int(columns[column])) if less.min() < 0 else None

    def check_real(self, real: Mapping[str, int], who: str) -> None:
        """Raise if what was counted in the end is above the budget, whatever was planned."""
        over = [unit for unit, allowed in self.allowed.items() if real[unit] > allowed]
        if over:
            raise SecateurError(
                f"{who}: the result has {real[over[0]]:,} {over[0]} where {self.allowed[over[0]]:,} are allowed: "
                "a layer is used in a way that was not seen; leave it whole (exclude=)"
            )

    def check(self) -> None:
        """Raise if not even the smallest boxes are within the budget."""
        boxes = self.smallest()
        if self.met(boxes):
            return
        used = self.used(boxes)
        parts = [
            asked(u, self.budget.limits[u], limit, used[u], self.of[u])
            for u, limit in self.allowed.items()
            if used[u] > limit
        ]
        raise InfeasibleBudget(
            f"the budget cannot be met: {'; '.join(parts)}: raise it, or lower at_least= or round_to="
        )


def choice_of(part: Candidate, basis: Eigenbasis | None) -> Choice:
    """The layer's costs; with a basis also its damages."""
    module, (before, after) = part.module, part.positions
    first, core, last = three(module)
    wide_in, wide_out = width(first, inward=True), width(last, inward=False)
    rows, columns = core.weight.shape[:2]
    taps = core.weight[0, 0].numel()
    shapes = {}
    for unit, inward, outward in (("params", 1, 1), ("macs", before, after)):
        row, column, both = wide_out * outward, wide_in * inward, taps * outward
        whole = both * rows * columns + row * rows * (last is not core) + column * columns * (first is not core)
        shapes[unit] = Shape(whole, row, column, both, (wide_out, wide_in))
    if basis is None:
        return Choice(part.name, torch.zeros(rows, columns).numpy(), shapes)
    return Choice(part.name, basis.energy()[0].sum(1).double().cpu().numpy() / 2, shapes)


def totals(counts: Counts) -> dict[str, int]:
    """What a network costs, by unit."""
    return {"macs": counts.macs, "params": counts.params}


def agreed(boxes: Sequence[Box], work: Workload) -> list[Box]:
    """The boxes that rank 0 has chosen."""
    found = work.agree([None if box is None else [int(side) for side in box] for box in boxes])
    return [None if box is None else (box[0], box[1]) for box in found]


def lagrangian(room: Room) -> list[Box]:
    """The boxes of least loss within a budget, by a price on cost; then filled up.

    With two limits the price is split between them in several ways, and the best outcome is taken. What steps by
    ``round_to="auto"`` leave of the budget is filled with finer ones; where that leaves much too, single ones decide.
    """
    room.check()

    def much_left(boxes: list[Box]) -> bool:
        return used_of(room.allowed, room.used(boxes)) < USED_ENOUGH

    best = _solved(room)
    for largest in room.budget.finer:
        if much_left(best):
            best = fill(room.finer(largest), best)
    if room.budget.finer and much_left(best):
        best = min(best, _solved(room.finer(1)), key=room.lost)
    return [None if _is_whole(c, box) else box for c, box in zip(room.choices, best, strict=True)]


def _solved(room: Room) -> list[Box]:
    """The best that was found with the sizes of a room."""
    found = [boxes for share in room.shares(9) if (boxes := _bisected(room, share)) is not None]
    found += [programmed(room)] if len(room.allowed) == 1 else []
    return min((fill(room, boxes) for boxes in found or [room.smallest()]), key=room.lost)


def _is_whole(choice: Choice, box: Box) -> bool:
    """Whether a box is the layer as it is."""
    return box == choice.damage.shape and all(choice.costs(unit, box) == of.whole for unit, of in choice.cost.items())


def programmed(room: Room) -> list[Box]:
    """The boxes of least loss by dynamic programming, costs rounded up to steps of the one budget."""
    (unit, allowed), fixed = next(iter(room.allowed.items())), next(iter(room.fixed.values()))
    step = max(1, -(-(allowed - fixed) // (STEPS + STEPS_A_LAYER * len(room.choices))))
    most = (allowed - fixed) // step
    best, ways = np.zeros(most + 1), []
    for choice in room.choices:
        rows, columns = room.sides(choice)
        costs = np.append(choice.cost[unit].of(rows[:, None], columns[None]), choice.cost[unit].whole)
        losses = np.append(choice.loss[np.ix_(rows, columns)], 0.0)
        steps = -(-costs // step)
        order = np.lexsort((losses, steps))
        order = order[steps[order] <= most]
        lower = np.r_[True, losses[order][1:] < np.minimum.accumulate(losses[order])[:-1]]
        order = order[lower[: len(order)]]  # the others lose no less and cost no less
        new, way = np.full(most + 1, np.inf), np.full(most + 1, -1)
        for option in order:
            cost = int(steps[option])
            value = best[: most + 1 - cost] + losses[option]
            better = value < new[cost:]
            new[cost:][better], way[cost:][better] = value[better], option
        best = new
        ways.append((way, steps, rows, columns))
    if not np.isfinite(best[-1]):  # met, but not in whole steps
        return room.smallest()
    boxes: list[Box] = []
    left = most
    for way, steps, rows, columns in reversed(ways):
        option = int(way[left])
        left -= int(steps[option])
        row, column = divmod(option, len(columns))
        boxes.append(None if option == len(steps) - 1 else (int(rows[row]), int(columns[column])))
    return boxes[::-1]


def _bisected(room: Room, share: Mapping[str, float]) -> list[Box] | None:
    """The boxes at the least price that meets the budget."""
    tables = [_table(room, choice, share) for choice in room.choices]

    def at(price: float) -> list[Box]:
        return [_best(room, choice, table, price) for choice, table in zip(room.choices, tables, strict=True)]

    low, high = -60.0, 60.0  # of the price's logarithm; losses are relative to what all layers together can lose
    if room.met(at(0.0)):
        return at(0.0)
    if not room.met(at(math.exp(high))):
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if room.met(at(math.exp(middle))) else (middle, high)
    return at(math.exp(high))


def _table(room: Room, choice: Choice, share: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray, float]:
    """Losses and costs of all boxes that are allowed, relative to the network's, and the cost of the whole layer."""
    rows, columns = room.sides(choice)
    total = sum(c.loss[0, 0] for c in room.choices) or 1.0
    cost = sum(s * choice.cost[u].of(rows[:, None], columns[None]) / room.totals[u] for u, s in share.items())
    whole = sum(s * choice.cost[u].whole / room.totals[u] for u, s in share.items())
    return choice.loss[np.ix_(rows, columns)] / total, np.asarray(cost), float(whole)


def _best(room: Room, choice: Choice, table: tuple[np.ndarray, np.ndarray, float], price: float) -> Box:
    loss, cost, whole = table
    value = loss + price * cost
    at = int(value.argmin())
    if price * whole <= value.flat[at]:
        return None
    rows, columns = room.sides(choice)
    row, column = divmod(at, len(columns))
    return int(rows[row]), int(columns[column])


def fill(room: Room, boxes: list[Box]) -> list[Box]:
    """Use up what room there is: the row, column or whole layer that saves most per cost, until nothing fits."""
    boxes = list(boxes)
    while True:
        used = room.used(boxes)
        best: tuple[float, int, Box] = (-1.0, -1, None)
        for i, (choice, box) in enumerate(zip(room.choices, boxes, strict=True)):
            if box is None:
                continue
            for new in (None, *_larger(room, choice, box)):
                gain = float(choice.loss[box] - (choice.loss[new] if new else 0.0))
                more = {u: choice.costs(u, new) - choice.costs(u, box) for u in room.allowed}
                if all(used[u] + extra <= room.allowed[u] for u, extra in more.items()):
                    rate = gain / max(sum(max(e, 0) / room.totals[u] for u, e in more.items()), 1e-12)
                    best = max(best, (rate, i, new), key=lambda found: found[0])
        if best[1] < 0:
            return boxes
        boxes[best[1]] = best[2]


def _larger(room: Room, choice: Choice, box: tuple[int, int]) -> list[tuple[int, int]]:
    rows, columns = room.sides(choice)
    found = []
    if box[0] < rows[-1]:
        found.append((int(rows[np.searchsorted(rows, box[0], "right")]), box[1]))
    if box[1] < columns[-1]:
        found.append((box[0], int(columns[np.searchsorted(columns, box[1], "right")])))
    return found


def threshold(room: Room, limit: float = 0.95) -> list[Box]:
    """The published rule at the lowest threshold that meets the budget.

    Args:
        room: the budget.
        limit: no layer loses a larger part of its rows or of its columns.
    """
    room.check()
    scores = [(c.damage.sum(1), c.damage.sum(0)) for c in room.choices]
    pool = np.sort(np.concatenate([side for pair in scores for side in pair]))
    for fraction in np.linspace(0, 1, 513)[:-1]:
        bound = pool[int(fraction * len(pool))]
        boxes = [_kept(choice, pair, bound, limit) for choice, pair in zip(room.choices, scores, strict=True)]
        if room.met(boxes):
            return boxes
    raise InfeasibleBudget(
        f"rule='threshold' cannot meet {room.budget} with limit={limit}: raise the limit, or the budget"
    )


def _kept(choice: Choice, scores: tuple[np.ndarray, np.ndarray], bound: float, limit: float) -> Box:
    kept = tuple(max(int((side > bound).sum()), len(side) - int(limit * len(side)), 1) for side in scores)
    smaller = choice.cost["params"].of(*kept) < choice.cost["params"].whole
    return (kept[0], kept[1]) if smaller else None
