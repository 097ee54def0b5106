"""Methods that are more than criterion, strategy and repair: two small contracts.

At once: a settings dataclass that makes a model smaller::

    @METHODS.register("mine")
    @dataclass(frozen=True)
    class Mine:
        needs: ClassVar[Needs] = Needs(data=True)

        def apply(self, model: nn.Module, inputs: Inputs, budget: Budget | None, work: Workload) -> Result: ...

While training: a settings dataclass that attaches a handle to a model and its optimizer::

    @TRAINING_METHODS.register("mine")
    @dataclass(frozen=True)
    class Mine:
        def attach(
            self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, budget: Budget | None
        ) -> Handle: ...

Several processes: data are shards, sums are added up, decisions are taken on rank 0 and told to the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from torch import nn
from torch.optim import Optimizer

from secateur._internal.batches import Inputs
from secateur._internal.registry import Registry
from secateur._internal.workload import Needs, Workload
from secateur.allocation.budget import Budget
from secateur.plan import Plan
from secateur.result import Result
from secateur.surgery.channels import cut
from secateur.tracing.graph import ChannelGraph


class Method(Protocol):
    """What makes a model smaller at once."""

    needs: ClassVar[Needs]

    def apply(self, model: nn.Module, inputs: Inputs, budget: Budget | None, work: Workload) -> Result:
        """A smaller model; the given one is left untouched.

        Args:
            model: the model.
            inputs: example inputs; counts refer to their shapes.
            budget: what may remain, for methods that take one.
            work: the table, with data and loss.
        """


class Handle(Protocol):
    """What stands beside an optimizer and prunes while training goes on.

    Optional beside these: ``steps_needed`` (the least number of steps until it is done), ``state_dict()`` and
    ``load_state_dict(state)`` (for runs that can be resumed), ``detach()``, and ``small()``, which gives the finished
    model where no plan of channels says what was done.
    """

    @property
    def done(self) -> bool:
        """Whether everything is out that shall be."""

    def step(self) -> None:
        """To be called after the optimizer's step."""

    def plan(self) -> Plan:
        """What went, to be cut."""


class TrainingMethod(Protocol):
    """What makes a handle."""

    def attach(self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, budget: Budget | None) -> Handle:
        """A handle for this model, changed in place while it trains."""


METHODS: Registry[Method] = Registry("method", "secateur.methods", apply=4)
"""All methods that prune at once, by name."""
TRAINING_METHODS: Registry[TrainingMethod] = Registry("training-time method", "secateur.methods", attach=4)
"""All methods that prune while training, by name."""


def finished(model: nn.Module, handle: Any) -> tuple[nn.Module, Plan | None]:
    """The smaller model that a handle has made ready, and its plan where there is one."""
    if hasattr(handle, "small"):
        return handle.small(), None
    plan = handle.plan()
    return cut(model, plan), plan


def state_of(handle: Any) -> Mapping[str, Any] | None:
    """What a handle must keep to be resumed, if it says."""
    return handle.state_dict() if hasattr(handle, "state_dict") else None
