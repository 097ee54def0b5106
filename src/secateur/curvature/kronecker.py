"""Kronecker factors of the Fisher: for every linear and convolution one of its inputs and one of its output gradients.

For a weight seen as a matrix (arXiv 1503.05671, for convolutions arXiv 1602.01407)::

    F  ~  G (x) A,    A = mean over positions of a a^T,    G = mean over examples of (sum over positions of g g^T)

with ``a`` what the weight's columns see (and a 1 for the bias) and ``g`` the gradient of an example's negative
log-likelihood at the output. For one example and a linear that sees one position of it this is exact. A weight that is
used at several places (a module called twice, a tied parameter) sees all of them as positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur._internal.checks import check_count
from secateur._internal.distributed import Group, all_reduce_, world_size
from secateur._internal.errors import BadBatch, CannotMeasure, SecateurError
from secateur._internal.workload import Workload
from secateur.curvature.fisher import Fisher
from secateur.curvature.layers import (
    COMPUTED,
    MEASURED,
    Layer,
    input_products,
    layers_of,
    measurable,
    output_products,
    reads_by,
    wide,
)
from secateur.curvature.passes import NO_GRADIENT, NOT_REACHED, watch
from secateur.curvature.projections import InProjection
from secateur.tracing.attentions import IN_PROJECTION


@dataclass(frozen=True, eq=False)
class Factors:
    """The Kronecker factors of one weight.

    Attributes:
        layer: whose they are.
        a: of the inputs, [groups, columns, columns], symmetric, float32 or better.
        g: of the gradients at the outputs, [groups, rows, rows].
    """

    layer: Layer
    a: Tensor
    g: Tensor

    def of(self, model: nn.Module) -> Factors:
        """The same factors, for the weight that this model holds now.

        Raises:
            SecateurError: the model has no such layer, or one of another shape.
        """
        module = dict(model.named_modules()).get(self.layer.name)
        if module is None and isinstance(self.layer.module, InProjection):
            module = InProjection(model.get_submodule(self.layer.name.removesuffix(f".{IN_PROJECTION}")))
        shape = None if module is None or reads_by(module) is None else module.weight.shape
        if shape != self.layer.module.weight.shape:
            raise SecateurError(f"the factors of {self.layer.name!r} are those of another model")
        return replace(self, layer=replace(self.layer, module=module))

    def channel_form(self) -> Factors:
        """The factors without the bias in which the taps of a kernel share a factor, from those in full form."""
        layer = self.layer
        columns, taps = layer.inputs, layer.module.weight[0, 0].numel()
        own = self.a[:, : columns * taps, : columns * taps]
        of_taps = own.unflatten(2, (columns, taps)).unflatten(1, (columns, taps)).diagonal(dim1=2, dim2=4)
        return Factors(replace(layer, form="channel", biased=False), of_taps.mean(-1), self.g)

    def restricted(self, layer: Layer, rows: Tensor, columns: Tensor) -> Factors:
        """The factors, in channel form, of a layer that has only some of the rows and columns."""
        rows, columns = rows.to(self.g.device), columns.to(self.a.device)
        return Factors(layer, self.a[:, columns][..., columns], self.g[:, rows][..., rows])


@dataclass(frozen=True, eq=False)
class Curvature(Mapping[str, Factors]):
    """Factors by the modules' paths.

    Attributes:
        layers: the factors.
        examples: how many examples were seen.
        skipped: what has no factors, and why.
    """

    layers: Mapping[str, Factors]
    examples: int
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Factors:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class _Sums:
    """What is added up for one weight: sums of products, and how many samples the inputs' is of."""

    def __init__(self) -> None:
        self.a: Tensor | None = None
        self.g: Tensor | None = None
        self.count = 0


def kronecker_factors(
    model: nn.Module,
    data: Iterable[Any],
    loss: Any = None,
    *,
    form: str = "channel",
    layers: Sequence[str] | None = None,
    fisher: str = "sampled",
    samples: int = 1,
    batches: int | None = None,
    positions: int | None = None,
    bias: bool = True,
    seed: int = 0,
    group: Group = None,
    progress: bool = False,
) -> Curvature:
    """Factors of all linears and convolutions, from one pass over the data in eval mode.

    Every process gives its shard of the data, and all get the factors of the whole.

    Args:
        model: any module; it is left untouched.
        data: batches, see :mod:`secateur._internal.batches`; bare inputs will do where targets are drawn.
        loss: ``"cross_entropy"``, ``"mse"`` (half the squared error: a normal distribution of variance 1), or any other
            of :mod:`secateur._internal.losses`, for which the empirical Fisher is taken, and told.
        form: ``"channel"``: the taps of a kernel share a factor of the input channels; ``"full"``: one factor for all
            pairs of channel and tap.
        layers: paths of modules, all if not given.
        fisher: one of :data:`secateur.curvature.fisher.FISHERS`, see :class:`secateur.curvature.fisher.Fisher`.
        samples: how many targets are drawn for each example.
        batches: use at most so many batches.
        positions: in full form, use so many positions of each batch, spread over all of it.
        bias: a layer's bias is one more column of its weight; without, it is taken as given.
        seed: for the drawn targets.
        group: the processes.
        progress: show how far it is.

    Returns:
        The factors, and what has none.

    Raises:
        SecateurError: an empty loader, batches that do not fit, losses or activations that are not finite.
    """
    work = Workload(model, data, loss, group=group, progress=progress)
    how = Fisher(fisher, samples, batches, seed)
    return factors_of(work, how, form=form, layers=layers, positions=positions, bias=bias)


