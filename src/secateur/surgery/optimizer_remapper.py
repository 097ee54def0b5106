"""An optimizer handed over to the cut model: its parameters are replaced and its state follows the slices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur._internal.errors import SecateurError
from secateur.plan import Plan
from secateur.tracing.slices import kept_positions, sliced


class OptimizerRemapper:
    """Checks at the door that an optimizer can follow a cut; calling it makes it follow.

    Args:
        model: the model before the cut.
        plan: the cut.
        optimizer: an optimizer of the model's parameters. If it has a method ``follow_cut(replaced, kept)`` that is
            called last, with the new parameter of every old one and the kept positions by dim.

    Raises:
        SecateurError: it holds parameters that are not the model's, or state whose shape says nothing of the slices.
    """

    def __init__(self, model: nn.Module, plan: Plan, optimizer: Optimizer) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self.optimizer = optimizer
        own = hasattr(optimizer, "follow_cut")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise SecateurError(
                "cut(optimizer): LBFGS keeps its history in one flat piece; build a new one after the cut"
            )
        names = {id(p): n for n, p in model.named_parameters()}
        self.removed: dict[int, Mapping[int, list[int]]] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) not in names:
                    raise SecateurError(
                        f"cut(optimizer): it holds a parameter of shape {list(p.shape)} that is not the model's; "
                        "build the optimizer from model.parameters()"
                    )
                removed = plan.slices.get(names[id(p)], {})
                self.removed[id(p)] = removed
                for key, value in optimizer.state.get(p, {}).items():
                    if (
                        not own
                        and removed
                        and isinstance(value, Tensor)
                        and value.numel() > 1
                        and value.shape != p.shape
                    ):
                        raise SecateurError(
                            f"cut(optimizer): its state {key!r} of {names[id(p)]} has shape {list(value.shape)}, not "
                            f"the parameter's {list(p.shape)}, and cannot follow; build a new optimizer after the cut"
                        )

    def __call__(self, replaced: Mapping[Tensor, Any]) -> None:
        """Hand the optimizer over to the new parameters."""
        optimizer = self.optimizer
        if hasattr(optimizer, "follow_cut"):  # it knows its state better
            self._grads(replaced)
            with torch.no_grad():
                optimizer.follow_cut(replaced, self._kept())
            return
        self._grads(replaced)
        state: dict[Tensor, Any] = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in optimizer.state:
                    state[replaced[p]] = {
                        key: sliced(value, self.removed[id(p)])
                        if isinstance(value, Tensor) and value.shape == p.shape
                        else value
                        for key, value in optimizer.state[p].items()
                    }
            group["params"] = [replaced[p] for p in group["params"]]
        optimizer.state.clear()
        optimizer.state.update(state)

    def _grads(self, replaced: Mapping[Tensor, Any]) -> None:
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    replaced[p].grad = sliced(p.grad, self.removed[id(p)]).clone()

    def _kept(self) -> dict[Tensor, dict[int, Tensor]]:
        return {
            p: {d: kept_positions(p.shape[d], gone, p.device) for d, gone in self.removed[id(p)].items()}
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
