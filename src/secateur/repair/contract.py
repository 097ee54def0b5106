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
    """
    with torch.no_grad():
        for name, p in small.named_parameters():
            if name in weights:
                p.copy_(sliced(weights[name], plan.slices.get(name, {})))
