"""The proof of a plan: the traced skeleton, cut as the plan would cut the model, computes what is left of what it did.

A graph is data. The skeleton that it was traced with is kept beside it, for as long as the graph lives, so that plans
are proven as they are made, without the model. A copy of a graph, or one that was pickled, has no skeleton: its plans
are proven when they are cut, with a skeleton that is built anew from the model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.batches import Inputs, tensors_in
from secateur._internal.errors import SecateurError
from secateur._internal.state import Switch
from secateur.tracing.build import unused
from secateur.tracing.graph import ChannelGraph, HasRemoved, fingerprint
from secateur.tracing.labels import Dim, Ids, Labels
from secateur.tracing.norms import norms_of
from secateur.tracing.op_log import OpLog, arrays_of, with_channels
from secateur.tracing.probe import Chosen, Fault, Run, mismatch
from secateur.tracing.skeleton import KINDS, Skeleton, quiet
from secateur.tracing.tracer import Watcher, attempt


def verify(model: nn.Module | None, graph: ChannelGraph, plan: HasRemoved) -> str:
    """Why a model does not bear a plan, in words, or an empty string; arguments and errors as for :func:`fault_of`."""
    fault = fault_of(model, graph, plan)
    return "" if fault is None else fault.reason


def fault_of(model: nn.Module | None, graph: ChannelGraph, plan: HasRemoved) -> Fault | None:
    """Why a model does not bear a plan, or None.

    Args:
        model: the traced model. It is needed where the graph has no skeleton (:func:`has_skeleton`): one is built then,
            and kept with the graph. Otherwise it may be None.
        graph: its graph.
        plan: what goes.

    Raises:
        SecateurError: a skeleton is needed, and there is no model, or another one than was traced.
    """
    with no_collection():
        proof = _PROOFS.get(graph)
        if proof is None:
            proof = _rebuilt(model, graph)
            keep_proof(graph, proof)
        return proof.fault(graph, Chosen(plan.removed))


def has_skeleton(graph: ChannelGraph) -> bool:
    """Whether plans can be proven without the model: a graph that was traced has a skeleton, a copy of it has none."""
    return graph in _PROOFS


class Proof:
    """A skeleton with what its first runs computed, against which cut ones are compared.

    Args:
        observed: the first runs.
        channel_of: the channel of every label.

    Attributes:
        logs: what the first runs computed, with channels for labels, by run.
        module: the skeleton's module, which is not run.
    """

    def __init__(self, observed: Observed, channel_of: Ids) -> None:
        self._skeleton = observed.skeleton
        self.module = observed.skeleton.module
        self.logs = {run: with_channels(log, channel_of) for run, log in observed.logs.items()}

    def fault(self, graph: ChannelGraph, chosen: Chosen) -> Fault | None:
        """Why the model does not bear this removal, or None."""
        for run, log in self.logs.items():
            wrong = mismatch(self._skeleton, log, graph, chosen, run)
            if wrong is not None:
                return wrong
        return None


_PROOFS: WeakKeyDictionary[ChannelGraph, Proof] = WeakKeyDictionary()


def keep_proof(graph: ChannelGraph, proof: Proof) -> None:
    """Keep a proof for as long as the graph lives."""
    _PROOFS[graph] = proof


def _rebuilt(model: nn.Module | None, graph: ChannelGraph) -> Proof:
    """The proof of a graph that has lost it."""
    if model is None:
        raise SecateurError("verify: this graph is a copy and has no skeleton: give the model, or trace it again")
    if fingerprint(model) != graph.fingerprint:
        raise SecateurError(f"verify: the graph was traced from another model than this {type(model).__name__}")
    if graph.inputs is None:
        raise SecateurError("verify: the graph holds no example inputs: trace the model again")
    with torch.inference_mode(False):
        observed = observe(model, [graph.inputs, *graph.more_inputs], attention=graph.attention)
        return Proof(observed, _channels_of_labels(observed.labels, graph))


def _channels_of_labels(labels: Labels, graph: ChannelGraph) -> Ids:
    """The channel of every label of a trace, read off the graph of an earlier one.

    Equal labels are one channel, and every channel is written by a parameter; so the graph's axes tell them all.
    """
    changed = SecateurError("the model's forward is another than when its graph was traced: trace it again")
    if [(o.name, o.dim, o.size) for o in labels.owners] != [(a.name, a.dim, len(a.channels)) for a in graph.axes]:
        raise changed
    component = labels.components()
    channel = np.zeros(int(component.max()) + 1, dtype=np.int64)
    if graph.axes:
        owned = component[np.concatenate([np.arange(o.start, o.start + o.size) for o in labels.owners])]
        known = np.concatenate([axis.channels for axis in graph.axes])
        channel[owned] = known
        if (channel[owned] != known).any():
            raise changed
    return channel[component]


@dataclass(frozen=True, eq=False)
class Observed:
    """What the first runs of a skeleton showed.

    Attributes:
        skeleton: it.
        labels: the labels of every position, and what is known of them.
        params: name of every parameter -> its number of dims.
        logs: what each run computed.
    """

    skeleton: Skeleton
    labels: Labels
    params: dict[str, int]
    logs: dict[Run, OpLog]


def observe(
    model: nn.Module,
    inputs: Sequence[Inputs],
    outputs: Callable[[Any], Any] | None = None,
    attention: str = "heads",
) -> Observed:
    """Run a skeleton of a model, and once more in training mode if something was not used until then.

    What no run uses may be used by a path that none of them takes. Where a value steers the model's Python, it freezes
    the channels that it might read, which are those of a width that it has.

    Args:
        model: the model.
        inputs: one run each.
        outputs: what of their outputs matters.
        attention: what goes of attention, as for :func:`secateur.trace`.

    Raises:
        SecateurError: the forward fails on the inputs, whatever stands in for the tensors.
    """
    skeleton, watcher, logs = _watched(model, inputs, outputs, attention)
    labels, params = watcher.labels, {name: p.ndim for name, p in skeleton.module.named_parameters()}
    if unused(labels, params):
        logs |= _in_training(skeleton, watcher)
    if labels.steered is not None and (left := params.keys() - labels.seen):
        sizes = {n: name for name, p in skeleton.module.named_parameters() if name in left for n in p.shape if n > 1}
        for ids in {id(ids): ids for log in logs.values() for ids in arrays_of(log)}.values():
            if len(ids) in sizes:
                labels.freeze(ids, "branch", _UNSEEN.format(sizes[len(ids)], labels.steered))
    return Observed(skeleton, labels, params, logs)


_UNSEEN = (
    "may be read by {}, which these example inputs do not use, since a value steers the model's Python, {}: give "
    "inputs for each path, trace(model, [x1, x2])"
)


def _watched(
    model: nn.Module, inputs: Sequence[Inputs], outputs: Callable[[Any], Any] | None, attention: str
) -> tuple[Skeleton, Watcher, dict[Run, OpLog]]:
    """Run a skeleton of the first kind that the model's Python accepts; the last kind's error is the user's."""
    error, place, failing = None, None, inputs[0]
    kinds, divisors = list(KINDS), set[str]()
    while kinds:
        skeleton = Skeleton(model, inputs, kinds[0], outputs)
        labels = Labels(divisors=divisors, innermost=attention == "sizes")
        labels.norm_at = norms_of(skeleton.module)
        logs: dict[Run, OpLog] = {}
        with quiet():
            first = found = attempt(skeleton, Watcher(labels), _fresh)
            counted = labels.state()["terms"]
            for number in range(1, len(inputs)):
                logs[False, number - 1] = found.watcher.log
                if found.error is None:
                    found = attempt(skeleton, Watcher(labels), _as_in(first.watcher), run=(False, number))
        if labels.divisors - divisors:  # buffers that were taken for zero must not be: once more
            divisors = labels.divisors
            continue
        kinds.pop(0)
        error, place, failing = found.error, found.place, inputs[len(logs)]
        if error is None:
            labels.forget({"terms": counted})
            return skeleton, first.watcher, {**logs, (False, len(inputs) - 1): found.watcher.log}
        if isinstance(error, SecateurError):
            raise error
    shapes = ", ".join(f"{list(t.shape)} {t.dtype}".replace("torch.", "") for t in tensors_in(failing))
    raise SecateurError(
        f"{type(model).__name__} fails on the example inputs ({shapes}): {type(error).__name__}: {error}, {place}; "
        "give inputs that model(*example_inputs) accepts"
    ) from error


