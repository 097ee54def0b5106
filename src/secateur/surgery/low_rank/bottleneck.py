r"""Bottlenecks: a linear or a convolution as three plain layers (EigenDamage, arXiv 1905.05934, section 4).

With orthonormal ``Qa`` and ``Qg``, and a convolution seen tap by tap::

    y = W x + b = Qg [ (Qg^T W Qa) (Qa^T x) ] + b

Keeping some columns of ``Qa`` and ``Qg`` makes the inner layer, the core, small. The two rotations are 1x1 convolutions
(linears for a linear); they commute with any padding, and the bias stays outside, so that with all columns the three
layers compute what the one did, at borders too. What the layer's neighbours see keeps its width.

A rotation that keeps all columns is none of its own, but is multiplied into the core, which computes the same for less:
then two layers are left. The published method keeps three.
"""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from secateur._internal.errors import SecateurError
from secateur._internal.records import add_to_record
from secateur.curvature.eigenbasis import Eigenbasis
from secateur.curvature.layers import CONVOLUTIONS
from secateur.tracing.graph import fingerprint

Kept = Mapping[str, tuple[Tensor, Tensor]]
"""Layer name -> indices of the kept rows and of the kept columns in the eigenbasis."""


class Bottleneck(nn.Sequential):
    """Rotation in ``"0"``, core ``"1"``, rotation out ``"2"``; a rotation that would keep all is not there."""

    __jit_unused_properties__: ClassVar[list[str]] = ["core", "weight", "bias"]  # for those who still script models

    @property
    def core(self) -> Any:
        """The layer in the middle."""
        return self._modules["1"]

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight that it stands for, without data: on the meta device.

        Modules around it may look at the weights of their parts: PyTorch's transformer layers do, to see whether one
        fused kernel can take them all. What has no data no kernel takes, so that they call their parts instead.
        """
        first, core, last = three(self)
        shape = (last.weight.shape[0], first.weight.shape[1], *core.weight.shape[2:])
        return torch.empty(shape, dtype=core.weight.dtype, device="meta")

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer that it stands for."""
        found: Tensor | None = three(self)[2].bias
        return found


@dataclass(frozen=True)
class Rewrite:
    """What was done to a model, as data: the layers that became bottlenecks, with the rows and columns they kept.

    Attributes:
        fingerprint: of the model.
        layers: path -> rows and columns.
        rotations: whether rotations that keep all are there nevertheless.
    """

    fingerprint: str
    layers: Mapping[str, tuple[int, int]]
    rotations: bool = True

    def to_json(self) -> str:
        """As JSON text."""
        layers = {name: list(kept) for name, kept in self.layers.items()}
        return json.dumps({"fingerprint": self.fingerprint, "layers": layers, "rotations": self.rotations})


def three(layer: Any) -> tuple[Any, Any, Any]:
    """Rotation in, core and rotation out of a bottleneck, the core in the place of what is not there.

    Of any other layer three times itself.
    """
    if not isinstance(layer, Bottleneck):
        return layer, layer, layer
    core = layer.core
    return layer._modules.get("0", core), core, layer._modules.get("2", core)


def width(layer: Any, *, inward: bool) -> int:
    """Features or channels of a linear's or a convolution's input or output."""
    if isinstance(layer, nn.Linear):
        return layer.in_features if inward else layer.out_features
    return layer.in_channels if inward else layer.out_channels


def hollow(
    layer: Any, rows: int, columns: int, groups: int = 1, *, rotations: tuple[bool, bool] = (False, False)
) -> Bottleneck:  # fmt: skip
    """A bottleneck of these sizes in the place of a layer (or of a bottleneck), its weights not set, nothing drawn.

    Args:
        layer: whose inputs and outputs it takes.
        rows: of the core.
        columns: of the core.
        groups: of the core.
        rotations: which of the two are there in any case, also where they keep all.
    """
    first, core, last = three(layer)
    inward, outward = width(first, inward=True), width(last, inward=False)
    entered, left = rotations[0] or columns != inward, rotations[1] or rows != outward
    plain: dict[str, Any] = {"device": core.weight.device, "dtype": core.weight.dtype}
    bias = last.bias is not None
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if isinstance(core, nn.Linear):
        kind, one, geometry = nn.Linear, {}, {}
    else:
        kind, one = next(k for k in CONVOLUTIONS if isinstance(core, k)), {"kernel_size": 1}  # type: ignore[assignment]
        own = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        geometry = {"groups": groups, **{name: getattr(core, name) for name in own}}
    if entered:
        parts["0"] = skip_init(kind, inward, columns, bias=False, **one, **plain)
    parts["1"] = skip_init(kind, columns, rows, bias=bias and not left, **geometry, **plain)
    if left:
        parts["2"] = skip_init(kind, rows, outward, bias=bias, **one, **plain)
    return Bottleneck(parts).train(layer.training)


def split(layer: Any, basis: Eigenbasis, rows: Tensor, columns: Tensor) -> Bottleneck:
    """A layer as a bottleneck in its eigenbasis; a bottleneck's core is split, and its rotations take up the new ones.

    Args:
        layer: a linear, a convolution of one group, or a bottleneck.
        basis: of the layer, or of the bottleneck's core, without the bias.
        rows: indices of the rows to keep (of ``Qg``'s columns).
        columns: indices of the columns to keep (of ``Qa``'s columns).
    """
    made = hollow(layer, len(rows), len(columns))
    qa, qg = basis.qa[0].double()[:, columns], basis.qg[0].double()[:, rows]
    kept = basis.rotate(basis.layer.table().to(basis.qa))[0][rows][:, :, columns].double()  # [rows, taps, columns]
    enter, leave = qa.mT, qg
    first, core, last = three(layer)
    if first is not core:
        enter = enter @ first.weight.detach().double().flatten(1)
    if last is not core:
        leave = last.weight.detach().double().flatten(1) @ leave
    _fill(made, enter, kept, leave, last.bias)
    return made


