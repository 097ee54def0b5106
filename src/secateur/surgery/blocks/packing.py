r"""Packing: a pivoted model as packed layers, as few gathers as can be, and no layer slower than it was.

Globally, the order of the channels between two layers is free (:mod:`secateur.surgery.permute`). A layer that writes
them wants the rows of each of its blocks side by side, and then needs no index afterwards; a layer that reads them
wants the same of its columns, and then gathers nothing. The order that spares most is taken. What remains is at most
one index where a layer reads, and one where several layers write one residual stream in different orders.

Locally, a layer is timed on what it sees in the model, dense, block by block and with all blocks at once; the fastest
stays, and packed layers must win by a margin, as must the model as a whole, which stays dense otherwise.
"""

from __future__ import annotations

import copy
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._internal.batches import Inputs, call_model, tensors_in
from secateur._internal.errors import NothingToPrune, SecateurError, unknown
from secateur._internal.records import add_to_record
from secateur.surgery.blocks.packed_layers import Layout, Packed, hollow
from secateur.surgery.blocks.pattern import Pattern
from secateur.surgery.blocks.pivots import PACK, apply, check_patterns, cloned, outputs, remembered, used_by
from secateur.surgery.low_rank.bottleneck import put
from secateur.surgery.permute import Index, keeps_its_order, moves, permuted
from secateur.tracing.api import check_traceable, trace
from secateur.tracing.build import UNUSED
from secateur.tracing.graph import ChannelGraph, fingerprint

WAYS = ("fastest", "blocks", "at_once")
FORM = 2
"""The version of what is written down: the weights of packed linears were [blocks, columns, rows] once."""
WHOLE = ""
"""The path of the whole model, among those of the layers that were timed."""
WINNING_SHARE = 0.95
"""A packed layer or model must take less than this part of the dense one's time."""
TIMED_SECONDS, MOST_TURNS = 0.1, 200
"""Seconds that a comparison takes at least, and after how many turns it is over nevertheless."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""How far packed and masked outputs may be apart; of other dtypes a tenth: they round, and faults shall be caught."""
TOLERANCE_ON_GPU = 1e-2
"""Likewise there: float32 products have ten bits, if PyTorch is told so."""


@dataclass(frozen=True)
class Packing:
    """What became of each layer with a pattern, as data.

    Attributes:
        fingerprint: of the model before.
        layers: the packed ones.
        patterns: of the ones that were faster dense, as their channels lie now.
        unused: layers that the forward does not use.
        milliseconds: of each layer that was timed, by way; of the whole model under ``""``.
        unread: parameters that the forward on the example inputs does not read; where there are any, all channels
            stay in their order, since another forward may read them.
    """

    fingerprint: str
    layers: Mapping[str, Layout]
    patterns: Mapping[str, Pattern]
    unused: Sequence[str]
    milliseconds: Mapping[str, Mapping[str, float]]
    unread: Sequence[str] = ()

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(
            {
                "form": FORM,
                "fingerprint": self.fingerprint,
                "layers": {name: layout.to_dict() for name, layout in self.layers.items()},
                "patterns": {name: pattern.to_dict() for name, pattern in self.patterns.items()},
                "unused": list(self.unused),
                "ms": self.milliseconds,
                "unread": list(self.unread),
            }
        )


# ------------------------------------------------------------------------------------------- the order of the channels


def side_by_side(places: np.ndarray, ghost: int) -> bool:
    """Whether each block's places [blocks, size] follow each other, those of zeros (``ghost``) aside."""
    high = np.where(places == ghost, -1, places).max(1)
    return bool((high - places.min(1) + 1 == (places != ghost).sum(1)).all())


