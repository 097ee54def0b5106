r"""Pivoting a model: blocks that hold most of every layer's energy; what is outside goes (after arXiv 1712.01084).

The energy of row ``i`` and column ``j`` (a filter and an input channel, summed over the taps of the kernel)::

    magnitude     E_ij = sum_t W_itj^2
    Fisher        E_ij = G_ii A_jj sum_t W_itj^2        A and G the layer's Kronecker factors (arXiv 1503.05671)

The second is twice what the loss rises by where one weight goes, as the Kronecker-factored Fisher sees it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.curvature import Curvature
from secateur.curvature.layers import CONVOLUTIONS, Layer, measurable
from secateur.cut.pattern import LAYOUTS, Pattern, find_pattern
from secateur.cut.record import add_to_record, record
from secateur.errors import SecateurError, unknown
from secateur.measure.accuracy import evaluating
from secateur.trace import call_model, fingerprint
from secateur.trace.tracer import Inputs

PIVOT = "pivot"
LEAST = 4
"""Blocks of fewer rows or columns than this are no gain for any hardware."""


@dataclass(frozen=True)
class Pivots:
    """What stays of each layer, as data."""

    fingerprint: str
    layers: Mapping[str, Pattern]
    skipped: Mapping[str, str]

    def to_json(self) -> str:
        """As JSON text."""
        layers = {name: pattern.to_dict() for name, pattern in self.layers.items()}
        return json.dumps({"fingerprint": self.fingerprint, "layers": layers, "skipped": dict(self.skipped)})


def energy(layer: nn.Module, factors: Any = None) -> np.ndarray:
    """The energy of each row and column of a linear or a convolution, float64 [rows, columns].

    Args:
        layer: the module.
        factors: of this layer, for the Fisher's energy.
    """
    # a whole column of the table is gone or stays at all taps; without the bias
    squared = Layer("", layer, biased=False).table().double().square().sum((0, 2))
    if factors is not None:
        if factors.layer.form != "channel" and squared.shape[1] * factors.layer.taps != factors.a.shape[-1]:
            raise SecateurError("factors in full form: give kronecker_factors(..., form='channel')")
        a, g = (f.diagonal(dim1=1, dim2=2)[0].to(squared) for f in (factors.a, factors.g))
        squared = squared * g[:, None] * a[: squared.shape[1]]
    return np.asarray(squared.cpu().numpy())


def why_not(model: nn.Module) -> dict[str, str]:
    """The linears and convolutions that cannot have blocks, and why."""
    users: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                users[id(p)] = users.get(id(p), 0) + 1
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            continue
        if type(module) not in (nn.Linear, *CONVOLUTIONS) or not measurable(module):
            found[name] = f"{type(module).__name__} does not hold a plain weight"
        elif getattr(module, "groups", 1) > 1:
            found[name] = "is a grouped convolution, which has blocks already"
        elif getattr(module, "padding_mode", "zeros") != "zeros":
            found[name] = f"pads with {module.padding_mode!r}"
        elif users[id(module.weight)] > 1:
            found[name] = "shares its weight with another layer"
    return found


def check_pivot(keep: object, layout: str, blocks: object) -> None:
    """Raise if these are no settings of pivoting."""
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise SecateurError(f"keep={keep!r}: a fraction of the coefficients in (0, 1] is expected")
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if blocks is not None and (isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1):
        raise SecateurError(f"blocks={blocks!r}: a whole number from 1 on is expected")
    if blocks is not None and layout == "diagonal":
        raise SecateurError("blocks: with layout='diagonal' there are 1 / keep of them; leave it out")


def patterns_of(
    model: nn.Module, keep: float, *, layout: str = "bundles", blocks: int | None = None,
    factors: Curvature | None = None, exclude: Sequence[str] = (), seed: int = 0,
) -> tuple[dict[str, Pattern], dict[str, str]]:  # fmt: skip
    """The pattern of every layer that can have one, and why others have none; see :func:`pivot`."""
    check_pivot(keep, layout, blocks)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, *CONVOLUTIONS))}
    for name in exclude:
        if name not in layers:
            raise unknown("layer", name, layers)
    skipped = why_not(model)
    found = {}
    for name, layer in layers.items():
        if name in skipped:
            continue
        m, n = layer.weight.shape[:2]
        if name in exclude:
            skipped[name] = "is excluded"
        elif factors is not None and name not in factors:
            skipped[name] = f"has no factors: {factors.skipped.get(name, 'it was not measured')}"
        elif keep * n < LEAST or m < LEAST or (layout == "diagonal" and keep * m < LEAST):
            skipped[name] = f"keep={keep:g} of {m} x {n} leaves blocks of fewer than {LEAST} rows or columns"
        else:
            count = None if blocks is None else min(blocks, m // LEAST)
            of = factors[name].of(model) if factors is not None else None
            found[name] = find_pattern(energy(layer, of), keep, layout=layout, blocks=count, seed=seed)
    return found, skipped


def pivot(
    model: nn.Module, example_inputs: Inputs, keep: float, *, layout: str = "bundles", blocks: int | None = None,
    factors: Curvature | None = None, exclude: Sequence[str] = (), seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A copy in which every linear and convolution has dense blocks, and zeros outside; :func:`pack` makes it fast.

    Args:
        model: the model; it is left untouched.
        example_inputs: what its forward takes, as for :func:`secateur.trace`; layers it does not use stay whole.
        keep: the part of each layer's coefficients that stays, in (0, 1].
        layout: ``"bundles"``: every bundle of rows has its own columns; ``"diagonal"``: block-diagonal after permuting
            rows and columns, with ``1 / keep`` blocks, rounded up; ``"growth"``: by complete pivoting.
        blocks: how many blocks a layer has, at most; fewer are faster, more keep more of the energy. Default: one for
            16 rows, up to 8. Not for ``"diagonal"``.
        factors: of :func:`secateur.kronecker_factors` in channel form, for the Fisher's energy instead of magnitude.
        exclude: layers that shall stay whole.
        seed: of the search.

    Returns:
        A new module of the same shape, which remembers its patterns (:func:`secateur.record`, with the layers that
        stayed whole and why). Where blocks do not divide a layer they are padded with rows and columns of zeros.

    Raises:
        SecateurError: bad values, an unknown layer, no layer that can have blocks.
    """
    patterns, skipped = patterns_of(
        model, keep, layout=layout, blocks=blocks, factors=factors, exclude=exclude, seed=seed
    )
    for name in set(patterns) - set(inputs_of(model, example_inputs, list(patterns))):
        del patterns[name]
        skipped[name] = "is not used on these inputs"
    if not patterns:
        why = "; ".join(f"{name} {reason}" for name, reason in skipped.items())
        raise SecateurError(f"pivot: no layer can have blocks: {why or 'there is no linear and no convolution'}")
    return pivoted(model, patterns, skipped)


