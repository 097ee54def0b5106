r"""IncReg: the least important channels get ever more weight decay, until they are nothing (arXiv 1811.08390).

Every channel has a penalty ``lambda >= 0`` of its own. With ``r`` its rank by size among the channels of its group,
averaged over all updates, and ``Delta`` the schedule of :mod:`secateur.methods.rank_schedule`::

    grad      <- grad + lambda * w
    lambda    <- max(0, lambda + rate * Delta(r))
    pruned     where lambda >= limit, until the group has lost what it shall

A channel whose rank rises recovers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from secateur.allocation.budget import Budget
from secateur.methods.contract import TRAINING_METHODS
from secateur.methods.penalty import PenaltyPruner, PenaltySettings
from secateur.methods.rank_schedule import MeanRanks, check_rank_schedule
from secateur.tracing.graph import ChannelGraph


@TRAINING_METHODS.register("increg")
@dataclass(frozen=True)
class IncRegSettings(PenaltySettings):
    """Incremental regularisation: the lower a channel ranks, the faster its weight decay grows.

    Attributes:
        keep: instead of a budget, the fraction of its channels that every group keeps, or by group.
        exclude: what stays whole: patterns of group names or module paths, modules, or types of modules.
        unit: ``"channel"`` or ``"column"``, see :class:`secateur.methods.gradual.GradualSettings`.
        every: steps from one update to the next.
        strategy: how a budget is shared among the groups, see :func:`secateur.allocate`.
        rate: ``A``, what the penalty of the least important channel grows by in an update; it is out after
            ``limit / rate`` updates at the earliest. The paper's is its weight decay.
        limit: the penalty at which a channel is out.
        settle: steps after the last channel is out, before the handle is done.
        rank_schedule: ``"centre_symmetric"`` or ``"piecewise_linear"``.
    """

    rank_schedule: str = "centre_symmetric"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_schedule(self.rank_schedule)

    def attach(self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, budget: Budget | None) -> IncReg:
        """A handle with these settings."""
        return IncReg(model, graph, optimizer, budget, settings=self)


class IncReg(PenaltyPruner[IncRegSettings]):
    """Incremental regularisation, beside an optimizer; best SGD, for the penalty's gradient passes through it.

    Arguments, attributes and errors are those of :class:`secateur.methods.gradual.GradualPruner`, the options the
    fields of :class:`IncRegSettings`; a learning rate for which ``lr * (weight decay + limit)`` is unstable is refused.
    """

    settings_class: ClassVar[type] = IncRegSettings

    def _begin(self) -> None:
        super()._begin()
        self.ranks = MeanRanks(self.units, self.settings.rank_schedule)

    def _after(self) -> None:
        if self.steps % self.settings.every == 0:
            self._update()
        if not self.unfinished():
            self.settled += 1
            if self.settled > self.settings.settle:
                self.penalty.zero_()
                self.done = True

    def _update(self) -> None:
        position = self.ranks.update(self.sizes(), self.pruned)
        self.penalty = (self.penalty + self.settings.rate * self.ranks.change(position, self.pruned)).clamp_(min=0)
        self.prune(self.at_limit() & (position < self.to_go()[self.units.group_of]) & ~self.pruned)
        self.penalty.masked_fill_(self.pruned | (self.to_go()[self.units.group_of] <= 0), 0)

    def updates_for(self, count: int, to_prune: int) -> int:
        """How many updates a group needs at least until so many of its units are out."""
        return self.ranks.updates_needed(count, to_prune, self.settings.rate, self.settings.limit)

    @property
    def kind(self) -> str:
        """What a state must be of, to be loaded."""
        how = self.settings
        return f"increg, rate {how.rate:g}, limit {how.limit:g}, every {how.every}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, tensors and numbers."""
        return super().state_dict() | {"ranks": self.ranks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self.ranks.load_state_dict(state["ranks"])
