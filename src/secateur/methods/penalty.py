r"""What IncReg and GReg share: every unit has a weight decay of its own, which grows until the unit is nothing.

::

    grad <- grad + lambda * w        lambda by unit, on top of the optimizer's own weight decay

The penalty is part of the gradient, so it passes through the optimizer as a weight decay does, and a learning rate that
is too large for it makes the weights explode: that is checked at the door and in each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from secateur._internal.checks import check_count, check_positive
from secateur._internal.errors import SecateurError
from secateur.methods.gradual import GradualPruner, GradualSettings

REACHED = 1 - 1e-9
"""The part of the limit from which on a penalty has reached it: sums of many small numbers are not exact."""


@dataclass(frozen=True)
class PenaltySettings(GradualSettings):
    """The settings of all methods with growing penalties: those of :class:`GradualSettings`, and these.

    Attributes:
        rate: what the penalty of the least important unit grows by in an update. The papers' is their weight decay.
        limit: the penalty at which a unit is out.
        settle: steps after that before the handle is done.
    """

    rate: float = 2.5e-4
    limit: float = 2.5
    settle: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("rate", self.rate)
        check_positive("limit", self.limit)
        check_count("settle", self.settle, 0)


S = TypeVar("S", bound=PenaltySettings)


class PenaltyPruner(GradualPruner[S]):
    """A handle whose units have penalties.

    Attributes:
        penalty: of every unit, float64 [units].
        settled: steps since all units have reached their limit.
    """

    def _begin(self) -> None:
        limit = float(self.settings.limit)
        self._check_stable(limit, f"limit={limit:g}")
        self.penalty = torch.zeros(len(self.units), dtype=torch.float64, device=self.pruned.device)
        self.settled = 0

    def _before(self) -> None:
        largest = float(self.penalty.max())
        self._check_stable(largest, f"penalties up to {largest:g}")
        # fused optimizers under mixed precision unscale by themselves
        scale = getattr(self.optimizer, "grad_scale", None)
        # a negative penalty takes a parameter's weight decay off, never more; AdamW's is no part of the gradient
        decoupled = isinstance(self.optimizer, torch.optim.AdamW)
        decay = {
            p: 0.0 if decoupled else float(group.get("weight_decay", 0))
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        for p, penalty in self.units.by_parameter(self.penalty):
            if p.grad is not None:
                value = penalty.to(p.dtype).clamp(min=-decay[p])
                p.grad.addcmul_(p, value if scale is None else value * scale.to(value))

    def at_limit(self) -> torch.Tensor:
        """Which units have reached their limit, bool [units]."""
        return self.penalty >= float(self.settings.limit) * REACHED

    def advice(self) -> str:
        """What to change where groups do not reach their targets, beside training longer."""
        return f"give a larger rate than {self.settings.rate:g} or a lower limit than {self.settings.limit:g}"

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, tensors and numbers."""
        return super().state_dict() | {"penalty": self.penalty.clone(), "settled": self.settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        super().load_state_dict(state)
        self.penalty = state["penalty"].to(self.penalty, copy=True)
        self.settled = int(state["settled"])

    def _check_stable(self, penalty: float, what: str) -> None:
        """Gradient descent overshoots on a quadratic from ``lr * curvature = 2 (1 + m)`` on, Nesterov's earlier.

        Adaptive optimizers scale gradients and are not judged.
        """
        own = {p for p, _ in self.units.owned}
        for group in self.optimizer.param_groups:
            if "dampening" not in group or not own & set(group["params"]):
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
