"""Cutting: a smaller model from a model and a plan, and the masked model that it must equal."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from secateur._internal.batches import Inputs, call_model, tensors_in
from secateur._internal.errors import SecateurError
from secateur._internal.state import eval_mode, fork_rng_of
from secateur.curvature.kronecker import Curvature
from secateur.plan import Plan
from secateur.repair.compensate import compensated
from secateur.surgery.optimizer_remapper import OptimizerRemapper
from secateur.surgery.records import add_to_record
from secateur.tracing.copying import copy_module
from secateur.tracing.graph import fingerprint
from secateur.tracing.slices import remember_sizes, sliced
from secateur.tracing.tracer import copyable


def cut(
    model: nn.Module, plan: Plan, *, optimizer: Optimizer | None = None, compensate: Curvature | None = None
) -> nn.Module:
    """Build the smaller model.

    Args:
        model: the model the plan was made for; it is left untouched.
        plan: what to remove.
        optimizer: an optimizer of ``model``; it is handed over to the new model: its parameters are replaced and its
            state follows the slices, so that training goes on with the smaller model.
        compensate: factors of the model's layers, with which the rows that stay make up for those that go
            (:func:`secateur.cut.compensated`).

    Returns:
        A new module, which remembers its plan (:func:`secateur.record`).

    Raises:
        SecateurError: the plan was made for another model, or the result does not run on the traced example inputs.
    """
    with torch.inference_mode(False):  # what is made in it could never be trained
        return _cut(model, plan, optimizer, compensate)


def _cut(model: nn.Module, plan: Plan, optimizer: Optimizer | None, compensate: Curvature | None) -> nn.Module:
    check_plan(model, plan)
    follower = OptimizerRemapper(model, plan, optimizer) if optimizer is not None else None
    source = model if compensate is None else compensated(model, plan, compensate)
    weights = dict((*source.named_parameters(), *source.named_buffers()))
    new = {
        id(t): _remaining(weights[n], plan.slices.get(n, {}))
        for n, t in (*model.named_parameters(), *model.named_buffers())
    }
    small = copy_module(
        model, dict(new)
    )  # wherever the copy meets an old tensor, in a plain list too, it takes the new
    remember_sizes(small)
    if plan.graph is not None and plan.graph.inputs is not None:
        _try(small, plan.graph.inputs)
    add_to_record(small, model, {"cut": replace(plan, graph=None)})
    if follower is not None:
        follower({p: new[id(p)] for p in model.parameters()})
    return small


def _remaining(tensor: Tensor, removed: Mapping[int, list[int]]) -> Tensor:
    left = sliced(tensor.detach(), removed) if removed else tensor.detach().clone()
    return nn.Parameter(left, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else left


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise if a plan was not made for this model."""
    if not isinstance(plan, Plan):
        raise SecateurError(f"a Plan is expected, {type(plan).__name__} was given")
    own = fingerprint(model)
    if own != plan.fingerprint:
        raise SecateurError(
            f"the plan was made for another model (names and shapes hash to {plan.fingerprint}, those of this "
            f"{type(model).__name__} to {own}): build the model as it was when it was traced"
        )
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, dims in plan.slices.items():
        for dim, positions in dims.items():
            if name not in tensors or dim >= tensors[name].ndim or positions[-1] >= tensors[name].shape[dim]:
                raise SecateurError(
                    f"the plan is damaged: it removes positions of {name}:{dim} that the model does not have"
                )


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model, of full size, with the removed channels zero at their producers."""
    check_plan(model, plan)
    if plan.graph is None:
        raise SecateurError("masked(plan): the plan has no graph (it came from JSON): trace the model and remake it")
    with copyable(model):
        copied = copy.deepcopy(model)
    tensors = dict(copied.named_parameters())
    for group_name, positions in plan.removed.items():
        group = plan.graph.group(group_name)
        gone = torch.zeros(int(max(a.channels.max() for a in group.axes)) + 1, dtype=torch.bool)
        gone[torch.as_tensor(group.channels[list(positions)])] = True
        for axis in group.producers:
            tensor = tensors[axis.name]
            known = torch.as_tensor(axis.channels)
            where = gone[known.clamp(max=len(gone) - 1)] & (known < len(gone))
            with torch.no_grad():
                tensor.index_fill_(axis.dim, where.nonzero().squeeze(1).to(tensor.device), 0)
    return copied


def check(model: nn.Module, small: nn.Module, plan: Plan, inputs: Inputs) -> float:
    """The largest relative difference between what the masked and the cut network compute, in eval mode.

    Both begin with the same random state, which comes back, as do the buffers.

    Args:
        model: the original.
        small: what :func:`cut` made of it.
        plan: what was removed.
        inputs: inputs to compare on, as for :func:`secateur.trace`.

    Returns:
        ``max |masked - small| / max |masked|`` over all outputs; infinity if anything is not finite.

    Raises:
        SecateurError: the outputs differ in number or shape.
    """
    wanted = tensors_in(_eval(masked(model, plan), inputs))
    given = tensors_in(_eval(small, inputs))
    if [t.shape for t in wanted] != [t.shape for t in given]:
        raise SecateurError(
            f"check: the outputs' shapes differ: {[list(t.shape) for t in wanted]} and {[list(t.shape) for t in given]}"
        )
    worst = 0.0
    for a, b in zip(wanted, given, strict=True):
        if a.numel():
            difference = (a.double() - b.double()).abs().max()
            relative = float(difference / a.double().abs().max().clamp_min(1e-30))
            worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def _eval(model: nn.Module, inputs: Inputs) -> Any:
    with eval_mode(model):
        return call_model(model, pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs))


def _try(small: nn.Module, inputs: Inputs) -> None:
    tensor = next(small.parameters())
    if tensor.is_meta or any(t.device != tensor.device for t in tensors_in(inputs)):
        return
    try:
        _eval(small, inputs)
    except Exception as error:
        raise SecateurError(
            f"the cut {type(small).__name__} fails on the example inputs: {type(error).__name__}: {error}"
        ) from error


def recalibrate(model: nn.Module, data: Any, *, batches: int | None = None) -> None:
    """Re-estimate the running statistics of all batch norms of a model, in place, as plain averages over the data.

    All else is as in eval mode (no dropout); modes and random state come back.

    Args:
        model: the model.
        data: batches; a tensor, or a tuple or list whose first entry is the input, or a dict of keyword arguments.
        batches: use at most so many.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes = [(m, m.training) for m in model.modules()]
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
        norm.train()
    seen = 0
    try:
        with torch.no_grad(), fork_rng_of(model):
            for batch in data:
                if batches is not None and seen >= batches:
                    break
                call_model(model, inputs_of(batch, seen))
                seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for m, mode in modes:
            m.training = mode
    if not seen:
        raise SecateurError("recalibrate(data): no batches were given, and the statistics are reset; give some data")


def inputs_of(batch: Any, number: int) -> Inputs:
    """What a model takes of a batch: the batch if it is a tensor or a mapping, else its first entry.

    A first entry that is a tuple holds several inputs.

    Raises:
        SecateurError: the batch is something else.
    """
    found = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if isinstance(found, Mapping):
        return dict(found)
    if not isinstance(found, (Tensor, tuple, list)):
        raise SecateurError(
            f"data: batches of tensors are expected, alone, as (inputs, ...) or by keyword; batch {number} is a "
            f"{type(batch).__name__}" + (f" of {type(found).__name__}" if found is not batch else "")
        )
    return found if isinstance(found, Tensor) else tuple(found)
