"""EigenDamage in one call (arXiv 1905.05934): factors, eigenbases, damages, boxes within a budget, bottlenecks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur._internal.batches import Inputs
from secateur._internal.errors import SecateurError, unknown
from secateur._internal.workload import Workload
from secateur.allocation.budget import Budget
from secateur.allocation.rank_allocation import Choice, Room, Shape, lagrangian, threshold
from secateur.curvature.eigenbasis import Eigenbasis, eigenbasis_of, second_moments
from secateur.curvature.fisher import Fisher
from secateur.curvature.kronecker import kronecker_factors
from secateur.curvature.layers import measurable
from secateur.measure.counting import count_macs, count_params, counted
from secateur.surgery.low_rank.bottleneck import Bottleneck, bottlenecked, three

EIGENDAMAGE = "eigendamage"
RULES = ("lagrangian", "threshold")
CUTTING = ("rule", "limit", "train_rotations")
"""The options of :meth:`Damages.cut`; the others are those of :func:`measure_damage`."""


def eigendamage(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    data: Iterable[Any],
    budget: Budget,
    loss: Any = "cross_entropy",
    rule: str = "lagrangian",
    limit: float = 0.95,
    ekfac: bool = False,
    layers: Sequence[str] | None = None,
    train_rotations: bool = True,
    fisher: str = "sampled",
    samples: int = 1,
    batches: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make a model smaller in the eigenbasis of its curvature: layers become bottlenecks, widths between them stay.

    No channel graph is needed: any model whose linears and convolutions are modules will do. Done again on its own
    result, the new bases are merged with the old ones and a layer stays three layers.

    Args:
        model: the model; it is left untouched.
        example_inputs: as for :func:`secateur.trace`; MACs refer to their shapes.
        data: batches (inputs, targets), passed over once (twice with ``ekfac``): something that can be iterated again.
        budget: what may remain, in MACs, parameters or both.
        loss: as for :func:`secateur.kronecker_factors`.
        rule: ``"lagrangian"``: the least total damage within the budget; ``"threshold"``: the published rule, one
            threshold for all rows and columns.
        limit: for ``"threshold"``: no layer loses a larger part of its rows or columns.
        ekfac: take second moments in the eigenbasis, in a second pass over the data.
        layers: which may become bottlenecks; all but the last one if not given.
        train_rotations: whether the rotations are trained afterwards.
        fisher: as for the factors, like ``samples``, ``batches`` and ``seed``.
        samples: draws of targets for each example.
        batches: use at most so many.
        seed: for the drawn targets.

    Returns:
        A new module, which remembers what was done.

    Raises:
        SecateurError: a budget that cannot be met, before any pass over the data; what the factors refuse.
    """
    check_rule(rule, limit, budget)
    check_budget(model, example_inputs, budget, layers)
    damages = measure_damage(
        model, example_inputs, data=data, loss=loss, ekfac=ekfac, layers=layers, fisher=fisher, samples=samples,
        batches=batches, seed=seed,
    )  # fmt: skip
    return damages.cut(budget, rule=rule, limit=limit, train_rotations=train_rotations)


def check_budget(model: nn.Module, example_inputs: Inputs, budget: Budget, layers: Sequence[str] | None = None) -> None:
    """Raise if no bottlenecks can meet the budget, with what is feasible; no data is needed for that."""
    parts, _ = _parts(model, layers)
    seen = _measure(model, example_inputs, parts)
    _room(model, seen, [_choice(p, None, seen.positions[p.name]) for p in parts], budget).check()


def check_rule(rule: str, limit: float, budget: Budget | None = None) -> None:
    """Raise if there is no such rule, no such limit, or the rule knows not all of the budget."""
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < 1:
        raise SecateurError(f"limit={limit!r}: a fraction between 0 and 1 is expected")
    if rule == "threshold" and isinstance(budget, Budget) and (budget.round_to != 1 or budget.at_least != 1):
        raise SecateurError("rule='threshold' knows no round_to= and no at_least=: leave them out, or use 'lagrangian'")


