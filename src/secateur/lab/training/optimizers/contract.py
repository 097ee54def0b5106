"""What an optimizer of a recipe is: a frozen dataclass of settings that knows how to make the optimizer.

::

    @OPTIMIZERS.register("sgd")
    @dataclass(frozen=True)
    class SGD(Optimizer):
        momentum: float = 0.0

In a recipe that is ``optimizer: {name: sgd, momentum: 0.9}``, and ``optimizer: sgd`` for the defaults. The learning
rate is the section's own, since its schedule is. A user's own is named ``package.module:Class``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur._internal.registry import Registry


class Optimizer:
    """Settings of an optimizer.

    Attributes:
        name: that it is registered under.
        prunes: whether it drives channels to zero while it trains; such a one trains, and never fine-tunes.
        refused: settings that one might expect, and why it has none of them.
    """

    name: ClassVar[str] = ""
    prunes: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = {}

    def make(self, model: nn.Module, inputs: Tensor, lr: float) -> torch.optim.Optimizer:
        """The optimizer of a model's parameters.

        Args:
            model: the model, on the device where it is trained.
            inputs: one example, for whoever traces the model.
            lr: the learning rate at the schedule's 1.
        """
        raise NotImplementedError

    def unpruned(self) -> Optimizer:
        """The optimizer that trains the same without pruning: what one that prunes is compared with."""
        return self

    def outcome(self, optimizer: torch.optim.Optimizer, epochs: int) -> tuple[dict[str, Any], str]:
        """After training: facts for the record, and what the user should be told, or an empty text.

        Args:
            optimizer: what :meth:`make` made.
            epochs: that it has trained for.
        """
        return {}, ""


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", "secateur.lab.training.optimizers", make=3)
