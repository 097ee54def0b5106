r"""SPP: channels are left out by chance, the least important most often, until some always are (arXiv 1709.06994).

Every channel has a probability ``P`` of being left out, 0 at first. With ``r`` its rank by size among the channels of
its group that remain, averaged over all updates, and ``Delta`` the schedule of
:mod:`secateur.methods.rank_schedule`::

    each step       a channel is zero in the forward and backward with probability P; its weights come back unharmed
    each update     P <- clip(P + rate * Delta(r), 0, 1);  pruned where P = 1
    at the end      0 < P < 1: what reads the channel is scaled by 1 - P, the mean over its masks; P <- 0

A channel that is left out now and then still has its weights, and recovers if its rank rises. Several processes draw
the same masks: from the seed that rank 0 has, and from probabilities that follow its ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur._internal.checks import check_seed, is_number
from secateur._internal.distributed import broadcast_json
from secateur._internal.errors import SecateurError
from secateur.allocation.budget import Budget
from secateur.methods.contract import TRAINING_METHODS
from secateur.methods.gradual import GradualPruner, GradualSettings
from secateur.methods.rank_schedule import MeanRanks, check_rank_schedule
from secateur.tracing.graph import ChannelGraph

MOMENTA = ("momentum_buffer", "exp_avg")
"""What optimizers call the history that a masked channel has no part in; other state is left alone."""
CERTAIN = 1 - 1e-9
"""The probability from which on a channel is out: sums of many small numbers are not exact."""


@TRAINING_METHODS.register("spp")
@dataclass(frozen=True)
class SPPSettings(GradualSettings):
    """Structured probabilistic pruning: the lower a channel ranks, the more often it is left out.

    Attributes:
        keep: instead of a budget, the fraction of its channels that every group keeps, or by group.
        exclude: what stays whole: patterns of group names or module paths, modules, or types of modules.
        unit: ``"channel"`` or ``"column"``, see :class:`secateur.methods.gradual.GradualSettings`.
        every: steps from one update to the next.
        strategy: how a budget is shared among the groups, see :func:`secateur.allocate`.
        rate: ``A``, what the probability of the least important channel grows by in an update; it is out after
            ``1 / rate`` updates at the earliest.
        rank_schedule: ``"centre_symmetric"`` or ``"piecewise_linear"``.
        seed: of the masks, which have a generator of their own.
    """

    every: int = 180
    rate: float = 0.05
    rank_schedule: str = "centre_symmetric"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.rate) or not 0 < self.rate <= 1:
            raise SecateurError(f"rate={self.rate!r}: a number in (0, 1] is expected, usually 0.05")
        check_rank_schedule(self.rank_schedule)
        check_seed(self.seed)

    def attach(self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, budget: Budget | None) -> SPP:
        """A handle with these settings."""
        return SPP(model, graph, optimizer, budget, settings=self)


class Mask:
    """What is hidden of some tensors now, and what they hold behind it."""

    def __init__(self) -> None:
        self.hidden: list[tuple[Tensor, Tensor, Tensor]] = []  # a tensor, where it is masked, and what it holds there

    @torch.no_grad()
    def lift(self) -> None:
        """Put everything back."""
        for tensor, where, kept in self.hidden:
            tensor.copy_(torch.where(where, kept, tensor))
        self.hidden = []


class SPP(GradualPruner[SPPSettings]):
    """Structured probabilistic pruning, beside an optimizer.

    Arguments, attributes and errors are those of :class:`secateur.methods.gradual.GradualPruner`, the options the
    fields of :class:`SPPSettings`. Between two steps the model is masked: whoever evaluates it then sees the network of
    this step's draw; :meth:`unmask` puts the weights back.

    Attributes:
        probability: of every unit's being left out, float64 [units].
        masked: which units are left out now, bool [units].
    """

    settings_class: ClassVar[type] = SPPSettings

    def _begin(self) -> None:
        self.ranks = MeanRanks(self.units, self.settings.rank_schedule)
        self.probability = torch.zeros(len(self.units), dtype=torch.float64, device=self.pruned.device)
        self.masked = torch.zeros_like(self.pruned)
        seed = broadcast_json(self.settings.seed, self.pruned.device, self.group)
        self.generator = torch.Generator().manual_seed(seed)
        self.mask = Mask()
        weakref.finalize(self, self.mask.lift).atexit = False

    def unmask(self) -> None:
        """Put back the weights and running statistics of channels that are masked now; the next step masks anew."""
        self.mask.lift()

    def _maskable(self) -> list[tuple[Tensor, Tensor]]:
        """What a mask changes, with where: weights, and the statistics that a forward takes of zeros."""
        masked = torch.cat([self.masked, self.masked.new_zeros(1)])
        return [(tensor, masked[number]) for tensor, number in (*self.units.owned, *self.units.carried)]

    def _before(self) -> None:
        anything = bool(self.masked.any())
        self.unmask()
        for p, masked in self.units.by_parameter(self.masked) if anything else ():
            if p.grad is not None:
                p.grad.masked_fill_(masked, 0)
            for name, value in self.optimizer.state.get(p, {}).items():
                if name in MOMENTA and value is not None:
                    value.masked_fill_(masked, 0)

    def _after(self) -> None:
        if self.steps % self.settings.every == 0:
            position = self.ranks.update(self.sizes(), self.pruned)
            change = self.ranks.change(position, self.pruned)
            self.probability = (self.probability + self.settings.rate * change).clamp_(0, 1)
            to_go = self.to_go()[self.units.group_of]
            self.prune((self.probability >= CERTAIN) & (position < to_go) & ~self.pruned)
            self.probability.masked_fill_(self.pruned, 0)
            finished = (self.to_go() <= 0)[self.units.group_of]
            self._settle(finished & (self.probability > 0))
            if not self.unfinished():
                self.masked.zero_()
                self.done = True
                return
        self._draw()

    def _settle(self, chosen: Tensor) -> None:
        """What reads these channels is scaled by how often they were there; they are there for good."""
        if bool(chosen.any()):
            stay = torch.cat([torch.where(chosen, 1 - self.probability, 1.0), self.probability.new_ones(1)])
            for p, number in self.units.readers or self.units.owned:
                p.mul_(stay[number].to(p.dtype))
            self.probability.masked_fill_(chosen, 0)

    def _draw(self) -> None:
        draws = torch.rand(len(self.units), dtype=torch.float64, generator=self.generator).to(self.probability.device)
        self.masked = draws < self.probability
        if bool(self.masked.any()):
            self._hide([tensor.detach().clone() for tensor, _ in self._maskable()])
            for p, masked in self.units.by_parameter(self.masked):
                p.masked_fill_(masked, 0)

    def _hide(self, kept: Sequence[Tensor]) -> None:
        """Remember what stands behind the mask."""
        pairs = zip(self._maskable(), kept, strict=True)
        self.mask.hidden = [(tensor, where, value) for (tensor, where), value in pairs]

    def updates_for(self, count: int, to_prune: int) -> int:
        """How many updates a group needs at least until so many of its units are out."""
        return self.ranks.updates_needed(count, to_prune, self.settings.rate, 1.0)

    def advice(self) -> str:
        """What to change where groups do not reach their targets, beside training longer."""
        return f"give a larger rate than {self.settings.rate:g} or a smaller every than {self.settings.every}"

    @property
    def kind(self) -> str:
        """What a state must be of, to be loaded."""
        return f"spp, rate {self.settings.rate:g}, every {self.settings.every}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, tensors and numbers; with the weights behind the mask."""
        return super().state_dict() | {
            "ranks": self.ranks.state_dict(), "probability": self.probability.clone(), "masked": self.masked.clone(),
            "generator": self.generator.get_state(), "kept": [kept.clone() for _, _, kept in self.mask.hidden],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with the model as it was then."""
        super().load_state_dict(state)
        self.mask.hidden = []  # the model is loaded too, with the mask of then
        self.ranks.load_state_dict(state["ranks"])
        self.probability = state["probability"].to(self.probability, copy=True)
        self.masked = state["masked"].to(self.masked, copy=True)
        self.generator.set_state(state["generator"].cpu())
        if state["kept"]:
            kept = [value.to(own) for value, (own, _) in zip(state["kept"], self._maskable(), strict=True)]
            self._hide(kept)
