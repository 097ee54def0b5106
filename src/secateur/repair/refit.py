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

Of a bottleneck, which stands for a layer of the original (:mod:`secateur.surgery.low_rank.bottleneck`), the core is
fitted first, to what the last rotation ``R`` takes nearest to ``y``, which is ``R^+ (y - b)``; then that rotation and
the bias are, to ``y``.

Examples go once through each model: in small parts through the original, all together through the smaller one, where a
layer is fitted while the forward stands before it. Where memory is short (what is free is looked at), or where they
are of several shapes, they go through the smaller one in parts too: for every layer again, up to that layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.hooks import RemovableHandle

from secateur._internal.batches import Batch, Inputs, call_model, copied, first_argument, tensors_in
from secateur._internal.checks import check_count, check_nonnegative
from secateur._internal.distributed import Group, all_gather, all_reduce_, rank
from secateur._internal.errors import BadBatch, SecateurError
from secateur._internal.losses import outputs_of
from secateur._internal.memory import available
from secateur._internal.state import fork_rng_of, preserved
from secateur._internal.workload import Needs, Workload
from secateur.curvature.layers import (
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
    wide,
)
from secateur.curvature.passes import STRANGE
from secateur.plan import Plan
from secateur.repair.contract import LEFT_WHOLE, REPAIRS, Facts
from secateur.repair.recalibrate import has_statistics
from secateur.surgery.channels import check_plan
from secateur.surgery.low_rank.bottleneck import Bottleneck, three

DAMPING = 1e-3
HELD_OUT = 8
"""One in so many samples, the last ones, is held out to find the length of the step; of few samples 16, or half."""
PART = 128
"""So many examples go through a model at a time, at most."""
ON_THE_WAY, FREE = 2, 1 / 4
"""So much of the largest inputs and outputs of a layer is held at a time (there is a shortcut); of the free memory."""


