"""Cutting: a smaller model from a model and a plan, and the masked model that it must equal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from secateur._internal.batches import Inputs, call_without_cache, tensors_in
from secateur._internal.errors import CannotCut, SecateurError, notice
from secateur._internal.records import add_to_record
from secateur._internal.state import eval_mode
from secateur._internal.wrappers import refuse_wrapped
from secateur.plan import Plan, cannot_cut
from secateur.surgery.optimizer_remapper import OptimizerRemapper
from secateur.tracing.attentions import free_heads
from secateur.tracing.copying import OF_MODULES, copy_model, reached, within
from secateur.tracing.display import LONGEST, listed
from secateur.tracing.graph import fingerprint, passing_buffers
from secateur.tracing.norms import narrow_all
from secateur.tracing.proof import verify
from secateur.tracing.skeleton import copyable
from secateur.tracing.slices import Patched, patch, patches, remembered, sliced
from secateur.tracing.weight_norms import rescale


def cut(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: Optimizer | None = None,
    averaged: AveragedModel | None = None,
    in_place: bool = False,
) -> nn.Module:
    """Build the smaller model; with ``in_place`` the model itself becomes it.

    Args:
        model: the model the plan was made for; it is left untouched, unless ``in_place``.
        plan: what to remove.
        optimizer: an optimizer of ``model``; it is handed over to the new model: its parameters are replaced and its
            state follows the slices, so that training goes on with the smaller model. Schedulers and a ``GradScaler``
            hold the optimizer and need nothing.
        averaged: an ``AveragedModel`` of ``model``, which goes on with the cut average, in place.
        in_place: the model and its modules stay the objects that they are, so whoever holds them (a loop, a wrapper of
            ``torch.compile``, which compiles anew) goes on with the smaller model; its parameters are new objects.

    Returns:
        A new module, or ``model`` itself; it remembers its plan (:func:`secateur.record`).

    Raises:
        SecateurError: the plan was made for another model. Nothing has changed then.
        CannotCut: the plan was made without the proof (:attr:`secateur.Plan.proven`), and the model does not bear it.
    """
    if averaged is not None and not isinstance(averaged, AveragedModel):
        raise SecateurError(f"cut(averaged=...): an AveragedModel is expected, not a {type(averaged).__name__}")
    with torch.inference_mode(False):  # what is made in it could never be trained
        average = None if averaged is None else _cut(averaged.module, plan, None)
        small = _cut(model, plan, optimizer, in_place=in_place)
    if averaged is not None and average is not None:
        averaged.module = average
    return small


def _cut(model: nn.Module, plan: Plan, optimizer: Optimizer | None, *, in_place: bool = False) -> nn.Module:
    check_plan(model, plan)
    plan = replace(proven(model, plan), patched=patched(model, plan))
    follower = OptimizerRemapper(model, plan, optimizer) if optimizer is not None else None
    before = dict(model.named_parameters())
    new = {id(t): _remaining(t, plan.slices.get(n, {})) for n, t in (*before.items(), *model.named_buffers())}
    # wherever the copy meets an old tensor, in a plain list too, it takes the new one
    small = _replaced(model, new) if in_place else copy_model(model, dict(new))
    hooked = [n for n, p in before.items() if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)]
    if in_place and hooked:
        notice(f"cut(in_place=True): hooks of {listed(hooked, LONGEST, 4)} are those of old tensors, and are gone")
    patch(small, plan.patched)
    narrow_all(small, plan.norms)
    free_heads(small, plan.attentions)
    _rescale(small, before, plan)
    add_to_record(small, model, {"cut": replace(plan, graph=None)})
    if follower is not None:
        follower({p: new[id(p)] for p in before.values()})
    return small


def _replaced(model: nn.Module, new: Mapping[int, Tensor]) -> nn.Module:
    """The model itself, with other tensors wherever its modules hold the old ones; all is known before it is changed.

    What holds old tensors beside (containers and objects of any kind) is copied with the new ones in it.
    """
    memo: dict[int, Any] = {id(module): module for module in model.modules()} | dict(new)
    for value in reached(model):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo.setdefault(id(value), value.detach().clone())
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            changes.append((table, {name: new.get(id(tensor), tensor) for name, tensor in table.items()}))
        own = {name: value for name, value in vars(module).items() if name not in OF_MODULES}
        holding = {name: value for name, value in own.items() if any(id(held) in new for held in within(value))}
        changes.append((vars(module), {name: copy.deepcopy(value, memo) for name, value in holding.items()}))
    for table, values in changes:
        table.update(values)
    return model


def _rescale(small: nn.Module, before: Mapping[str, Tensor], plan: Plan) -> None:
    """Let normalised weights whose directions have lost positions be what they were there; see ``WeightNorm``."""
    after = dict(small.named_parameters())
    for name, norm in plan.weight_norms.items():
        direction, dims = before[norm.direction].detach(), plan.slices.get(norm.direction, {})
        kept = sliced(direction, {d: p for d, p in dims.items() if d == norm.dim})
        rescale(after[name], after[norm.direction], kept, norm.dim)


def _remaining(tensor: Tensor, removed: Mapping[int, list[int]]) -> Tensor:
    # a buffer that is not saved may have another shape than when the model was traced: its forward will see to it
    fits = removed and _has(tensor, removed)
    left = sliced(tensor.detach(), removed) if fits else tensor.detach().clone()
    if not isinstance(tensor, nn.Parameter):
        return left
    own = nn.Parameter(left, requires_grad=tensor.requires_grad)
    vars(own).update(vars(tensor))  # what somebody has noted of it
    return own


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise if a plan was not made for this model."""
    if not isinstance(plan, Plan):
        raise SecateurError(f"a Plan is expected, {type(plan).__name__} was given")
    refuse_wrapped(model, "the model")
    own = fingerprint(model)
    if own != plan.fingerprint:
        raise SecateurError(
            f"the plan was made for another model (names and shapes hash to {plan.fingerprint}, those of this "
            f"{type(model).__name__} to {own}): build the model as it was when it was traced"
        )
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    passing = passing_buffers(model)
    for name, dims in plan.slices.items():
        if name not in passing and not _has(tensors.get(name), dims):
            raise SecateurError(f"the plan is damaged: it removes positions of {name} that the model does not have")