def _as_in(watcher: Watcher) -> Callable[[Labels, str, Tensor], tuple[Dim, ...]]:
    """The labels with which parameters and buffers began in another run."""
    return lambda _, name, tensor: watcher.given(name)


def _fresh(labels: Labels, name: str, tensor: Tensor) -> tuple[Dim, ...]:
    return tuple(labels.own(name, d, n) for d, n in enumerate(tensor.shape))


def _in_training(skeleton: Skeleton, watcher: Watcher) -> dict[Run, OpLog]:
    """What only training uses (an auxiliary head) is bound to the same channels, if its forward needs no more."""
    labels = watcher.labels
    before = labels.state()
    with quiet():
        again = attempt(skeleton, Watcher(labels), _as_in(watcher), run=(True, 0))
    if again.error is not None:  # targets are wanted, say: half a forward binds nothing: what only it uses stays frozen
        labels.forget(before)
        return {}
    labels.forget({"terms": before["terms"]})  # inference is what is counted
    return {(True, 0): again.watcher.log}


_COLLECTOR = Switch(gc.isenabled, lambda on: gc.enable() if on else gc.disable())


def no_collection() -> AbstractContextManager[None]:
    """No garbage collection: a trace makes many small objects, and the collector would look at each again and again."""
    return _COLLECTOR.off()
