"""Which layer of the smaller model stands for which of the original, and why others stay as they are."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur._internal.errors import SecateurError
from secateur.curvature.layers import (
    CHECKED,
    COMPUTED,
    MEASURED,
    TRANSPOSED,
    Choice,
    Layer,
    computes_its_weight,
    input_samples_at,
    layers_of,
    measurable,
    output_samples_at,
    spread,
    turned,
    wide,
)
from secateur.curvature.passes import STRANGE
from secateur.curvature.projections import InProjection
from secateur.plan import Plan
from secateur.surgery.blocks.pattern import Pattern
from secateur.surgery.blocks.pivots import remembered
from secateur.surgery.low_rank.bottleneck import Bottleneck, three
from secateur.tracing.attentions import attentions_of
from secateur.tracing.norms import norms_of

SHARED = "its weight or bias is used at several places"


@dataclass(frozen=True, eq=False)
class Scale(Layer):
    """The weight of a norm over channels, and its bias: a linear of one input for each channel, what it normalises.

    Attributes:
        norm: which channels, and how the weight counts.
    """

    norm: Any = None

    @property
    def groups(self) -> int:
        """Each channel is on its own."""
        return len(self.module.weight)

    @property
    def transposed(self) -> bool:
        """It has rows alone."""
        return False

    def table(self) -> Tensor:
        """The weights as they count, [channels, 1, 1, 1]."""
        return (self.module.weight.detach() + self.norm.offset).reshape(-1, 1, 1, 1)

    def weights(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """The module's weight, of a table [channels, 1, 1, 1]."""
        return table.flatten() - self.norm.offset, None

    def normalised(self, x: Tensor) -> Tensor:
        """What the weights are multiplied by."""
        own = self.module._parameters
        self.module._parameters = {n: None if p is None else torch.zeros_like(p) for n, p in own.items()}
        self.module._parameters["weight"] += 1 - self.norm.offset
        try:
            found: Tensor = self.module.forward(x)  # its hooks are for what the model does with it
        finally:
            self.module._parameters = own
        return found

    def at(self, y: Tensor, choice: Choice) -> Tensor:
        """Some positions of the norm's outputs, [channels, samples, 1]."""
        y = y.movedim(self.norm.dim, -1)
        at = choice(math.prod(y.shape[:-1])).to(y.device)
        return wide(y[torch.unravel_index(at, y.shape[:-1])]).mT.unsqueeze(2)


def inputs_at(layer: Layer, x: Tensor, choice: Choice) -> Tensor:
    """What the columns of a layer see at some positions, [groups, samples, columns]."""
    if isinstance(layer, Scale):
        return layer.at(layer.normalised(x), choice)
    return input_samples_at(layer, wide(x), choice)


def outputs_at(layer: Layer, y: Tensor, choice: Choice) -> Tensor:
    """What its rows give there, [groups, samples, rows]."""
    return layer.at(y, choice) if isinstance(layer, Scale) else output_samples_at(layer, wide(y), choice)


