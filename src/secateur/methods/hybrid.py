r"""Both moves under one budget: channels go and layers become bottlenecks, so that the loss rises least.

The two moves have prices in the same unit, to second order and after repair: channels what
:mod:`secateur.scoring.schur` predicts for every width, bottlenecks what :mod:`secateur.methods.eigendamage` does for
every box of rotated rows and columns (in the eigenbasis of the inputs what goes is no linear function of what stays, so
nothing can make up for it). For a part ``s`` of the network::

    J(s) = min rise of channels, so that s remains  +  min rise of bottlenecks of what remains, within the budget

The least ``J`` is where both moves pay the same price. Its ends are channels alone and bottlenecks alone, so what is
chosen is never predicted to be worse than either. One pass over the data measures what both need: the factors of a
narrower layer are those of the layer, in the rows and columns that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur import auto
from secateur._internal.batches import Inputs
from secateur._internal.checks import check_choice, check_count, check_flag, check_nonnegative
from secateur._internal.distributed import Group
from secateur._internal.errors import CannotCut, CannotMeasure, InfeasibleBudget, NothingToPrune, SecateurError
from secateur._internal.workload import Needs, Workload
from secateur.allocation.api import allocated
from secateur.allocation.budget import Budget, unused
from secateur.allocation.contract import STRATEGIES
from secateur.allocation.rank_allocation import Box, Choice, Room, agreed, choice_of, lagrangian, totals
from secateur.curvature.eigenbasis import Eigenbasis, eigen, sorted_by_damage
from secateur.curvature.fisher import FISHERS, Fisher
from secateur.curvature.kronecker import Curvature, factors_of
from secateur.curvature.layers import Layer
from secateur.curvature.passes import NOT_REACHED
from secateur.curvature.projections import projections
from secateur.curvature.readers import POSITIONS, readers
from secateur.measure.layers import layer_data
from secateur.methods.contract import METHODS, described, measured_counts, settings_from, share_weights
from secateur.methods.layer_selection import check_exclude, excluded_layers, frozen_layers
from secateur.plan import Plan, make_plan
from secateur.repair.api import repaired, repairs_of
from secateur.repair.compensate import compensated_weights
from secateur.repair.contract import LEFT_WHOLE, copy_remaining
from secateur.result import Counts, Result
from secateur.scoring.api import scored
from secateur.scoring.contract import CRITERIA, Scores
from secateur.surgery.channels import cut
from secateur.surgery.low_rank.bottleneck import bottlenecked, three
from secateur.surgery.low_rank.replaceable import Candidate, positions_of, probe
from secateur.tracing.api import trace
from secateur.tracing.graph import ChannelGraph, ChannelGroup, fingerprint
from secateur.tracing.selection import Exclude, excluded

BATCHES = 100
"""Of the data, unless another number is given."""
FIRST = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Parts of what may be removed that channels leave to bottlenecks, tried first."""
CLOSER = 2
"""So often the two halves around the best are tried."""