def factors_of(
    work: Workload, how: Fisher, *, form: str, layers: Sequence[str] | None = None, positions: int | None = None,
    bias: bool = True,
) -> Curvature:  # fmt: skip
    """:func:`kronecker_factors` at a table that is laid; what was measured there before is not measured again."""
    check_count("positions", positions, optional=True)
    measured: list[tuple[Hashable, Curvature]] = work.once(("kronecker", how, form, positions, bias), list)
    for key, known in measured:
        if layers is not None and _covers(known, layers, work.model):
            work.recall(key)
            some = {name: known.layers[name] for name in layers if name in known.layers}
            return replace(known, layers=some, skipped={n: known.skipped[n] for n in layers if n not in some})
    key = ("kronecker", how, form, None if layers is None else tuple(layers), positions, bias)
    found = work.once(key, lambda: _factors(work, how, form, layers, positions, bias))
    if not any(known is found for _, known in measured):
        measured.append((key, found))
    return found


def _covers(known: Curvature, layers: Sequence[str], model: nn.Module) -> bool:
    """Whether these layers were measured, and without the uses of their weights by others."""
    names = {*known.layers, *known.skipped}
    if not set(layers) <= names or not any(name in known.layers for name in layers):
        return False
    modules = dict(model.named_modules())
    weights = {name: id(modules[name]._parameters.get("weight")) for name in names if name in modules}
    own = {weights[name] for name in layers if name in known.layers}
    return not own & {weights[name] for name in weights.keys() - set(layers)}


def _factors(
    work: Workload, how: Fisher, form: str, layers: Sequence[str] | None, positions: int | None, bias: bool
) -> Curvature:
    model = work.model
    chosen = layers_of(model, form, layers, biased=bias)
    first = {id(layer.module.weight): layer for layer in reversed(chosen)}
    sums = {id(layer.module.weight): _Sums() for layer in chosen}

    def on_input(layer: Layer, x: Tensor) -> None:
        mine = sums[id(layer.module.weight)]
        mine.a, count = input_products(layer, wide(x), positions, mine.a)
        mine.count += count

    def on_gradient(layer: Layer, g: Tensor, _: Any) -> None:
        mine = sums[id(layer.module.weight)]
        mine.g = output_products(layer, wide(g), mine.g)

    seen = watch(work, chosen, on_input=on_input, on_gradient=on_gradient, how=how, what="Kronecker factors")
    _gather(first, sums, work.group)
    found: dict[str, Factors] = {}
    skipped = {
        name: COMPUTED
        for name, module in model.named_modules()
        if layers is None and isinstance(module, MEASURED) and not measurable(module)
    }
    strange = {id(layer.module.weight): seen.strange[layer.name] for layer in chosen if layer.name in seen.strange}
    for layer in chosen:
        of, mine = first[id(layer.module.weight)], sums[id(layer.module.weight)]
        if id(layer.module.weight) in strange:
            skipped[layer.name] = strange[id(layer.module.weight)]
        elif of is not layer:
            skipped[layer.name] = f"its weight is that of {of.name}, which has the factors of both"
        elif mine.a is None or mine.g is None:
            skipped[layer.name] = NOT_REACHED if mine.a is None else NO_GRADIENT
        else:
            found[layer.name] = Factors(layer, mine.a.div_(mine.count), mine.g.div_(seen.examples * seen.how.samples))
    for name, factors in found.items():
        a, g = factors.a.diagonal(dim1=1, dim2=2), factors.g.diagonal(dim1=1, dim2=2)  # the squares tell of all
        if not (a.isfinite().all() and g.isfinite().all()):
            which = "inputs" if g.isfinite().all() else "gradients"
            raise BadBatch(f"the {which} of {name!r} are not finite: check the data and the model's weights")
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:5])
        raise CannotMeasure(f"the data reached no linear or convolution of the model that can be measured ({why})")
    return Curvature(found, seen.examples, skipped)


def _gather(first: Mapping[int, Layer], sums: Mapping[int, _Sums], group: Group) -> None:
    """Add up over processes; a layer that one process never reached counts as zero there."""
    if world_size(group) == 1:
        return
    device = next(iter(first.values())).module.weight.device
    for key, layer in first.items():
        mine = sums[key]
        reached = torch.tensor([mine.a is not None, mine.g is not None], device=device, dtype=torch.int64)
        all_reduce_(reached, group)
        if not bool(reached.all()):
            mine.a = mine.g = None
            continue
        rows, _, columns = layer.table().shape[1:]
        dtype = torch.float64 if layer.module.weight.dtype == torch.float64 else torch.float32
        for name, size in (("a", columns), ("g", rows)):
            own = getattr(mine, name)
            own = torch.zeros(layer.groups, size, size, device=device, dtype=dtype) if own is None else own
            all_reduce_(own, group)
            setattr(mine, name, own)
        count = torch.tensor(mine.count, device=device)
        all_reduce_(count, group)
        mine.count = int(count)
