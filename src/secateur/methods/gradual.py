"""What the handles that prune gently share: attached to any optimizer, stepped after it, done when all units are out.

::

    reg = IncReg(model, graph, optimizer, budget=Budget(macs=0.5))
    for x, y in loader:
        ...
        optimizer.step()
        reg.step()
        if reg.done:
            break
    small = cut(model, reg.plan(), optimizer=optimizer)
    reg.detach()                                                # and train on with the smaller model
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur._internal.errors import SecateurError, unknown
from secateur.allocation.budget import Budget
from secateur.methods.rank_schedule import RANK_SCHEDULES
from secateur.methods.units import channel_units, check_share, column_units, targets
from secateur.plan import Plan, make_plan
from secateur.tracing.graph import ChannelGraph

UNITS = ("channel", "column")
_ATTACHED: WeakSet[GradualPruner] = WeakSet()


class GradualPruner(ABC):
    """A handle beside an optimizer that takes units out while training goes on.

    Args:
        model: the traced model.
        graph: its graph.
        optimizer: of the model's parameters; it is not changed but for a hook before its step.
        budget: what may remain (channels only).
        keep: instead, the fraction of its units that every group keeps, or by group (or convolution, for columns).
        exclude: groups (or convolutions) that shall stay whole.
        unit: ``"channel"``, or ``"column"``: one input channel at one tap of a convolution, over all filters. Columns
            stay zero by a mask; they make no plan.
        increment: the rank rule, a name in :data:`secateur.methods.rank_schedule.RANK_SCHEDULES`.
        every: steps from one update to the next.
        strategy: how the budget is shared among the groups, see :func:`secateur.allocate`.

    Attributes:
        steps: how often :meth:`step` was called.
        gone: bool [units], what is out for good.
        done: whether everything is out that shall be, and the handle has nothing more to do.
    """

    def __init__(
        self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, *, budget: Budget | None,
        keep: float | Mapping[str, float] | None, exclude: Sequence[str], unit: str, increment: str, every: int,
        strategy: str = "global",
    ) -> None:  # fmt: skip
        if unit not in UNITS:
            raise unknown("unit", unit, UNITS)
        if increment not in RANK_SCHEDULES:
            raise unknown("increment", increment, RANK_SCHEDULES)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise SecateurError(f"every={every!r}: a whole number from 1 on is expected")
        self.graph, self.unit = graph, unit
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if unit == "channel":
            self.units = channel_units(
                model, graph, targets(model, graph, budget, keep, exclude=exclude, strategy=strategy)
            )
        else:
            self.units = column_units(model, _columns(model, budget, keep, exclude))
        if any(group.get("maximize") for group in self.optimizer.param_groups):
            raise SecateurError("the optimizer maximises, and a penalty would make channels grow; turn the loss's sign")
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        names = {p: name for name, p in model.named_parameters()}
        strange = [names[p] for p, _ in self.units.parts if p not in held]
        if strange:
            raise SecateurError(f"the optimizer does not hold {strange[0]}: build it from model.parameters()")
        own = {id(p) for p, _ in self.units.parts}
        if any(id(p) in own for other in _ATTACHED for p, _ in other.units.parts):
            raise SecateurError("another handle prunes this model already: detach() it first")
        self.increment, self.every = RANK_SCHEDULES[increment], every
        self.steps, self.done = 0, False
        self.gone = torch.zeros(len(self.units), dtype=torch.bool, device=self.units.group.device)
        self.rank = torch.zeros(len(self.units), dtype=torch.float64, device=self.units.group.device)
        self.updates = 0
        self._acted = self._detached = False
        self._hook = self.optimizer.register_step_pre_hook(self._on_step)
        _ATTACHED.add(self)

    def _on_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(callable(a) and not isinstance(a, Optimizer) for a in (*args, *kwargs.values())):
            raise SecateurError(
                f"{type(self).__name__}: optimizer.step(closure) computes gradients after the handle has changed them; "
                "call the loss's backward before, and step() without a closure"
            )
        self.before()

    @torch.no_grad()
    def before(self) -> None:
        """What happens right before the optimizer's step; it is called by a hook."""
        self._acted = True
        here = next((p.device for p, _ in self.units.parts), self.gone.device)
        if here != self.gone.device:
            raise SecateurError(
                f"the model was moved to {here} after the handle was made on {self.gone.device}: move it first"
            )
        if not self.done:
            self._before()
        for p, gone in self.units.each(self.gone):
            if p.grad is not None:
                p.grad.masked_fill_(gone, 0)

    @torch.no_grad()
    def step(self) -> None:
        """To be called after the optimizer's step; where that was left out (an overflow), nothing happens."""
        if self._detached:
            raise SecateurError("this handle is detached from its optimizer; make a new one")
        if self.done or not self._acted:
            return
        self._acted = False
        self.steps += 1
        self._after()

    @abstractmethod
    def _before(self) -> None:
        """Change gradients, if need be."""

    @abstractmethod
    def _after(self) -> None:
        """Update penalties, take units out, and set ``done``."""

    def needed(self) -> Tensor:
        """How many units of each group are still to go, int64 [groups]."""
        return self.units.wanted - self.units.count(self.gone)

    def position(self) -> Tensor:
        """The rank of each unit by its mean rank over all updates, this one included; int64 [units], -1 where gone.

        Ranks of one moment change places from update to update, and whoever has just changed to a high one loses what
        it has gathered: groups would never be through.
        """
        self.updates += 1
        rank = self.units.ranks(self.units.sizes(), self.gone)
        self.rank += (rank.double() - self.rank) / self.updates
        return self.units.ranks(self.rank, self.gone)

    def change(self, position: Tensor) -> Tensor:
        """By the rank rule, the change of every unit's penalty in multiples of the rate; 0 where a group is through.

        Args:
            position: rank among the units of the group that are left, int64 [units].
        """
        needed = self.needed()
        left = torch.bincount(self.units.group[~self.gone], minlength=len(self.units.names))
        of = self.units.group
        change = self.increment(position.double(), needed[of].double(), left[of].double())
        return torch.where(self.gone | (needed[of] <= 0), 0.0, change)

    def take_out(self, chosen: Tensor) -> None:
        """Zero for good."""
        if bool(chosen.any()):
            self.gone |= chosen
            self.units.clear(chosen, self.optimizer)

    @abstractmethod
    def updates_for(self, count: int, wanted: int) -> int:
        """How many updates a group needs at least until so many of its units are out."""

    def steps_needed(self) -> int:
        """How many steps it takes until everything is out, if the ranks stay as they are now; often it takes longer."""
        counts = torch.bincount(self.units.group, minlength=len(self.units.names)).tolist()
        pairs = set(zip(counts, self.units.wanted.tolist(), strict=True))
        return self.every * max(self.updates_for(count, wanted) for count, wanted in pairs)

    def left(self) -> dict[str, int]:
        """The groups that are not through -> how many units are still to go."""
        return {n: int(k) for n, k in zip(self.units.names, self.needed().tolist(), strict=True) if k > 0}

    def plan(self) -> Plan:
        """What went, to be cut.

        Raises:
            SecateurError: not everything is out yet, or columns went, which no plan can say.
        """
        if self.unit == "column":
            raise SecateurError("columns are zero by a mask (see gone and units); only channels make a plan")
        if self.left():
            missing = ", ".join(f"{name} ({count})" for name, count in self.left().items())
            raise SecateurError(
                f"after {self.steps} steps these channels are still to go: {missing}; even if no rank ever changed it "
                f"took {self.steps_needed()} steps: train longer, or {self.advice()}"
            )
        return make_plan(self.graph, self.units.by_group(self.gone))

    @abstractmethod
    def advice(self) -> str:
        """What to change where groups do not reach their targets, beside training longer."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Neither copied nor pickled: a copy would have no hook on an optimizer, and prune nothing."""
        raise SecateurError(
            f"{type(self).__name__} cannot be copied: keep its state_dict(), and load it into a handle that was made "
            "for the other model and its optimizer"
        )

    def detach(self) -> None:
        """Take the hook off the optimizer; pruned weights are no longer held at zero."""
        self._hook.remove()
        self._detached = True
        _ATTACHED.discard(self)

    @property
    def kind(self) -> str:
        """What a state must be of, to be loaded."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, tensors and numbers."""
        return {
            "kind": self.kind, "names": list(self.units.names), "wanted": self.units.wanted.tolist(),
            "steps": self.steps, "done": self.done, "gone": self.gone.clone(), "rank": self.rank.clone(),
            "updates": self.updates,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, by a handle of the same kind and targets.

        Raises:
            SecateurError: the state of another kind of handle, or of other targets; nothing is changed.
        """
        own = {"kind": self.kind, "names": list(self.units.names), "wanted": self.units.wanted.tolist()}
        for name, value in own.items():
            if state.get(name) != value:
                raise SecateurError(
                    f"the state has {name} {state.get(name)}, this handle {value}: method, budget or model differ"
                )
        self.steps, self.done = int(state["steps"]), bool(state["done"])
        self.gone, self.rank = state["gone"].to(self.gone), state["rank"].to(self.rank)
        self.updates = int(state["updates"])


def _columns(
    model: nn.Module, budget: Budget | None, keep: float | Mapping[str, float] | None, exclude: Sequence[str]
) -> dict[str, float]:
    if budget is not None or keep is None:
        raise SecateurError("unit='column': columns have no budget; give keep=, a fraction of every convolution")
    convolutions = {
        n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and m.groups == 1
    }
    for name in (*exclude, *(keep if isinstance(keep, Mapping) else ())):
        if name not in convolutions:
            raise unknown("convolution of one group", name, convolutions)
    shares = dict(keep) if isinstance(keep, Mapping) else dict.fromkeys(convolutions, keep)
    for name, share in shares.items():
        check_share(share, name)
    found = {name: 1 - share for name, share in shares.items() if share < 1 and name not in exclude}
    if not found:
        raise SecateurError(f"keep={keep!r} leaves every convolution whole; there is nothing to prune")
    return found
