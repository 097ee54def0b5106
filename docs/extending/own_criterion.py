"""A criterion: the sum of absolute values, to some power, of all weights that write a channel."""

from dataclasses import dataclass
from typing import ClassVar

from secateur import CRITERIA, ChannelGraph, Needs, Scores, SecateurError, Workload
from secateur.scoring.sums import by_group, channel_sums, producers, rows


@CRITERIA.register("power_sum")
@dataclass(frozen=True)
class PowerSum:
    needs: ClassVar[Needs] = Needs()  # neither data nor a loss
    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise SecateurError(f"power={self.power!r}: a number above 0 is expected")

    def scores(self, graph: ChannelGraph, work: Workload) -> Scores:
        weights = dict(work.model.named_parameters())
        sums = channel_sums(graph, producers(graph), lambda a: rows(weights[a.name].abs() ** self.power, a.dim))
        return Scores(by_group(graph, sums))