def computes(layer: Layer, x: Any, y: Any) -> bool:
    """Whether a layer's output is its weight times what its columns see (and its bias), at some positions."""
    if not isinstance(layer, Scale):
        return computes_its_weight(layer, x, y)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.shape != y.shape:
        return False
    some = partial(spread, wanted=CHECKED)
    bias = getattr(layer.module, "bias", None)
    expected = layer.at(layer.normalised(x), some) * layer.table().flatten()[:, None, None]
    expected = expected if bias is None else expected + bias[:, None, None]
    return bool((layer.at(y, some) - expected).norm() <= 0.02 * expected.norm())


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer of the smaller model, and the layer of the original whose outputs it is fitted to.

    Attributes:
        ones: of the original, wherever its weight is used: one layer, or several that share it.
        layers: of the smaller model, likewise. Biases are no columns of theirs.
        last: of a core: the rotation behind it.
        of_bottleneck: whether it is a part of a bottleneck.
        blocks: of a pivoted layer: which of its weights there are.
    """

    ones: Sequence[Layer]
    layers: Sequence[Layer]
    last: Any = None
    of_bottleneck: bool = False
    blocks: Pattern | None = None

    @property
    def one(self) -> Layer:
        """The first of the original's."""
        return self.ones[0]

    @property
    def layer(self) -> Layer:
        """The first of the smaller model's."""
        return self.layers[0]

    @property
    def name(self) -> str:
        """The path of the original's."""
        return self.one.name

    @property
    def biases(self) -> list[Tensor]:
        """Those of the smaller model, each once: layers that share a weight may have biases of their own."""
        found = [b for layer in self.layers if (b := getattr(layer.module, "bias", None)) is not None]
        return list({id(bias): bias for bias in found}.values())

    def table(self) -> Tensor:
        """The smaller model's weight and the biases behind it, float64 [groups, rows, columns + biases]."""
        biases = [bias.detach().reshape(self.layer.groups, -1, 1) for bias in self.biases]
        return torch.cat([self.layer.table().squeeze(2), *biases], 2).double()

    def write(self, table: Tensor) -> None:
        """Let the smaller model have these weights and biases."""
        columns = table.shape[2] - len(self.biases)
        self.layer.module.weight.copy_(self.layer.weights(table[..., :columns].unsqueeze(2))[0])
        for number, bias in enumerate(self.biases):
            bias.copy_(table[..., columns + number].flatten())
        torch.clear_autocast_cache()  # which holds copies of what they were

    def inputs(self, use: int, samples: Tensor) -> Tensor:
        """Samples [groups, samples, columns] of the inputs at a use, with a 1 in the column of its bias."""
        of_use = getattr(self.layers[use].module, "bias", None)
        ones = [samples.new_full((*samples.shape[:2], 1), float(bias is of_use)) for bias in self.biases]
        return torch.cat([samples, *ones], 2)

    def targets(self, y: Tensor) -> Tensor:
        """What it should give where the original gives ``y`` [groups, samples, rows]."""
        if self.last is None:
            return y
        y = y.double() if self.last.bias is None else y.double() - self.last.bias.double()
        return y @ torch.linalg.pinv(self.last.weight.double().flatten(1)).mT


def pairs_of(model: nn.Module, small: nn.Module, plan: Plan) -> tuple[list[Pair], dict[str, str]]:
    """The layers of the smaller model that can be fitted; and why others cannot."""
    ones = {layer.name: layer for layer in layers_of(model, "full", transposed=True)}
    ones = {name: _layer(name, layer.module) for name, layer in ones.items()}
    others: dict[str, Any] = {
        name: m for name, m in small.named_modules() if isinstance(m, (*MEASURED, *TRANSPOSED, Bottleneck)) or turned(m)
    }
    holders = [m for m in model.modules() if not isinstance(m, InProjection)]  # what it holds is the attention's
    uses = Counter(id(p) for m in holders for p in m._parameters.values() if p is not None)
    sharers: dict[int, list[Layer]] = defaultdict(list)
    for layer in ones.values():
        sharers[id(layer.module.weight)].append(layer)
    left = {
        name: "it is transposed, in groups"
        if getattr(module, "groups", 1) > 1 and isinstance(module, TRANSPOSED)
        else COMPUTED
        for name, module in model.named_modules()
        if isinstance(module, (*MEASURED, *TRANSPOSED)) and name not in ones
    }
    pairs: list[Pair] = []
    patterns = _patterns(small)
    parts = {
        f"{path}.{number}": path
        for path, m in model.named_modules()
        if isinstance(m, Bottleneck)
        for number in m._modules
    }
    for name, layer in ones.items():
        module, alike = layer.module, sharers[id(layer.module.weight)]
        if not _alone(alike, uses):
            left[name] = SHARED
            continue
        if layer is not alike[0]:
            continue
        if any(of.module._parameters.get("bias") is None and of.module.bias is not None for of in alike):
            left |= dict.fromkeys([of.name for of in alike], "its bias is computed from other parameters")
            continue
        other, path = others.get(name), name
        if name in parts:  # of a bottleneck of the original, whose last rotation gives what it stands for
            path = parts[name]
            other = others.get(path)
            if isinstance(other, Bottleneck) and three(model.get_submodule(path))[2] is not module:
                continue
        if len(alike) > 1 and (name in parts or isinstance(other, Bottleneck)):
            left |= dict.fromkeys([of.name for of in alike], "it shares its weight and is, or becomes, a bottleneck")
            continue
        if isinstance(other, Bottleneck):
            parts_of = _parts(path, layer, other, patterns)
            pairs += parts_of
            if not parts_of:
                left[path] = "the core of its bottleneck is no plain layer"
            continue
        if other is None and turned(module):  # cut, it does not look like that any more
            left[name] = STRANGE
            continue
        _check_kept(name, module, other, plan)
        weights = [getattr(others.get(of.name), "weight", None) for of in alike]
        if any(weight is not weights[0] for weight in weights):
            left |= dict.fromkeys([of.name for of in alike], "it shares its weight in the original alone")
        else:
            layers = [_layer(of.name, others[of.name]) for of in alike]
            pairs.append(Pair(alike, layers, blocks=patterns.get(name)))
    scales, others_left = _scales(model, small, uses)
    return [*pairs, *scales], left | others_left | _unseen_attentions(model)


