r"""IncReg: the least important channels get ever more weight decay, until they are nothing (arXiv 1811.08390).

Every channel has a penalty ``lambda >= 0`` of its own. With ``r`` its rank by size among the channels of its group,
averaged over all updates, and ``Delta`` the rank rule of :mod:`secateur.methods.rank_schedule`::

    grad      <- grad + lambda * w
    lambda    <- max(0, lambda + rate * Delta(r))
    gone       where lambda >= limit, until the group has lost what it shall

A channel whose rank rises recovers. GReg (arXiv 2012.09243) shares the machinery: its penalties grow alike for a set
that is chosen at once (GReg-1), or once a penalty on all has told channels apart (GReg-2); the set goes at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur._internal.errors import SecateurError, unknown
from secateur.allocation.budget import Budget
from secateur.methods.gradual import GradualPruner
from secateur.methods.rank_schedule import updates_needed
from secateur.tracing.graph import ChannelGraph

RULES = ("increg", "greg1", "greg2")


class IncReg(GradualPruner):
    """Incremental regularisation.

    Args:
        model: the traced model.
        graph: its graph.
        optimizer: of the model's parameters, best SGD: the penalty's gradient passes through it.
        budget: what may remain.
        keep: instead, the fraction of its channels that every group keeps, or by group.
        rule: ``"increg"``, ``"greg1"`` or ``"greg2"``.
        rate: ``A``, what the penalty of the least important channel grows by in an update; it is out after
            ``limit / rate`` updates at the earliest. The papers' is their weight decay.
        limit: the penalty at which a channel is out.
        pick: of ``"greg2"``: the penalty on all at which the set is chosen; it grows by a tenth of ``rate``.
        settle: steps after the last channel has reached its limit, before ``done`` (GReg: before the set is zeroed).
        exclude: groups that shall stay whole.
        unit: see :class:`secateur.methods.gradual.GradualPruner`.
        increment: the rank rule, ``"centre_symmetric"`` or ``"piecewise_linear"``.
        every: steps from one update to the next.
        strategy: how the budget is shared among the groups, see :func:`secateur.allocate`.

    Raises:
        SecateurError: unknown names, a budget or fractions that leave nothing to do, an optimizer that lacks the
            parameters, a learning rate for which ``lr * (weight decay + limit)`` is unstable.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, *, budget: Budget | None = None,
        keep: float | Mapping[str, float] | None = None, rule: str = "increg", rate: float = 2.5e-4, limit: float = 2.5,
        pick: float = 1e-2, settle: int = 0, exclude: Sequence[str] = (), unit: str = "channel",
        increment: str = "centre_symmetric", every: int = 1, strategy: str = "global",
    ) -> None:  # fmt: skip
        if rule not in RULES:
            raise unknown("rule", rule, RULES)
        for name, value in (("rate", rate), ("limit", limit), ("pick", pick)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise SecateurError(f"{name}={value!r}: a number above 0 is expected")
        if isinstance(settle, bool) or not isinstance(settle, int) or settle < 0:
            raise SecateurError(f"settle={settle!r}: a whole number of steps from 0 on is expected")
        self.rule, self.rate, self.limit, self.pick, self.settle = rule, float(rate), float(limit), float(pick), settle
        if rule == "greg2" and pick >= limit:
            raise SecateurError(f"pick={pick:g}: greg2 chooses its set below its limit={limit:g}; give less")
        super().__init__(
            model, graph, optimizer, budget=budget, keep=keep, exclude=exclude, unit=unit, increment=increment,
            every=every, strategy=strategy,
        )  # fmt: skip
        try:
            self._check_stable(self.limit, f"limit={limit:g}")
        except SecateurError:
            self.detach()
            raise
        device = self.gone.device
        self.penalty = torch.zeros(len(self.units), dtype=torch.float64, device=device)
        self.chosen = torch.zeros_like(self.gone)
        self.settled = 0

    def _before(self) -> None:
        largest = float(self.penalty.max())
        self._check_stable(largest, f"penalties up to {largest:g}")
        # fused optimizers under mixed precision unscale by themselves
        scale = getattr(self.optimizer, "grad_scale", None)
        # GReg-2 lets the others grow by taking their weight decay off, never more; AdamW's is no part of the gradient
        decoupled = isinstance(self.optimizer, torch.optim.AdamW)
        decay = {
            p: 0.0 if decoupled else float(group.get("weight_decay", 0))
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        for p, penalty in self.units.each(self.penalty):
            if p.grad is not None:
                value = penalty.to(p.dtype).clamp(min=-decay[p])
                p.grad.addcmul_(p, value if scale is None else value * scale.to(value))

    def _after(self) -> None:
        if self.steps % self.every == 0:
            {"increg": self._increg, "greg1": self._greg, "greg2": self._greg}[self.rule]()
        through = bool((self.penalty[self.chosen] >= self.limit * (1 - 1e-9)).any())
        if through if self.rule != "increg" else not self.left():
            self.settled += 1
            if self.settled > self.settle:
                self.take_out(self.chosen & ~self.gone)
                self.penalty.zero_()
                self.done = True

    def _increg(self) -> None:
        position = self.position()
        self.penalty = (self.penalty + self.rate * self.change(position)).clamp_(min=0)
        needed = self.needed()[self.units.group]
        self.take_out((self.penalty >= self.limit * (1 - 1e-9)) & (position < needed) & ~self.gone)
        self.penalty.masked_fill_(self.gone | (self.needed()[self.units.group] <= 0), 0)

    def _greg(self) -> None:
        if not bool(self.chosen.any()):
            if self.rule == "greg2" and float(self.penalty.max()) < self.pick:
                self.penalty += self.rate / 10
                return
            rank = self.units.ranks(self.units.sizes(), self.gone)
            self.chosen = rank < self.units.wanted[self.units.group]
            self.penalty[~self.chosen] = -self.rate if self.rule == "greg2" else 0.0
        self.penalty[self.chosen] = (self.penalty[self.chosen] + self.rate).clamp(max=self.limit)

    def updates_for(self, count: int, wanted: int) -> int:
        """How many updates a group needs at least until so many of its units are out."""
        if self.rule == "increg":
            return updates_needed(count, wanted, self.increment, self.rate, self.limit)
        if self.rule == "greg1":
            return math.ceil(self.limit / self.rate - 1e-9)
        return math.ceil(10 * self.pick / self.rate - 1e-9) + math.ceil((self.limit - self.pick) / self.rate - 1e-9)

    def steps_needed(self) -> int:
        """How many steps it takes until everything is out, if the ranks stay as they are now; often it takes longer."""
        return super().steps_needed() + (self.settle if self.rule != "increg" else 0)

    @property
    def kind(self) -> str:
        """What a state must be of, to be loaded."""
        return f"{self.rule}, rate {self.rate:g}, limit {self.limit:g}, every {self.every}"

    def advice(self) -> str:
        """What to change where groups do not reach their targets, beside training longer."""
        return f"give a larger rate than {self.rate:g} or a lower limit than {self.limit:g}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, tensors and numbers."""
        return super().state_dict() | {
            "penalty": self.penalty.clone(), "chosen": self.chosen.clone(), "settled": self.settled,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        for name in ("penalty", "chosen"):
            setattr(self, name, state[name].to(getattr(self, name)))
        self.settled = int(state["settled"])

    def _check_stable(self, penalty: float, what: str) -> None:
        """Gradient descent overshoots on a quadratic from ``lr * curvature = 2 (1 + m)`` on, Nesterov's earlier.

        Adaptive optimizers scale gradients and are not judged.
        """
        pruned = {p for p, _ in self.units.parts}
        for group in self.optimizer.param_groups:
            if "dampening" not in group or not pruned & set(group["params"]):
                continue
            momentum = float(group["momentum"])
            bound = 2 * (1 + momentum) / (1 + 2 * momentum if group["nesterov"] else 1)
            lr, decay = float(group["lr"]), float(group["weight_decay"])
            if lr * (decay + penalty) >= bound:
                raise SecateurError(
                    f"lr={lr:g}, weight_decay={decay:g} and {what} are unstable together: lr * (weight decay + "
                    f"penalty) must stay below {bound:.3g} with momentum={momentum:g}; lower the learning rate, or "
                    "limit and rate"
                )
