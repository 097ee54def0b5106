"""``trace``: check what is given, run a skeleton once, build the graph, probe what the model's Python bears."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur._internal.batches import Inputs, caches, tensors_in
from secateur._internal.errors import NothingToPrune, SecateurError
from secateur._internal.progress import LateBar
from secateur._internal.wrappers import refuse_wrapped
from secateur.tracing.attentions import attentions_of
from secateur.tracing.build import build
from secateur.tracing.graph import ChannelGraph, ChannelGroup, fingerprint, no_removable_channel
from secateur.tracing.labels import Ids, Labels
from secateur.tracing.memories import Recollection, alike, candidates
from secateur.tracing.probe import Chosen, Fault, Refused, ends, lone, unbearable, uneven
from secateur.tracing.proof import Observed, Proof, keep_proof, no_collection, observe
from secateur.tracing.slices import remembered


def trace(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    outputs: Callable[[Any], Any] | None = None,
    attention: str = "heads",
) -> ChannelGraph:
    """Find out which channels of a model live and die together.

    The model's forward runs once on a copy without data (so on any device, in any dtype, and without room for a second
    model), and once more for each group of channels that its Python does not bear to lose.

    Args:
        model: any module.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. A forward that knows
            ``use_cache`` is called without a cache, if they do not say otherwise. A list of several, where a forward
            takes one path or another: what any of them uses is bound together, and the first is what is counted.
        outputs: which of what the forward returns matters, ``lambda out: out.logits``: its widths stay what they are.
            Everything if not given, hidden states and auxiliary tensors among it.
        attention: what goes where channels are split into heads of some size: whole ``"heads"``, or ``"sizes"``,
            positions of the size, the same in all heads, where the forward does not fix it. To have both, trace what
            was cut by one again for the other.

    Returns:
        The channel graph; counts refer to the example inputs' shapes.

    Raises:
        NothingToPrune: no channel can go, with the reasons.
        SecateurError: the forward fails on the example inputs, they are on another device, or empty.
    """
    given = example_inputs if isinstance(example_inputs, list) else [example_inputs]
    if not given:
        raise SecateurError("trace(example_inputs): the list is empty: give at least one example input")
    if attention not in ATTENTION:
        raise SecateurError(
            f"trace(attention=): {' or '.join(map(repr, ATTENTION))} is expected, {attention!r} was given"
        )
    for inputs in given:
        check_traceable(model, inputs)
    plain = [dict(inputs) if isinstance(inputs, Mapping) else inputs for inputs in given]  # only plain ones are opened
    with no_collection(), torch.inference_mode(False), LateBar("tracing: runs") as bar:
        return _trace(model, plain, outputs, attention, bar)


ATTENTION = ("heads", "sizes")


def _trace(
    model: nn.Module, inputs: Sequence[Inputs], outputs: Callable[[Any], Any] | None, attention: str, bar: LateBar
) -> ChannelGraph:
    observed, mark, sizes = observe(model, inputs, outputs, attention), fingerprint(model), remembered(model)
    labels, params = observed.labels, observed.params
    extra: list[tuple[Ids, str, str]] = []
    known = [Recollection(path, name, len(ids), 0, ids) for path, name, ids in labels.met if ids is not None]
    while True:
        graph, channel_of = build(labels, params, mark, sizes, extra)
        prober = _Prober(graph, observed, channel_of, known, bar)
        placed = _placed(graph, labels, channel_of)
        bad = _refused(prober, graph, placed)
        if not bad:
            break
        # what stays whole now may be what another's size comes from: once more
        extra += [(np.flatnonzero(np.isin(channel_of, g.channels)), "probe", reason) for g, reason in bad]
    if not graph.groups:
        raise no_removable_channel(graph.frozen, model)

    least: list[Refused] = []
    before = -1
    while before < len(least):  # what was cut along with one that keeps two is to be cut without it
        before = len(least)
        for chosen in lone(placed, graph.groups):
            least += prober.probe(chosen, least)
    pairs = {g.name for g, _ in least}
    groups = tuple(replace(g, least=2) if g.name in pairs else g for g in graph.groups)
    first, *more = pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, list(inputs))
    notes = (NO_CACHE,) if any(caches(model, one) for one in inputs) else ()
    graph = replace(
        prober.graph,
        groups=groups,
        inputs=first,
        more_inputs=tuple(more),
        notes=notes,
        attentions=attentions_of(model),
        attention=attention,
    )
    keep_proof(graph, prober.proof)
    return graph


NO_CACHE = "traced with use_cache=False, as the example inputs do not say: caches of keys and values are no outputs"


class _Prober:
    """Says which groups of a graph the model does not bear to be cut as chosen, and finds what its Python remembers.

    Args:
        graph: the graph.
        observed: the first runs.
        channel_of: the channel of every label.
        known: what was found to be remembered until now, to which more is added.
        bar: counts the runs.

    Attributes:
        graph: the graph, with what is remembered.
        proof: its proof.
    """

    def __init__(
        self, graph: ChannelGraph, observed: Observed, channel_of: Ids, known: list[Recollection], bar: LateBar
    ) -> None:
        self._bar = bar
        self.proof = Proof(observed, channel_of)
        self._logs, self._channel_of, self._known, self._plain = observed.logs, channel_of, known, graph
        self._standard = {size.key for size in graph.sizes}
        self.graph = self._with(known)

    def _with(self, known: Sequence[Recollection]) -> ChannelGraph:
        return replace(self._plain, memories=tuple(each.memory(self._channel_of) for each in known))

    def probe(self, chosen: Chosen, but: Iterable[Refused] = ()) -> list[Refused]:
        """Those of the chosen groups that are not borne, but for some that are known."""
        known = {g.name for g, _ in but}
        groups = [g for g in self.graph.groups if g.name in chosen.removed and g.name not in known]

        def fault(some: Sequence[ChannelGroup]) -> Fault | None:
            part = chosen.of(some)
            found = self.proof.fault(self.graph, part)
            self._bar.step()
            while found is not None and self._mend(part, found):
                found = self.proof.fault(self.graph, part)
                self._bar.step()
            return found

        return unbearable(groups, fault)

    def _mend(self, chosen: Chosen, fault: Fault) -> bool:
        """Find a number in the model's Python with whose change a run gets further."""
        log, module = self._logs[fault.run], self.proof.module
        keys = {each.key[:2] for each in self._known}
        taken = self._standard | {f"{path}.{attribute}" if path else attribute for path, attribute in keys}
        for at in range(fault.at, max(fault.at - 2, -1), -1):
            found = candidates(module, log[at], self._channel_of, taken.__contains__)
            for some in ([each] for each in found) if len(found) < 2 else (*([each] for each in found), found):
                if self._helps([each.what for each in some], chosen, fault):
                    for each in some:
                        self._keep(each.what, *alike(module, log, at, each, self._channel_of))
                    return True
        return False

    def _helps(self, more: list[Recollection], chosen: Chosen, fault: Fault) -> bool:
        again = self.proof.fault(self._with([*self._known, *more]), chosen)
        return again is None or (again.run, again.at) > (fault.run, fault.at)

    def _keep(self, *more: Recollection) -> None:
        for each in more:
            if each.key not in {known.key for known in self._known}:
                self._known.append(each)
        self.graph = self._with(self._known)


