"""What a search of widths has learned, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Found:
    """What a search has learned. :meth:`to_dict` is ``result.facts["search"]`` of :func:`secateur.prune`.

    Attributes:
        start: the start that was asked for.
        started: the start that was taken: ``"uniform"`` if there were too few forwards or minutes for sensitivities.
        forwards: how many there were, of all processes; those of the whole network are not counted.
        late: whether the minutes were up before the forwards were.
        table: what was learned of every width, see :meth:`secateur.allocation.search.arms.ArmTable.learned`;
            :func:`secateur.report.search.draw_search` draws it. Empty if no group has a choice.
        price: what a unit of the budget costs in the end, in rewards.
        explained: which part of the rewards' variance within batches the worth of single widths explains; the rest is
            noise, and what widths do together.
        doubts: groups whose best width depends on what the other groups do -> the best among weak and among strong
            others. Duels are not looked at.
        losses: what the loss rises by at the start and at what was found, on the same batches: those of the last
            comparison, all if there are forwards enough. The lower one is the answer. For a budget in milliseconds the
            clock may still change some channels of it.
    """

    start: str
    started: str
    forwards: int
    late: bool = False
    table: Sequence[Mapping[str, Any]] = ()
    price: float = 0.0
    explained: float = 0.0
    doubts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    losses: tuple[float, float] = (0.0, 0.0)

    @property
    def better(self) -> bool:
        """Whether what was found is better than the start; otherwise the start is the answer."""
        return self.losses[1] < self.losses[0]

    def to_dict(self) -> dict[str, Any]:
        """As what JSON can hold."""
        return {
            "start": self.start, "started": self.started, "forwards": self.forwards, "late": self.late,
            "table": [dict(row) for row in self.table], "price": self.price, "explained": self.explained,
            "doubts": {name: list(widths) for name, widths in self.doubts.items()}, "losses": list(self.losses),
            "better": self.better,
        }  # fmt: skip

    def remarks(self) -> list[str]:
        """What whoever reads the result should know, in a sentence each."""
        if not self.table:
            return ["bandit: no group has a choice of widths around the start, so the start is the answer"]
        found = []
        if not self.better:
            found.append("bandit: nothing better than the start was found on the same batches, so it is the answer")
        if self.late:
            found.append(f"bandit: the minutes were up after {self.forwards} forwards")
        found += [
            f"bandit: the best width of {name} is {weak} or {strong}, depending on what the other groups do"
            for name, (weak, strong) in self.doubts.items()
        ]
        return found