def hybrid(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget,
    *,
    data: Iterable[Any],
    loss: Any = None,
    settings: Hybrid | None = None,
    group: Group = None,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Make a model smaller by both moves: channels go, and layers become bottlenecks.

    Args:
        model: the model; it is left untouched.
        example_inputs: as for :func:`secateur.trace`; MACs refer to their shapes.
        budget: what may remain, in MACs, parameters or both.
        data: batches (:mod:`secateur._internal.batches`); inputs alone will do.
        loss: the loss (:mod:`secateur._internal.losses`), where it does not.
        settings: of the method; or their fields as keyword arguments.
        group: the processes that work along; ``None`` for all there are.
        progress: show how far it is.
        **options: fields of :class:`Hybrid`.

    Returns:
        A result whose ``model`` remembers what was done. ``facts["widths"]`` says how many channels every group had and
        has, ``"bottlenecks"`` how many rows and columns each bottleneck keeps, ``"tried"`` what was predicted for which
        share between the two, ``"skipped"`` which groups kept all channels, and ``"left whole"`` which layers could not
        become bottlenecks, and why.

    Raises:
        InfeasibleBudget: a budget that both moves together cannot meet, before any pass over the data.
        NothingToPrune: no channel can go, and no layer can become a bottleneck.
        SecateurError: unknown options, bad values, what the factors refuse.
    """
    method = settings_from(Hybrid, settings, options, "hybrid", ("budget", "data", "loss", "group"))
    work = Workload(model, data, loss, inputs=example_inputs, batches=method.batches, group=group, progress=progress)
    return method.apply(model, example_inputs, budget, work)


@METHODS.register("hybrid")
@dataclass(frozen=True)
class Hybrid:
    """Channels go and layers become bottlenecks, within one budget.

    Attributes:
        fisher: one of :data:`secateur.curvature.fisher.FISHERS`; ``"auto"``: by how far the outputs move, where
            one tensor of them matters or there is no loss, else by the loss.
        samples: draws of targets for each example.
        batches: use at most so many; ``None`` for all of them.
        seed: for the drawn targets.
        damping: of the channels' scores, see :class:`secateur.Schur`.
        exclude: what keeps its channels and stays whole: patterns of module paths, modules, or types of modules. Layers
            that do not require gradients stay whole too.
        train_rotations: whether the rotations of bottlenecks are trained afterwards.
        repair: how what stays makes up for what goes, see :func:`secateur.apply_repair`.
    """

    needs: ClassVar[Needs] = Needs(data=True)
    plans: ClassVar[bool] = False
    fisher: str = "auto"
    samples: int = 1
    batches: int | None = BATCHES
    seed: int = 0
    damping: float = 1e-3
    exclude: Exclude = ()
    train_rotations: bool = True
    repair: Any = "refit"

    def __post_init__(self) -> None:
        check_choice("fisher", self.fisher, (auto.AUTO, *FISHERS))
        check_count("samples", self.samples)
        check_nonnegative("damping", self.damping)
        check_exclude(self.exclude)
        check_flag("train_rotations", self.train_rotations)
        repairs_of(self.repair)
        self.how(FISHERS[0])

    def how(self, kind: str) -> Fisher:
        """The Fisher of the one pass over the data."""
        return Fisher(kind, self.samples, self.batches, self.seed)

    def check(self, model: nn.Module, inputs: Inputs, budget: Budget | None) -> None:
        """Raise if both moves together cannot meet the budget; no data is needed for that."""
        self._house(model, inputs, budget)

    def apply(self, model: nn.Module, inputs: Inputs, budget: Budget | None, work: Workload) -> Result:
        """See :func:`hybrid`."""
        work.require(self.needs, "hybrid")
        house = self._house(model, inputs, budget)
        kind = auto.fisher(work) if self.fisher == auto.AUTO else self.fisher
        factors, scores = self._measured(house, kind, work)
        if house.untraced:
            work.note(f"hybrid: bottlenecks alone, since the model cannot be traced: {house.untraced}")
        alone = house.left_alone(scores)
        if scores is None:
            house = replace(house, graph=None)
        best = _least(house, factors, scores, work)

        small = best.small
        if small is model and not best.boxes:
            small = copy.deepcopy(model)
        if best.boxes:
            small = bottlenecked(small, best.bases, best.boxes, train_rotations=self.train_rotations)
        after = measured_counts(small, inputs)
        unmeasured = [part for part in house.parts if part.core not in factors]
        Room([], totals(house.before), house.budget).check_real(totals(after), "hybrid")
        facts: dict[str, Any] = {
            "chosen": {"method": {**described(self), "fisher": kind}},
            "widths": best.widths(house.graph),
            "bottlenecks": {name: [len(rows), len(columns)] for name, (rows, columns) in best.boxes.items()},
            "tried": best.tried,
            "skipped": alone,
            LEFT_WHOLE: {**house.left, **{p.name: factors.skipped.get(p.core, NOT_REACHED) for p in unmeasured}},
        }
        work.remarks += unused(house.budget, totals(house.before), totals(after), "rounded sizes")
        share_weights(small, work)
        repairs = repairs_of(self.repair) if best.plan.slices or best.boxes else []
        more = repaired(repairs, model, small, best.plan, work)
        facts[LEFT_WHOLE] |= more.pop(LEFT_WHOLE, {})
        facts |= more | {"forwards": work.forwards, "notices": list(work.notices), "remarks": list(work.remarks)}
        return Result(small, house.before, after, facts=facts, layers=layer_data(model, small, inputs))

    def _house(self, model: nn.Module, inputs: Inputs, budget: Budget | None) -> _House:
        """What both moves can do, and what the budget allows."""
        if not isinstance(budget, Budget):
            raise SecateurError(f"hybrid(budget={budget!r}): a Budget is expected, for instance Budget(params=0.3)")
        without = {**excluded_layers(model, self.exclude), **frozen_layers(model)}
        graph: ChannelGraph | None = None
        why: list[str] = []
        untraced = ""
        try:
            graph = trace(model, inputs)
        except SecateurError as error:  # bottlenecks need no graph
            why.append(str(error))
            untraced = "" if isinstance(error, NothingToPrune) else str(error)
        try:
            probed = probe(model, inputs, None, without)
            parts, left = probed.candidates, dict(probed.left)
        except NothingToPrune as error:
            why.append(str(error))
            parts, left = [], {"all layers": str(error)}
        left |= {} if graph is not None else {"all channels": why[0]}
        alone = {} if graph is None else excluded(model, graph, self.exclude)
        house = _House(model, inputs, budget, graph, alone, parts, left, measured_counts(model, inputs), untraced)
        if not house.movable and not parts:
            raise NothingToPrune("; ".join(why) or "hybrid: every channel and every layer is excluded or left alone")
        house.check()
        return house

    def _measured(self, house: _House, kind: str, work: Workload) -> tuple[Curvature, Scores | None]:
        """From one pass: the factors of all layers that count, and the rises of all groups; none if none is known."""
        with projections(work.model):
            return self._of_one_pass(house, kind, work)

    def _of_one_pass(self, house: _House, kind: str, work: Workload) -> tuple[Curvature, Scores | None]:
        graph = house.graph
        names = {part.core for part in house.parts}
        if graph is not None:
            names |= set(readers(work.model, graph)[1])
        order = {name: number for number, (name, _) in enumerate(work.model.named_modules())}
        factors = factors_of(
            work, self.how(kind), form="full", layers=sorted(names, key=order.__getitem__), positions=POSITIONS
        )
        if graph is None:
            return factors, None
        own = {"fisher": kind, "samples": self.samples, "batches": self.batches, "seed": self.seed}
        try:
            return factors, scored(CRITERIA.make("schur", own | {"damping": self.damping}), graph, work)
        except CannotMeasure as error:
            work.note(f"hybrid: bottlenecks alone, since no channel can be judged: {error}")
            return factors, None


@dataclass(frozen=True, eq=False)
class _House:
    """What both moves can do.

    Attributes:
        model: the model.
        inputs: example inputs.
        budget: what may remain.
        graph: its channels; None if none can go.
        alone: groups that keep their channels -> why.
        parts: the layers that can become bottlenecks.
        left: those that cannot -> why.
        before: what the model costs.
        untraced: why there is no graph, if the model cannot be traced.
    """

    model: nn.Module
    inputs: Inputs
    budget: Budget
    graph: ChannelGraph | None
    alone: Mapping[str, str]
    parts: Sequence[Candidate]
    left: Mapping[str, str]
    before: Counts
    untraced: str = ""

    def left_alone(self, scores: Scores | None) -> dict[str, str]:
        """The groups that keep their channels -> why."""
        groups = [] if self.graph is None else self.graph.groups
        found = {g.name: f"not exact: {g.reason}" for g in groups if not g.exact} | dict(self.alone)
        unknown = {g.name: "no channel can be judged" for g in groups} if scores is None else scores.skipped
        return found | {name: f"has no scores: {why}" for name, why in unknown.items() if name not in found}

    @cached_property
    def nothing(self) -> Plan:
        """No channel goes."""
        return Plan({}, {}, fingerprint(self.model))

    @property
    def movable(self) -> list[ChannelGroup]:
        """The groups that may lose channels."""
        groups = [] if self.graph is None else self.graph.groups
        return [group for group in groups if group.exact and group.name not in self.alone]

    @cached_property
    def narrowest(self) -> Plan:
        """All channels gone that may go."""
        if self.graph is None:
            return self.nothing
        floors = dict(zip((g.name for g in self.graph.groups), self.budget.floors(self.graph).tolist(), strict=True))
        return make_plan(self.graph, {g.name: range(len(g) - floors[g.name]) for g in self.movable})

    def left_by_channels(self, part: float) -> Budget:
        """What channels leave: between everything and the budget, or the least that they can."""
        least, limits = totals(self.counts(self.narrowest)), {}
        for unit, limit in self.budget.limits.items():
            low = min(1.0, max(limit, (least[unit] + 0.5) / max(totals(self.before)[unit], 1)))
            limits[unit] = low + part * (1 - low)
        some: dict[str, Any] = dict(limits)
        return replace(self.budget, **some)

    def check(self) -> None:
        """Raise if both moves together cannot meet the budget."""
        self.room_of([], self.before)  # a budget of other units
        plan, small = self.narrowest, self.model
        if plan.slices:
            try:
                small = cut(self.model, plan)
            except CannotCut:  # some combination, which allocation will find: what is feasible is seen then
                return
        parts = self.parts_of(small, plan)
        self.room_of([choice_of(part, None) for part in parts], self.counts(plan)).check()

    def parts_of(self, small: nn.Module, plan: Plan) -> list[Candidate]:
        """The layers that can become bottlenecks, in the network that a plan leaves."""
        if not plan.slices or not self.parts:
            return list(self.parts)
        positions = positions_of(small, self.inputs, [part.name for part in self.parts])
        return [replace(p, module=small.get_submodule(p.name), positions=positions[p.name]) for p in self.parts]

    def counts(self, plan: Plan) -> Counts:
        """What the network costs after a plan."""
        if self.graph is None or not plan.slices:
            return self.before
        return Counts(self.graph.macs(plan), self.graph.params(plan))

    def room_of(self, choices: Sequence[Choice], now: Counts) -> Room:
        """What the budget allows a network that costs so much now."""
        return Room(choices, totals(now), self.budget, totals(self.before))


@dataclass(eq=False)
class _Split:
    """What both moves do if channels leave so much.

    Attributes:
        part: of what may be removed, what channels leave to bottlenecks.
        plan: of the channels.
        small: the network without them, in which what stays makes up for them.
        rise: predicted, of both moves.
        bases: of the layers that become bottlenecks.
        boxes: the rows and columns that these keep.
        tried: of the best: all that was tried.
    """

    part: float
    plan: Plan
    small: nn.Module
    rise: tuple[float, float]
    bases: Mapping[str, Eigenbasis]
    boxes: Mapping[str, tuple[Tensor, Tensor]]
    tried: list[dict[str, float]] = field(default_factory=list)

    def widths(self, graph: ChannelGraph | None) -> dict[str, list[int]]:
        """Of every group, before and after."""
        if graph is None:
            return {}
        kept = graph.kept(self.plan)
        return {g.name: [len(g), int(n)] for g, n in zip(graph.groups, kept, strict=True)}


Known = dict[tuple[str, str, bytes], tuple[Tensor, Tensor]]
"""Eigenvectors and eigenvalues by layer, side and what stays."""


def _least(house: _House, factors: Curvature, scores: Scores | None, work: Workload) -> _Split:
    """The split of least predicted rise: on a grid first, then closer around its best."""
    found: dict[float, float] = {}
    tried: list[dict[str, float]] = []
    best: list[_Split] = []  # one; of the others nothing is kept
    eigenpairs: Known = {}

    def look(part: float) -> None:
        if part in found:
            return
        found[part] = np.inf
        try:
            split = _split(house, factors, scores, part, work, eigenpairs)
        except InfeasibleBudget as error:
            why.append(error)
            return
        split.rise = tuple(work.agree(list(split.rise)))  # type: ignore[assignment]
        found[part] = sum(split.rise)
        left = house.counts(split.plan)
        shares = {unit: totals(left)[unit] / max(totals(house.before)[unit], 1) for unit in house.budget.limits}
        if all(shares.items() - row.items() for row in tried):  # other widths than any before
            tried.append({**shares, "channels": split.rise[0], "bottlenecks": split.rise[1]})
        if not best or found[part] < sum(best[0].rise):
            best[:] = [split]

    why: list[InfeasibleBudget] = []
    parts = FIRST if house.graph is not None and house.parts else ((1.0,) if house.graph is None else (0.0,))
    for part in work.tracked(parts, "hybrid, splits", len(parts)):
        look(part)
    for _ in range(CLOSER if len(parts) > 1 and best else 0):
        known, at = sorted(found), best[0].part
        place = known.index(at)
        for other in known[max(0, place - 1) : place + 2]:
            if other != at:
                look((at + other) / 2)
    if not best:
        raise why[-1]
    best[0].tried = sorted(tried, key=lambda row: next(iter(row.values())))
    return best[0]


def _split(
    house: _House, factors: Curvature, scores: Scores | None, part: float, work: Workload, known: Known
) -> _Split:  # fmt: skip
    """What both moves do if channels leave this part of what may be removed."""
    plan, small, rise = house.nothing, house.model, 0.0
    if house.graph is not None and scores is not None and part < 1:
        plan = allocated(
            house.graph, scores, house.left_by_channels(part), STRATEGIES.make("global"), work, without=house.alone
        )
        small = cut(house.model, plan)
        copy_remaining(compensated_weights(house.model, plan, factors, at="consumers"), small, plan)
        rise = sum(float(scores.rises[name][len(gone)]) for name, gone in plan.removed.items())
    parts = [own for own in house.parts_of(small, plan) if own.core in factors]
    bases = {own.name: _basis(factors, own, plan, known) for own in parts}
    room = house.room_of([choice_of(own, bases[own.name]) for own in parts], house.counts(plan))
    boxes: list[Box] = [None] * len(parts)
    if not room.met(boxes):
        boxes = agreed(lagrangian(room), work)
    kept = {
        own.name: (torch.arange(box[0]), torch.arange(box[1]))
        for own, box in zip(parts, boxes, strict=True)
        if box is not None
    }
    return _Split(part, plan, small, (rise, room.lost(boxes)), bases, kept)


def _basis(factors: Curvature, own: Candidate, plan: Plan, known: Known) -> Eigenbasis:
    """The eigenbasis of a layer (of the core of a bottleneck) that has lost rows and columns, by the damage."""
    whole = factors[own.core].channel_form()
    gone = plan.slices.get(f"{own.core}.weight" if own.core else "weight", {})
    rows, columns = (
        torch.tensor(np.delete(np.arange(size), list(gone.get(dim, ()))))
        for dim, size in enumerate(whole.layer.module.weight.shape[:2])
    )
    layer = Layer(own.core, three(own.module)[1], "channel", biased=False)
    given = whole.restricted(layer, rows, columns)
    of = []
    for side, matrix, stay in (("a", given.a, columns), ("g", given.g, rows)):
        key = own.core, side, stay.numpy().tobytes()
        if key not in known:
            known[key] = eigen(matrix)
        of.append(known[key])
    return sorted_by_damage(Eigenbasis(layer, *of[0], *of[1]))