def orders_of(graph: ChannelGraph, patterns: Mapping[str, Pattern]) -> dict[str, list[int]]:
    """For each group, the order of its channels that makes most indices needless: old positions, for ``moves``."""
    axes = {(axis.name, axis.dim): axis.channels for axis in graph.axes}
    found = {}
    for group in graph.groups:
        if not group.exact or keeps_its_order(graph, group):
            continue
        place = {int(channel): i for i, channel in enumerate(group.channels)}
        wishes: list[np.ndarray] = []  # positions in the group, [blocks, size], the group's size for zeros
        for name, pattern in patterns.items():
            for dim, blocks in enumerate((pattern.rows, pattern.columns)):
                ids = axes.get((f"{name}.weight", dim), np.zeros(0, dtype=np.int64))
                if len(ids) == len(group) and set(ids.tolist()) == set(place):
                    table = np.array([*(place[int(i)] for i in ids), len(group)])
                    wishes.append(table[blocks])
        candidates = [np.arange(len(group))]  # as they are, if nothing is better
        for blocks in wishes:
            in_turn = blocks.flatten()
            in_turn = in_turn[in_turn < len(group)]
            if len(set(in_turn.tolist())) == len(in_turn):  # what no block reads comes last
                candidates.append(np.r_[in_turn, np.setdiff1d(np.arange(len(group)), in_turn)])
        if len(candidates) > 1:

            def spared(order: np.ndarray, wishes: Sequence[np.ndarray] = wishes) -> int:
                rank = np.append(np.argsort(order), len(order))
                return sum(side_by_side(rank[blocks], len(order)) for blocks in wishes)

            found[group.name] = max(candidates, key=spared).tolist()
    return found


def unread_by(graph: ChannelGraph) -> list[str]:
    """Tensors with an axis of two or more positions, none of which the traced forward uses."""
    total = Counter(axis.name for axis in graph.axes)
    idle = Counter(f.axis for f in graph.frozen if f.reason == UNUSED)
    long = {axis.name for axis in graph.axes if len(axis.channels) > 1}
    return [name for name in total if name in long and idle[name] == total[name]]


def moved(name: str, pattern: Pattern, index: Index) -> Pattern:
    """A pattern after the channels were put in another order, its blocks in the order of their rows or columns."""
    own, (m, n) = index.get(f"{name}.weight", {}), pattern.shape
    places = [
        np.append(np.argsort(own[dim]) if dim in own else np.arange(size), size) for dim, size in enumerate((m, n))
    ]
    rows, columns = np.sort(places[0][pattern.rows], axis=1), np.sort(places[1][pattern.columns], axis=1)
    first = rows[:, 0] if side_by_side(rows, m) else columns[:, 0]
    turn = np.lexsort((first, rows[:, -1] == m))  # the block that is filled up with zeros stays the last
    return replace(pattern, rows=rows[turn], columns=columns[turn])


def layout_of(pattern: Pattern, *, at_once: bool) -> Layout:
    """What a packed layer with this pattern is made of."""
    (m, n), flat = pattern.shape, pattern.rows.flatten()
    beside = side_by_side(pattern.columns, n)
    return Layout(
        len(pattern.rows), pattern.rows.shape[1], pattern.columns.shape[1], at_once,
        tuple(pattern.columns[:, 0].tolist()) if beside else None, bool((flat[:m] == np.arange(m)).all()),
    )  # fmt: skip


@torch.no_grad()
def packed(layer: Any, pattern: Pattern, *, at_once: bool) -> Packed:
    """A linear or a convolution as the blocks of a pattern, which follow each other as they are there."""
    made = hollow(layer, layout_of(pattern, at_once=at_once))
    m, device = pattern.shape[0], layer.weight.device
    rows, columns = (torch.from_numpy(blocks).to(device) for blocks in (pattern.rows, pattern.columns))
    whole = torch.cat([layer.weight, layer.weight.new_zeros((1, *layer.weight.shape[1:]))])
    weight = whole[rows[:, :, None], columns[:, None, :]]  # [blocks, rows, columns, *kernel]
    if isinstance(layer, nn.Linear):
        made.weight.copy_(weight)
    else:
        made.weight.copy_(weight.flatten(0, 1))
    if made.bias is not None:
        made.bias.copy_(torch.cat([layer.bias, layer.bias.new_zeros(1)])[rows.flatten()])
    if made.index is not None:
        made.index.copy_(columns)
    if made.order is not None:
        flat = rows.flatten()
        made.order.copy_(torch.argsort(flat, stable=True)[:m])
    return made