@dataclass(frozen=True, eq=False)
class Damages:
    """What the passes over the data found, from which networks of any size can be cut.

    Attributes:
        model: the model.
        inputs: its example inputs.
        bases: by the name of the layer (or bottleneck), rows and columns by their damage, the largest first.
        choices: the damages and costs of every layer.
        skipped: layers that stay as they are, and why.
    """

    model: nn.Module
    inputs: Inputs
    bases: Mapping[str, Eigenbasis]
    choices: Sequence[Choice]
    skipped: Mapping[str, str]
    _seen: _Seen

    def cut(
        self, budget: Budget, *, rule: str = "lagrangian", limit: float = 0.95, train_rotations: bool = True
    ) -> nn.Module:
        """The model within a budget; arguments as for :func:`eigendamage`."""
        check_rule(rule, limit, budget)
        room = _room(self.model, self._seen, self.choices, budget)
        boxes = lagrangian(room) if rule == "lagrangian" else threshold(room, limit)
        kept = {
            choice.name: (torch.arange(box[0]), torch.arange(box[1]))
            for choice, box in zip(self.choices, boxes, strict=True)
            if box is not None
        }
        small = bottlenecked(self.model, self.bases, kept, train_rotations=train_rotations)
        real = counted(small, self.inputs)
        over = [unit for unit, allowed in room.allowed.items() if real[unit] > allowed]
        if over:
            raise SecateurError(
                f"eigendamage: the result has {real[over[0]]:,} {over[0]} where {room.allowed[over[0]]:,} are allowed: "
                "a layer is used in a way that was not seen; name the layers that may become bottlenecks (layers=)"
            )
        return small


def measure_damage(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    data: Iterable[Any],
    loss: Any = "cross_entropy",
    ekfac: bool = False,
    layers: Sequence[str] | None = None,
    fisher: str = "sampled",
    samples: int = 1,
    batches: int | None = None,
    seed: int = 0,
) -> Damages:
    """The passes over the data, without a budget; arguments as for :func:`eigendamage`."""
    parts, skipped = _parts(model, layers)
    seen = _measure(model, example_inputs, parts)
    passing: dict[str, Any] = {"fisher": fisher, "samples": samples, "batches": batches}
    curvature = kronecker_factors(model, data, loss, layers=[p.core for p in parts], bias=False, seed=seed, **passing)
    bases = {name: eigenbasis_of(factors) for name, factors in curvature.items()}
    if ekfac:
        moments = second_moments(Workload(model, data, loss), bases, Fisher(fisher, samples, batches, seed + 1))
        bases, skipped = dict(moments.bases), {**skipped, **moments.skipped}
    sorted_bases = {p.name: _sorted(bases[p.core]) for p in parts if p.core in bases}
    choices = [_choice(p, sorted_bases[p.name], seen.positions[p.name]) for p in parts if p.core in bases]
    return Damages(model, example_inputs, sorted_bases, choices, {**skipped, **curvature.skipped}, seen)


def _room(model: nn.Module, seen: _Seen, choices: Sequence[Choice], budget: Budget) -> Room:
    if not isinstance(budget, Budget):
        raise SecateurError(f"eigendamage(budget={budget!r}): a Budget is expected, for instance Budget(params=0.3)")
    return Room(choices, {"macs": seen.macs, "params": count_params(model)}, budget)


@dataclass(frozen=True, eq=False)
class _Part:
    """A layer that may become a bottleneck, or a bottleneck that may become smaller.

    Attributes:
        name: its path.
        core: the path of the layer whose curvature decides.
        module: it.
    """

    name: str
    core: str
    module: Any