def _has(tensor: Tensor | None, removed: Mapping[int, list[int]]) -> bool:
    """Whether a tensor has all the positions."""
    return tensor is not None and all(
        dim < tensor.ndim and positions[-1] < tensor.shape[dim] for dim, positions in removed.items()
    )


def patched(model: nn.Module, plan: Plan) -> Patched:
    """What modules must remember otherwise after the cut; a plan that does not say it is told by the model.

    Raises:
        SecateurError: the plan says something else.
    """
    due = patches(remembered(model), plan.slices)
    for key, (before, after) in due.items():
        if plan.patched.get(key, due[key]) != (before, after):
            raise SecateurError(
                f"the plan is damaged: it changes {key} from {plan.patched[key][0]} to {plan.patched[key][1]}, where "
                f"its slices make {after} of {before}"
            )
    return {**due, **plan.patched}


def proven(model: nn.Module, plan: Plan) -> Plan:
    """The plan, once it is known that the model bears it.

    Raises:
        CannotCut: it does not, or there is no graph to prove it with.
    """
    if plan.proven:
        return plan
    if plan.graph is None:
        if plan.slices or plan.removed:
            raise CannotCut(
                "cut(plan): nobody has proven that the model bears this plan, and it has no graph to prove it with: "
                "make the plan anew, with the graph of secateur.trace(model, example_inputs)"
            )
    elif wrong := verify(model, plan.graph, plan):
        raise cannot_cut(wrong)
    return replace(plan, proven=True)


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model, of full size, with the removed channels zero at their producers."""
    check_plan(model, plan)
    if plan.graph is None:
        raise SecateurError("masked(plan): the plan has no graph (it came from JSON): trace the model and remake it")
    with copyable(model):
        copied = copy_model(model, {})
    tensors = dict((*copied.named_parameters(), *copied.named_buffers()))
    for group_name, positions in plan.removed.items():
        group = plan.graph.group(group_name)
        gone = torch.zeros(int(max(a.channels.max() for a in group.axes)) + 1, dtype=torch.bool)
        gone[torch.as_tensor(group.channels[list(positions)])] = True
        for axis in (*group.producers, *group.constants):
            tensor = tensors[axis.name]
            known = torch.as_tensor(axis.channels)
            where = gone[known.clamp(max=len(gone) - 1)] & (known < len(gone))
            with torch.no_grad():
                tensor.index_fill_(axis.dim, where.nonzero().squeeze(1).to(tensor.device), 0)
    before = dict(model.named_parameters())
    for name, norm in plan.weight_norms.items():
        direction = before[norm.direction].detach()
        rescale(tensors[name], tensors[norm.direction], direction, norm.dim)
    return copied


def check(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    inputs: Inputs,
    *,
    outputs: Callable[[Any], Any] | None = None,
) -> float:
    """The largest relative difference between what the masked and the cut network compute, in eval mode.

    Both begin with the same random state, which comes back, as do the buffers.

    Args:
        model: the original.
        small: what :func:`cut` made of it.
        plan: what was removed.
        inputs: inputs to compare on, as for :func:`secateur.trace`.
        outputs: which of what the forwards return is compared, as for :func:`secateur.trace`.

    Returns:
        ``max |masked - small| / max |masked|`` over all outputs; infinity if anything is not finite.

    Raises:
        SecateurError: the outputs differ in number or shape.
    """
    matters = outputs if outputs is not None else lambda out: out
    wanted = tensors_in(matters(_eval(masked(model, plan), inputs)))
    given = tensors_in(matters(_eval(small, inputs)))
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
        return call_without_cache(model, pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs))