def _refused(prober: _Prober, graph: ChannelGraph, placed: list[ChannelGroup]) -> list[Refused]:
    """The groups that the model does not bear to lose channels of: placed ones unevenly, others at their ends."""
    names = {g.name for g in placed if len(g) > 2}
    first = ends(g for g in graph.groups if g.name not in names)
    bad: list[Refused] = []
    for chosen in uneven(placed) if names else (first,):
        bad += prober.probe(Chosen({**first.removed, **chosen.removed}), bad)
        first = Chosen({})
    return bad


def _placed(graph: ChannelGraph, labels: Labels, channel_of: Ids) -> list[ChannelGroup]:
    """The groups that slices and views treat by position or by size."""
    placed = np.zeros(int(channel_of.max(initial=0)) + 1, dtype=bool)
    if labels.places:
        placed[channel_of[np.abs(np.concatenate(labels.places))]] = True
    return [g for g in graph.groups if placed[g.channels].any()]


def check_traceable(model: nn.Module, inputs: Inputs, who: str = "trace") -> None:
    """Raise if these are no model and example inputs."""
    if not isinstance(model, nn.Module):
        raise SecateurError(f"{who}(model): a torch.nn.Module is expected, {type(model).__name__} was given")
    refuse_wrapped(model, f"{who}(model)")
    tensors = [*model.parameters(), *model.buffers()]
    if not any(isinstance(t, nn.Parameter) for t in tensors):
        raise NothingToPrune(f"{type(model).__name__} has no parameters: there is nothing to prune")
    if any(isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer)) for t in tensors):
        raise SecateurError(f"{type(model).__name__} has lazy parameters without a shape: run one forward first")
    if isinstance(inputs, list) or not isinstance(inputs, (Tensor, tuple, Mapping)):
        raise SecateurError(
            f"{who}(example_inputs): a tensor, a tuple or a dict is expected, {type(inputs).__name__} was given"
        )
    empty = [t for t in tensors_in(inputs) if not t.numel()]
    if empty:
        raise SecateurError(
            f"{who}(example_inputs): a tensor of shape {list(empty[0].shape)} is empty, and nothing can be learnt from "
            "it: give at least one example"
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
