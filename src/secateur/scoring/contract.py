"""The seat of the criterion: which channels of a group matter least?

A criterion is a settings dataclass with one method::

    @CRITERIA.register("mine")
    @dataclass(frozen=True)
    class Mine:
        needs: ClassVar[Needs] = Needs(data=True, loss=True)
        power: int = 1

        def scores(self, graph: ChannelGraph, work: Workload) -> Scores: ...

It knows nothing of how many channels will go, nor of what makes up for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from secateur._internal.registry import Registry
from secateur._internal.workload import Needs, Workload
from secateur.tracing.graph import ChannelGraph


class Scores(dict[str, Tensor]):
    """Group name -> one score a channel, the estimated rise of the loss if it goes; lower goes first.

    Attributes:
        skipped: groups that have no scores -> why.
        rises: group name -> by how much the loss rises if the channels with the lowest scores go, none, one, two and so
            on, [channels + 1]; where a criterion knows better than that single scores add up.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor] = {},
        skipped: Mapping[str, str] | None = None,
        rises: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(values)
        self.skipped: dict[str, str] = dict(skipped or {})
        self.rises: dict[str, Tensor] = dict(rises or {})


class Criterion(Protocol):
    """What sits there."""

    needs: ClassVar[Needs]

    def scores(self, graph: ChannelGraph, work: Workload) -> Mapping[str, Tensor]:
        """How much each channel matters, by group: :class:`Scores`, or a plain dict."""


CRITERIA: Registry[Criterion] = Registry("criterion", "secateur.scoring", scores=2)
"""All criteria by name."""
