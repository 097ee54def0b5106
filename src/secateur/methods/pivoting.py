r"""Pivoting: dense blocks of every layer stay, and what is outside of them goes (after arXiv 1712.01084).

At once (:func:`pivot`), or while training (:class:`Pivoting`): ever less stays, in blocks that are looked for anew each
time, then the last ones are kept. At update ``t`` of ``T`` (the cubic schedule of arXiv 1710.01878)::

    keep_t = keep + (1 - keep) (1 - t / T)^3        the blocks of keep_t are found, and all outside becomes zero

Between updates all weights train, so what was outside may grow and come back; after the last the masks are fixed. What
is block-diagonal keeps a half, a third, a quarter, ...: the next of these that is no more than ``keep_t``.

How blocks are found is told in :mod:`secateur.surgery.blocks.pattern`; :func:`secateur.pack` makes them fast. Several
processes: rank 0 decides which blocks.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur._internal.batches import Inputs, call_model
from secateur._internal.checks import check_count, check_seed
from secateur._internal.distributed import Group, broadcast_json, world_size
from secateur._internal.errors import SecateurError
from secateur._internal.records import record
from secateur._internal.state import device_of, eval_mode
from secateur._internal.workload import Needs, Workload
from secateur.allocation.budget import Budget
from secateur.curvature.kronecker import Curvature
from secateur.measure.layers import layer_data
from secateur.methods.contract import METHODS, TRAINING_METHODS, described, measured_counts, settings_from
from secateur.methods.layer_selection import check_exclude, excluded_layers, frozen_layers
from secateur.plan import Plan
from secateur.repair.api import repaired, repairs_of
from secateur.repair.contract import LEFT_WHOLE
from secateur.result import Counts, Result
from secateur.surgery.blocks.packing import pack
from secateur.surgery.blocks.pattern import Pattern
from secateur.surgery.blocks.pivots import (
    PACK,
    apply,
    check_patterns,
    check_pivot,
    check_some,
    cloned,
    eligible,
    energy,
    mask_of,
    patterns_of,
    pivoted,
    remembered,
    used_by,
)
from secateur.tracing.api import check_traceable
from secateur.tracing.graph import ChannelGraph, fingerprint
from secateur.tracing.selection import Exclude


@dataclass(frozen=True)
class PivotSettings:
    """What blocks stay.

    Attributes:
        keep: the part of each layer's coefficients that stays in the end, in (0, 1].
        layout: ``"bundles"``: every bundle of rows has its own columns; ``"diagonal"``: block-diagonal after permuting
            rows and columns, with ``1 / keep`` blocks; ``"growth"``: by complete pivoting.
        blocks: how many a layer has, at most; see :func:`pivot`.
        exclude: what stays whole: patterns of module paths, modules, or types of modules.
        seed: of the search.
    """

    takes_budget: ClassVar[bool] = False
    plans: ClassVar[bool] = False
    needs: ClassVar[Needs] = Needs()
    keep: float = 0.5
    layout: str = "bundles"
    blocks: int | None = None
    exclude: Exclude = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_pivot(self.keep, self.layout, self.blocks)
        check_exclude(self.exclude)
        check_seed(self.seed)

    def candidates(self, model: nn.Module, factors: Curvature | None = None) -> tuple[list[str], dict[str, str]]:
        """The layers that get blocks, and the others -> why."""
        without = {**excluded_layers(model, self.exclude), **frozen_layers(model)}
        return eligible(model, self.keep, self.layout, without, factors)

    def keeper(self, model: nn.Module) -> Pivoting:
        """A handle that keeps the blocks of a pivoted model while it is fine-tuned."""
        return Pivoting(model)

    def finish(self, model: nn.Module, inputs: Inputs) -> Result:
        """The pivoted model packed, for these inputs."""
        small = pack(model, inputs)
        done = json.loads(record(small)[-1][PACK])
        facts = {"packed": sorted(done["layers"]), "dense": sorted(done["patterns"]), "ms": done["ms"]}
        if facts["dense"]:
            facts["remarks"] = [f"pack: no slower dense, and left so: {', '.join(facts['dense'])}"]
        before, after = measured_counts(model, inputs), measured_counts(small, inputs)
        return Result(small, before, after, facts=facts, layers=layer_data(model, small, inputs))


@METHODS.register("pivot")
@dataclass(frozen=True)
class Pivot(PivotSettings):
    """Dense blocks of every linear and convolution, found at once; see :class:`PivotSettings` for the others.

    Attributes:
        repair: how what stays makes up for what goes where there are data, see :func:`secateur.apply_repair`.
    """

    repair: Any = "refit"

    def __post_init__(self) -> None:
        super().__post_init__()
        repairs_of(self.repair)

    def check(self, model: nn.Module, inputs: Inputs, budget: Budget | None) -> None:
        """Raise if no layer can have blocks, or a budget is given."""
        _refuse_budget(budget)
        self.used(model, inputs)

    def used(
        self, model: nn.Module, inputs: Inputs, factors: Curvature | None = None
    ) -> tuple[list[str], dict[str, str]]:
        """The layers that get blocks and that the forward uses, and the others -> why."""
        names, left = self.candidates(model, factors)
        used = used_by(model, inputs, names)
        left |= {name: "is not used on these inputs" for name in names if name not in used}
        names = [name for name in names if name in used]
        check_some(names, left, "pivot")
        return names, left

    def apply(self, model: nn.Module, inputs: Inputs, budget: Budget | None, work: Workload) -> Result:
        """The pivoted model, see :func:`pivot`."""
        _refuse_budget(budget)
        check_traceable(model, inputs, "pivot")
        return self.with_factors(model, inputs, work, None)

    def with_factors(self, model: nn.Module, inputs: Inputs, work: Workload, factors: Curvature | None) -> Result:
        """The pivoted model by the energy of magnitude, or of the Fisher where there are factors."""
        names, left = self.used(model, inputs, factors)
        found = patterns_of(
            model, names, self.keep, layout=self.layout, blocks=self.blocks, factors=factors, seed=self.seed
        )
        patterns = _agreed(found, work.device, work.group)
        before = measured_counts(model, inputs)
        facts = {
            "chosen": {"method": described(self)},
            "blocks": _sizes(patterns),
            "captured": {name: p.captured(energy(model.get_submodule(name))) for name, p in patterns.items()},
            LEFT_WHOLE: left,
        }
        after = _packed_counts(model, inputs, patterns, before)
        small = pivoted(model, patterns, left)
        if work.has_data:
            told = repaired(repairs_of(self.repair), model, small, Plan({}, {}, fingerprint(model)), work)
            if unfitted := told.pop(LEFT_WHOLE, {}):  # a fact of that name says which layers have no blocks
                facts["not fitted"] = unfitted
            facts |= told
            _check_inside(small, patterns)
        facts["notices"] = list(work.notices)
        return Result(small, before, after, facts=facts, layers=layer_data(model, small, inputs))


def pivot(
    model: nn.Module,
    example_inputs: Inputs,
    keep: float,
    *,
    layout: str = "bundles",
    blocks: int | None = None,
    factors: Curvature | None = None,
    exclude: Exclude = (),
    seed: int = 0,
    data: Iterable[Any] | None = None,
    repair: Any = "refit",
    group: Group = None,
    progress: bool = False,
) -> Result:
    """Leave dense blocks of every linear and convolution, and zeros outside; :func:`secateur.pack` makes them fast.

    Args:
        model: the model; it is left untouched.
        example_inputs: what its forward takes, as for :func:`secateur.trace`; layers it does not use stay whole.
        keep: the part of each layer's coefficients that stays, in (0, 1]; for ``"diagonal"`` a half, a third, ...
        layout: ``"bundles"``: every bundle of rows has its own columns; ``"diagonal"``: block-diagonal after permuting
            rows and columns, with ``1 / keep`` blocks; ``"growth"``: by complete pivoting.
        blocks: how many blocks a layer has, at most; fewer are faster, more keep more of the energy. Default:
            ``1 / keep``, but none of fewer than 32 rows; a layer of fewer than 64 rows then has one block, whose rows
            all read the same columns. Not for ``"diagonal"``.
        factors: of :func:`secateur.kronecker_factors` in channel form, for the Fisher's energy instead of magnitude.
        exclude: what stays whole: patterns of module paths, modules, or types of modules. Layers that do not require
            gradients stay whole too.
        seed: of the search.
        data: batches; no targets are needed. With them, what stays is fitted to what the model computes.
        repair: how, see :func:`secateur.apply_repair`; ``"none"`` for the weights as they were.
        group: the processes that work along; rank 0 decides which blocks.
        progress: show what takes long.

    Returns:
        A result whose ``model`` is a new module of the same shape that remembers its patterns
        (:func:`secateur.record`), to be given to :func:`secateur.pack`. ``after`` counts what stays: what the layers
        cost when all of them are packed. ``facts["left whole"]`` says which layers have no blocks, and why;
        ``"blocks"`` how many each other one has, with their rows and columns; ``"captured"`` which part of its energy
        they hold; ``"not fitted"`` which layers the repair could not change. Where blocks do not divide the rows of a
        layer, the last one is filled up with zeros; a block has ``keep`` of the columns, rounded down.

    Raises:
        SecateurError: bad values, an unknown layer, inputs on which the model does not run, no layer that can have
            blocks.
    """
    check_traceable(model, example_inputs, "pivot")
    settings = Pivot(keep=keep, layout=layout, blocks=blocks, exclude=exclude, seed=seed, repair=repair)
    work = Workload(model, data, group=group, progress=progress)
    return settings.with_factors(model, example_inputs, work, factors)


def _refuse_budget(budget: Budget | None) -> None:
    if budget is not None:
        raise SecateurError("pivoting takes keep=, the part of every layer that stays, and no budget: leave it out")


def _agreed(patterns: Mapping[str, Pattern], device: torch.device, group: Group) -> dict[str, Pattern]:
    """The patterns that rank 0 has found."""
    if world_size(group) == 1:
        return dict(patterns)
    found = broadcast_json({name: pattern.to_dict() for name, pattern in patterns.items()}, device, group)
    return {name: Pattern.from_dict(pattern) for name, pattern in found.items()}


def _check_inside(small: nn.Module, patterns: Mapping[str, Pattern]) -> None:
    """Raise if a repair has written outside of the blocks."""
    for name, pattern in patterns.items():
        weight: Any = small.get_submodule(name).weight
        if bool((weight.detach()[mask_of(pattern, weight).expand_as(weight) == 0] != 0).any()):
            raise SecateurError(
                f"pivot(repair=): it changed {name!r} outside of its blocks; use 'refit' or 'none', and train with "
                "secateur.Pivoting(result.model), which keeps them"
            )


def _sizes(patterns: Mapping[str, Pattern]) -> dict[str, list[int]]:
    """By layer how many blocks there are, and their rows and columns."""
    return {name: [*map(int, p.rows.shape), int(p.columns.shape[1])] for name, p in patterns.items()}


def _packed_counts(model: nn.Module, inputs: Inputs, patterns: Mapping[str, Pattern], before: Counts) -> Counts:
    """What the model costs when the layers with patterns compute their blocks alone."""
    positions: Counter[str] = Counter()

    def watch(name: str) -> Any:
        def hook(layer: Any, _: Any, output: Tensor) -> None:
            positions[name] += output.numel() // layer.weight.shape[0]

        return model.get_submodule(name).register_forward_hook(hook)

    with eval_mode(model):  # which takes the hooks off too
        for name in patterns:
            watch(name)
        call_model(model, cloned(inputs))
    macs, params = before.macs, before.params
    for name, pattern in patterns.items():
        layer: Any = model.get_submodule(name)
        (rows, columns), taps = pattern.shape, math.prod(layer.weight.shape[2:])
        less = taps * (rows * columns - pattern.rows.size * pattern.columns.shape[1])
        macs -= positions[name] * less
        params -= less - (pattern.rows.size - rows if layer.bias is not None else 0)
    return Counts(macs, params)


# ---------------------------------------------------------------------------------------------------- while it trains


@TRAINING_METHODS.register("pivot")
@dataclass(frozen=True)
class GradualPivot(PivotSettings):
    """Dense blocks that are found bit by bit while the network trains; see :class:`PivotSettings` for the others.

    Attributes:
        every: steps from one update to the next.
        times: how many updates there are.
    """

    every: int = 100
    times: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("every", self.every)
        check_count("times", self.times)

    def keep_at(self, update: int) -> float:
        """What stays after so many updates, a fraction."""
        return self.keep + (1 - self.keep) * (1 - update / self.times) ** 3

    def attach(self, model: nn.Module, graph: ChannelGraph, optimizer: Optimizer, budget: Budget | None) -> Pivoting:
        """A handle with these settings; it needs neither graph nor optimizer."""
        _refuse_budget(budget)
        return Pivoting(model, settings=self)


class Pivoting:
    """A handle beside any optimizer: ``step()`` after ``optimizer.step()``; then :func:`secateur.pack` ``small()``.

    Args:
        model: the model that is trained, changed in place.
        keep: the part of each layer's coefficients that stays in the end, in (0, 1]. Without any of these, the patterns
            of a model from :func:`secateur.pivot` are kept.
        settings: instead, settings.
        patterns: instead of all these, patterns to be kept from the beginning.
        group: the processes that train along; rank 0 decides.
        **options: fields of :class:`GradualPivot`.

    Attributes:
        settings: what blocks stay; None where patterns were given.
        patterns: by layer, what stays now; empty before the first update.
        skipped: the layers that stay whole, and why.
        steps: how often :meth:`step` was called.

    Raises:
        SecateurError: bad values, an unknown layer, no layer that can have blocks, patterns of another model.
    """

    def __init__(
        self, model: nn.Module, keep: float | None = None, *, settings: GradualPivot | None = None,
        patterns: Mapping[str, Pattern] | None = None, group: Group = None, **options: Any,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise SecateurError(f"Pivoting(model): a torch.nn.Module is expected, {type(model).__name__} was given")
        options |= {} if keep is None else {"keep": keep}
        if (patterns is not None) + (settings is not None) + bool(options) > 1:
            raise SecateurError("give either keep=, a fraction of each layer's coefficients, or patterns= to be kept")
        if options and "keep" not in options:
            raise SecateurError(f"Pivoting({', '.join(options)}=...): give keep= too, the fraction that stays")
        if options:
            settings = settings_from(GradualPivot, None, options, "Pivoting", ("patterns", "group"))
        self.model, self.group, self.settings = model, group, settings
        self.steps = self.updates = 0
        self.patterns: dict[str, Pattern] = {}
        self.skipped: dict[str, str] = {}
        self._names: Sequence[str] = []
        self._masks: list[tuple[Tensor, Tensor]] = []
        self._detached = False
        if settings is None:
            patterns = remembered(model) if patterns is None else patterns
            check_patterns(model, patterns)
            self.patterns = dict(patterns)
            apply(model, self.patterns)
        else:
            self._names, self.skipped = settings.candidates(model)
            check_some(self._names, self.skipped, "Pivoting")

    @property
    def done(self) -> bool:
        """Whether the patterns are the last ones. Go on calling :meth:`step`: it keeps the zeros."""
        return self.settings is None or self.updates >= self.settings.times

    @property
    def steps_needed(self) -> int:
        """How many steps it takes until the patterns are the last ones."""
        return 0 if self.settings is None else self.settings.every * self.settings.times

    def advice(self) -> str:
        """What to change where the training is too short, beside training longer."""
        return "give a smaller every or fewer times"

    def step(self) -> None:
        """To be called after the optimizer's step."""
        if self._detached:
            raise SecateurError("this handle is detached; make a new one")
        self.steps += 1
        how = self.settings
        if how is not None and not self.done and self.steps % how.every == 0:
            self.updates += 1
            found = patterns_of(
                self.model, self._names, how.keep_at(self.updates), layout=how.layout, blocks=how.blocks, seed=how.seed,
                final=how.keep,
            )  # fmt: skip
            self.patterns = _agreed(found, device_of(self.model), self.group)
            self._masks = []
            apply(self.model, self.patterns)
        elif self.done:
            self._hold()

    @torch.no_grad()
    def _hold(self) -> None:
        weights: list[Any] = [self.model.get_submodule(name).weight for name in self.patterns]
        known = zip(weights, self._masks, strict=False)
        if len(self._masks) != len(weights) or any(w is not p or w.device != out.device for w, (p, out) in known):
            pairs = zip(weights, self.patterns.values(), strict=True)
            self._masks = [(weight, mask_of(pattern, weight) == 0) for weight, pattern in pairs]
        for weight, outside in self._masks:
            weight.masked_fill_(outside, 0)

    def small(self) -> nn.Module:
        """The finished model, a copy with zeros outside of its blocks, for :func:`secateur.pack`.

        Raises:
            SecateurError: the patterns are not the last ones yet.
        """
        if not self.done:
            raise SecateurError(
                f"after {self.steps} steps more than keep is left, for it takes {self.steps_needed} steps: train "
                f"longer, or {self.advice()}"
            )
        return pivoted(self.model, self.patterns, self.skipped)

    def plan(self) -> Plan:
        """There is none, since no channel goes.

        Raises:
            SecateurError: always; it says what to call.
        """
        raise SecateurError(
            "pivoting removes no channels, so there is no plan to be cut: call small(), and pack what it gives"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What is to be known, as what JSON can hold."""
        return {"steps": self.steps, "blocks": _sizes(self.patterns), LEFT_WHOLE: dict(self.skipped)}

    def detach(self) -> None:
        """Keep the zeros no longer."""
        self._detached = True

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        patterns = json.dumps({name: pattern.to_dict() for name, pattern in self.patterns.items()})
        return {"steps": self.steps, "updates": self.updates, "settings": self._kind(), "patterns": patterns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, by a handle of the same settings.

        Raises:
            SecateurError: the state of a handle with other settings; nothing is changed.
        """
        found = state.get("settings") if isinstance(state, Mapping) else type(state).__name__
        if found != self._kind():
            raise SecateurError(f"the state is of pivoting with {found}, this handle has {self._kind()}")
        try:
            patterns = {name: Pattern.from_dict(p) for name, p in json.loads(state["patterns"]).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SecateurError(f"the state of pivoting is damaged ({type(error).__name__}: {error})") from error
        if patterns:
            check_patterns(self.model, patterns)
        self.steps, self.updates, self.patterns = int(state["steps"]), int(state["updates"]), patterns
        self._masks = []

    def _kind(self) -> str:
        """What a state must be of, to be loaded."""
        how = self.settings
        own = (
            {} if how is None else {n: getattr(how, n) for n in ("keep", "every", "times", "layout", "blocks", "seed")}
        )
        return json.dumps({**own, "layers": list(self._names)})
