r"""Bottlenecks: a linear or a convolution as three plain layers (EigenDamage, arXiv 1905.05934, section 4).

With orthonormal ``Qa`` and ``Qg``, and a convolution seen tap by tap::

    y = W x + b = Qg [ (Qg^T W Qa) (Qa^T x) ] + b

Keeping some columns of ``Qa`` and ``Qg`` makes the inner layer, the core, small. The two rotations are 1x1 convolutions
(linears for a linear); they commute with any padding, and the bias stays outside, so that with all columns the three
layers compute what the one did, at borders too. What the layer's neighbours see keeps its width.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from secateur._internal.errors import SecateurError
from secateur.curvature.eigenbasis import Eigenbasis
from secateur.curvature.layers import CONVOLUTIONS
from secateur.surgery.records import add_to_record
from secateur.tracing.graph import fingerprint

Kept = Mapping[str, tuple[Tensor, Tensor]]
"""Layer name -> indices of the kept rows and of the kept columns in the eigenbasis."""


class Bottleneck(nn.Sequential):
    """Rotation in, core, rotation out."""

    __jit_unused_properties__: ClassVar[list[str]] = ["core", "weight", "bias"]  # for those who still script models

    @property
    def core(self) -> Any:
        """The layer in the middle."""
        return self[1]

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
    """What was done to a model, as data: the layers that became bottlenecks, with the rows and columns they kept."""

    fingerprint: str
    layers: Mapping[str, tuple[int, int]]

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps({"fingerprint": self.fingerprint, "layers": {n: list(k) for n, k in self.layers.items()}})


def three(layer: Any) -> tuple[Any, Any, Any]:
    """Rotation in, core and rotation out of a bottleneck; of any other layer three times itself."""
    return tuple(layer) if isinstance(layer, Bottleneck) else (layer, layer, layer)  # type: ignore[return-value]


def hollow(layer: Any, rows: int, columns: int, groups: int = 1) -> Bottleneck:
    """A bottleneck of these sizes in the place of a layer (or of a bottleneck), its weights not set, nothing drawn."""
    first, core, last = three(layer)
    weight = core.weight
    plain: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    bias = last.bias is not None
    if isinstance(core, nn.Linear):
        made = Bottleneck(
            skip_init(nn.Linear, first.in_features, columns, bias=False, **plain),
            skip_init(nn.Linear, columns, rows, bias=False, **plain),
            skip_init(nn.Linear, rows, last.out_features, bias=bias, **plain),
        )
    else:
        kind = next(k for k in CONVOLUTIONS if isinstance(core, k))
        geometry = {k: getattr(core, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        made = Bottleneck(
            skip_init(kind, first.in_channels, columns, 1, bias=False, **plain),
            skip_init(kind, columns, rows, bias=False, groups=groups, **geometry, **plain),
            skip_init(kind, rows, last.out_channels, 1, bias=bias, **plain),
        )
    return made.train(layer.training)


def split(layer: Any, basis: Eigenbasis, rows: Tensor, columns: Tensor) -> Bottleneck:
    """A layer as a bottleneck in its eigenbasis; a bottleneck's core is split, and its rotations take up the new ones.

    Args:
        layer: a linear, a convolution of one group, or a bottleneck.
        basis: of the layer, or of the bottleneck's core, without the bias.
        rows: indices of the rows to keep (of ``Qg``'s columns).
        columns: indices of the columns to keep (of ``Qa``'s columns).
    """
    made: Any = hollow(layer, len(rows), len(columns))
    qa, qg = basis.qa[0].double()[:, columns], basis.qg[0].double()[:, rows]
    core = basis.rotate(basis.layer.table().to(basis.qa))[0][rows][:, :, columns]  # [rows, taps, columns]
    enter, leave = qa.mT, qg
    first, _, last = three(layer)
    if isinstance(layer, Bottleneck):
        enter = enter @ first.weight.detach().double().flatten(1)
        leave = last.weight.detach().double().flatten(1) @ leave
    with torch.no_grad():
        made[0].weight.copy_(enter.reshape(made[0].weight.shape))
        made[1].weight.copy_(core.mT.reshape(made[1].weight.shape))
        made[2].weight.copy_(leave.reshape(made[2].weight.shape))
        if last.bias is not None:
            made[2].bias.copy_(last.bias)
    return made


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
        for rotation in (made[0], made[2]):
            rotation.weight.requires_grad_(train_rotations)
        bias = three(model.get_submodule(name))[2].bias
        if bias is not None:
            made[2].bias.requires_grad_(bias.requires_grad)
        copied = put(copied, name, made)
    sizes = {name: (len(rows), len(columns)) for name, (rows, columns) in kept.items()}
    return add_to_record(copied, model, {"eigendamage": Rewrite(fingerprint(model), sizes)})


def sizes_of(model: nn.Module, text: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """The fingerprint and the layers' sizes of a rewrite that was made for this model.

    Raises:
        SecateurError: damaged data, or another model's.
    """
    try:
        data = json.loads(text)
        layers = {str(name): (int(rows), int(columns)) for name, (rows, columns) in data["layers"].items()}
        own, given = fingerprint(model), str(data["fingerprint"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SecateurError(f"the rewrite is damaged ({type(error).__name__}: {error})") from error
    if own != given:
        raise SecateurError(f"the rewrite was made for another model (fingerprint {given}, this one has {own})")
    return given, layers


def replay(model: nn.Module, text: str) -> nn.Module:
    """Do a rewrite again on a fresh model; the weights come later.

    Raises:
        SecateurError: damaged data, or another model's.
    """
    given, layers = sizes_of(model, text)
    copied = copy.deepcopy(model)
    for name, (rows, columns) in layers.items():
        try:
            layer = copied.get_submodule(name)
        except AttributeError as error:
            raise SecateurError(f"the rewrite is damaged: the model has no layer {name!r}") from error
        if not isinstance(layer, (nn.Linear, *CONVOLUTIONS, Bottleneck)) or min(rows, columns) < 1:
            raise SecateurError(f"the rewrite is damaged: {name!r} cannot keep {rows} rows and {columns} columns")
        copied = put(copied, name, hollow(layer, rows, columns))
    return add_to_record(copied, model, {"eigendamage": Rewrite(given, layers)})


def merge_bases(model: nn.Module) -> nn.Module:
    """A copy in which bottlenecks whose core is a bottleneck again are three layers, not five."""
    merged = copy.deepcopy(model)
    found: list[tuple[str, Any]] = [(n, m) for n, m in merged.named_modules() if isinstance(m, Bottleneck)]
    for name, outer in found:
        inner: Any = outer.core
        if not isinstance(inner, Bottleneck):
            continue
        core = inner.core
        made: Any = hollow(
            Bottleneck(outer[0], core, outer[2]), _rows(core), _columns(core), getattr(core, "groups", 1)
        )
        first, nested, last = three(outer)
        enter, _, leave = three(nested)
        with torch.no_grad():
            entering = enter.weight.double().flatten(1) @ first.weight.double().flatten(1)
            leaving = last.weight.double().flatten(1) @ leave.weight.double().flatten(1)
            made[0].weight.copy_(entering.reshape(made[0].weight.shape))
            made[1].weight.copy_(core.weight)
            made[2].weight.copy_(leaving.reshape(made[2].weight.shape))
            if last.bias is not None:
                made[2].bias.copy_(last.bias)
        merged = put(merged, name, made)
    return add_to_record(merged, model, {"merge_bases": Rewrite(fingerprint(model), {})})


def _rows(core: Any) -> int:
    return int(core.weight.shape[0])


def _columns(core: Any) -> int:
    return int(core.weight.shape[1]) * getattr(core, "groups", 1)


def put(model: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """The model with another part at a path (the part itself, where the path is that of the whole)."""
    if not name:
        return part
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, part)
    return model
