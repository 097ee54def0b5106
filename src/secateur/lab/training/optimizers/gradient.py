"""The usual ones, as PyTorch has them: SGD, Adam and AdamW, with one learning rate for all parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur._internal.checks import check_flag, check_nonnegative, is_number
from secateur._internal.errors import SecateurError
from secateur.lab.training.optimizers.contract import OPTIMIZERS, Optimizer


@OPTIMIZERS.register("sgd")
@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent.

    Attributes:
        momentum: share of the last step that goes into the next, in [0, 1).
        nesterov: take the gradient where the momentum leads.
        weight_decay: factor of the weights that is added to their gradients.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise SecateurError(f"momentum={self.momentum!r}: a number in [0, 1) is expected")
        check_flag("nesterov", self.nesterov)
        check_nonnegative("weight_decay", self.weight_decay)
        if self.nesterov and not self.momentum:
            raise SecateurError("nesterov: true needs a momentum above 0")

    def make(self, model: nn.Module, inputs: Tensor, lr: float) -> torch.optim.Optimizer:
        """See the contract."""
        return torch.optim.SGD(
            model.parameters(),
            lr=lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )


@OPTIMIZERS.register("adam")
@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (arXiv 1412.6980).

    Attributes:
        weight_decay: factor of the weights that is added to their gradients.
    """

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_nonnegative("weight_decay", self.weight_decay)

    def make(self, model: nn.Module, inputs: Tensor, lr: float) -> torch.optim.Optimizer:
        """See the contract."""
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=self.weight_decay)


@OPTIMIZERS.register("adamw")
@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101).

    Attributes:
        weight_decay: share of the weights that is taken off in a step, times the learning rate.
    """

    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_nonnegative("weight_decay", self.weight_decay)

    def make(self, model: nn.Module, inputs: Tensor, lr: float) -> torch.optim.Optimizer:
        """See the contract."""
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=self.weight_decay)
