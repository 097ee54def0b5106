r"""The smaller model fitted to what the original computes: layer by layer, in closed form.

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

Examples go through the models in small parts. The original runs once. The smaller model runs once for every layer and
norm, as far as there: what is before is fitted by then, what is behind need not run. So memory holds the activations of
one part, and samples.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from secateur._internal.batches import Batch, Inputs, call_model, first_argument, tensors_in
from secateur._internal.checks import check_count, check_nonnegative
from secateur._internal.distributed import Group, all_gather, all_reduce_, rank
from secateur._internal.errors import BadBatch, SecateurError
from secateur._internal.losses import outputs_of
from secateur._internal.state import fork_rng_of, preserved
from secateur._internal.workload import Needs, Workload
from secateur.curvature.layers import (
    COMPUTED,
    MEASURED,
    Choice,
    Layer,
    computes_its_weight,
    input_samples_at,
    layers_of,
    output_samples_at,
    spread,
    wide,
)
from secateur.curvature.passes import STRANGE
from secateur.plan import Plan
from secateur.repair.contract import LEFT_WHOLE, REPAIRS, Facts
from secateur.repair.recalibrate import has_statistics
from secateur.surgery.channels import check_plan

DAMPING = 1e-3
HELD_OUT = 8
"""One in so many samples, the last ones, is held out to find the length of the step; of few samples 16, or half."""
PART = 128
"""So many examples go through a model at a time, at most."""


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
        examples: how many are used, by all processes together; batches of many are taken in parts if the first dim of
            all their inputs is that of the examples.
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

    needs: ClassVar[Needs] = Needs(data=True)
    examples: int = 1024
    positions: int | None = None
    damping: float = DAMPING

    def __post_init__(self) -> None:
        check_count("examples", self.examples)
        check_count("positions", self.positions, optional=True)
        check_nonnegative("damping", self.damping)

    def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts:
        """See :func:`refit`."""
        return {LEFT_WHOLE: refitted(self, original, small, plan, work)}


def refitted(settings: Refit, model: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> dict[str, str]:
    """:func:`refit` at a table that is laid."""
    check_plan(model, plan)
    pairs, left = _pairs(model, small, plan)
    many = {name: settings.positions or max(8192, 4 * one.table().shape[-1]) for name, (one, _) in pairs.items()}
    with torch.inference_mode(False), torch.no_grad():
        examples = _read(work, settings.examples)
        norms = {name: m for name, m in model.named_modules() if has_statistics(m)}
        original = _Original({name: one for name, (one, _) in pairs.items()}, norms, many, examples)
        original.watch(model)
        steps, kept = original.steps(work)
        tensors = (*small.parameters(), *small.buffers())
        before = [t.clone() for t in tensors]
        try:
            for names in work.tracked(steps, "refit", len(steps)):
                if names[0] in pairs:
                    some = {name: pairs[name] for name in names}
                    left |= _fit(small, some, original, plan, settings.damping, work)
                else:
                    _follow(small, names[0], original, plan, work)
        except BaseException:
            for t, was in zip(tensors, before, strict=True):
                t.copy_(was)
            raise
    return left | kept


def _fit(
    small: nn.Module, pairs: Mapping[str, tuple[Layer, Layer]], original: _Original, plan: Plan, damping: float,
    work: Workload,
) -> dict[str, str]:  # fmt: skip
    """Fit layers of the same input; those that stay as they are -> why."""
    samples: dict[str, list[Tensor]] = {name: [] for name in pairs}
    places: dict[str, dict[int, torch.Size]] = {name: {} for name in pairs}

    def see(name: str, part: _Part, x: Tensor) -> None:
        layer = pairs[name][1]
        x = _by_example(layer, x, part.count)
        places[name][part.number] = _places(layer, x)
        samples[name].append(input_samples_at(layer, wide(x), original.examples.choice(part, original.many[name])))

    _run_until(small, {name: layer.module for name, (_, layer) in pairs.items()}, original.examples, see)
    left = {}
    for name, (one, layer) in pairs.items():
        same = torch.tensor(int(places[name] == original.places[name]), device=work.device)
        if int(all_reduce_(same, work.group)) < work.processes:
            left[name] = "the forward takes it to other positions than in the original"
            continue
        table, missing = layer.table().double().squeeze(2), plan.slices.get(_of(name, "weight"), {}).get(0, [])
        x = _gathered(samples.pop(name), wide(layer.table()[:, :0, 0]), work)
        y = _gathered(original.outputs.pop(name), wide(one.table()[:, :, 0, :0].mT), work)
        y = _without(y.transpose(1, 2).flatten(0, 1), missing).unflatten(0, (layer.groups, -1)).transpose(1, 2)
        new, bias = layer.weights((table + least_squares(x, y, table, damping, name)).unsqueeze(2))
        layer.module.weight.copy_(new)
        if bias is not None:
            layer.module.bias.copy_(bias)
    return left


def _gathered(parts: list[Tensor], none: Tensor, work: Workload) -> Tensor:
    """Samples [groups, samples, width] of all processes, in the order of their ranks; ``none`` has no samples."""
    own = torch.cat([none, *parts], 1)
    return torch.cat([t.transpose(0, 1) for t in all_gather(own.transpose(0, 1).contiguous(), work.group)], 1)


def _follow(small: nn.Module, name: str, original: _Original, plan: Plan, work: Workload) -> None:
    """Let the statistics of a batch norm follow what the examples show in both models."""
    found: list[Tensor] = []
    norm: Any = small.get_submodule(name)
    _run_until(small, {name: norm}, original.examples, lambda _, __, x: found.append(_moments(x)))
    missing = plan.slices.get(_of(name, "running_mean"), {}).get(0, [])
    then = _without(_combined(original.moments.pop(name), len(norm.running_mean) + len(missing), work), missing)
    now = _combined(found, len(norm.running_mean), work)
    norm.running_mean += now[:, 1] - then[:, 1]
    norm.running_var *= (now[:, 2] / then[:, 2].clamp(min=1e-12)).clamp(max=1e6)


def _moments(x: Tensor) -> Tensor:
    """How many numbers a channel has, their mean and their variance, float64 [channels, 3]."""
    rows = wide(x).transpose(0, 1).flatten(1)
    count = torch.full_like(rows[:, 0], rows.shape[1])
    return torch.stack([count, rows.mean(1), rows.var(1, correction=0)], 1).double()


def _combined(parts: list[Tensor], channels: int, work: Workload) -> Tensor:
    """The moments [channels, 3] of several parts, of all processes, as one."""
    none = torch.zeros(0, channels, 3, dtype=torch.float64, device=work.device)
    own = torch.cat([none, *(part[None] for part in parts)])
    count, mean, variance = torch.cat(all_gather(own, work.group)).unbind(2)
    total = count.sum(0)
    middle = (count * mean).sum(0) / total
    return torch.stack([total, middle, (count * (variance + (mean - middle).square())).sum(0) / total], 1)


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
class _Original:
    """What the original computes, from one forward of every part.

    Attributes:
        layers: those that could be fitted.
        norms: the batch norms.
        many: how many positions are looked at, by layer.
        examples: the examples.
        outputs: samples of the outputs of layers, [groups, samples, rows] for each part.
        places: the shape of a layer's inputs without their channels, by the number of the part.
        moments: of the inputs of batch norms, for each part.
        calls: how often a layer or norm runs in a forward, at most.
        strange: layers that do not compute their weight times their input.
        order: layers and norms in the order in which they run.
        alike: those whose input is the very tensor that the one before them in this order has got.
    """

    layers: Mapping[str, Layer]
    norms: Mapping[str, nn.Module]
    many: Mapping[str, int]
    examples: _Examples
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    places: dict[str, dict[int, torch.Size]] = field(default_factory=lambda: defaultdict(dict))
    moments: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    calls: Counter[str] = field(default_factory=Counter)
    strange: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)
    alike: set[str] = field(default_factory=set)

    def watch(self, model: nn.Module) -> None:
        """Run the model."""
        with preserved(model, fast_path=False):
            for part in self.examples.parts:
                calls: Counter[str] = Counter()
                handles = self._attach(part, calls)
                try:
                    _forward(model, part)
                finally:
                    for handle in handles:
                        handle.remove()
                self.calls |= calls

    def _attach(self, part: _Part, calls: Counter[str]) -> list[RemovableHandle]:
        before: tuple[Any, int] = (None, 0)

        def runs(name: str, x: Any) -> None:
            nonlocal before
            calls[name] += 1
            now = (x, x._version if isinstance(x, Tensor) and not x.is_inference() else -1)
            if name not in self.order:
                self.order.append(name)
                if now[0] is before[0] and now[1] == before[1] >= 0:
                    self.alike.add(name)
            before = now

        def layer_ran(name: str, x: Any, y: Any) -> None:
            runs(name, x)
            layer = self.layers[name]
            if name in self.strange or not computes_its_weight(layer, x, y):
                self.strange.add(name)
                return
            x, y = _by_example(layer, x, part.count), _by_example(layer, y, part.count)
            self.places[name][part.number] = _places(layer, x)
            self.outputs[name].append(output_samples_at(layer, wide(y), self.examples.choice(part, self.many[name])))

        def norm_runs(name: str, x: Tensor) -> None:
            runs(name, x)
            self.moments[name].append(_moments(x))

        return [
            layer.module.register_forward_hook(
                lambda _, a, k, y, name=name: layer_ran(name, first_argument(a, k), y), with_kwargs=True, prepend=True
            )
            for name, layer in self.layers.items()
        ] + [
            norm.register_forward_pre_hook(
                lambda _, a, k, name=name: norm_runs(name, first_argument(a, k)), with_kwargs=True
            )
            for name, norm in self.norms.items()
        ]

    def steps(self, work: Workload) -> tuple[list[list[str]], dict[str, str]]:
        """What is to be done, in the order of the forward: layers of the same input, or one norm; and what is left why.

        All processes find the same.
        """
        names = [*self.layers, *self.norms]
        own = torch.tensor([[self.calls[name], int(name in self.strange)] for name in names], device=work.device)
        most = torch.stack(all_gather(own, work.group)).amax(0).tolist() if names else []
        left = {}
        for name, (calls, strange) in zip(names, most, strict=True):
            if not calls:
                left[name] = "its own forward does not run"
            elif calls > 1:
                left[name] = f"it runs {calls} times in a forward"
            elif strange:
                left[name] = STRANGE
        order, alike = work.agree([self.order, sorted(self.alike)])
        order += [name for name in names if name not in order]
        steps: list[list[str]] = []
        for number, name in enumerate(order):
            if name in left:
                continue
            if name in alike and name in self.layers and steps and steps[-1][-1] == order[number - 1] in self.layers:
                steps[-1].append(name)
            else:
                steps.append([name])
        return steps, left


# ------------------------------------------------------------------------------------------------ examples, in parts


@dataclass(frozen=True, eq=False)
class _Part:
    """Some examples that go through a model together.

    Attributes:
        number: its place among the parts of this process.
        batch: the number of the batch that it is of.
        first: the number of its first example, among those of all processes.
        count: how many examples.
        inputs: what the forward is called with.
    """

    number: int
    batch: int
    first: int
    count: int
    inputs: Inputs


@dataclass(frozen=True, eq=False)
class _Examples:
    """The parts of this process, and how many examples all processes have."""

    parts: list[_Part]
    total: int

    def choice(self, part: _Part, many: int) -> Choice:
        """Which of a part's positions are looked at: spread over those of all examples."""

        def chosen(positions: int) -> Tensor:
            first = part.first * positions // part.count
            of_all = spread(self.total * positions // part.count, many)
            return of_all[(of_all >= first) & (of_all < first + positions)] - first

        return chosen


def _read(work: Workload, examples: int) -> _Examples:
    """This process's share of so many examples."""
    wanted = examples // work.processes + (rank(work.group) < examples % work.processes)
    found: list[tuple[int, Inputs, int]] = []
    with fork_rng_of(work.model):  # a loader may draw the order of its batches
        for batch in work.batches(None, "refit, examples"):
            found += _split(batch, wanted - sum(count for *_, count in found))
            if sum(count for *_, count in found) >= wanted:
                break
    counts = [count for *_, count in found]
    of_all = torch.cat(all_gather(torch.tensor([sum(counts)], device=work.device), work.group)).tolist()
    if not sum(of_all):
        raise BadBatch("refit: the data holds no example; give batches of inputs")
    before = sum(of_all[: rank(work.group)])
    parts = [
        _Part(number, batch, before + sum(counts[:number]), count, inputs)
        for number, (batch, inputs, count) in enumerate(found)
    ]
    return _Examples(parts, sum(of_all))


def _split(batch: Batch, most: int) -> Iterator[tuple[int, Inputs, int]]:
    """The first examples of a batch, in parts: its number, inputs, their count; one part where first dims differ."""
    count = batch.examples
    alike = all(len(t) == count for t in tensors_in(batch.inputs) if t.ndim)
    step = PART if alike else max(count, 1)
    for begin in range(0, min(count, most), step):
        end = min(begin + step, count, most)

        def some(value: Any, begin: int = begin, end: int = end) -> Any:
            own = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
            return value[begin:end] if own else value

        yield batch.number, tree_map(some, batch.inputs), end - begin


class _Reached(BaseException):
    """A forward has come as far as it had to; no ``except Exception`` of a model's own keeps it from ending there."""


def _run_until(
    model: nn.Module, modules: Mapping[str, nn.Module], examples: _Examples, see: Callable[[str, _Part, Tensor], None]
) -> None:
    """Run every part as far as the last of some modules; ``see(name, part, input)`` is called before each of them."""
    with preserved(model, fast_path=False):
        for part in examples.parts:
            ahead = set(modules)

            def before(name: str, x: Any, part: _Part = part, ahead: set[str] = ahead) -> None:
                see(name, part, x)
                ahead.discard(name)
                if not ahead:
                    raise _Reached

            handles = [
                module.register_forward_pre_hook(
                    lambda _, a, k, name=name, before=before: before(name, first_argument(a, k)), with_kwargs=True
                )
                for name, module in modules.items()
            ]
            try:
                _forward(model, part)
            except _Reached:
                pass
            finally:
                for handle in handles:
                    handle.remove()


def _forward(model: nn.Module, part: _Part) -> None:
    """Run one part; each run begins with the same random state, and may write into its inputs."""
    inputs = tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, part.inputs)
    with fork_rng_of(model):
        outputs_of(lambda given: call_model(model, given), Batch(part.batch, inputs))


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
        name: COMPUTED if isinstance(module, MEASURED) else "it is transposed"
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


def _by_example(layer: Layer, x: Tensor, count: int) -> Tensor:
    """Inputs or outputs of a layer with the examples first, so that the last samples are of other examples."""
    if not layer.kernel and x.ndim > 2 and x.shape[0] != count and x.shape[1] == count:
        return x.transpose(0, 1)
    return x


def _places(layer: Layer, x: Tensor) -> torch.Size:
    """The shape of a layer's inputs without their channels."""
    return x.shape[:1] + x.shape[2:] if layer.kernel else x.shape[:-1]
