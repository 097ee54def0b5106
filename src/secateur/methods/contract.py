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

Whoever runs methods asks the two registries, and these optional members of a settings class:

==================  ================================================================================================
``takes_budget``    whether a budget is needed (the default) or refused
``plans``           whether channels are removed, so that there is a plan (the default)
``exclude, seed``   fields that a recipe fills in from its own
``check``           ``check(model, inputs, budget)`` raises what can be known to be wrong before any work
``before_last``     ``before_last()`` gives the settings of all rounds but the last
``needs_optimizer`` the name of the optimizer without which there is nothing that it could take
``keeper``          ``keeper(model)`` gives a handle that keeps what was pruned while the result is fine-tuned
``finish``          ``finish(model, inputs)`` gives a Result: what is left to do after all training
==================  ================================================================================================

Several processes: data are shards, sums are added up, decisions are taken on rank 0 and told to the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from secateur._internal.batches import Inputs
from secateur._internal.distributed import broadcast_
from secateur._internal.errors import SecateurError, unknown
from secateur._internal.registry import Registry, options_of
from secateur._internal.workload import Needs, Workload
from secateur.allocation.budget import Budget
from secateur.measure.counting import counted
from secateur.plan import Plan
from secateur.result import Counts, Result
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

    The built-in ones have all of these; one of your own needs ``done``, ``step`` and ``plan``, and the others where
    they have a meaning. More that is asked for where it is there: ``advice()``, what to change where the training is
    too short; ``facts``, what is to be known; and ``small()``, which gives the finished model where no plan of channels
    says what was done.
    """

    @property
    def done(self) -> bool:
        """Whether everything is out that shall be."""

    @property
    def steps_needed(self) -> int | None:
        """The least number of steps until it is done; None where nobody can know."""

    def step(self) -> None:
        """To be called after the optimizer's step."""

    def plan(self) -> Plan:
        """What went, to be cut."""

    def detach(self) -> None:
        """Leave the model and its optimizer alone from now on."""

    def state_dict(self) -> Mapping[str, Any]:
        """What a resumed run needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""


class TrainingMethod(Protocol):
    """What makes a handle."""

    def attach(self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, budget: Budget | None) -> Handle:
        """A handle for this model, changed in place while it trains."""


T = TypeVar("T")
METHODS: Registry[Method] = Registry("method", "secateur.methods", apply=4)
"""All methods that prune at once, by name."""
TRAINING_METHODS: Registry[TrainingMethod] = Registry("training-time method", "secateur.methods", attach=4)
"""All methods that prune while training, by name."""


def settings_from(cls: type[T], given: T | None, options: Mapping[str, Any], who: str, also: Sequence[str] = ()) -> T:
    """Settings that a user gave as such, or field by field.

    Args:
        cls: their class.
        given: the settings, if they were given.
        options: or some of their fields.
        who: the verb or the handle that asks, for messages.
        also: its other arguments, for messages.

    Raises:
        SecateurError: both, settings of another class, an unknown field, values that are not allowed.
    """
    if given is not None and options:
        raise SecateurError(f"{who}(settings=..., {', '.join(options)}=...): give either settings or their fields")
    if given is not None and not isinstance(given, cls):
        raise SecateurError(f"{who}(settings={given!r}): {cls.__name__}(...) is expected")
    for name in options:
        if name not in options_of(cls):
            raise unknown(f"option of {who}", name, [*also, *options_of(cls)])
    return cls(**options) if given is None else given


def finished(model: nn.Module, handle: Any) -> tuple[nn.Module, Plan | None]:
    """The smaller model that a handle has made ready, and its plan where there is one."""
    if hasattr(handle, "small"):
        return handle.small(), None
    plan = handle.plan()
    return cut(model, plan), plan


def measured_counts(model: nn.Module, inputs: Inputs) -> Counts:
    """What a model costs that has no channel graph, counted in one forward of the example inputs."""
    own = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)  # a forward may write into them
    return Counts(**counted(model, own))


@torch.no_grad()
def share_weights(model: nn.Module, work: Workload) -> None:
    """Let all processes have rank 0's weights: eigenvectors are found anew in each, and may differ in their signs."""
    if work.processes > 1:
        for p in model.parameters():
            p.copy_(broadcast_(p.detach().contiguous(), work.group))


def described(method: Any) -> dict[str, Any]:
    """A method's name and settings as what JSON can hold, for ``result.facts["chosen"]``."""
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    own = {field.name: _plain(getattr(method, field.name)) for field in fields}
    return {"name": str(getattr(method, "name", type(method).__name__)), **own}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value.__name__ if isinstance(value, type) else type(value).__name__
