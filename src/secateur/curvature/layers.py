"""What curvature sees of a linear or a convolution: its weight as a table, its inputs and gradients as samples.

A weight is a table ``W[group, row, tap, column]``. In *channel* form a tap is a position of the kernel and a column an
input channel; in *full* form there is one tap, and a column is an input channel at a position of the kernel. A linear
has one tap in both. A bias is one more column: its input is the constant 1, spread evenly over the taps.

A transposed convolution is a convolution of its input with zeros between, by the kernel turned round; in full form it
is seen as that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur._internal.errors import SecateurError
from secateur.curvature.projections import InProjection
from secateur.tracing.attentions import IN_PROJECTION

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MEASURED = (nn.Linear, *CONVOLUTIONS)
FORMS = ("channel", "full")
COMPUTED = "its weight is computed from other parameters"
"""Why a layer is left out whose weight is no parameter of its own."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear or a convolution, in one of the two forms.

    Attributes:
        name: the module's path.
        module: the module.
        form: ``"channel"`` or ``"full"``.
        biased: whether a bias counts as a column; without, it is left out of sight.
    """

    name: str
    module: Any
    form: str = "channel"
    biased: bool = True

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel; none for a linear."""
        return tuple(self.module.kernel_size) if isinstance(self.module, (*CONVOLUTIONS, *TRANSPOSED)) else ()

    @property
    def transposed(self) -> bool:
        """Whether its weight has its inputs first: a transposed convolution's, or that of a linear like GPT-2's."""
        return isinstance(self.module, TRANSPOSED) or turned(self.module)

    @property
    def inputs(self) -> int:
        """How many input channels each block of the weight has."""
        return int(self.module.weight.shape[0]) // self.groups if self.transposed else int(self.module.weight.shape[1])

    @property
    def groups(self) -> int:
        """Independent blocks of the weight (a grouped convolution has several)."""
        return int(self.module.groups) if self.kernel else 1

    @property
    def taps(self) -> int:
        """Positions of the kernel that share their columns."""
        return math.prod(self.kernel) if self.form == "channel" else 1

    def parameter(self, tensor: str) -> str:
        """The name by which the model knows its ``"weight"`` or ``"bias"``."""
        between = "_" if isinstance(self.module, InProjection) else "." if self.name else ""
        return f"{self.name}{between}{tensor}"

    @property
    def bias(self) -> bool:
        """Whether the last column is the bias."""
        return self.biased and self.module.bias is not None

    def table(self) -> Tensor:
        """The weight (and bias), detached: [groups, rows, taps, columns]; a view of the weight where that can be."""
        return self.table_of(self.module.weight.detach(), self.module.bias.detach() if self.bias else None)

    def table_of(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Any tensors in the shapes of the module's weight and bias as a table [groups, rows, taps, columns]."""
        table = weight.reshape(self.groups, weight.shape[0] // self.groups, weight.shape[1], -1)
        if self.transposed:
            table = table.transpose(1, 2)
        table = table.transpose(2, 3) if self.form == "channel" else table.flatten(2).unsqueeze(2)
        if self.bias:
            assert bias is not None
            table = torch.cat([table, bias.reshape(self.groups, -1, 1, 1).expand(-1, -1, self.taps, 1)], -1)
        return table

    def weights(self, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight and the bias, in the module's shapes, that a table [groups, rows, taps, columns] stands for."""
        bias = table[..., -1].mean(2).flatten() if self.bias else None
        table = table[..., :-1] if self.bias else table
        if self.form == "channel":
            table = table.transpose(2, 3)
        if self.transposed:
            table = table if self.form == "channel" else table.squeeze(2).unflatten(2, (-1, math.prod(self.kernel)))
            table = table.transpose(1, 2)
        return table.reshape(self.module.weight.shape), bias


# ---------------------------------------------------------------------------------------------- samples of the inputs


def input_samples(layer: Layer, x: Tensor) -> Tensor:
    """Everything that the columns of each tap see.

    Args:
        layer: a linear or a convolution.
        x: its input, [..., features] or [batch, channels, *space].

    Returns:
        [groups, batch, positions, taps, columns]; zeros where a tap sees padding.
    """
    if not layer.kernel:
        x = x if x.ndim > 1 else x.unsqueeze(0)
        return _with_ones(layer, x.reshape(1, x.shape[0], math.prod(x.shape[1:-1]), 1, x.shape[-1]))
    windows = _windows(layer, x)
    groups, batch, *positions = windows.shape[: 2 + len(layer.kernel)]
    columns = math.prod(windows.shape[2 + len(layer.kernel) :]) // layer.taps
    if layer.form == "channel":
        windows = windows.movedim(2 + len(layer.kernel), -1)
    return _with_ones(layer, windows.reshape(groups, batch, math.prod(positions), layer.taps, columns))


def output_samples(layer: Layer, g: Tensor) -> Tensor:
    """Gradients at the outputs, [groups, batch, positions, rows]."""
    if not layer.kernel:
        g = g if g.ndim > 1 else g.unsqueeze(0)
        return g.reshape(1, g.shape[0], math.prod(g.shape[1:-1]), g.shape[-1])
    g = _batched(layer, g).flatten(2)
    return g.unflatten(1, (layer.groups, g.shape[1] // layer.groups)).permute(1, 0, 3, 2)


def spread(total: int, wanted: int) -> Tensor:
    """So many of the numbers below a total, spread over all of it in ascending order; all of them if there are fewer.

    Multiples of the golden ratio modulo 1 keep no step with the rows of an image, which even distances do.
    """
    if 3 * wanted > total:  # too dense for the former to be different, and for the latter to skip much
        number = min(wanted, total)
        return torch.arange(number) * total // max(number, 1)
    golden = (math.sqrt(5) - 1) / 2
    return (torch.arange(wanted, dtype=torch.float64).add(0.5).mul(golden).remainder(1) * total).long().sort().values


Choice = Callable[[int], Tensor]
"""Given how many positions a batch has, all its examples together: the numbers of those that are looked at."""


def input_samples_at(layer: Layer, x: Tensor, choice: Choice) -> Tensor:
    """:func:`input_samples` in full form at some positions of the batch: [groups, samples, columns]."""
    windows = _windows(layer, x) if layer.kernel else x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    places = windows.shape[1 : 2 + len(layer.kernel)]
    at = choice(math.prod(places)).to(x.device)
    chosen = windows.movedim(0, 1 + len(layer.kernel))[torch.unravel_index(at, places)]
    return _with_ones(layer, chosen.movedim(1, 0).flatten(2))


def output_samples_at(layer: Layer, y: Tensor, choice: Choice) -> Tensor:
    """:func:`output_samples` at the same positions: [groups, samples, rows]."""
    y = _batched(layer, y).flatten(2).mT if layer.kernel else y.reshape(1, math.prod(y.shape[:-1]), y.shape[-1])
    at = choice(math.prod(y.shape[:2])).to(y.device)
    return y[torch.unravel_index(at, y.shape[:2])].unflatten(1, (layer.groups, -1)).transpose(0, 1)


def _with_ones(layer: Layer, samples: Tensor) -> Tensor:
    return F.pad(samples, (0, 1), value=1 / layer.taps) if layer.bias else samples


def _batched(layer: Layer, x: Tensor) -> Tensor:
    return x if x.ndim == len(layer.kernel) + 2 else x.unsqueeze(0)


def _padding(layer: Layer) -> list[int]:
    """Before and after each spatial dim, the last dim first, as ``F.pad`` takes it."""
    return list(layer.module._reversed_padding_repeated_twice)  # "same" is resolved there


def _windows(layer: Layer, x: Tensor) -> Tensor:
    """What the kernel sees of the padded input, a view: [groups, batch, *positions, channels, *kernel]."""
    module, x, space = layer.module, _batched(layer, x), len(layer.kernel)
    if layer.transposed:
        return _transposed_windows(layer, x)
    x = F.pad(x, _padding(layer), mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    for d, (size, stride, dilation) in enumerate(zip(layer.kernel, module.stride, module.dilation, strict=True)):
        x = x.unfold(2 + d, (size - 1) * dilation + 1, stride)[..., ::dilation]
    return x.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, 2 + space)


def _transposed_windows(layer: Layer, x: Tensor) -> Tensor:
    """What the kernel, in the order of the weight, sees of the input with zeros between, in the same dims."""
    module, space = layer.module, len(layer.kernel)
    sizes = [(n - 1) * stride + 1 for n, stride in zip(x.shape[2:], module.stride, strict=True)]
    apart = x.new_zeros(*x.shape[:2], *sizes)
    every = [slice(None), slice(None), *(slice(None, None, stride) for stride in module.stride)]
    apart[tuple(every)] = x
    padding: list[int] = []
    for d in reversed(range(space)):
        reach = (layer.kernel[d] - 1) * module.dilation[d]
        padding += [reach - module.padding[d], reach - module.padding[d] + module.output_padding[d]]
    x = F.pad(apart, padding)
    for d in range(space):
        x = x.unfold(2 + d, (layer.kernel[d] - 1) * module.dilation[d] + 1, 1)[..., :: module.dilation[d]]
    x = x.flip(list(range(2 + space, 2 + 2 * space)))
    return x.unflatten(1, (layer.groups, -1)).movedim(1, 0).movedim(2, 2 + space)


# ---------------------------------------------------------------------------------------- sums of products of samples


def input_products(
    layer: Layer, x: Tensor, positions: int | None = None, into: Tensor | None = None
) -> tuple[Tensor, int]:
    """The sum over all samples of ``a a^T``, and the number of positions (times taps) it was taken over.

    In channel form nothing is unfolded: an input position is counted as often as taps see it, and those counts are
    a product over the spatial dims. The batch is taken in parts, so that copies of it stay small.

    Args:
        layer: a linear or a convolution.
        x: its input.
        positions: in full form, look at so many positions of each batch only, see :func:`spread`.
        into: sums to add to, in place.

    Returns:
        [groups, columns, columns], and the number of samples.
    """
    if positions is not None and layer.form == "full":
        samples = input_samples_at(layer, x, lambda total: spread(total, positions))
        return _added(samples.mT, into), samples.shape[1]
    total = 0
    for part in _parts(layer, x, math.prod(layer.kernel) if layer.form == "full" else 1):
        if layer.kernel and layer.form == "channel":
            products, count = _counted_products(layer, part)
            into = products if into is None else into.add_(products)
        else:
            samples = input_samples(layer, part).flatten(1, 3)  # one tap: [groups, samples, columns]
            into, count = _added(samples.mT, into), samples.shape[1]
        total += count
    assert into is not None
    return into, total


def output_products(layer: Layer, g: Tensor, into: Tensor | None = None) -> Tensor:
    """The sum over all samples of ``g g^T``, [groups, rows, rows]; ``into`` as for :func:`input_products`."""
    if not layer.kernel:
        return _added(g.reshape(1, math.prod(g.shape[:-1]), g.shape[-1]).mT, into)
    for part in _parts(layer, g, 1):
        into = _added(
            part.flatten(2).transpose(0, 1).reshape(layer.groups, part.shape[1] // layer.groups, part[:, 0].numel()),
            into,
        )
    assert into is not None
    return into


SMALL = 2**18
"""How many numbers a copy of a part of the batch holds, at most; or an eighth of those of the factor."""


def _parts(layer: Layer, x: Tensor, times: int) -> Iterable[Tensor]:
    """The batch in parts whose unfolding (so many times as large) is small."""
    x = _batched(layer, x) if layer.kernel else (x if x.ndim > 1 else x.unsqueeze(0))
    columns = x.shape[1 if layer.kernel else -1] // layer.groups * times
    return x.split(max(1, max(SMALL, columns**2 // 8) // max(1, math.prod(x.shape[1:]) * times)))


def _added(samples: Tensor, into: Tensor | None) -> Tensor:
    """The products of samples [groups, columns, samples], summed; a large factor is written once, not thrice."""
    return samples @ samples.mT if into is None else into.baddbmm_(samples, samples.mT)


def _counted_products(layer: Layer, x: Tensor) -> tuple[Tensor, int]:
    module, space = layer.module, len(layer.kernel)
    pad = _padding(layer)
    if module.padding_mode != "zeros":
        x, pad = F.pad(x, pad, mode=module.padding_mode), [0] * len(pad)
    counts = torch.ones((), device=x.device, dtype=x.dtype)
    positions = x.shape[0]
    for d in range(space):
        before, after = pad[2 * (space - 1 - d) : 2 * (space - d)]
        count, outputs = tap_counts(
            x.shape[2 + d], layer.kernel[d], module.stride[d], module.dilation[d], before, after
        )
        counts = counts.unsqueeze(-1) * count.to(counts)
        positions *= outputs
    channels = x.shape[1] // layer.groups
    seen = (x * counts.sqrt()).transpose(0, 1).reshape(layer.groups, channels, -1)
    products = seen @ seen.mT
    samples = positions * layer.taps
    if layer.bias:
        column = (x * counts).sum((0, *range(2, x.ndim))).reshape(layer.groups, channels, 1) / layer.taps
        corner = column.new_full((layer.groups, 1, 1), samples / layer.taps**2)
        products = torch.cat([torch.cat([products, column], 2), torch.cat([column.mT, corner], 2)], 1)
    return products, samples


def tap_counts(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> tuple[Tensor, int]:
    """How many pairs of output and tap see each input position of one dim, [size]; and the number of outputs."""
    outputs = (size + before + after - (kernel - 1) * dilation - 1) // stride + 1
    seen = torch.arange(outputs)[:, None] * stride + torch.arange(kernel) * dilation - before
    seen = seen[(seen >= 0) & (seen < size)]
    return torch.bincount(seen, minlength=size), outputs


def measurable(module: nn.Module) -> bool:
    """Whether it is a linear or a convolution that holds its weight itself (a parametrised one computes it)."""
    return isinstance(module, MEASURED) and module._parameters.get("weight") is not None


def turned(module: nn.Module) -> bool:
    """Whether it looks like a linear whose weight has its inputs first, as GPT-2's; where it runs, that is checked."""
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    known = isinstance(module, (*MEASURED, *TRANSPOSED)) or set(module._parameters) != {"weight", "bias"}
    if known or module._modules or weight is None or bias is None:
        return False
    return weight.ndim == 2 and bias.shape == weight.shape[1:]


def reads_by(module: nn.Module) -> int | None:
    """The dim of the weight that is a layer's inputs, if full form can see the layer.

    A transposed convolution in groups has all inputs of a group at one place, and outputs at another: it is left out.
    """
    if turned(module):
        return 0
    if isinstance(module, TRANSPOSED):
        return 0 if module.groups == 1 and module._parameters.get("weight") is not None else None
    return 1 if measurable(module) else None


def layers_of(
    model: nn.Module, form: str, names: Sequence[str] | None = None, *, biased: bool = True, transposed: bool = False
) -> list[Layer]:
    """All linears and convolutions of a model; or the named ones, followed by others that hold the weight of one.

    Args:
        model: the model.
        form: ``"channel"`` or ``"full"``.
        names: the paths of those that are wanted.
        biased: whether biases are columns.
        transposed: all transposed convolutions too; named ones are there in any case, in full form.

    Raises:
        SecateurError: an unknown form, a name that is no linear or convolution, none at all.
    """
    if form not in FORMS:
        raise SecateurError(f"form={form!r}: 'channel' or 'full' is expected")
    known = {
        name: module
        for name, module in model.named_modules()
        if (measurable(module) if form == "channel" else reads_by(module) is not None)
    }
    for name in names or ():
        if name not in known:
            raise SecateurError(f"{name!r} is no linear or convolution of this model; there are {', '.join(known)}")
    chosen = {name: known[name] for name in known if transposed or not isinstance(known[name], TRANSPOSED)}
    if names is not None:
        chosen = {name: known[name] for name in names}
    if not chosen:
        raise SecateurError(f"{type(model).__name__} has no linear or convolution to measure the curvature of")
    return with_sharers(model, [Layer(name, module, form, biased) for name, module in chosen.items()])


def with_sharers(model: nn.Module, layers: Sequence[Layer]) -> list[Layer]:
    """Layers, then those that hold the weight of one as well: a weight's curvature is that of all its uses."""
    own, of = {layer.name for layer in layers}, {id(layer.module.weight): layer for layer in reversed(layers)}
    return [*layers] + [
        replace(of[id(module.weight)], name=name, module=module)
        for name, module in model.named_modules()
        if name not in own and measurable(module) and id(module.weight) in of
    ]


def why_not(model: nn.Module, parameter: str, skipped: Mapping[str, str]) -> tuple[str, str]:
    """Why nothing is known of a parameter.

    Args:
        model: the model.
        parameter: its name.
        skipped: the layers that were left out, with reasons.

    Returns:
        The path of the module that holds it, and the reason.
    """
    modules, path = dict(model.named_modules()), module_of(parameter).partition(".parametrizations.")[0]
    if path not in skipped and path not in modules:  # an attention's projections are not always there
        path = parameter.rpartition(".")[0]
    module = modules.get(path)
    computed = isinstance(module, MEASURED) and not measurable(module)
    why = COMPUTED if computed else "it is no linear or convolution whose rows are channels"
    return path, skipped.get(path, why)


def module_of(parameter: str) -> str:
    """The path of the module that computes with a parameter; see :func:`secateur.curvature.projections.projections`."""
    path, _, tensor = parameter.rpartition(".")
    return f"{path}.{IN_PROJECTION}".lstrip(".") if tensor == f"{IN_PROJECTION}_weight" else path


CHECKED = 64
"""At so many positions a layer must compute what its weight says."""


def computes_its_weight(layer: Layer, x: object, y: object) -> bool:
    """Whether a layer's output is its weight times its input (and its bias), at some positions.

    A module of a linear's or a convolution's class may compute something else: its weight standardised, its input
    padded by itself.
    """
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    whole, totals = Layer(layer.name, layer.module, "full"), list[int]()

    def some(total: int) -> Tensor:
        totals.append(total)
        return spread(total, CHECKED)

    try:
        samples, outputs = input_samples_at(whole, wide(x), some), output_samples_at(whole, wide(y), some)
    except (RuntimeError, IndexError, ValueError):  # shapes that its weight could not take
        return False
    table = whole.table().double().squeeze(2)
    if len(set(totals)) > 1 or samples.shape[::2] != table.shape[::2]:
        return False
    expected = samples.double() @ table.mT
    size = float(expected.norm())
    # single precision on a GPU may be reduced inside; reduced precision is off by less than a hundredth
    exact = y.dtype == torch.float64 or (y.dtype == torch.float32 and y.device.type == "cpu")
    allowed = 1e-3 if exact else 0.02
    return not math.isfinite(size) or float((outputs - expected).norm()) <= allowed * size  # not finite: told later


def wide(x: Tensor) -> Tensor:
    """In single precision at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
