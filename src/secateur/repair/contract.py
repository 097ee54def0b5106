"""The seat of the repair: how does what stays make up for what goes, before any training?

A repair is a settings dataclass with one method::

    @REPAIRS.register("mine")
    @dataclass(frozen=True)
    class Mine:
        needs: ClassVar[Needs] = Needs(data=True)

        def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts: ...

It changes the smaller model in place, and knows nothing of how its channels were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur._internal.errors import SecateurError
from secateur._internal.registry import Registry
from secateur._internal.workload import Needs, Workload
from secateur.plan import Plan
from secateur.tracing.slices import sliced

Facts = dict[str, Any]
"""What is to be known of a step, as what JSON can hold."""
LEFT_WHOLE = "left whole"
"""The fact that says which layers a repair could not change: path -> why."""


class Repair(Protocol):
    """What sits there."""

    needs: ClassVar[Needs]

    def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts:
        """Change the smaller model in place; if this fails, it is as before.

        Args:
            original: the model that was pruned; it is left untouched.
            small: what was cut from it by the plan.
            plan: what was removed.
            work: the table, with the data.

        Returns:
            What is to be known, such as which layers stay as they were, and why.
        """


REPAIRS: Registry[Repair] = Registry("repair", "secateur.repair", apply=4)
"""All repairs by name."""


def copy_remaining(weights: Mapping[str, Tensor], small: nn.Module, plan: Plan) -> None:
    """Write what a plan leaves of full-size weights into the smaller model.

    Args:
        weights: parameters of the original's shapes, by name; others stay as they are.
        small: what was cut by the plan.
        plan: what was removed.

    Raises:
        SecateurError: the smaller model was not cut by this plan; nothing is written then.
    """
    parameters = dict(small.named_parameters())
    left = {name: sliced(weight, plan.slices.get(name, {})) for name, weight in weights.items()}
    for name, weight in left.items():
        found = f"shape {list(parameters[name].shape)}" if name in parameters else "no such parameter"
        if name not in parameters or parameters[name].shape != weight.shape:
            raise SecateurError(
                f"the plan leaves {name!r} with shape {list(weight.shape)}, the smaller model has {found}: give what "
                "secateur.cut made of the model by this plan"
            )
    with torch.no_grad():
        for name, weight in left.items():
            parameters[name].copy_(weight)
