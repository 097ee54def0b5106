"""EigenDamage (arXiv 1905.05934): factors, eigenbases, damages, boxes within a budget, bottlenecks.

No channel graph is needed: any model whose linears and convolutions are modules will do. Layers become bottlenecks in
the eigenbasis of their curvature; widths between them stay. Several processes: rank 0 decides what stays, and all get
its network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from secateur._internal.batches import Inputs
from secateur._internal.checks import check_choice, check_flag, check_names, check_open_fraction
from secateur._internal.distributed import Group
from secateur._internal.errors import SecateurError
from secateur._internal.workload import Needs, Workload
from secateur.allocation.budget import AUTO, Budget, unused
from secateur.allocation.rank_allocation import Room, agreed, choice_of, lagrangian, threshold, totals
from secateur.curvature.eigenbasis import Eigenbasis, eigenbasis_of, second_moments, sorted_by_damage
from secateur.curvature.fisher import Fisher
from secateur.curvature.kronecker import factors_of
from secateur.curvature.layers import CONVOLUTIONS
from secateur.measure.layers import layer_data
from secateur.methods.contract import METHODS, described, measured_counts, settings_from, share_weights
from secateur.methods.layer_selection import check_exclude, excluded_layers, frozen_layers
from secateur.plan import Plan
from secateur.repair.api import repaired, repairs_of
from secateur.repair.contract import LEFT_WHOLE
from secateur.result import Counts, Result
from secateur.surgery.low_rank.bottleneck import bottlenecked, three
from secateur.surgery.low_rank.replaceable import Candidate, Probed, probe
from secateur.surgery.low_rank.separable import check_how, separable, separate
from secateur.tracing.graph import fingerprint
from secateur.tracing.selection import Exclude

RULES = ("lagrangian", "threshold")


def eigendamage(
    model: nn.Module,
    example_inputs: Inputs,
    budget: Budget,
    *,
    data: Iterable[Any],
    loss: Any = None,
    settings: EigenDamage | None = None,
    group: Group = None,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Make a model smaller in the eigenbasis of its curvature: layers become bottlenecks, widths between them stay.

    Done again on its own result, the new bases are merged with the old ones and a layer stays three layers.

    Args:
        model: the model; it is left untouched.
        example_inputs: as for :func:`secateur.trace`; MACs refer to their shapes.
        budget: what may remain, in MACs, parameters or both.
        data: batches (:mod:`secateur._internal.batches`), passed over once (twice with ``ekfac``): something that can
            be iterated again. Where ``torch.distributed`` runs, every process gives its shard.
        loss: the loss (:mod:`secateur._internal.losses`); not needed where batches have labels for the model's own.
        settings: of the method; or their fields as keyword arguments.
        group: the processes that work along; ``None`` for all there are.
        progress: show how far it is.
        **options: fields of :class:`EigenDamage`.

    Returns:
        A result whose ``model`` is a new module that remembers what was done. ``facts["left whole"]`` says which layers
        stay as they were, and why: layers that compute something else than their weight times their input, whose weight
        is used elsewhere, that have hooks, or in whose place the model's Python bears no other module;
        ``"bottlenecks"`` how many rows and columns each other one keeps.

    Raises:
        InfeasibleBudget: a budget that cannot be met, before any pass over the data.
        NothingToPrune: no layer can become a bottleneck.
        SecateurError: unknown options, bad values, what the factors refuse.
    """
    method = settings_from(EigenDamage, settings, options, "eigendamage", ("budget", "data", "loss", "group"))
    work = Workload(model, data, loss, inputs=example_inputs, group=group, progress=progress)
    return method.apply(model, example_inputs, budget, work)