# ----------------------------------------------------------------------------------------------------- what is fastest


def milliseconds(layers: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, repeats: int = 15) -> dict[str, float]:
    """The least time of each layer on an input, in turn, so that what else the machine does strikes all alike.

    What takes microseconds is timed more often than ``repeats`` says, until all have taken ``TIMED_SECONDS`` together.
    """
    times: dict[str, list[float]] = {name: [] for name in layers}
    with torch.no_grad():
        begun, turn = time.perf_counter(), 0
        while turn < repeats + 2 or (time.perf_counter() - begun < TIMED_SECONDS and turn < MOST_TURNS):
            for name, layer in layers.items():
                _wait(x)
                start = time.perf_counter()
                layer(x)
                _wait(x)
                if turn >= 2:
                    times[name].append(1000 * (time.perf_counter() - start))
            turn += 1
    return {name: min(values) for name, values in times.items()}


def _wait(x: Tensor) -> None:
    if x.device.type != "cpu":
        getattr(torch, x.device.type).synchronize(x.device)


# --------------------------------------------------------------------------------------------------------- whole models


def pack(
    model: nn.Module, example_inputs: Inputs, patterns: Mapping[str, Pattern] | None = None, *, way: str = "fastest"
) -> nn.Module:
    """A copy in which layers with patterns are packed, where that is faster; it computes what the masked one computes.

    Args:
        model: a model from :func:`secateur.pivot`, or any one with ``patterns``; it is left untouched.
        example_inputs: what its forward takes; layers are timed on what they see then, so give the batch size, the
            device and the number of threads that the model will run with.
        patterns: by layer, weights outside of which become zero; default: those that :func:`secateur.pivot` or an
            earlier packing left, outside of which weights must be zero.
        way: ``"fastest"``: whatever is, measured here and now; ``"blocks"`` or ``"at_once"``: this way, for all layers.

    Returns:
        A new module, which remembers what became of each layer and what was measured (:func:`secateur.record`).

    Raises:
        SecateurError: no patterns, those of another model, an unknown way, inputs on which the model does not run, a
            result that computes something else.
    """
    check_traceable(model, example_inputs, "pack")
    if way not in WAYS:
        raise unknown("way", way, WAYS)
    if patterns is None:
        patterns = remembered(model)
    check_patterns(model, patterns)
    used = used_by(model, example_inputs, list(patterns))
    unused = [name for name in patterns if name not in used]
    patterns = {name: pattern for name, pattern in patterns.items() if name in used}
    whole = copy.deepcopy(model)
    apply(whole, patterns)
    wanted = outputs(whole, example_inputs)
    graph = _graph(whole, example_inputs)
    unread = unread_by(graph) if graph is not None else []  # what another forward reads in the order that it knows
    orders = orders_of(graph, patterns) if graph is not None and not unread else {}
    index = moves(graph, orders) if graph is not None else {}
    new = permuted(whole, graph, orders) if graph is not None else copy.deepcopy(whole)
    seen = used_by(new, example_inputs, list(patterns)) if way == "fastest" else {}
    layouts: dict[str, Layout] = {}
    left: dict[str, Pattern] = {}
    times: dict[str, dict[str, float]] = {}
    for name, pattern in patterns.items():
        dense: Any = new.get_submodule(name)
        own = moved(name, pattern, index)
        ways = {key: packed(dense, own, at_once=key == "at_once") for key in WAYS[1:] if way in ("fastest", key)}
        best = way
        if way == "fastest":
            times[name] = milliseconds({"dense": dense, **ways}, seen.pop(name))
            best = min(ways, key=times[name].__getitem__)
            if times[name][best] >= WINNING_SHARE * times[name]["dense"]:
                left[name] = own
                continue
        layouts[name] = ways[best].layout
        new = exchanged(new, dense, ways[best])
    _check_same(wanted, new, example_inputs)
    if way == "fastest" and layouts:  # single calls may be faster and the whole not, where it is all overhead
        times[WHOLE] = _whole(whole, new, example_inputs)
        if times[WHOLE]["packed"] >= WINNING_SHARE * times[WHOLE]["dense"]:
            new, layouts, left = whole, {}, dict(patterns)
    return add_to_record(new, model, {PACK: Packing(fingerprint(model), layouts, left, unused, times, unread)})