def inputs_of(model: nn.Module, example_inputs: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    """What the named layers see first in a forward in eval mode."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: seen.get(name, args[0].detach())})
        )
        for name in names
    ]
    try:
        with evaluating(model):
            call_model(model, pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, example_inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


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
        weight.mul_(mask_of(pattern, weight))


def mask_of(pattern: Pattern, weight: Tensor) -> Tensor:
    """What stays as ones, shaped to be broadcast over the weight."""
    mask = torch.from_numpy(pattern.mask()).to(weight)
    return mask.reshape(*mask.shape, *[1] * (weight.ndim - 2))


def remembered(model: nn.Module) -> tuple[dict[str, Pattern], dict[str, str]]:
    """The patterns that the last pivoting of a model left, and the layers it skipped.

    Raises:
        SecateurError: there was none.
    """
    for step in reversed(record(model)):
        if PIVOT in step:
            data = json.loads(step[PIVOT])
            return {n: Pattern.from_dict(p) for n, p in data["layers"].items()}, dict(data["skipped"])
    raise SecateurError("the model has no patterns: make some with secateur.pivot(model, keep=0.25), or give them")


def replay(model: nn.Module, text: str) -> nn.Module:
    """Do it again on a fresh model; the weights come later.

    Raises:
        SecateurError: damaged data, or another model's.
    """
    try:
        data = json.loads(text)
        given = str(data["fingerprint"])
        patterns = {str(name): Pattern.from_dict(p) for name, p in data["layers"].items()}
        skipped = {str(name): str(why) for name, why in data["skipped"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"the patterns are damaged ({type(error).__name__}: {error})") from error
    check_patterns(model, patterns, given)
    return add_to_record(copy.deepcopy(model), model, {PIVOT: Pivots(given, patterns, skipped)})


def check_patterns(model: nn.Module, patterns: Mapping[str, Pattern], given: str | None = None) -> None:
    """Raise if patterns are not of this model (``given``: the fingerprint they came with)."""
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
