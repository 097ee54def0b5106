r"""The smaller model fitted to what the original computes: layer by layer, in closed form, in one forward.

Each linear and convolution ``W`` of the smaller model, in the order in which they run, gets inputs ``x'`` from fitted
layers, and predicts from them what the original computes there from its own, ``y``, in the rows that are left::

    W' = W + D
    D = argmin sum |y - (W + D) x'|^2 + damping |D|^2 = (sum (y - W x') x'^T) (sum x' x'^T + damping I)^-1

All layers are fitted, not only those that lose inputs: after the first cut all inputs differ. Fitting in order, on the
inputs of the smaller model, is due to arXiv 1707.06168, which fits the layers that lose inputs. A step is as long as
images that it was not computed from say. The statistics of batch norms follow on the way, by what the same images show
in both models::

    mean' = mean + m(x') - m(x)          var' = var * v(x') / v(x)

No label is needed, and where the cut changes nothing, nothing changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from secateur._internal.batches import Batch, call_model, first_argument
from secateur._internal.checks import check_count, check_nonnegative
from secateur._internal.distributed import Group
from secateur._internal.errors import SecateurError
from secateur._internal.losses import outputs_of
from secateur._internal.state import preserved
from secateur._internal.workload import Needs, Workload
from secateur.curvature.layers import (
    MEASURED,
    Layer,
    computes_its_weight,
    input_samples_at,
    layers_of,
    output_samples_at,
    wide,
)
from secateur.plan import Plan
from secateur.repair.contract import REPAIRS, Facts
from secateur.surgery.channels import check_plan

DAMPING = 1e-3
HELD_OUT = 8
"""One in so many samples, the last ones, is held out to find the length of the step; of few samples 16, or half."""


def refit(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    examples: int = 1024,
    positions: int | None = None,
    damping: float = DAMPING,
    group: Group = None,
    progress: bool = False,
) -> dict[str, str]:
    """Change the smaller model in place: fit it to what the original computes.

    Args:
        model: the original; it is left untouched.
        small: what :func:`secateur.cut` made of it by ``plan``; if this fails, it is as before. Parameters that want no
            gradient are fitted too.
        plan: what was removed.
        data: batches as for :func:`secateur.cut.recalibrate`; targets are not looked at.
        examples: how many are used; they pass through both models as one batch, without gradients. Inputs whose first
            dim is not that of the examples (a mask) are taken from the first batch.
        positions: how many positions of a layer's outputs are fitted over all examples; by default four for each
            column of the layer's weight and not less than 8192.
        damping: in units of the mean square of the layer's inputs.
        group: the processes, each with its shard of the data.
        progress: show how far it is.

    Returns:
        The layers and batch norms that stay as they are: path -> reason.

    Raises:
        SecateurError: models and plan that do not belong together, no data, layers whose outputs are not finite.
    """
    settings = Refit(examples=examples, positions=positions, damping=damping)
    return refitted(settings, model, small, plan, Workload(model, data, group=group, progress=progress))


@REPAIRS.register("refit")
@dataclass(frozen=True)
class Refit:
    """Fit the smaller model's layers, one after the other, to what the original computes; norms follow.

    Attributes:
        examples: how many are used.
        positions: of a layer's outputs, over all examples; by default four for each column and not less than 8192.
        damping: in units of the mean square of the layer's inputs.
    """

    needs: ClassVar[Needs] = Needs(data=True, plan=True)
    examples: int = 1024
    positions: int | None = None
    damping: float = DAMPING

    def __post_init__(self) -> None:
        check_count("examples", self.examples)
        check_count("positions", self.positions, optional=True)
        check_nonnegative("damping", self.damping)

    def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts:
        """See :func:`refit`."""
        return {"left whole": refitted(self, original, small, plan, work)}


def refitted(settings: Refit, model: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> dict[str, str]:
    """:func:`refit` at a table that is laid."""
    check_plan(model, plan)
    examples, positions, damping = settings.examples, settings.positions, settings.damping
    pairs, left = _pairs(model, small, plan)
    inputs, count = _joined(work, examples)
    many = {name: positions or max(8192, 4 * one.table().shape[-1]) for name, (one, _) in pairs.items()}
    seen = _Seen(model, pairs, many, count)
    seen.watch(inputs)
    left |= {name: seen.why_not(name) for name in pairs.keys() - seen.outputs.keys()}
    norms: dict[str, Any] = {name: m for name, m in small.named_modules() if _has_statistics(m)}
    left |= {name: f"it runs {seen.calls[name]} times in a forward" for name in norms if name not in seen.statistics}

    def fit(name: str, args: Any, kwargs: Any) -> None:
        x, y = first_argument(args, kwargs), seen.outputs[name]
        layer, missing = pairs[name][1], plan.slices.get(_of(name, "weight"), {}).get(0, [])
        places = _by_example(layer, x, count).shape
        if places[:1] + places[2:] != seen.places[name] if layer.kernel else places[:-1] != seen.places[name]:
            left[name] = "the forward takes it to other positions than in the original"
            return
        y = _without(y.transpose(1, 2).flatten(0, 1), missing).unflatten(0, (layer.groups, -1)).transpose(1, 2)
        table = layer.table().double().squeeze(2)
        samples = input_samples_at(layer, wide(_by_example(layer, x, count)), many[name])
        new, bias = layer.weights((table + least_squares(samples, y, table, damping, name)).unsqueeze(2))
        layer.module.weight.copy_(new)
        if bias is not None:
            layer.module.bias.copy_(bias)

    def follow(name: str, args: Any, kwargs: Any) -> None:
        norm, missing = norms[name], plan.slices.get(_of(name, "running_mean"), {}).get(0, [])
        then, now = _without(seen.statistics[name], missing), _moments(first_argument(args, kwargs))
        norm.running_mean += now[:, 0] - then[:, 0]
        norm.running_var *= (now[:, 1] / then[:, 1].clamp(min=1e-12)).clamp(max=1e6)

    handles = [
        module.register_forward_pre_hook(lambda _, a, k, do=do, name=name: do(name, a, k), with_kwargs=True)
        for do, modules in (
            (fit, {name: pairs[name][1].module for name in seen.outputs}),
            (follow, {name: norms[name] for name in norms.keys() & seen.statistics.keys()}),
        )
        for name, module in modules.items()
    ]
    tensors = (*small.parameters(), *small.buffers())
    before = [t.detach().clone() for t in tensors]
    try:
        with torch.no_grad(), preserved(small, fast_path=False):
            outputs_of(partial(call_model, small), Batch(0, inputs))
    except BaseException:
        with torch.no_grad():
            for t, was in zip(tensors, before, strict=True):
                t.copy_(was)
        raise
    finally:
        for handle in handles:
            handle.remove()
    return left


def least_squares(x: Tensor, y: Tensor, table: Tensor, damping: float, name: str = "a layer") -> Tensor:
    """By how much a table of weights should change.

    Args:
        x: inputs, [groups, samples, columns].
        y: what should come out, [groups, samples, rows].
        table: weights, [groups, rows, columns].
        damping: in units of the mean square of the inputs.
        name: for messages.

    Returns:
        The step, float64, [groups, rows, columns].
    """
    x, y = x.double(), y.double()
    missing = y - x @ table.double().mT
    if not missing.isfinite().all():
        raise SecateurError(f"refit: the inputs or outputs of {name!r} are not finite: check the data and the weights")
    samples = x.shape[1]
    fitted = samples - max(samples // HELD_OUT, min(samples // 2, 2 * HELD_OUT))
    if fitted == samples:  # a single one
        return torch.zeros_like(table, dtype=torch.float64)
    seen, rest = x[:, :fitted], missing[:, :fitted]
    few = fitted < x.shape[2]  # then the same step, through the samples' products
    squares = seen @ seen.mT if few else seen.mT @ seen
    energy = seen.square().sum((1, 2))
    ridge = torch.where(energy > 0, damping * energy / x.shape[2], 1.0)  # a group that sees only zeros stays
    squares.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    lower, wrong = torch.linalg.cholesky_ex(squares)
    if wrong.any() or not lower.isfinite().all():
        raise SecateurError(
            f"refit: the inputs of {name!r} are linearly dependent, and damping={damping:g}: give more damping, or "
            "more examples"
        )
    step = torch.cholesky_solve(rest, lower).mT @ seen if few else torch.cholesky_solve(seen.mT @ rest, lower).mT
    moved = x[:, fitted:] @ step.mT
    best = (moved * missing[:, fitted:]).sum((1, 2)) / moved.square().sum((1, 2)).clamp(min=1e-300)
    return step * best.clamp(0, 1)[:, None, None]


# ------------------------------------------------------------------------------------------- what the original computes


@dataclass
class _Seen:
    """Samples of the outputs of layers, and statistics of norms, from one forward of the original.

    Attributes:
        model: the original.
        pairs: its layers, with those of the smaller model.
        many: positions, by layer.
        count: examples.
        outputs: [groups, samples, rows] of the layers that can be fitted.
        places: the shape of a layer's inputs without their channels.
        statistics: mean and variance by channel, [channels, 2], of the inputs of batch norms.
        calls: how often a module runs.
        strange: layers that do not compute their weight times their input.
    """

    model: nn.Module
    pairs: Mapping[str, tuple[Layer, Layer]]
    many: Mapping[str, int]
    count: int
    outputs: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, torch.Size] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    strange: set[str] = field(default_factory=set)

    def watch(self, inputs: Any) -> None:
        """Run the original."""
        norms = {name: m for name, m in self.model.named_modules() if _has_statistics(m)}
        handles = [
            one.module.register_forward_hook(
                lambda _, a, k, y, name=name: self._layer(name, first_argument(a, k), y), with_kwargs=True, prepend=True
            )
            for name, (one, _) in self.pairs.items()
        ] + [
            m.register_forward_pre_hook(
                lambda _, a, k, name=name: self._norm(name, first_argument(a, k)), with_kwargs=True
            )
            for name, m in norms.items()
        ]
        try:
            with torch.no_grad(), preserved(self.model, fast_path=False):
                copied = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
                outputs_of(partial(call_model, self.model), Batch(0, copied))
        finally:
            for handle in handles:
                handle.remove()
        for name in [*self.strange, *(name for name in self.outputs if self.calls[name] > 1)]:
            self.outputs.pop(name, None)
        for name in [name for name in self.statistics if self.calls[name] > 1]:
            del self.statistics[name]

    def why_not(self, name: str) -> str:
        """Why a layer is not among those that can be fitted."""
        if not self.calls[name]:
            return "its own forward does not run"
        if self.calls[name] > 1:
            return f"it runs {self.calls[name]} times in a forward"
        return "its forward is not its weight times its input"

    def _layer(self, name: str, x: Any, y: Any) -> None:
        self.calls[name] += 1
        layer = self.pairs[name][0]
        if not computes_its_weight(layer, x, y):
            self.strange.add(name)
            return
        x, y = _by_example(layer, x, self.count), _by_example(layer, y, self.count)
        self.places[name] = x.shape[:1] + x.shape[2:] if layer.kernel else x.shape[:-1]
        self.outputs[name] = output_samples_at(layer, wide(y), self.many[name])

    def _norm(self, name: str, x: Tensor) -> None:
        self.calls[name] += 1
        self.statistics[name] = _moments(x)


def _moments(x: Tensor) -> Tensor:
    """Mean and variance by channel, [channels, 2]."""
    rows = wide(x).transpose(0, 1).flatten(1)
    return torch.stack([rows.mean(1), rows.var(1, correction=0)], 1)


# --------------------------------------------------------------------------------------------------- models and inputs


def _pairs(model: nn.Module, small: nn.Module, plan: Plan) -> tuple[dict[str, tuple[Layer, Layer]], dict[str, str]]:
    """The layers of both models that can be fitted; and why others cannot."""
    for what, given in (("model", model), ("small", small)):
        if not isinstance(given, nn.Module):
            raise SecateurError(f"refit({what}={given!r}): a module is expected")
    if {id(p) for p in model.parameters()} & {id(p) for p in small.parameters()}:
        raise SecateurError("refit: both models share parameters, and the original must stay as it is; cut a copy")
    ones = {layer.name: layer for layer in layers_of(model, "full")}
    others = {name: module for name, module in small.named_modules() if isinstance(module, MEASURED)}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    left = {
        name: "its weight is computed from other parameters" if isinstance(module, MEASURED) else "it is transposed"
        for name, module in model.named_modules()
        if isinstance(module, (*MEASURED, nn.modules.conv._ConvTransposeNd)) and name not in ones
    }
    pairs = {}
    for name, layer in ones.items():
        module, bias = layer.module, layer.module._parameters.get("bias")
        if max(uses[id(p)] for p in (module.weight, bias) if p is not None) > 1:
            left[name] = "its weight or bias is used at several places"
            continue
        if bias is None and module.bias is not None:
            left[name] = "its bias is computed from other parameters"
            continue
        shape = list(module.weight.shape)
        for dim, positions in plan.slices.get(_of(name, "weight"), {}).items():
            shape[dim] -= len(positions)
        other = others.get(name)
        if other is None or list(other.weight.shape) != shape:
            found = "no such layer" if other is None else f"shape {list(other.weight.shape)}"
            raise SecateurError(f"refit: the plan leaves {name!r} with shape {shape}, the smaller model has {found}")
        for what in ("dtype", "device"):
            if getattr(other.weight, what) != getattr(module.weight, what):
                raise SecateurError(
                    f"refit: {name!r} has {what} {getattr(module.weight, what)} in the original and "
                    f"{getattr(other.weight, what)} in the smaller model; refit first, then change it"
                )
        pairs[name] = (layer, Layer(name, other, "full"))
    return pairs, left


def _of(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor


def _without(tensor: Tensor, positions: Iterable[int]) -> Tensor:
    stay = torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
    stay[list(positions)] = False
    return tensor[stay]


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None


def _by_example(layer: Layer, x: Tensor, count: int) -> Tensor:
    """Inputs or outputs of a layer with the examples first, so that the last samples are of other examples."""
    if not layer.kernel and x.ndim > 2 and x.shape[0] != count and x.shape[1] == count:
        return x.transpose(0, 1)
    return x


def _joined(work: Workload, examples: int) -> tuple[Any, int]:
    """The inputs of as many examples as one batch, and how many there are."""
    parts: list[Any] = []
    sizes: list[int] = []
    for batch in work.batches(None, "refit"):
        parts.append(batch.inputs)
        sizes.append(batch.examples)
        if sum(sizes) >= examples:
            break
    count = sum(sizes)

    def join(*tensors: Any) -> Any:
        same = [isinstance(t, Tensor) and t.ndim > 0 and len(t) == n for t, n in zip(tensors, sizes, strict=True)]
        return torch.cat(tensors)[:examples] if all(same) else tensors[0]

    try:
        return tree_map(join, *parts), min(count, examples)
    except (RuntimeError, ValueError) as error:
        raise SecateurError(
            f"refit: the batches cannot be joined to one ({error}); give batches of one shape, or one batch"
        ) from error
