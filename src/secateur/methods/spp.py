r"""SPP: channels are left out by chance, the least important most often, until some always are (arXiv 1709.06994).

Every channel has a probability ``P`` of being left out, 0 at first. With ``r`` its rank by size among the channels of
its group that are left, averaged over all updates, and ``Delta`` the rank rule of
:mod:`secateur.methods.rank_schedule`::

    each step       a channel is zero in the forward and backward with probability P; its weights come back unharmed
    each update     P <- clip(P + rate * Delta(r), 0, 1);  gone where P = 1
    at the end      0 < P < 1: what reads the channel is scaled by 1 - P, the mean over its masks; P <- 0

A channel that is left out now and then still has its weights, and recovers if its rank rises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur._internal.errors import SecateurError
from secateur.allocation.budget import Budget
from secateur.methods.gradual import GradualPruner
from secateur.methods.rank_schedule import updates_needed
from secateur.tracing.graph import ChannelGraph

MOMENTA = ("momentum_buffer", "exp_avg")
"""What optimizers call the history that a masked channel has no part in; other state is left alone."""


class SPP(GradualPruner):
    """Structured probabilistic pruning.

    Between two steps the model is masked: whoever evaluates it then sees the network of this step's draw.

    Args:
        model: the traced model.
        graph: its graph.
        optimizer: of the model's parameters.
        budget: what may remain.
        keep: instead, the fraction of its channels that every group keeps, or by group.
        rate: ``A``, what the probability of the least important channel grows by in an update; it is out after
            ``1 / rate`` updates at the earliest.
        every: steps from one update to the next.
        exclude: groups that shall stay whole.
        unit: see :class:`secateur.methods.gradual.GradualPruner`.
        increment: the rank rule, ``"centre_symmetric"`` or ``"piecewise_linear"``.
        strategy: how the budget is shared among the groups, see :func:`secateur.allocate`.
        seed: of the masks, which have a generator of their own.

    Raises:
        SecateurError: unknown names, a budget or fractions that leave nothing to do, an optimizer that lacks the
            parameters.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, *, budget: Budget | None = None,
        keep: float | Mapping[str, float] | None = None, rate: float = 0.05, every: int = 180,
        exclude: Sequence[str] = (), unit: str = "channel", increment: str = "centre_symmetric",
        strategy: str = "global", seed: int = 0,
    ) -> None:  # fmt: skip
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise SecateurError(f"rate={rate!r}: a number in (0, 1] is expected, usually 0.05")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise SecateurError(f"seed={seed!r}: a whole number is expected")
        super().__init__(
            model, graph, optimizer, budget=budget, keep=keep, exclude=exclude, unit=unit, increment=increment,
            every=every, strategy=strategy,
        )  # fmt: skip
        self.rate = float(rate)
        self.probability = torch.zeros(len(self.units), dtype=torch.float64, device=self.gone.device)
        self.hidden = torch.zeros_like(self.gone)
        self.generator = torch.Generator().manual_seed(seed)
        self._kept: list[Tensor] = []  # weights and statistics as they are without the mask, while there is one

    @torch.no_grad()
    def reveal(self) -> None:
        """Put back the weights and running statistics of channels that are masked now; the next step masks anew."""
        for (tensor, hidden), kept in zip(self._masked(), self._kept, strict=False):
            tensor.copy_(torch.where(hidden, kept, tensor))
        self._kept = []

    def _masked(self) -> list[tuple[Tensor, Tensor]]:
        """What a mask changes, with where it is: weights, and the statistics that a forward takes of zeros."""
        hidden = torch.cat([self.hidden, self.hidden.new_zeros(1)])
        return [(tensor, hidden[number]) for tensor, number in (*self.units.parts, *self.units.carried)]

    def _before(self) -> None:
        masked = bool(self.hidden.any())
        self.reveal()
        for p, hidden in self.units.each(self.hidden) if masked else ():
            if p.grad is not None:
                p.grad.masked_fill_(hidden, 0)
            for name, value in self.optimizer.state.get(p, {}).items():
                if name in MOMENTA and value is not None:
                    value.masked_fill_(hidden, 0)

    def _after(self) -> None:
        if self.steps % self.every == 0:
            position = self.position()
            self.probability = (self.probability + self.rate * self.change(position)).clamp_(0, 1)
            needed = self.needed()[self.units.group]
            self.take_out((self.probability >= 1 - 1e-9) & (position < needed) & ~self.gone)
            self.probability.masked_fill_(self.gone, 0)
            through = (self.needed() <= 0)[self.units.group]
            self._settle(through & (self.probability > 0))
            if not self.left():
                self.hidden.zero_()
                self.done = True
                return
        self._draw()

    def _settle(self, chosen: Tensor) -> None:
        """What reads these channels is scaled by how often they were there; they are there for good."""
        if bool(chosen.any()):
            stay = torch.cat([torch.where(chosen, 1 - self.probability, 1.0), self.probability.new_ones(1)])
            for p, number in self.units.readers or self.units.parts:
                p.mul_(stay[number].to(p.dtype))
            self.probability.masked_fill_(chosen, 0)

    def _draw(self) -> None:
        draws = torch.rand(len(self.units), dtype=torch.float64, generator=self.generator).to(self.probability.device)
        self.hidden = draws < self.probability
        if bool(self.hidden.any()):
            self._kept = [tensor.detach().clone() for tensor, _ in self._masked()]
            for p, hidden in self.units.each(self.hidden):
                p.masked_fill_(hidden, 0)

    def updates_for(self, count: int, wanted: int) -> int:
        """How many updates a group needs at least until so many of its units are out."""
        return updates_needed(count, wanted, self.increment, self.rate, 1.0)

    def advice(self) -> str:
        """What to change where groups do not reach their targets, beside training longer."""
        return f"give a larger rate than {self.rate:g} or a smaller every than {self.every}"

    @property
    def kind(self) -> str:
        """What a state must be of, to be loaded."""
        return f"SPP, rate {self.rate:g}, every {self.every}"

    def detach(self) -> None:
        """Take the hook off the optimizer, and the mask off the weights."""
        self.reveal()
        super().detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, tensors and numbers; with the weights behind the mask."""
        return super().state_dict() | {
            "probability": self.probability.clone(), "hidden": self.hidden.clone(),
            "generator": self.generator.get_state(), "kept": [t.clone() for t in self._kept],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with the model as it was then."""
        super().load_state_dict(state)
        self._kept = []  # the model is loaded too, with the mask of then
        self.probability = state["probability"].to(self.probability)
        self.hidden = state["hidden"].to(self.hidden)
        self.generator.set_state(state["generator"].cpu())
        self._kept = [t.to(own) for t, (own, _) in zip(state["kept"], self._masked(), strict=False)]
