"""What the handles that prune bit by bit share: attached to an optimizer, stepped after it, done when all is out.

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

Several processes: how many units go, and in which order, rank 0 decides and tells the others, so that all prune alike.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur._internal.checks import check_choice, check_count
from secateur._internal.distributed import Group, broadcast_, broadcast_json
from secateur._internal.errors import SecateurError, notice
from secateur._internal.state import device_of
from secateur.allocation.budget import Budget
from secateur.allocation.contract import STRATEGIES, Strategy
from secateur.methods.contract import settings_from
from secateur.methods.layer_selection import check_exclude, excluded_layers
from secateur.methods.units import (
    Keep,
    Units,
    channel_units,
    channels_to_prune,
    check_keep,
    column_units,
    columns_to_prune,
)
from secateur.plan import Plan, make_plan
from secateur.tracing.graph import ChannelGraph
from secateur.tracing.selection import Exclude, excluded

UNITS = ("channel", "column")
ATTACHED: weakref.WeakSet[GradualPruner[Any]] = weakref.WeakSet()
"""The handles that prune a model now; nothing is kept alive by it."""


@dataclass(frozen=True)
class GradualSettings:
    """The settings of all methods that prune bit by bit.

    Attributes:
        keep: instead of a budget, the fraction of its units that every group keeps, or by group (or by convolution,
            for columns).
        exclude: what stays whole: patterns of group names or module paths, modules, or types of modules.
        unit: ``"channel"``, or ``"column"``: one input channel at one tap of a convolution, over all filters. Columns
            stay zero by a mask; they make no plan.
        every: steps from one update to the next.
        strategy: how a budget is shared among the groups, see :func:`secateur.allocate`.
    """

    keep: Keep | None = None
    exclude: Exclude = ()
    unit: str = "channel"
    every: int = 1
    strategy: str | Strategy = "global"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_exclude(self.exclude)
        check_choice("unit", self.unit, UNITS)
        check_count("every", self.every)
        STRATEGIES.make(self.strategy)


S = TypeVar("S", bound=GradualSettings)


class GradualPruner(ABC, Generic[S]):
    """A handle beside an optimizer that prunes units while training goes on.

    It knows the model's parameters and the optimizer, and never sees a batch. There is one for a model: a new one takes
    the place of an earlier one, which is detached. The optimizer holds it weakly: who lets it go has detached it.

    Args:
        model: the traced model, not a wrapper around it.
        graph: its graph.
        optimizer: of the model's parameters; it is not changed but for a hook before its step.
        budget: what may remain (channels only).
        settings: of the method; or its fields as keyword arguments.
        group: the processes that train along; ``None`` for all there are.
        **options: fields of the settings.

    Attributes:
        settings: of the method.
        skipped: groups (or convolutions) that are left alone -> why.
        steps: how often :meth:`step` was called.
        pruned: bool [units], what is out for good.
        done: whether everything is out that shall be, and the handle has nothing more to do.

    Raises:
        NothingToPrune: a budget, fractions or exclusions that leave nothing to do.
        SecateurError: unknown options, bad values, a graph of another model, an optimizer that lacks the parameters or
            maximises.
    """

    settings_class: ClassVar[type]

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        optimizer: Optimizer,
        budget: Budget | None = None,
        *,
        settings: S | None = None,
        group: Group = None,
        **options: Any,
    ) -> None:
        self.settings: S = settings_from(
            self.settings_class, settings, options, type(self).__name__, ("budget", "group")
        )
        _check_traced(model, graph)
        before = [handle for handle in ATTACHED if handle.shares(model)]
        for handle in before:
            handle.unmask()
        self.graph, self.group = graph, group
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self.skipped: dict[str, str] = {}
        self.units = self._units(model, budget)
        self._check_optimizer(model)
        self.steps, self.done = 0, False
        self.pruned = torch.zeros(len(self.units), dtype=torch.bool, device=self.units.group_of.device)
        self._acted = self._detached = False
        self._begin()
        for handle in before:
            handle.replaced_by(self)
        self._attach()

    def _units(self, model: nn.Module, budget: Budget | None) -> Units:
        """What is pruned; rank 0 says how much of it."""
        how, device = self.settings, device_of(model)
        if how.unit == "column":
            self.skipped = excluded_layers(model, how.exclude)
            columns = columns_to_prune(model, budget, how.keep, without=self.skipped)
            return column_units(model, broadcast_json(columns, device, self.group))
        self.skipped = excluded(model, self.graph, how.exclude)
        channels = channels_to_prune(model, self.graph, budget, how.keep, without=self.skipped, strategy=how.strategy)
        return channel_units(model, self.graph, broadcast_json(channels, device, self.group))

    def _check_optimizer(self, model: nn.Module) -> None:
        if isinstance(self.optimizer, torch.optim.LBFGS):
            raise SecateurError(
                "LBFGS takes gradients several times a step, which a penalty would change; take another"
            )
        if any(group.get("maximize") for group in self.optimizer.param_groups):
            raise SecateurError("the optimizer maximises, and a penalty would make channels grow; turn the loss's sign")
        held = {p for group in self.optimizer.param_groups for p in group["params"]}
        names = {p: name for name, p in model.named_parameters()}
        strange = [names[p] for p, _ in self.units.owned if p not in held]
        if strange:
            raise SecateurError(f"the optimizer does not hold {strange[0]}: build it from model.parameters()")

    # ------------------------------------------------------------------------------------------- attached and detached

    def _attach(self) -> None:
        me = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            handle = me()
            return None if handle is None else handle.on_step(args, kwargs)

        self._hook = self.optimizer.register_step_pre_hook(before_step)
        weakref.finalize(self, self._hook.remove).atexit = False
        ATTACHED.add(self)

    def shares(self, model: nn.Module) -> bool:
        """Whether it prunes parameters of this model."""
        own = {id(p) for p, _ in self.units.owned}
        return any(id(p) in own for p in model.parameters())

    def replaced_by(self, other: GradualPruner[Any]) -> None:
        """Make room for another handle; that this one was not finished is told."""
        if not self.done:
            notice(
                f"{type(other).__name__} takes the place of {type(self).__name__}, which had pruned "
                f"{int(self.pruned.sum())} of {int(self.units.to_prune.sum())} units of this model in {self.steps} "
                "steps and is detached: the new handle begins anew, with the weights as they are",
                stacklevel=4,
            )
        self.detach()

    def detach(self) -> None:
        """Take the hook off the optimizer; pruned weights are no longer held at zero."""
        self.unmask()
        self._hook.remove()
        self._detached = True
        ATTACHED.discard(self)

    def unmask(self) -> None:
        """Put back what is hidden for the time being, for methods that hide something."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Neither copied nor pickled: a copy would have no hook on an optimizer, and prune nothing."""
        raise SecateurError(
            f"{type(self).__name__} cannot be copied: keep its state_dict(), and load it into a handle that was made "
            "for the other model and its optimizer"
        )

    # -------------------------------------------------------------------------------------------------------- the loop

    def on_step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """Called by the optimizer before its step, with its arguments; the handle's turn comes after gradients.

        Returns:
            The arguments with a closure that also lets the handle act, where one computes the gradients.
        """

        def is_closure(value: Any) -> bool:
            return callable(value) and not isinstance(value, Optimizer)

        def acting(closure: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                loss = closure()
                self.before()
                return loss

            return run

        if not any(is_closure(value) for value in (*args, *kwargs.values())):
            self.before()
            return None
        own = {name: acting(value) if is_closure(value) else value for name, value in kwargs.items()}
        return tuple(acting(value) if is_closure(value) else value for value in args), own

    @torch.no_grad()
    def before(self) -> None:
        """What happens right before the optimizer's step."""
        self._acted = True
        here = next((p.device for p, _ in self.units.owned), self.pruned.device)
        if here != self.pruned.device:
            raise SecateurError(
                f"the model was moved to {here} after the handle was made on {self.pruned.device}: move it first"
            )
        if not self.done:
            self._before()
        for p, pruned in self.units.by_parameter(self.pruned):
            if p.grad is not None:
                p.grad.masked_fill_(pruned, 0)

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
    def _begin(self) -> None:
        """Set up the method's own state, and check what it needs, before anything is attached."""

    @abstractmethod
    def _before(self) -> None:
        """Change gradients, if need be."""

    @abstractmethod
    def _after(self) -> None:
        """Update penalties, prune units, and set ``done``."""

    def sizes(self) -> Tensor:
        """The sizes of the units by which they are ranked: those that rank 0 sees, float64 [units]."""
        return broadcast_(self.units.sizes(), self.group)

    def prune(self, chosen: Tensor) -> None:
        """Zero for good."""
        if bool(chosen.any()):
            self.pruned = self.pruned | chosen
            self.units.clear(chosen, self.optimizer)

    # ------------------------------------------------------------------------------------------- what is still to come

    def to_go(self) -> Tensor:
        """How many units of each group are still to be pruned, int64 [groups]."""
        return self.units.to_prune - self.units.count(self.pruned)

    def unfinished(self) -> dict[str, int]:
        """The groups that are not finished -> how many units are still to be pruned."""
        return {n: int(k) for n, k in zip(self.units.names, self.to_go().tolist(), strict=True) if k > 0}

    @abstractmethod
    def updates_for(self, count: int, to_prune: int) -> int:
        """How many updates a group needs at least until so many of its units are out."""

    @property
    def steps_needed(self) -> int:
        """How many steps it takes until everything is out, if the ranks stay as they are now; often it takes longer."""
        counts = torch.bincount(self.units.group_of, minlength=len(self.units.names)).tolist()
        pairs = set(zip(counts, self.units.to_prune.tolist(), strict=True))
        return self.settings.every * max(self.updates_for(count, to_prune) for count, to_prune in pairs)

    @abstractmethod
    def advice(self) -> str:
        """What to change where groups do not reach their targets, beside training longer."""

    def plan(self) -> Plan:
        """What went, to be cut.

        Raises:
            SecateurError: not everything is out yet, or columns went, which no plan can say.
        """
        if self.settings.unit == "column":
            raise SecateurError("columns are zero by a mask (see pruned and units); only channels make a plan")
        if self.unfinished():
            missing = ", ".join(f"{name} ({count})" for name, count in self.unfinished().items())
            raise SecateurError(
                f"after {self.steps} steps these channels are still to go: {missing}; even if no rank ever changed it "
                f"took {self.steps_needed} steps: train longer, or {self.advice()}"
            )
        return make_plan(self.graph, self.units.positions(self.pruned), skipped=self.skipped)

    @property
    def facts(self) -> dict[str, Any]:
        """What is to be known of the pruning, as what JSON can hold."""
        return {"steps": self.steps, "skipped": dict(self.skipped)}

    # --------------------------------------------------------------------------------------------------------- resuming

    @property
    def kind(self) -> str:
        """What a state must be of, to be loaded."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, tensors and numbers."""
        return {
            "kind": self.kind, "names": list(self.units.names), "to_prune": self.units.to_prune.tolist(),
            "steps": self.steps, "done": self.done, "pruned": self.pruned.clone(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, by a handle of the same kind and targets.

        Raises:
            SecateurError: the state of another kind of handle, or of other targets; nothing is changed.
        """
        own = {"kind": self.kind, "names": list(self.units.names), "to_prune": self.units.to_prune.tolist()}
        for name, value in own.items():
            if state.get(name) != value:
                raise SecateurError(
                    f"the state has {name} {state.get(name)}, this handle {value}: method, budget or model differ"
                )
        self.steps, self.done = int(state["steps"]), bool(state["done"])
        self.pruned = state["pruned"].to(self.pruned, copy=True)


def _check_traced(model: nn.Module, graph: ChannelGraph) -> None:
    """Raise if the graph names tensors that the model lacks."""
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    strange = [axis.name for group in graph.groups for axis in group.producers if axis.name not in own]
    if strange:
        raise SecateurError(
            f"the graph names {strange[0]}, which the model lacks: give the traced model, not a wrapper"
        )