def _parts(model: nn.Module, names: Sequence[str] | None) -> tuple[list[_Part], dict[str, str]]:
    """The named layers, or all but the last; and of these the ones that must stay as they are, with reasons."""
    inside: set[str] = set()
    every: dict[str, _Part] = {}
    for name, module in model.named_modules():
        if name in inside:
            continue
        if isinstance(module, Bottleneck):
            inside |= {f"{name}.{i}" for i in range(3)}
            every[name] = _Part(name, f"{name}.1", module)
        elif measurable(module):
            every[name] = _Part(name, name, module)
    for name in names or ():
        if name not in every:
            raise SecateurError(
                f"layers: {name!r} is no linear or convolution of this model; there are {', '.join(every)}"
            )
    chosen = [every[n] for n in names] if names is not None else list(every.values())[:-1]
    skipped = {p.name: reason for p in chosen if (reason := _unfit(model, p))}
    chosen = [p for p in chosen if p.name not in skipped]
    if not chosen:
        told = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in skipped.items())
        raise SecateurError(f"no layer can become a bottleneck ({told or 'the last one stays as it is'})")
    return chosen, skipped


def _unfit(model: nn.Module, part: _Part) -> str:
    """Why a layer stays as it is, if it must."""
    if getattr(three(part.module)[1], "groups", 1) > 1:
        return "a grouped convolution"
    weight = part.module.get_parameter("1.weight" if isinstance(part.module, Bottleneck) else "weight")
    places = sum(p is weight for module in model.modules() for p in module._parameters.values())
    paths = sum(module is part.module for _, module in model.named_modules(remove_duplicate=False))
    return "its weight is used at several places" if places > 1 or paths > 1 else ""


@dataclass(frozen=True)
class _Seen:
    """What one forward on the example inputs shows: MACs of all, and per layer its input's and output's positions."""

    macs: int
    positions: Mapping[str, tuple[int, int]]


def _measure(model: nn.Module, inputs: Inputs, parts: Sequence[_Part]) -> _Seen:
    positions: dict[str, list[int]] = {p.name: [0, 0] for p in parts}

    def attach(part: _Part) -> Any:
        def hook(module: nn.Module, given: Any, out: Tensor) -> None:
            first, _, last = three(module)
            for i, (tensor, layer, inward) in enumerate(((given[0], first, True), (out, last, False))):
                positions[part.name][i] += tensor.numel() // _width(layer, inward=inward)

        return part.module.register_forward_hook(hook)

    handles = [attach(p) for p in parts]
    try:
        macs = count_macs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return _Seen(macs, {n: (a, b) for n, (a, b) in positions.items()})


def _width(layer: Any, *, inward: bool) -> int:
    if isinstance(layer, nn.Linear):
        return layer.in_features if inward else layer.out_features
    return layer.in_channels if inward else layer.out_channels


def _choice(part: _Part, basis: Eigenbasis | None, positions: tuple[int, int]) -> Choice:
    """The layer's costs; with a basis also its damages."""
    module, (before, after) = part.module, positions
    first, core, last = three(module)
    wide_in, wide_out = _width(first, inward=True), _width(last, inward=False)
    rows, columns = core.weight.shape[:2]
    taps = core.weight[0, 0].numel()
    shapes = {}
    for unit, inward, outward in (("params", 1, 1), ("macs", before, after)):
        row, column, both = wide_out * outward, wide_in * inward, taps * outward
        whole = rows * columns * both
        if isinstance(module, Bottleneck):
            whole += rows * row + columns * column
        shapes[unit] = Shape(whole, row, column, both)
    if basis is None:
        return Choice(part.name, torch.zeros(rows, columns).numpy(), shapes)
    return Choice(part.name, basis.energy()[0].sum(1).double().cpu().numpy() / 2, shapes)


def _sorted(basis: Eigenbasis) -> Eigenbasis:
    """The basis with rows and columns by their damage, the largest first."""
    damage = basis.energy()[0].sum(1)
    rows, columns = damage.sum(1).argsort(descending=True), damage.sum(0).argsort(descending=True)
    moments = None if basis.moments is None else basis.moments[:, rows][..., columns]
    return replace(
        basis, qa=basis.qa[..., columns], a=basis.a[:, columns], qg=basis.qg[..., rows], g=basis.g[:, rows],
        moments=moments,
    )  # fmt: skip