@METHODS.register("eigendamage")
@dataclass(frozen=True)
class EigenDamage:
    """Layers as bottlenecks in the eigenbasis of their curvature, within a budget.

    Attributes:
        rule: ``"lagrangian"``: the least total damage within the budget; ``"threshold"``: the published rule, one
            threshold for all rows and columns.
        limit: for ``"threshold"``: no layer loses a larger part of its rows or columns.
        ekfac: take second moments in the eigenbasis, in a second pass over the data.
        layers: the paths of those that may become bottlenecks; all but the last one if not given.
        exclude: what stays whole: patterns of module paths, modules, or types of modules. Layers that do not require
            gradients stay whole too.
        train_rotations: whether the rotations are trained afterwards.
        separable: make convolutional bottlenecks depthwise-separable at the end: ``"cp"`` or ``"svd"``, see
            :func:`secateur.separate`.
        repair: how what stays makes up for what goes, see :func:`secateur.apply_repair`; ``"refit"`` fits cores and
            rotations to what the original computes, which the published method does not (``"none"``).
        fisher: one of :data:`secateur.curvature.fisher.FISHERS`, see :class:`secateur.curvature.fisher.Fisher`.
        samples: draws of targets for each example.
        batches: use at most so many.
        seed: for the drawn targets.
    """

    needs: ClassVar[Needs] = Needs(data=True, loss=True)
    plans: ClassVar[bool] = False
    rule: str = "lagrangian"
    limit: float = 0.95
    ekfac: bool = False
    layers: Sequence[str] | None = None
    exclude: Exclude = ()
    train_rotations: bool = True
    separable: str | None = None
    repair: Any = "refit"
    fisher: str = "sampled"
    samples: int = 1
    batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, RULES)
        check_open_fraction("limit", self.limit)
        check_flag("ekfac", self.ekfac)
        if self.layers is not None:
            check_names("layers", self.layers, "layers' paths")
        check_exclude(self.exclude)
        check_flag("train_rotations", self.train_rotations)
        if self.separable is not None:
            check_how(self.separable)
        repairs_of(self.repair)
        self.how(0)

    def how(self, further: int) -> Fisher:
        """The Fisher of one of the passes over the data; each draws targets of its own."""
        return Fisher(self.fisher, self.samples, self.batches, self.seed + further)

    def before_last(self) -> EigenDamage:
        """The settings of all rounds but the last: what is separable cannot be rotated again."""
        return replace(self, separable=None)

    def check(self, model: nn.Module, inputs: Inputs, budget: Budget | None) -> None:
        """Raise if no bottlenecks can meet the budget, with what is feasible; no data is needed for that.

        Raises:
            InfeasibleBudget: none can.
            NothingToPrune: no layer can become a bottleneck.
            SecateurError: a budget that the rule does not know, separable layers where there is no convolution.
        """
        probed, _, _ = self._begin(model, inputs, budget)
        cores = [three(part.module)[1] for part in probed.candidates]
        if self.separable is not None and not any(isinstance(core, CONVOLUTIONS) for core in cores):
            raise SecateurError(
                f"separable={self.separable!r}: no layer that can become a bottleneck is a convolution; leave it out"
            )

    def apply(self, model: nn.Module, inputs: Inputs, budget: Budget | None, work: Workload) -> Result:
        """See :func:`eigendamage`. Once measured, the curvature serves for every budget at the same table."""
        work.require(self.needs, "eigendamage")
        probed, before, allowed = self._begin(model, inputs, budget)
        parts, left = probed.candidates, dict(probed.left)
        bases, unmeasured = work.once(self._key(parts), lambda: self._bases(work, parts))
        left |= unmeasured
        parts = [part for part in parts if part.name in bases]
        sorted_bases = {part.name: sorted_by_damage(bases[part.name]) for part in parts}
        choices = [choice_of(part, sorted_bases[part.name]) for part in parts]
        room = Room(choices, totals(before), allowed)
        boxes = agreed(lagrangian(room) if self.rule == "lagrangian" else threshold(room, self.limit), work)

        kept = {
            choice.name: (torch.arange(box[0]), torch.arange(box[1]))
            for choice, box in zip(choices, boxes, strict=True)
            if box is not None
        }
        small = bottlenecked(model, sorted_bases, kept, train_rotations=self.train_rotations)
        after = measured_counts(small, inputs)
        room.check_real({"macs": after.macs, "params": after.params}, "eigendamage")
        facts: dict[str, Any] = {
            "chosen": {"method": described(self)},
            "bottlenecks": {name: [len(rows), len(columns)] for name, (rows, columns) in kept.items()},
            LEFT_WHOLE: left,
        }
        if self.rule == "lagrangian":
            work.remarks += unused(room.budget, totals(before), totals(after), "rounded sizes")
        facts["remarks"] = list(work.remarks)
        if self.separable is not None:
            facts["separated"] = separable(small)
            if facts["separated"]:
                small = separate(small, self.separable)
                after = measured_counts(small, inputs)
            else:
                facts["remarks"] += ["separable: the budget made no convolution a bottleneck, so none is"]
        share_weights(small, work)
        repairs = repairs_of(self.repair) if kept else []  # what is whole needs none
        repaired_facts = repaired(repairs, model, small, Plan({}, {}, fingerprint(model)), work)
        facts[LEFT_WHOLE] |= repaired_facts.pop(LEFT_WHOLE, {})
        facts |= repaired_facts
        facts |= {"forwards": work.forwards, "notices": list(work.notices)}
        return Result(small, before, after, facts=facts, layers=layer_data(model, small, inputs))

    def _begin(self, model: nn.Module, inputs: Inputs, budget: Budget | None) -> tuple[Probed, Counts, Budget]:
        """What can become a bottleneck, what the model costs, and the budget, which such bottlenecks can meet."""
        if not isinstance(budget, Budget):
            raise SecateurError(
                f"eigendamage(budget={budget!r}): a Budget is expected, for instance Budget(params=0.3)"
            )
        if self.rule == "threshold" and (budget.round_to not in (1, AUTO) or budget.at_least != 1):
            raise SecateurError(
                "rule='threshold' knows no round_to= and no at_least=: leave them out, or use 'lagrangian'"
            )
        probed = probe(model, inputs, self.layers, {**excluded_layers(model, self.exclude), **frozen_layers(model)})
        before = measured_counts(model, inputs)
        Room([choice_of(part, None) for part in probed.candidates], totals(before), budget).check()
        return probed, before, budget

    def _key(self, parts: Sequence[Candidate]) -> tuple[Any, ...]:
        """What the bases depend on."""
        return ("eigendamage", self.how(0), self.ekfac, tuple(part.core for part in parts))

    def _bases(self, work: Workload, parts: Sequence[Candidate]) -> tuple[dict[str, Eigenbasis], dict[str, str]]:
        """The passes over the data: bases by the names of the candidates, and those that have none -> why."""
        cores = [part.core for part in parts]
        curvature = factors_of(work, self.how(0), form="channel", layers=cores, bias=False)
        bases = {name: eigenbasis_of(factors) for name, factors in curvature.items()}
        skipped = dict(curvature.skipped)
        if self.ekfac:
            moments = second_moments(work, bases, self.how(1))
            bases, skipped = dict(moments.bases), {**skipped, **moments.skipped}
        found = {part.name: bases[part.core] for part in parts if part.core in bases}
        return found, {part.name: skipped[part.core] for part in parts if part.core not in bases}
