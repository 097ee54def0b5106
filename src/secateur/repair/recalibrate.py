"""The running statistics of batch norms, re-estimated on the smaller model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur._internal.batches import call_model
from secateur._internal.checks import check_count
from secateur._internal.distributed import Group, all_reduce_
from secateur._internal.losses import outputs_of
from secateur._internal.state import preserved
from secateur._internal.workload import Needs, Workload
from secateur.plan import Plan
from secateur.repair.contract import REPAIRS, Facts


def recalibrate(
    model: nn.Module, data: Iterable[Any], *, batches: int | None = None, group: Group = None, progress: bool = False
) -> None:
    """Change a model in place: re-estimate the running statistics of all its batch norms, as plain averages.

    All else is as in eval mode (no dropout), and comes back as it was. If a batch fails, the model is as before.

    Args:
        model: the model.
        data: batches; targets are not looked at. Every process gives its shard, and all get the averages of the whole.
        batches: use at most so many.
        group: the processes.
        progress: show how far it is.

    Raises:
        BadBatch: no data, or data that does not fit.
    """
    check_count("batches", batches, optional=True)
    re_estimate(model, Workload(model, data, group=group, progress=progress), batches)


def re_estimate(model: nn.Module, work: Workload, most: int | None = None) -> int:
    """:func:`recalibrate` with the batches of a table; gives the number of batch norms that were reached."""
    norms = [m for m in model.modules() if has_statistics(m)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), preserved(model):
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train()
                norm.momentum = None  # the cumulative average
            work.together(lambda: _run(model, work, most))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
        own = [tuple(t.clone() for t in statistics_of(norm)) for norm in norms]
    of_all = [_averaged(statistics, work) for statistics in own]
    with torch.no_grad():  # only now: until here all came back as it was
        for norm, found in zip(norms, of_all, strict=True):
            if int(found[2]):  # one that no batch reached stays as it is
                for old, new in zip(statistics_of(norm), found, strict=True):
                    old.copy_(new)
    return sum(bool(found[2]) for found in of_all)


def _run(model: nn.Module, work: Workload, most: int | None) -> None:
    for batch in work.batches(most, "batch norms"):
        outputs_of(partial(call_model, model), batch)


def has_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether it is a batch norm that keeps running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


def statistics_of(norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Its running mean, running variance and how many batches these are of."""
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


def _averaged(own: tuple[Tensor, ...], work: Workload) -> tuple[Tensor, ...]:
    """The averages over the batches of all processes, and how many these are."""
    if work.processes == 1:
        return own
    mean, variance, count = own
    total = all_reduce_(count.clone(), work.group)
    sums = (all_reduce_(value.double() * count, work.group) / total.clamp(min=1) for value in (mean, variance))
    return *sums, total


@REPAIRS.register("recalibrate")
@dataclass(frozen=True)
class Recalibrate:
    """Re-estimate the running statistics of batch norms.

    Attributes:
        batches: use at most so many batches.
    """

    needs: ClassVar[Needs] = Needs(data=True)
    batches: int | None = None

    def __post_init__(self) -> None:
        check_count("batches", self.batches, optional=True)

    def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts:
        """See :func:`recalibrate`."""
        return {"norms": re_estimate(small, work, self.batches)}


@REPAIRS.register("none")
@dataclass(frozen=True)
class Nothing:
    """What stays stays as it was."""

    needs: ClassVar[Needs] = Needs()

    def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts:
        """Change nothing."""
        return {}
