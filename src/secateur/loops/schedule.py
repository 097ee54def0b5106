"""What prunes while somebody else's loop trains: a method that steps beside the optimizer, or cuts after epochs.

The model becomes smaller in place, so the loop that holds it goes on; its optimizer follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map

from secateur._internal.batches import Inputs
from secateur._internal.errors import NothingToPrune, SecateurError, notice
from secateur._internal.state import device_of
from secateur.allocation.budget import Budget, check_rounds, in_round
from secateur.methods.contract import TRAINING_METHODS, Handle, TrainingMethod
from secateur.plan import Plan
from secateur.pruning import prune
from secateur.result import Counts, counts_of
from secateur.surgery.channels import cut
from secateur.surgery.optimizer_remapper import OptimizerRemapper
from secateur.tracing.api import trace

After = int | Sequence[int] | Mapping[int, Budget]
"""Epochs, from 1 on: one, several that each bring the network equally nearer, or budgets by epoch."""


class PruningSchedule:
    """Prunes a model that is being trained, in place.

    Either a method that prunes while training goes on stands beside the optimizer until all is out, and then channels
    go; or channels go at once after some epochs, as :func:`secateur.prune` chooses and repairs them. Where neither is
    asked for, the optimizer itself must be one that prunes, :class:`secateur.SDPrun`; its zero channels go once its
    budget is reached, or at the end.

    Args:
        inputs: example inputs, as for :func:`secateur.trace`.
        budget: what may remain in the end; of ``after`` by epoch, and of an optimizer that prunes, it is theirs.
        method: ``"increg"``, ``"greg"``, ``"spp"``, a name and settings, or settings.
        after: the epochs after which channels go.
        averaged: an ``AveragedModel`` of the model, which follows.
        data: batches, for what chooses channels after an epoch; likewise ``loss``.
        loss: see :func:`secateur.prune`.
        **options: what else :func:`secateur.prune` takes: criterion, strategy, repair, exclude, outputs, batches...

    Attributes:
        cuts: what went: ``step``, ``epoch``, and which parts of the original's ``macs`` and ``params`` are left.
        plan: what the last cut removed.

    Raises:
        SecateurError: a method and epochs, epochs or budgets that are none.
    """

    def __init__(
        self,
        inputs: Inputs,
        budget: Budget | None = None,
        *,
        method: str | TrainingMethod | None = None,
        after: After | None = None,
        averaged: AveragedModel | None = None,
        data: Iterable[Any] | None = None,
        loss: Any = None,
        **options: Any,
    ) -> None:
        if method is not None and after is not None:
            raise SecateurError("PruningSchedule: a method prunes while training goes on; give method= or after=")
        self.inputs, self.budget, self.averaged = inputs, budget, averaged
        self.method: TrainingMethod | None = None if method is None else TRAINING_METHODS.make(method)
        if method is not None and set(options) - {"outputs"}:
            raise SecateurError(
                f"PruningSchedule(method=...): {', '.join(options)} are of secateur.prune; a method has settings of "
                "its own: method={'name': ..., ...}"
            )
        self.options = {"data": data, "loss": loss, **options}
        self.budgets = _budgets(after, budget)
        self.cuts: list[dict[str, float]] = []
        self.plan: Plan | None = None
        self.handle: Handle | None = None
        self.steps = self.epoch = 0

    def begin(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take up a model and its optimizer, before the first step.

        Raises:
            SecateurError: what :func:`secateur.trace`, the method, or :func:`secateur.prune` refuses.
        """
        self.model, self.optimizer = model, getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        self.steps = self.epoch = 0
        self.cuts, self.plan, self.handle = [], None, None
        if isinstance(self.optimizer, torch.optim.Adafactor):
            raise SecateurError(
                "PruningSchedule: the state of Adafactor is in rows and columns, and cannot follow a cut"
            )
        OptimizerRemapper(model, Plan({}, {}, ""), self.optimizer)  # refuses now, not after hours, what cannot follow
        device = device_of(model)
        self.inputs = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, self.inputs)
        graph = trace(model, self.inputs, outputs=self.options.get("outputs"))
        self.whole: Counts = counts_of(graph)
        if self.method is not None:
            self.handle = self.method.attach(model, graph, self.optimizer, self.budget)
        elif not self.budgets:
            own: Any = self.optimizer
            if not all(hasattr(own, name) for name in ("plan", "done", "follow_cut")):
                raise SecateurError(
                    "PruningSchedule: neither method= nor after= is given, and the optimizer prunes nothing: give one, "
                    "or train with secateur.SDPrun"
                )
            self.handle = own

    def step(self) -> bool:
        """To be called after every step of the optimizer; whether the model became smaller now."""
        self.steps += 1
        if self.handle is None:
            return False
        if self.handle is not self.optimizer:
            self.handle.step()
        return self._finish() if self.handle.done else False

    def end_epoch(self) -> bool:
        """To be called after every epoch; whether the model became smaller now."""
        self.epoch += 1
        budget = self.budgets.get(self.epoch)
        if budget is None:
            return False
        now = counts_of(trace(self.model, self.inputs, outputs=self.options.get("outputs")))
        own = in_round(budget, 1, 1, asdict(self.whole), asdict(now)) if budget.limits else budget
        try:
            result = prune(self.model, self.inputs, own, **self.options)
        except NothingToPrune as error:
            notice(f"PruningSchedule: after epoch {self.epoch} nothing goes: {error}")
            return False
        assert result.plan is not None
        self._cut(result.plan)
        self.model.load_state_dict(result.model.state_dict())  # as the repair has left it
        return True

    def end(self) -> bool:
        """To be called after the last step; whether the model became smaller now."""
        never = [epoch for epoch in self.budgets if epoch > self.epoch]
        if never:
            notice(
                f"PruningSchedule: training has ended after {self.epoch} epochs; nothing was cut after {never}, which "
                "never came"
            )
        if self.handle is None:
            return False
        if self.handle is not self.optimizer and not self.handle.done:
            needed = self.handle.steps_needed
            notice(
                f"PruningSchedule: training has ended after {self.steps} steps, before the method was done"
                f"{f' ({needed} more are needed)' if needed else ''}; nothing was cut: train longer, or let it take "
                "larger steps"
            )
            return False
        return self._finish()

    def _finish(self) -> bool:
        """Cut what the method has made zero."""
        handle, self.handle = self.handle, None
        assert handle is not None
        if hasattr(handle, "small"):
            raise SecateurError(
                "PruningSchedule: this method has no plan of channels, and the model cannot become smaller in place; "
                "call it in a loop of your own"
            )
        plan = handle.plan()
        if handle is not self.optimizer:
            handle.detach()
        if plan.removed:
            self._cut(plan)
        return bool(plan.removed)

    def _cut(self, plan: Plan) -> None:
        with torch.no_grad():
            cut(self.model, plan, optimizer=self.optimizer, averaged=self.averaged, in_place=True)
        now = counts_of(trace(self.model, self.inputs, outputs=self.options.get("outputs")))
        parts = {unit: getattr(now, unit) / max(getattr(self.whole, unit), 1) for unit in ("macs", "params")}
        self.cuts.append({"step": self.steps, "epoch": self.epoch, **parts})
        self.plan = plan


def _budgets(after: After | None, budget: Budget | None) -> dict[int, Budget]:
    """The budget after every epoch in which channels go, as fractions of the original."""
    if after is None:
        return {}
    epochs = [after] if isinstance(after, int) else list(after)
    wrong = [epoch for epoch in epochs if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 1]
    if wrong or not epochs or epochs != sorted(set(epochs)):
        raise SecateurError(f"PruningSchedule(after={after!r}): epochs from 1 on, in their order, are expected")
    if isinstance(after, Mapping):
        if budget is not None or not all(isinstance(own, Budget) for own in after.values()):
            raise SecateurError(
                "PruningSchedule(after={...}): a Budget for each epoch is expected there, and no budget="
            )
        return dict(after)
    if not isinstance(budget, Budget):
        raise SecateurError(f"PruningSchedule(budget={budget!r}): a Budget is expected, for instance Budget(macs=0.5)")
    check_rounds(budget, len(epochs))
    ones = dict.fromkeys(budget.limits, 10**12)
    return {
        epoch: in_round(budget, number, len(epochs), ones, ones) if len(epochs) > 1 else budget
        for number, epoch in enumerate(epochs, start=1)
    }
