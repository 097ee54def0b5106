r"""GReg: a set of channels is selected, and their weight decay grows alike until it goes (arXiv 2012.09243).

::

    grad      <- grad + lambda * w
    lambda    <- min(limit, lambda + rate)        on the selected channels
    pruned     all at once, when they have reached the limit and settled

GReg-1 selects the smallest channels at once. GReg-2 first lets the penalty of all grow, a tenth as fast: what is in
flat directions of the loss shrinks most; it selects when that penalty has reached ``pick``, and takes the weight decay
off the others from then on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from secateur._internal.checks import check_choice, check_positive
from secateur._internal.errors import SecateurError
from secateur.allocation.budget import Budget
from secateur.methods.contract import TRAINING_METHODS
from secateur.methods.penalty import PenaltyPruner, PenaltySettings
from secateur.tracing.graph import ChannelGraph

RULES = ("greg1", "greg2")
PICKING = 10
"""While GReg-2 has not selected yet, penalties grow so many times slower."""


@TRAINING_METHODS.register("greg")
@dataclass(frozen=True)
class GRegSettings(PenaltySettings):
    """Growing regularisation: the weight decay of a selected set grows alike, and then the set goes.

    Attributes:
        keep: instead of a budget, the fraction of its channels that every group keeps, or by group.
        exclude: what stays whole: patterns of group names or module paths, modules, or types of modules.
        unit: ``"channel"`` or ``"column"``, see :class:`secateur.methods.gradual.GradualSettings`.
        every: steps from one update to the next.
        strategy: how a budget is shared among the groups, see :func:`secateur.allocate`.
        rate: what the penalty of the selected channels grows by in an update.
        limit: the penalty at which they go.
        settle: steps at the limit before they go.
        rule: ``"greg1"``: the smallest channels are selected at once; ``"greg2"``: once a penalty on all has told them
            apart.
        pick: of ``"greg2"``: the penalty on all at which it selects; below ``limit``.
    """

    rule: str = "greg1"
    pick: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rule", self.rule, RULES)
        check_positive("pick", self.pick)
        if self.rule == "greg2" and self.pick >= self.limit:
            raise SecateurError(f"pick={self.pick:g}: greg2 selects below its limit={self.limit:g}; give less")

    def attach(self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, budget: Budget | None) -> GReg:
        """A handle with these settings."""
        return GReg(model, graph, optimizer, budget, settings=self)


class GReg(PenaltyPruner[GRegSettings]):
    """Growing regularisation, beside an optimizer; best SGD, for the penalty's gradient passes through it.

    Arguments, attributes and errors are those of :class:`secateur.methods.gradual.GradualPruner`, the options the
    fields of :class:`GRegSettings`; a learning rate for which ``lr * (weight decay + limit)`` is unstable is refused.

    Attributes:
        selected: what will go, bool [units]; nothing until GReg-2 has selected.
    """

    settings_class: ClassVar[type] = GRegSettings

    def _begin(self) -> None:
        super()._begin()
        self.selected = torch.zeros_like(self.pruned)

    def _after(self) -> None:
        if self.steps % self.settings.every == 0:
            self._update()
        if bool(self.at_limit()[self.selected].any()):
            self.settled += 1
            if self.settled > self.settings.settle:
                self.prune(self.selected & ~self.pruned)
                self.penalty.zero_()
                self.done = True

    def _update(self) -> None:
        how = self.settings
        if not bool(self.selected.any()):
            if how.rule == "greg2" and float(self.penalty.max()) < how.pick:
                self.penalty += how.rate / PICKING
                return
            rank = self.units.ranks(self.sizes(), self.pruned)
            self.selected = rank < self.units.to_prune[self.units.group_of]
            self.penalty[~self.selected] = -how.rate if how.rule == "greg2" else 0.0
        self.penalty[self.selected] = (self.penalty[self.selected] + how.rate).clamp(max=how.limit)

    def updates_for(self, count: int, to_prune: int) -> int:
        """How many updates a group needs at least until so many of its units are out."""
        how = self.settings
        if how.rule == "greg1":
            return math.ceil(how.limit / how.rate - 1e-9)
        picking = math.ceil(PICKING * how.pick / how.rate - 1e-9)
        return picking + math.ceil((how.limit - how.pick) / how.rate - 1e-9)

    @property
    def steps_needed(self) -> int:
        """How many steps it takes until everything is out."""
        return super().steps_needed + self.settings.settle

    @property
    def kind(self) -> str:
        """What a state must be of, to be loaded."""
        how = self.settings
        return f"{how.rule}, rate {how.rate:g}, limit {how.limit:g}, every {how.every}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, tensors and numbers."""
        return super().state_dict() | {"selected": self.selected.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self.selected = state["selected"].to(self.selected, copy=True)