def _whole(dense: nn.Module, packed_one: nn.Module, example_inputs: Inputs) -> dict[str, float]:
    """Least times of both models, in eval mode, the random state aside."""
    given = tensors_in(example_inputs)
    x = given[0] if given else torch.zeros(())
    models = {"dense": copy.deepcopy(dense).eval(), "packed": copy.deepcopy(packed_one).eval()}
    runs = {key: (lambda _, m=m: call_model(m, cloned(example_inputs))) for key, m in models.items()}
    with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        return milliseconds(runs, x)


def exchanged(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with another part wherever it holds the old one."""
    for path in [path for path, module in model.named_modules(remove_duplicate=False) if module is old]:
        model = put(model, path, new)
    return model


def _graph(model: nn.Module, example_inputs: Inputs) -> ChannelGraph | None:
    try:
        return trace(model, example_inputs)
    except NothingToPrune:
        return None  # a single layer between input and output, say: nothing can change its order


def _check_same(wanted: Sequence[Tensor], new: nn.Module, example_inputs: Inputs) -> None:
    try:
        given = outputs(new, example_inputs)
    except SecateurError as error:
        raise SecateurError(
            f"pack: {error}: does a module read the weights of another? leave that one out by pivot(exclude=...)"
        ) from error
    coarse = {p.dtype for p in new.parameters() if p.is_floating_point()}  # it may return more digits than it computes
    for a, b in zip(wanted, given, strict=True):
        wide = torch.complex128 if a.is_complex() else torch.float64
        whole, small, sound = a.detach().to(wide), b.detach().to(wide), a.isfinite()
        scale = whole[sound].abs().max().clamp_min(1e-30) if bool(sound.any()) else 1.0
        gap = float((whole - small)[sound].abs().max() / scale) if bool(sound.any()) else 0.0
        allowed = max(TOLERANCE.get(d, 0.1) for d in (a.dtype, *coarse)) if a.device.type == "cpu" else TOLERANCE_ON_GPU
        if not gap <= allowed or not torch.equal(sound, b.isfinite()):
            raise SecateurError(
                f"pack: the packed model computes something else (relative difference {gap:.1e}); does its forward "
                "depend on the order of its channels, or on anything but its inputs?"
            )


def replay(model: nn.Module, text: str) -> nn.Module:
    """Do it again on a fresh model; the numbers come later.

    Raises:
        SecateurError: damaged data, or another model's.
    """
    try:
        data = json.loads(text)
        if data["form"] != FORM:
            raise ValueError(f"it is of form {data['form']}, and this version reads {FORM}")
        given = str(data["fingerprint"])
        layouts = {str(name): Layout.from_dict(layout) for name, layout in data["layers"].items()}
        left = {str(name): Pattern.from_dict(pattern) for name, pattern in data["patterns"].items()}
        unused, unread = ([str(n) for n in names] for names in (data["unused"], data.get("unread", [])))
        packing = Packing(given, layouts, left, unused, dict(data["ms"]), unread)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"the packing is damaged ({type(error).__name__}: {error})") from error
    if given != fingerprint(model):
        raise SecateurError(
            f"the packing was made for another model (fingerprint {given}, this one has {fingerprint(model)})"
        )
    new = copy.deepcopy(model)
    for name, layout in layouts.items():
        layer = dict(new.named_modules()).get(name)
        if not isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            raise SecateurError(f"the packing is damaged: the model has no linear or convolution {name!r}")
        new = exchanged(new, layer, hollow(layer, layout))
    return add_to_record(new, model, {PACK: packing})