def refit(
    model: nn.Module,
    small: nn.Module,
    plan: Plan,
    data: Iterable[Any],
    *,
    examples: int = 1024,
    positions: int | None = None,
    damping: float = DAMPING,
    together: int | None = None,
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
        together: so many examples go through the smaller model at a time; see :class:`Refit`.
        group: the processes, each with its shard of the data.
        progress: show how far it is.

    Returns:
        The layers and batch norms that stay as they are: path -> reason.

    Raises:
        SecateurError: models and plan that do not belong together, no data, layers whose outputs are not finite.
    """
    settings = Refit(examples=examples, positions=positions, damping=damping, together=together)
    return refitted(settings, model, small, plan, Workload(model, data, group=group, progress=progress))


@REPAIRS.register("refit")
@dataclass(frozen=True)
class Refit:
    """Fit the smaller model's layers, one after the other, to what the original computes; norms follow.

    Attributes:
        examples: how many are used.
        positions: of a layer's outputs, over all examples; by default four for each column and not less than 8192.
        damping: in units of the mean square of the layer's inputs.
        together: so many examples go through the smaller model at a time. By default all of them, once, which needs
            memory for what they are on the way; where that is more than a quarter of what is free, as many as need no
            more, which is told. Fewer than all need a forward for each layer, as far as that layer.
    """

    needs: ClassVar[Needs] = Needs(data=True, plan=True)
    examples: int = 1024
    positions: int | None = None
    damping: float = DAMPING
    together: int | None = None

    def __post_init__(self) -> None:
        check_count("examples", self.examples)
        check_count("positions", self.positions, optional=True)
        check_nonnegative("damping", self.damping)
        check_count("together", self.together, optional=True)

    def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> Facts:
        """See :func:`refit`."""
        return {LEFT_WHOLE: refitted(self, original, small, plan, work)}


def refitted(settings: Refit, model: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> dict[str, str]:
    """:func:`refit` at a table that is laid."""
    check_plan(model, plan)
    pairs, left = _pairs(model, small, plan)
    ones = {pair.one.name: pair.one for pair in pairs.values()}
    many = {name: settings.positions or max(8192, 4 * one.table().shape[-1]) for name, one in ones.items()}
    norms: dict[str, Any] = {name: m for name, m in small.named_modules() if has_statistics(m)}
    with torch.inference_mode(False), torch.no_grad():
        examples = _read(work, settings.examples, min(PART, settings.together or PART))
        originals = {name: m for name, m in model.named_modules() if name in norms}
        original = _Original(ones, originals, many, examples)
        work.together(lambda: original.watch(model))
        order, kept = original.order_of_all(work)
        together = settings.together or _at_a_time(original, work)

        def look(name: str, x: Tensor | None, some: _Examples) -> None:
            if x is None:
                return
            if name in pairs:
                seen[name].add(pairs[name], x, some, original)
            else:
                seen[name].moments += [_moments(part) for part in x.split(PART)]

        def step(name: str) -> None:
            if name in pairs:
                left.update(_fit(pairs[name], seen.pop(name, _Seen()), original, plan, settings.damping, work))
            else:
                _follow(name, norms[name], seen.pop(name, _Seen()), original, plan, work)

        seen: dict[str, _Seen] = defaultdict(_Seen)
        fitted: dict[str, dict[str, nn.Module]] = defaultdict(dict)
        for path, pair in pairs.items():
            fitted[pair.one.name][path] = pair.layer.module
        modules: dict[str, nn.Module] = {}
        for name in order:  # of the original
            modules |= fitted[name] if name in ones else {name: norms[name]}
        statistics = [t for norm in norms.values() for t in (norm.running_mean, norm.running_var)]
        parameters = list(small.parameters())
        before = [p.clone() for p in parameters]
        try:
            with preserved(small, fast_path=False):
                _step_by_step(small, modules, look, step, examples.chunks(together), work)
                followed = [t.clone() for t in statistics]
        except BaseException:
            for p, was in zip(parameters, before, strict=True):
                p.copy_(was)
            raise
        for t, found in zip(statistics, followed, strict=True):  # only now: until here all buffers come back
            t.copy_(found)
    return left | kept


def _at_a_time(original: _Original, work: Workload) -> int | None:
    """How many examples go through the smaller model at a time, so that they fit; None for all of them."""
    examples, free = original.examples, available(work.device)
    if free is None or not examples.parts:
        return None
    allowed = FREE * free / (work.processes if work.device.type == "cpu" else 1)
    needed = ON_THE_WAY * original.largest * examples.own
    if needed <= allowed:
        return None
    at_a_time = max(int(allowed / needed * examples.own), *(part.count for part in examples.parts))
    if len(examples.chunks(at_a_time)) == len(examples.chunks(None)):
        return None
    work.note(
        f"refit: {examples.own} examples at a time would need about {needed / 2**30:.3g} GiB on their way, more than a "
        f"quarter of what is free; they go {at_a_time} at a time, once for each layer, which takes longer: "
        "Refit(examples=...) takes fewer, Refit(together=...) decides"
    )
    return at_a_time


Look = Callable[[str, Tensor | None, "_Examples"], None]
"""To be called with what a module gets, and of which examples."""


def _step_by_step(
    small: nn.Module, modules: Mapping[str, nn.Module], look: Look, step: Callable[[str], None],
    chunks: list[_Examples], work: Workload,
) -> None:  # fmt: skip
    """Take the step of each module once the smaller model, fitted as far as that, has shown what the module gets.

    The steps are in one order on all processes; so is the way, which is the longer one if any of them needs it.
    """
    steps = work.tracked(modules, "refit", len(modules))
    most = max(torch.cat(all_gather(torch.tensor([len(chunks)], device=work.device), work.group)).tolist())
    if most > 1:
        for name in steps:
            work.together(lambda name=name: _up_to(small, name, modules[name], chunks, look))  # type: ignore[misc]
            step(name)
        return
    ahead = set(modules)

    def reached(name: str, x: Tensor | None) -> None:
        while name in ahead:  # what this process's examples do not reach is done without them
            now = next(steps)
            ahead.discard(now)
            if now == name:
                look(name, x, chunks[0])
            step(now)

    with _watched(modules, reached), _ConvolutionsInParts():
        for chunk in chunks:
            _forward(small, chunk.take())
    for name in steps:
        step(name)


def _up_to(small: nn.Module, name: str, module: nn.Module, chunks: list[_Examples], look: Look) -> None:
    """Let all chunks go through the smaller model as far as a module."""
    for chunk in chunks:

        def reached(name: str, x: Tensor | None, chunk: _Examples = chunk) -> None:
            look(name, x, chunk)
            raise _FarEnough

        with _watched({name: module}, reached), _ConvolutionsInParts(), suppress(_FarEnough):
            _forward(small, chunk.joined())


class _FarEnough(BaseException):
    """A forward has shown what was wanted; it is no error, which a model might catch."""


@contextmanager
def _watched(modules: Mapping[str, nn.Module], reached: Callable[[str, Tensor | None], None]) -> Iterator[None]:
    """Call with what each module gets, before it runs."""
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: reached(name, first_argument(args, kwargs)), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ConvolutionsInParts(TorchFunctionMode):
    """Convolutions of many examples are computed for some at a time: what they need besides their output is large."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _CONVOLUTIONS or not args or args[0].ndim != 2 + _CONVOLUTIONS[func] or len(args[0]) <= PART:
            return func(*args, **kwargs)
        x, *rest = args
        first = func(x[:PART], *rest, **kwargs)
        last = first.ndim == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
        whole = torch.empty(
            len(x), *first.shape[1:], dtype=first.dtype, device=first.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )  # fmt: skip
        whole[:PART] = first
        for begin in range(PART, len(x), PART):
            whole[begin : begin + PART] = func(x[begin : begin + PART], *rest, **kwargs)
        return whole


_CONVOLUTIONS = {
    F.conv1d: 1, F.conv2d: 2, F.conv3d: 3, F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Pair:
    """A layer of the smaller model, and the layer of the original whose outputs it is fitted to.

    Attributes:
        one: of the original.
        layer: of the smaller model.
        last: of a core: the rotation behind it.
        of_bottleneck: whether it is a part of a bottleneck.
    """

    one: Layer
    layer: Layer
    last: Any = None
    of_bottleneck: bool = False

    def targets(self, y: Tensor) -> Tensor:
        """What it should give where the original gives ``y`` [groups, samples, rows]."""
        if self.last is None:
            return y
        y = y.double() if self.last.bias is None else y.double() - self.last.bias.double()
        return y @ torch.linalg.pinv(self.last.weight.double().flatten(1)).mT


@dataclass(eq=False)
class _Seen:
    """What a layer or a norm of the smaller model gets.

    Attributes:
        samples: of a layer: of its inputs, [groups, samples, columns] by the number of the part.
        other: of a layer: whether some examples got it at other positions than in the original.
        moments: of a norm: see :func:`_moments`.
    """

    samples: dict[int, Tensor] = field(default_factory=dict)
    other: bool = False
    moments: list[Tensor] = field(default_factory=list)

    def add(self, pair: _Pair, x: Tensor, examples: _Examples, original: _Original) -> None:
        """What a layer gets from these examples."""
        name, layer = pair.one.name, pair.layer
        x = _by_example(layer, x, examples.own)
        for part, some in examples.split(x):
            choice = examples.choice(part, original.many[name])
            self.samples[part.number] = input_samples_at(layer, wide(some), choice)
        if not pair.of_bottleneck:  # whose parts have positions of their own
            self.other |= _places(layer, x) != original.places_of(name, examples)


def _fit(pair: _Pair, seen: _Seen, original: _Original, plan: Plan, damping: float, work: Workload) -> dict[str, str]:
    """Fit a layer to what the original's computes, by the inputs that it gets; if it stays as it is, why."""
    name, one, layer = pair.one.name, pair.one, pair.layer
    samples = [seen.samples[number] for number in sorted(seen.samples)]
    outputs = original.outputs.pop(name, []) if pair.last is None else original.outputs[name]
    alike = not seen.other and sum(x.shape[1] for x in samples) == sum(y.shape[1] for y in outputs)
    same = torch.tensor(int(alike), device=work.device)
    if int(all_reduce_(same, work.group)) < work.processes:
        return {layer.name: "the forward takes it to other positions than in the original"}
    table = layer.table().double().squeeze(2)
    missing = plan.slices.get(_of(name, "weight"), {}).get(int(layer.transposed), [])
    x = _gathered(samples, wide(layer.table()[:, :0, 0]), work)
    y = _gathered(outputs, wide(one.table()[:, :, 0, :0].mT), work)
    y = _without(y.transpose(1, 2).flatten(0, 1), missing).unflatten(0, (layer.groups, -1)).transpose(1, 2)
    step = least_squares(x, pair.targets(y), table, damping, layer.name)
    new, bias = layer.weights((table + step).unsqueeze(2))
    layer.module.weight.copy_(new)
    if bias is not None:
        layer.module.bias.copy_(bias)
    return {}


def _gathered(parts: list[Tensor], none: Tensor, work: Workload) -> Tensor:
    """Samples [groups, samples, width] of all processes, in the order of their ranks; ``none`` has no samples."""
    own = torch.cat([none, *parts], 1)
    return torch.cat([t.transpose(0, 1) for t in all_gather(own.transpose(0, 1).contiguous(), work.group)], 1)


def _follow(
    name: str, norm: Any, seen: _Seen, original: _Original, plan: Plan, work: Workload
) -> None:  # fmt: skip
    """Let the statistics of a batch norm follow what the examples show in both models."""
    missing = plan.slices.get(_of(name, "running_mean"), {}).get(0, [])
    channels = len(norm.running_mean)
    then = _without(_combined(original.moments.pop(name, []), channels + len(missing), work), missing)
    now = _combined(seen.moments, channels, work)
    norm.running_mean += now[:, 1] - then[:, 1]
    norm.running_var *= (now[:, 2] / then[:, 2].clamp(min=1e-12)).clamp(max=1e6)


def _moments(x: Tensor) -> Tensor:
    """How many numbers a channel has, their mean and their variance, float64 [channels, 3]."""
    dims, x = [d for d in range(x.ndim) if d != 1], wide(x)
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square_().mean(dims)  # `var` is ten times slower
    return torch.stack([torch.full_like(variance, x.numel() / x.shape[1]), mean.flatten(), variance], 1).double()


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
        largest: bytes of the inputs and outputs of a layer for an example, at most.
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
    largest: float = 0.0

    def places_of(self, name: str, examples: _Examples) -> torch.Size | None:
        """The shape for some examples together; None if that of their parts differs."""
        found = [of for part in examples.parts if (of := self.places[name].get(part.number)) is not None]
        if len(found) < len(examples.parts):
            return None
        alike = all(shape[1:] == found[0][1:] for shape in found)
        return torch.Size([sum(shape[0] for shape in found), *found[0][1:]]) if alike else None

    def watch(self, model: nn.Module) -> None:
        """Run the model."""
        with preserved(model, fast_path=False):
            for part in self.examples.parts:
                calls: Counter[str] = Counter()
                handles = self._attach(part, calls)
                try:
                    _forward(model, replace(part, inputs=copied(part.inputs)))
                finally:
                    for handle in handles:
                        handle.remove()
                self.calls |= calls

    def _attach(self, part: _Part, calls: Counter[str]) -> list[RemovableHandle]:
        def runs(name: str) -> None:
            calls[name] += 1
            if name not in self.order:
                self.order.append(name)

        def layer_ran(name: str, x: Any, y: Any) -> None:
            runs(name)
            layer = self.layers[name]
            if name in self.strange or not computes_its_weight(layer, x, y):
                self.strange.add(name)
                return
            x, y = _by_example(layer, x, part.count), _by_example(layer, y, part.count)
            self.largest = max(self.largest, (x.nbytes + y.nbytes) / max(p.count for p in self.examples.parts))
            self.places[name][part.number] = _places(layer, x)
            self.outputs[name].append(output_samples_at(layer, wide(y), self.examples.choice(part, self.many[name])))

        def norm_runs(name: str, x: Tensor) -> None:
            runs(name)
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

    def order_of_all(self, work: Workload) -> tuple[list[str], dict[str, str]]:
        """What is to be done, in the order of the forward; and what stays as it is, why: the same on all processes."""
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
        own = torch.tensor([names.index(name) for name in self.order], dtype=torch.int64, device=work.device)
        merged: list[int] = []
        for found in all_gather(own, work.group):
            at = 0
            for number in found.tolist():
                if number not in merged:  # what other processes did not reach, where this one did
                    merged.insert(at, number)
                at = max(at, merged.index(number) + 1)
        return [name for number in merged if (name := names[number]) not in left], left


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


@dataclass(eq=False)
class _Examples:
    """The parts of this process, how many examples these are, and how many all processes have."""

    parts: list[_Part]
    own: int
    total: int

    def chunks(self, together: int | None) -> list[_Examples]:
        """Those whose inputs are of the same shapes, so many at a time."""
        alike: dict[Any, list[_Part]] = {}
        for part in self.parts:
            alike.setdefault(_shapes(part), []).append(part)
        found: list[_Examples] = []
        for parts in alike.values():
            some: list[_Part] = []
            for part in parts:
                if some and together is not None and sum(p.count for p in some) + part.count > together:
                    found.append(_Examples(some, sum(p.count for p in some), self.total))
                    some = []
                some = [*some, part]
            found.append(_Examples(some, sum(p.count for p in some), self.total))
        return found

    def take(self) -> _Part:
        """All parts as one, which have no inputs from then on."""
        joined = self.joined()
        self.parts = [replace(part, inputs=None) for part in self.parts]
        return joined

    def joined(self) -> _Part:
        """All parts as one. Inputs whose first dim is not that of the examples are taken from the first part."""
        counts = [part.count for part in self.parts]

        def join(*tensors: Any) -> Any:
            same = [isinstance(t, Tensor) and t.ndim > 0 and len(t) == n for t, n in zip(tensors, counts, strict=True)]
            if all(same):
                return torch.cat(tensors)
            return tensors[0].clone() if isinstance(tensors[0], Tensor) else tensors[0]

        return replace(self.parts[0], count=self.own, inputs=tree_map(join, *(part.inputs for part in self.parts)))

    def split(self, x: Tensor) -> Iterator[tuple[_Part, Tensor]]:
        """Each part's share of what a layer of the joined parts gets; it is as long as a multiple of the examples."""
        each, rest = divmod(len(x), self.own)
        if rest:
            yield replace(self.parts[0], count=self.own), x
        else:
            yield from zip(self.parts, x.split([each * part.count for part in self.parts]), strict=True)

    def choice(self, part: _Part, many: int) -> Choice:
        """Which of a part's positions are looked at: spread over those of all examples."""

        def chosen(positions: int) -> Tensor:
            first = part.first * positions // part.count
            of_all = spread(self.total * positions // part.count, many)
            return of_all[(of_all >= first) & (of_all < first + positions)] - first

        return chosen


def _shapes(part: _Part) -> Any:
    """What the inputs of parts that are joined have in common: their structure, and all dims but the examples'."""
    leaves, structure = tree_flatten(part.inputs)
    shapes = [
        (leaf.shape[1:] if leaf.ndim and len(leaf) == part.count else leaf.shape, leaf.dtype)
        if isinstance(leaf, Tensor)
        else None
        for leaf in leaves
    ]
    return str(structure), tuple(shapes)


def _read(work: Workload, examples: int, most: int = PART) -> _Examples:
    """This process's share of so many examples."""
    wanted = examples // work.processes + (rank(work.group) < examples % work.processes)

    def read() -> list[tuple[int, Inputs, int]]:
        found: list[tuple[int, Inputs, int]] = []
        for batch in work.batches(None, "refit, examples"):
            found += _split(batch, wanted - sum(count for *_, count in found), most)
            if sum(count for *_, count in found) >= wanted:
                break
        return found

    with fork_rng_of(work.model.parameters()):  # a loader may draw the order of its batches
        found = work.together(read)
    counts = [count for *_, count in found]
    of_all = torch.cat(all_gather(torch.tensor([sum(counts)], device=work.device), work.group)).tolist()
    if not sum(of_all):
        raise BadBatch("refit: the data holds no example; give batches of inputs")
    before = sum(of_all[: rank(work.group)])
    parts = [
        _Part(number, batch, before + sum(counts[:number]), count, inputs)
        for number, (batch, inputs, count) in enumerate(found)
    ]
    return _Examples(parts, sum(counts), sum(of_all))


def _split(batch: Batch, most: int, part: int) -> Iterator[tuple[int, Inputs, int]]:
    """The first examples of a batch, in parts: its number, inputs, their count; one part where first dims differ."""
    count = batch.examples
    alike = all(len(t) == count for t in tensors_in(batch.inputs) if t.ndim)
    step = part if alike else max(count, 1)
    for begin in range(0, min(count, most), step):
        end = min(begin + step, count, most)

        def some(value: Any, begin: int = begin, end: int = end) -> Any:
            own = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
            return value[begin:end] if own else value

        yield batch.number, tree_map(some, batch.inputs), end - begin


def _forward(model: nn.Module, part: _Part) -> None:
    """Run one part."""
    outputs_of(partial(call_model, model), Batch(part.batch, part.inputs))


# --------------------------------------------------------------------------------------------------- models and inputs


def _pairs(model: nn.Module, small: nn.Module, plan: Plan) -> tuple[dict[str, _Pair], dict[str, str]]:
    """The layers of the smaller model that can be fitted, by their paths; and why others cannot."""
    for what, given in (("model", model), ("small", small)):
        if not isinstance(given, nn.Module):
            raise SecateurError(f"refit({what}={given!r}): a module is expected")
    if {id(p) for p in model.parameters()} & {id(p) for p in small.parameters()}:
        raise SecateurError("refit: both models share parameters, and the original must stay as it is; cut a copy")
    ones = {layer.name: layer for layer in layers_of(model, "full", transposed=True)}
    others = {name: m for name, m in small.named_modules() if isinstance(m, (*MEASURED, *TRANSPOSED, Bottleneck))}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    left = {
        name: "it is transposed, in groups"
        if getattr(module, "groups", 1) > 1 and isinstance(module, TRANSPOSED)
        else COMPUTED
        for name, module in model.named_modules()
        if isinstance(module, (*MEASURED, *TRANSPOSED)) and name not in ones
    }
    pairs: dict[str, _Pair] = {}
    parts = {
        f"{path}.{number}": path
        for path, m in model.named_modules()
        if isinstance(m, Bottleneck)
        for number in m._modules
    }
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
        other, path = others.get(name), name
        if name in parts:  # of a bottleneck of the original, whose last rotation gives what it stands for
            path = parts[name]
            other = others.get(path)
            if isinstance(other, Bottleneck) and three(model.get_submodule(path))[2] is not module:
                continue
        if isinstance(other, Bottleneck):
            _, core, last = three(other)
            if measurable(core) and measurable(last) and Layer("", core, "full").groups == 1 == layer.groups:
                behind = None if last is core else last
                pairs[f"{path}.1"] = _Pair(layer, Layer(f"{path}.1", core, "full"), behind, of_bottleneck=True)
                if last is not core:
                    pairs[f"{path}.2"] = _Pair(layer, Layer(f"{path}.2", last, "full"), of_bottleneck=True)
            else:
                left[path] = "the core of its bottleneck is no plain layer"
            continue
        if other is None or list(other.weight.shape) != shape:
            found = "no such layer" if other is None else f"shape {list(other.weight.shape)}"
            raise SecateurError(f"refit: the plan leaves {name!r} with shape {shape}, the smaller model has {found}")
        for what in ("dtype", "device"):
            if getattr(other.weight, what) != getattr(module.weight, what):
                raise SecateurError(
                    f"refit: {name!r} has {what} {getattr(module.weight, what)} in the original and "
                    f"{getattr(other.weight, what)} in the smaller model; refit first, then change it"
                )
        pairs[name] = _Pair(layer, Layer(name, other, "full"))
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
