"""SDPrun, which prunes while it trains (:mod:`secateur.methods.sdprun`), as an optimizer that a recipe can name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur._internal.checks import check_choice, check_names, check_nonnegative, is_number
from secateur._internal.errors import SecateurError
from secateur.allocation.budget import budget_from
from secateur.lab.training.optimizers.contract import OPTIMIZERS, Optimizer
from secateur.lab.training.optimizers.gradient import SGD
from secateur.methods.sdprun import WEIGHTS
from secateur.methods.sdprun import SDPrun as Method
from secateur.tracing.api import trace

_SUM = "it would break the sum of gradients that sdprun keeps"


@OPTIMIZERS.register("sdprun")
@dataclass(frozen=True)
class SDPrun(Optimizer):
    """SDPrun; without its threshold (``c: 0``) it is SGD.

    Attributes:
        c: strength of the pruning.
        mu: growth of the threshold in time, in (0, 1].
        weights: ``none`` or ``sqrt``: how the threshold depends on a channel's size.
        exclude: names of groups that are left alone (``secateur inspect`` shows them).
        budget: what may remain, as the arguments of :class:`secateur.Budget`; once met, the threshold stands still.
    """

    prunes: ClassVar[bool] = True
    refused: ClassVar[Mapping[str, str]] = {"momentum": _SUM, "nesterov": _SUM, "weight_decay": _SUM}

    c: float = 5e-4
    mu: float = 0.6
    weights: str = "none"
    exclude: Sequence[str] = ()
    budget: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_nonnegative("c", self.c)
        if not is_number(self.mu) or not 0 < self.mu <= 1:
            raise SecateurError(f"mu={self.mu!r}: a number in (0, 1] is expected")
        check_choice("weights", self.weights, WEIGHTS)
        if len(self.exclude):
            check_names("exclude", self.exclude, "groups' names")
        if self.budget is not None:
            budget_from(self.budget)

    def make(self, model: nn.Module, inputs: Tensor, lr: float) -> torch.optim.Optimizer:
        """See the contract."""
        budget = None if self.budget is None else budget_from(self.budget)
        return Method(
            model,
            trace(model, inputs.cpu()),
            lr=lr,
            c=self.c,
            mu=self.mu,
            weights=self.weights,
            exclude=list(self.exclude),
            budget=budget,
        )

    def unpruned(self) -> Optimizer:
        """Plain SGD."""
        return SGD()

    def outcome(self, optimizer: torch.optim.Optimizer, epochs: int) -> tuple[dict[str, Any], str]:
        """Whether the budget was reached, where there is one."""
        if self.budget is None or not isinstance(optimizer, Method):
            return {}, ""
        if optimizer.reached:
            return {"reached": True}, ""
        return {"reached": False}, (
            f"the budget {dict(self.budget)} was not reached in {epochs} epochs with c={self.c}: give a larger c, or "
            "more epochs; what is zero by now is cut"
        )