def _unseen_attentions(model: nn.Module) -> dict[str, str]:
    """The attentions whose projections cannot run as one module, and why."""
    left = {}
    for path in attentions_of(model):
        attention: Any = model.get_submodule(path)
        if attention._parameters.get("in_proj_weight") is None:
            widths = "its queries, keys and values are of several widths, each with a projection of its own"
            left[path] = COMPUTED if attention._qkv_same_embed_dim else widths
    return left


def _parts(path: str, one: Layer, bottleneck: Bottleneck, patterns: Mapping[str, Pattern]) -> list[Pair]:
    """The core of a bottleneck, and its last rotation if it has one; none if the core is no plain layer."""
    _, core, last = three(bottleneck)
    if not (measurable(core) and measurable(last) and _layer("", core).groups == 1 == one.groups):
        return []
    behind = None if last is core else last
    names = [(f"{path}.1", core, behind)] + ([] if behind is None else [(f"{path}.2", last, None)])
    return [Pair([one], [_layer(name, m)], after, True, patterns.get(name)) for name, m, after in names]


def _patterns(small: nn.Module) -> dict[str, Pattern]:
    """The dense blocks that layers of a pivoted model have, outside of which there are zeros."""
    try:
        return remembered(small)
    except SecateurError:  # it was not pivoted, or has been changed since
        return {}


def _scales(model: nn.Module, small: nn.Module, uses: Mapping[int, int]) -> tuple[list[Pair], dict[str, str]]:
    """The norms over channels; and why others stay as they are."""
    whole, cut = norms_of(model), norms_of(small)
    found, left = [], {}
    for name, norm in whole.items():
        one, other = model.get_submodule(name), small.get_submodule(name)
        if any(uses[id(p)] > 1 for p in one.parameters()):
            left[name] = SHARED
        elif name not in cut:
            left[name] = "what is left of it is no norm that is known"
        else:
            layers = Scale(name, one, "full", False, norm), Scale(name, other, "full", False, cut[name])
            found.append(Pair([layers[0]], [layers[1]]))
    return found, left


def check_models(model: nn.Module, small: nn.Module) -> None:
    """Raise if these are no two modules, or share parameters."""
    for what, given in (("model", model), ("small", small)):
        if not isinstance(given, nn.Module):
            raise SecateurError(f"refit({what}={given!r}): a module is expected")
    if {id(p) for p in model.parameters()} & {id(p) for p in small.parameters()}:
        raise SecateurError("refit: both models share parameters, and the original must stay as it is; cut a copy")


def _check_kept(name: str, module: Any, other: Any, plan: Plan) -> None:
    """Raise if a layer of the smaller model is not what the plan leaves."""
    shape = list(module.weight.shape)
    for dim, positions in plan.slices.get(_layer(name, module).parameter("weight"), {}).items():
        shape[dim] -= len(positions)
    if other is None or list(other.weight.shape) != shape:
        found = "no such layer" if other is None else f"shape {list(other.weight.shape)}"
        raise SecateurError(f"refit: the plan leaves {name!r} with shape {shape}, the smaller model has {found}")
    for what in ("dtype", "device"):
        if getattr(other.weight, what) != getattr(module.weight, what):
            raise SecateurError(
                f"refit: {name!r} has {what} {getattr(module.weight, what)} in the original and "
                f"{getattr(other.weight, what)} in the smaller model; refit first, then change it"
            )


def _layer(name: str, module: Any) -> Layer:
    return Layer(name, module, "full", biased=False)


def _alone(layers: Sequence[Layer], uses: Mapping[int, int]) -> bool:
    """Whether nothing but these layers, which share a weight, holds it or a bias of theirs; all take it alike."""
    biases = Counter(id(layer.module._parameters.get("bias")) for layer in layers)
    return (
        uses[id(layers[0].module.weight)] == len(layers)
        and all(uses[bias] == number for bias, number in biases.items() if bias != id(None))
        and len({(layer.groups, layer.transposed) for layer in layers}) == 1
    )


def tensor_of(name: str, tensor: str) -> str:
    """The name of a tensor of a module."""
    return f"{name}.{tensor}" if name else tensor