@torch.no_grad()
def _fill(made: Bottleneck, enter: Tensor, core: Tensor, leave: Tensor, bias: Tensor | None) -> None:
    """Set the weights of a hollow one, whose core [rows, taps, columns] takes up the rotations that are not there."""
    first, middle, last = three(made)
    if first is middle:
        core = core @ enter
    else:
        first.weight.copy_(enter.reshape(first.weight.shape))
    if last is middle:
        core = torch.einsum("or,rkc->okc", leave, core)
    else:
        last.weight.copy_(leave.reshape(last.weight.shape))
    middle.weight.copy_(core.mT.reshape(middle.weight.shape))
    if bias is not None:
        last.bias.copy_(bias)


def bottlenecked(
    model: nn.Module, bases: Mapping[str, Eigenbasis], kept: Kept, *, train_rotations: bool = True
) -> nn.Module:
    """A copy of the model with some of its layers as bottlenecks; all other layers are as they were.

    Args:
        model: the model the bases are of; it is left untouched.
        bases: by the name of the layer, or of the bottleneck whose core it is of.
        kept: what remains of each layer that is to become one.
        train_rotations: whether the rotations are parameters that want gradients.
    """
    copied = copy.deepcopy(model)
    for name, (rows, columns) in kept.items():
        made: Any = split(copied.get_submodule(name), bases[name], rows, columns)
        first, core, last = three(made)
        for rotation in (first, last):
            rotation.weight.requires_grad_(train_rotations or rotation is core)
        bias = three(model.get_submodule(name))[2].bias
        if bias is not None:
            last.bias.requires_grad_(bias.requires_grad)
        copied = put(copied, name, made)
    sizes = {name: (len(rows), len(columns)) for name, (rows, columns) in kept.items()}
    return add_to_record(copied, model, {"eigendamage": Rewrite(fingerprint(model), sizes, rotations=False)})


def read(model: nn.Module, text: str) -> Rewrite:
    """A rewrite that was made for this model.

    Raises:
        SecateurError: damaged data, or another model's.
    """
    try:
        data = json.loads(text)
        layers = {str(name): (int(rows), int(columns)) for name, (rows, columns) in data["layers"].items()}
        own, given = fingerprint(model), str(data["fingerprint"])
        rotations = bool(data.get("rotations", True))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"the rewrite is damaged ({type(error).__name__}: {error})") from error
    if own != given:
        raise SecateurError(f"the rewrite was made for another model (fingerprint {given}, this one has {own})")
    return Rewrite(given, layers, rotations)


def replay(model: nn.Module, text: str) -> nn.Module:
    """Do a rewrite again on a fresh model; the weights come later.

    Raises:
        SecateurError: damaged data, or another model's.
    """
    done = read(model, text)
    copied = copy.deepcopy(model)
    for name, (rows, columns) in done.layers.items():
        try:
            layer = copied.get_submodule(name)
        except AttributeError as error:
            raise SecateurError(f"the rewrite is damaged: the model has no layer {name!r}") from error
        if not isinstance(layer, (nn.Linear, *CONVOLUTIONS, Bottleneck)) or min(rows, columns) < 1:
            raise SecateurError(f"the rewrite is damaged: {name!r} cannot keep {rows} rows and {columns} columns")
        copied = put(copied, name, hollow(layer, rows, columns, rotations=(done.rotations, done.rotations)))
    return add_to_record(copied, model, {"eigendamage": done})


def merge_bases(model: nn.Module) -> nn.Module:
    """A copy in which bottlenecks whose core is a bottleneck again are three layers, not five."""
    merged = copy.deepcopy(model)
    found: list[tuple[str, Any]] = [(n, m) for n, m in merged.named_modules() if isinstance(m, Bottleneck)]
    for name, outer in found:
        inner: Any = outer.core
        if not isinstance(inner, Bottleneck):
            continue
        rotations = [[m._modules[side] for m in (outer, inner) if side in m._modules] for side in ("0", "2")]
        into, out_of = rotations  # the outer one first
        parts = {**({"0": into[0]} if into else {}), "1": inner.core, **({"2": out_of[0]} if out_of else {})}
        core, last = inner.core, three(outer)[2]
        made = hollow(
            Bottleneck(OrderedDict(parts)), int(core.weight.shape[0]), width(core, inward=True),
            getattr(core, "groups", 1), rotations=(bool(into), bool(out_of)),
        )  # fmt: skip
        first, _, leave = three(made)
        with torch.no_grad():
            if into:
                first.weight.copy_(_product(into[::-1]).reshape(first.weight.shape))
            if out_of:
                leave.weight.copy_(_product(out_of).reshape(leave.weight.shape))
            made.core.weight.copy_(core.weight)
            if last.bias is not None:
                leave.bias.copy_(last.bias)
        merged = put(merged, name, made)
    return add_to_record(merged, model, {"merge_bases": Rewrite(fingerprint(model), {})})


def _product(rotations: Sequence[Any]) -> Tensor:
    """Of their weights, float64."""
    return reduce(torch.matmul, [rotation.weight.double().flatten(1) for rotation in rotations])


def put(model: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """The model with another part at a path (the part itself, where the path is that of the whole)."""
    if not name:
        return part
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, part)
    return model
