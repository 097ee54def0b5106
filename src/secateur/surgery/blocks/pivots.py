r"""Pivoting a model: blocks that hold most of every layer's energy; what is outside goes (after arXiv 1712.01084).

The energy of row ``i`` and column ``j`` (a filter and an input channel, summed over the taps of the kernel)::

    magnitude     E_ij = sum_t W_itj^2
    Fisher        E_ij = G_ii A_jj sum_t W_itj^2        A and G the layer's Kronecker factors (arXiv 1503.05671)

The second is twice what the loss rises by where one weight goes, as the Kronecker-factored Fisher sees it.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur._internal.batches import Inputs, call_model, first_argument, tensors_in
from secateur._internal.checks import check_choice, check_count, is_number
from secateur._internal.errors import NothingToPrune, SecateurError, unknown
from secateur._internal.records import add_to_record, record
from secateur._internal.state import eval_mode
from secateur.curvature.kronecker import Curvature, Factors
from secateur.curvature.layers import CONVOLUTIONS, Layer, measurable
from secateur.surgery.blocks.pattern import LAYOUTS, Pattern, blocks_for, find_pattern
from secateur.tracing.graph import fingerprint
from secateur.tracing.skeleton import copyable

PIVOT, PACK = "pivot", "pack"
FUSED = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
SMALLEST_BLOCK = 4
"""Blocks of fewer rows or columns than this are no gain for any hardware."""


@dataclass(frozen=True)
class Pivots:
    """What stays of each layer, as data."""

    fingerprint: str
    patterns: Mapping[str, Pattern]
    skipped: Mapping[str, str]

    def to_json(self) -> str:
        """As JSON text."""
        patterns = {name: pattern.to_dict() for name, pattern in self.patterns.items()}
        return json.dumps({"fingerprint": self.fingerprint, "patterns": patterns, "skipped": dict(self.skipped)})


def energy(layer: nn.Module, factors: Any = None) -> np.ndarray:
    """The energy of each row and column of a linear or a convolution, float64 [rows, columns].

    Args:
        layer: the module.
        factors: of this layer, for the Fisher's energy.
    """
    # a whole column of the table is gone or stays at all taps; without the bias
    squared = Layer("", layer, biased=False).table().double().square().sum((0, 2))
    if not bool(squared.isfinite().all()):
        raise SecateurError("the weight holds NaN or infinite numbers")
    if factors is not None:
        if factors.layer.form != "channel" and squared.shape[1] * factors.layer.taps != factors.a.shape[-1]:
            raise SecateurError("factors in full form: give kronecker_factors(..., form='channel')")
        a, g = (f.diagonal(dim1=1, dim2=2)[0].to(squared) for f in (factors.a, factors.g))
        squared = squared * g[:, None] * a[: squared.shape[1]]
    return np.asarray(squared.cpu().numpy())


def why_not(model: nn.Module) -> dict[str, str]:
    """The linears and convolutions that cannot have blocks, and why."""
    weights = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    fused = {id(m) for encoder in model.modules() if isinstance(encoder, FUSED) for m in encoder.modules()}
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            continue
        if type(module) not in (nn.Linear, *CONVOLUTIONS) or not measurable(module):
            found[name] = "computes its weight, or is not a plain linear or convolution"
        elif getattr(module, "groups", 1) > 1:
            found[name] = "is a grouped convolution, which has blocks already"
        elif getattr(module, "padding_mode", "zeros") != "zeros":
            found[name] = f"pads with {module.padding_mode!r}"
        elif weights[id(module.weight)] > 1:
            found[name] = "shares its weight with another layer"
        elif id(module) in fused:
            found[name] = "is read by the fused forward of a transformer layer"
        elif "forward" in vars(module) or any(getattr(module, hooks, None) for hooks in HOOKS):
            found[name] = "has hooks, or a forward of its own"
    return found


def check_pivot(keep: object, layout: object, blocks: object) -> None:
    """Raise if these are no settings of pivoting."""
    if not is_number(keep) or not 0 < keep <= 1:  # type: ignore[operator]
        raise SecateurError(f"keep={keep!r}: a fraction of the coefficients in (0, 1] is expected, for instance 0.25")
    check_choice("layout", layout, LAYOUTS)
    check_count("blocks", blocks, optional=True)
    if layout == "diagonal" and blocks is not None:
        raise SecateurError("blocks: with layout='diagonal' there are 1 / keep of them; leave it out")
    if layout == "diagonal" and abs(1 / keep - round(1 / keep)) > 1e-6:  # type: ignore[operator]
        raise SecateurError(
            f"keep={keep:g}: block-diagonal layers keep a half, a third, a quarter, ...; give one of these"
        )


def eligible(
    model: nn.Module,
    keep: float,
    layout: str,
    without: Mapping[str, str] = MappingProxyType({}),
    factors: Curvature | None = None,
) -> tuple[list[str], dict[str, str]]:
    """The layers that can have blocks, and why others cannot.

    Args:
        model: the model.
        keep: the part of each layer's coefficients that stays.
        layout: of the blocks.
        without: paths of layers that stay whole -> why.
        factors: if given, a layer must have some.
    """
    if factors is not None and not (factors and all(isinstance(f, Factors) for f in _values(factors))):
        raise SecateurError("factors: what secateur.kronecker_factors gives is expected")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
    skipped = why_not(model)
    for name, layer in layers.items():
        if name in skipped:
            continue
        m, n = layer.weight.shape[:2]
        if name in without:
            skipped[name] = without[name]
        elif factors is not None and name not in factors:
            skipped[name] = f"has no factors: {factors.skipped.get(name, 'it was not measured')}"
        elif int(keep * n + 1e-9) < SMALLEST_BLOCK or (m * keep if layout == "diagonal" else m) < SMALLEST_BLOCK:
            skipped[name] = f"keep={keep:g} of {m} x {n} leaves blocks of fewer than {SMALLEST_BLOCK} rows or columns"
    return [name for name in layers if name not in skipped], skipped


def _values(factors: Any) -> list[Any]:
    return list(factors.values()) if isinstance(factors, Mapping) else [None]


def patterns_of(
    model: nn.Module, names: Sequence[str], keep: float, *, layout: str = "bundles", blocks: int | None = None,
    factors: Curvature | None = None, seed: int = 0, final: float | None = None,
) -> dict[str, Pattern]:  # fmt: skip
    """The pattern of each of these layers; of block-diagonal ones the next that keep no more.

    Arguments are those of :func:`secateur.pivot`. ``final`` is what stays in the end, if that is less: there are as
    many blocks as there will be then.
    """
    final = keep if final is None else final
    if layout == "diagonal":
        keep = 1 / math.ceil(1 / keep - 1e-6)
    found = {}
    for name in names:
        layer: Any = model.get_submodule(name)
        rows = layer.weight.shape[0]
        count = blocks_for(final, rows) if blocks is None else min(blocks, rows // SMALLEST_BLOCK)
        try:
            table = energy(layer, factors[name].of(model) if factors is not None else None)
        except SecateurError as error:
            raise SecateurError(f"layer {name!r}: {error}") from error
        found[name] = find_pattern(
            table, keep, layout=layout, blocks=None if layout == "diagonal" else count, seed=seed
        )
    return found


def check_some(names: Sequence[str], skipped: Mapping[str, str], who: str) -> None:
    """Raise if no layer can have blocks."""
    if not names:
        why = "; ".join(f"{name} {reason}" for name, reason in skipped.items())
        raise NothingToPrune(f"{who}: no layer can have blocks: {why or 'there is no linear and no convolution'}")


def used_by(model: nn.Module, example_inputs: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    """What the named layers see first in a forward in eval mode, of a copy, the random state aside.

    Raises:
        SecateurError: the forward fails.
    """
    with copyable(model):
        copied = copy.deepcopy(model)
    seen: dict[str, Tensor] = {}
    for name in names:

        def watch(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            seen.setdefault(name, first_argument(args, kwargs).detach())

        copied.get_submodule(name).register_forward_pre_hook(watch, with_kwargs=True)
    _run(copied, example_inputs)
    return seen


def outputs(model: nn.Module, example_inputs: Inputs) -> list[Tensor]:
    """All tensors that a copy of the model gives in eval mode, from a fixed random state that is put back.

    Raises:
        SecateurError: the forward fails.
    """
    return _run(copy.deepcopy(model), example_inputs)


def cloned(inputs: Inputs) -> Any:
    """The same inputs in tensors of their own: a forward may change them in place."""
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)


def _run(model: nn.Module, example_inputs: Inputs) -> list[Tensor]:
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), eval_mode(model):
        torch.manual_seed(0)
        try:
            return list(tensors_in(call_model(model, cloned(example_inputs))))
        except SecateurError:
            raise
        except Exception as error:
            raise SecateurError(
                f"the forward of {type(model).__name__} fails on these example inputs ({type(error).__name__}: {error})"
            ) from error


def pivoted(model: nn.Module, patterns: Mapping[str, Pattern], skipped: Mapping[str, str]) -> nn.Module:
    """A copy with zeros outside of given patterns, which remembers them."""
    copied = copy.deepcopy(model)
    apply(copied, patterns)
    return add_to_record(copied, model, {PIVOT: Pivots(fingerprint(model), dict(patterns), dict(skipped))})


@torch.no_grad()
def apply(model: nn.Module, patterns: Mapping[str, Pattern]) -> None:
    """Make everything outside of the patterns zero, in place."""
    for name, pattern in patterns.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.masked_fill_(mask_of(pattern, weight) == 0, 0)


def mask_of(pattern: Pattern, weight: Tensor) -> Tensor:
    """What stays as ones, shaped to be broadcast over the weight."""
    mask = torch.from_numpy(pattern.mask()).to(weight)
    return mask.reshape(*mask.shape, *[1] * (weight.ndim - 2))


def remembered(model: nn.Module) -> dict[str, Pattern]:
    """The patterns that the last pivoting or packing of a model left, of the layers that are not packed.

    Raises:
        SecateurError: there are none, or the weights have changed outside of them.
    """
    steps = [json.loads(text) for step in record(model) for kind, text in step.items() if kind in (PIVOT, PACK)]
    if not steps:
        raise SecateurError("the model has no patterns: make some with secateur.pivot(model, inputs, keep=0.25)")
    patterns = {name: Pattern.from_dict(p) for name, p in steps[-1]["patterns"].items()}
    if not patterns:
        raise SecateurError("all layers with patterns are packed already")
    try:
        check_patterns(model, patterns)
    except SecateurError as error:
        raise SecateurError(f"the model was changed since it was pivoted ({error}): pivot it again") from error
    for name, pattern in patterns.items():
        weight: Any = model.get_submodule(name).weight
        if bool(((weight.detach() != 0) & (mask_of(pattern, weight) == 0)).any()):
            raise SecateurError(
                f"the weights of {name!r} have changed outside of its blocks: hold them in training by "
                "Pivoting(model, patterns=...), or give the patterns that are to hold"
            )
    return patterns


def replay(model: nn.Module, text: str) -> nn.Module:
    """Do it again on a fresh model; the weights come later.

    Raises:
        SecateurError: damaged data, or another model's.
    """
    try:
        data = json.loads(text)
        given = str(data["fingerprint"])
        patterns = {str(name): Pattern.from_dict(p) for name, p in data["patterns"].items()}
        skipped = {str(name): str(why) for name, why in data["skipped"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"the patterns are damaged ({type(error).__name__}: {error})") from error
    check_patterns(model, patterns, given)
    return add_to_record(copy.deepcopy(model), model, {PIVOT: Pivots(given, patterns, skipped)})


def check_patterns(model: nn.Module, patterns: Mapping[str, Pattern], given: str | None = None) -> None:
    """Raise if patterns are not of this model (``given``: the fingerprint they came with)."""
    if not isinstance(patterns, Mapping) or not all(isinstance(p, Pattern) for p in patterns.values()):
        raise SecateurError("patterns: a pattern for each layer is expected, {path: Pattern}")
    if not patterns:
        raise SecateurError("patterns: there is none; Pivoting has none before its first update")
    if given is not None and given != fingerprint(model):
        raise SecateurError(
            f"the patterns were made for another model (fingerprint {given}, this one has {fingerprint(model)})"
        )
    refused = why_not(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
    for name, pattern in patterns.items():
        if name not in layers:
            raise unknown("layer", name, layers)
        shape = tuple(layers[name].weight.shape[:2])
        if name in refused or shape != pattern.shape:
            why = refused.get(name, f"is {shape[0]} x {shape[1]}, the pattern {pattern.shape[0]} x {pattern.shape[1]}")
            raise SecateurError(f"the patterns do not fit this model: {name!r} {why}")
