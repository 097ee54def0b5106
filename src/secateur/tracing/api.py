"""``trace``: check what is given, run a skeleton once, build the graph, probe what the model's Python bears."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.batches import Inputs, tensors_in
from secateur._internal.errors import SecateurError
from secateur.tracing.build import build, unused
from secateur.tracing.graph import ChannelGraph, ChannelGroup, HasRemoved, fingerprint, no_removable_channel
from secateur.tracing.labels import Dim, Ids, Labels
from secateur.tracing.op_log import Step, final_steps
from secateur.tracing.probe import Chosen, Refused, ends, lone, mismatch, unbearable, uneven
from secateur.tracing.tracer import Skeleton, Watcher, in_mode, quiet, watch

KINDS = ("meta", "fake", "real")


def trace(model: nn.Module, example_inputs: Inputs) -> ChannelGraph:
    """Find out which channels of a model live and die together.

    The model's forward runs once on a copy without data (so on any device, in any dtype, and without room for a second
    model), and once more for each group of channels that its Python does not bear to lose.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Returns:
        The channel graph; counts refer to the example inputs' shapes.

    Raises:
        SecateurError: nothing is removable, the forward fails on the example inputs, they are on another device.
    """
    check_traceable(model, example_inputs)
    with no_collection(), torch.inference_mode(False):
        return _trace(model, example_inputs)


def _trace(model: nn.Module, example_inputs: Inputs) -> ChannelGraph:
    skeleton, watcher = _watched(model, example_inputs)
    names, mark = watcher.names, fingerprint(model)
    params = {name: p.ndim for name, p in skeleton.module.named_parameters()}
    runs = {False: watcher.steps}
    if unused(names, params):
        runs |= _in_training(skeleton, watcher)
    graph, channel_of = build(names, params, mark)
    final = {mode: final_steps(steps, channel_of) for mode, steps in runs.items()}

    def fault(chosen: Chosen) -> str:
        for mode, steps in final.items():
            with in_mode(skeleton.module, training=mode):
                wrong = mismatch(skeleton, steps, graph, chosen)
            if wrong:
                return wrong
        return ""

    def probe(chosen: Chosen, but: Iterable[Refused] = ()) -> list[Refused]:
        known = {g.name for g, _ in but}
        groups = [g for g in graph.groups if g.name in chosen.removed and g.name not in known]
        return unbearable(groups, lambda some: fault(chosen.of(some)))

    extra: list[tuple[Ids, str, str]] = []
    while bad := _refused(
        probe, graph, names, channel_of
    ):  # what stays whole now may be what another's size comes from
        extra += [(np.flatnonzero(np.isin(channel_of, g.channels)), "probe", reason) for g, reason in bad]
        graph, channel_of = build(names, params, mark, extra)
        final = {mode: final_steps(steps, channel_of) for mode, steps in runs.items()}
    if not graph.groups:
        raise no_removable_channel(graph.frozen, model)

    least: list[Refused] = []
    for chosen in lone(_placed(graph, names, channel_of)):
        least += probe(chosen, least)
    pairs = {g.name for g, _ in least}
    graph.groups = tuple(replace(g, least=2) if g.name in pairs else g for g in graph.groups)
    graph.inputs = example_inputs

    def verify(plan: HasRemoved) -> str:
        with no_collection():
            return fault(Chosen(plan.removed))

    graph.verify = verify
    return graph


def _refused(probe: Callable[..., list[Refused]], graph: ChannelGraph, names: Labels, channel_of: Ids) -> list[Refused]:
    """The groups that the model does not bear to lose channels of, at their ends or unevenly."""
    bad = probe(ends(graph.groups))
    for chosen in uneven(_placed(graph, names, channel_of)):
        bad += probe(chosen, bad)
    return bad


def _in_training(skeleton: Skeleton, watcher: Watcher) -> dict[bool, list[Step]]:
    """What only training uses (an auxiliary head) is bound to the same channels, if its forward needs no more."""
    names = watcher.names
    before = names.state()
    try:
        with quiet(), in_mode(skeleton.module, training=True):
            again = watch(skeleton, lambda _, key, tensor: watcher.get(tensor).dims, names=names)
    except Exception:  # targets are wanted, say: half a forward binds nothing, and what only it uses stays frozen
        names.forget(before)
        return {}
    names.forget({"terms": before["terms"]})  # inference is what is counted
    return {True: again.steps}


def _placed(graph: ChannelGraph, names: Labels, channel_of: Ids) -> list[ChannelGroup]:
    """The groups that slices and views treat by position or by size."""
    channels = channel_of[np.abs(np.concatenate(names.places))] if names.places else []
    return [g for g in graph.groups if np.isin(g.channels, channels).any()]


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage collection: a trace makes many small objects, and the collector would look at each again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def check_traceable(model: nn.Module, inputs: Inputs, who: str = "trace") -> None:
    """Raise if these are no model and example inputs."""
    if not isinstance(model, nn.Module):
        raise SecateurError(f"{who}(model): a torch.nn.Module is expected, {type(model).__name__} was given")
    tensors = [*model.parameters(), *model.buffers()]
    if not any(isinstance(t, nn.Parameter) for t in tensors):
        raise SecateurError(f"{type(model).__name__} has no parameters: there is nothing to prune")
    if any(isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer)) for t in tensors):
        raise SecateurError(f"{type(model).__name__} has lazy parameters without a shape: run one forward first")
    if isinstance(inputs, list) or not isinstance(inputs, (Tensor, tuple, Mapping)):
        raise SecateurError(
            f"{who}(example_inputs): a tensor, a tuple or a dict is expected, {type(inputs).__name__} was given"
        )
    given = {t.device for t in tensors_in(inputs)}
    own = {t.device for t in tensors}
    if len(own) == 1 and given and given != own:
        raise SecateurError(
            f"the model is on {_words(own)}, the example inputs are on {_words(given)}: move them together, "
            f'for instance inputs.to("{next(iter(own))}")'
        )


def _words(devices: set[torch.device]) -> str:
    return " and ".join(sorted(map(str, devices)))


def _watched(model: nn.Module, inputs: Inputs) -> tuple[Skeleton, Watcher]:
    """Run a skeleton of the first kind that the model's Python accepts; the last kind's error is the user's."""
    error: Exception | None = None
    for kind in KINDS:
        skeleton = Skeleton(model, inputs, kind)
        try:
            with quiet():
                return skeleton, watch(skeleton, _fresh)
        except SecateurError:
            raise
        except Exception as failure:
            error = failure
    shapes = ", ".join(f"{list(t.shape)} {t.dtype}".replace("torch.", "") for t in tensors_in(inputs))
    raise SecateurError(
        f"{type(model).__name__} fails on the example inputs ({shapes}): {type(error).__name__}: {error}; "
        "give inputs that model(*example_inputs) accepts"
    ) from error


def _fresh(names: Labels, key: str, tensor: Tensor) -> tuple[Dim, ...]:
    return tuple(names.own(key, d, n) for d, n in enumerate(tensor.shape))
