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

What a layer's outputs are added to, as in residual blocks, is known when it is fitted; what is missing there is asked
of it (:mod:`secateur.repair.sums`), and a batch norm between them keeps its variance::

    y + (v - v') / a     in place of y, where the model computes (a y + b) + v

No label is needed, and where the cut changes nothing, nothing changes.

Of a bottleneck, which stands for a layer of the original (:mod:`secateur.surgery.low_rank.bottleneck`), the core is
fitted first, to what the last rotation ``R`` takes nearest to ``y``, which is ``R^+ (y - b)``; then that rotation and
the bias are, to ``y``.

A norm over channels has a weight, and a bias, for each: a linear of one input, what it normalises. What runs several
times in a forward, or shares its weight, is fitted to all that it computes there. Of a layer with weights in dense
blocks alone each block is fitted. Queries and keys that lose numbers: :mod:`secateur.repair.logits`.

Examples go once through each model: in small parts through the original, all together through the smaller one, where a
layer is fitted while the forward stands before it. Where memory is short (what is free is looked at), or where they
are of several shapes, they go through the smaller one in parts too: for every layer again, up to that layer.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from secateur._internal.batches import copied, first_argument
from secateur._internal.checks import check_count, check_nonnegative
from secateur._internal.distributed import Group, all_gather, all_reduce_
from secateur._internal.errors import SecateurError
from secateur._internal.memory import available
from secateur._internal.state import preserved
from secateur._internal.workload import Needs, Workload
from secateur.curvature.layers import (
    Layer,
    wide,
)
from secateur.curvature.passes import STRANGE
from secateur.curvature.projections import projections
from secateur.plan import Plan
from secateur.repair.contract import LEFT_WHOLE, REPAIRS, Facts
from secateur.repair.examples import PART, Examples, Part, forward_part, read_examples
from secateur.repair.logits import turns
from secateur.repair.pairs import Pair, Scale, check_models, computes, inputs_at, outputs_at, pairs_of, tensor_of
from secateur.repair.recalibrate import has_statistics
from secateur.repair.sums import Added, Outputs, Sums
from secateur.surgery.blocks.pattern import Pattern
from secateur.surgery.channels import check_plan

DAMPING = 1e-3
HELD_OUT = 8
"""One in so many samples, the last ones, is held out to find the length of the step; of few samples 16, or half."""
DAMPED = (1, 10, 100, 1000)
"""So many times the damping is tried, and what is held out says which is best: few examples want more of it."""
FEWEST = 256
"""So many examples are enough where memory has no room for more; fewer go in parts, which takes a forward a layer."""
ON_THE_WAY, FREE = 2, 1 / 2
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
        damping: in units of the mean square of the layer's inputs; the least that is tried (:data:`DAMPED`).
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
        damping: in units of the mean square of the layer's inputs; the least that is tried (:data:`DAMPED`).
        together: so many examples go through the smaller model at a time. By default all of them, once, which needs
            memory for what they are on the way; where that is more than half of what is free, as many as need no
            more: the first ones alone where these are 256 or more, of one shape and in one process; else in parts. It
            is told. Fewer than all need a forward for each layer, as far as that layer.
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
    check_models(model, small)
    with projections(model), projections(small):
        return _refitted(settings, model, small, plan, work)


def _refitted(settings: Refit, model: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> dict[str, str]:
    pairs, left = pairs_of(model, small, plan)
    places = {pair.name: pair.ones for pair in pairs}
    many = {
        pair.name: settings.positions or max(8192, 4 * (pair.one.table().shape[-1] + len(pair.biases)))
        for pair in pairs
    }
    norms: dict[str, Any] = {name: m for name, m in small.named_modules() if has_statistics(m)}
    with torch.inference_mode(False), torch.no_grad():
        examples = read_examples(work, settings.examples, min(PART, settings.together or PART))
        originals = {name: m for name, m in model.named_modules() if name in norms}
        original = _Original(places, originals, dict(many), examples)
        work.together(lambda: original.watch(model))
        together = settings.together or _at_a_time(original, work)
        if settings.together is None and _enough(together, examples, work):
            assert together is not None
            examples, together = examples.first(together), None
            original = _Original(places, originals, dict(many), examples)
            original.watch(model)
        order, several, kept = original.order_of_all(work)
        doable = [pair for pair in pairs if pair.name in order and pair.name not in several]
        turned = turns(model, plan, doable, original.outputs, examples.parts, work)
        added = original.sums_of_all(work, {p.name for p in doable if _may_make_up(p, turned)})
        normed = original.normed_of_all(work, {p.name for p in doable if not p.biases})
        jobs: dict[str, list[_Job]] = defaultdict(list)
        before_norm: dict[str, _Fit] = {}
        for pair in pairs:
            of = added.get(pair.name) if pair.last is None else None
            centred = pair.name in normed and pair.last is None
            fit = _Fit(pair, original, plan, settings.damping, work, turned.get(pair.name), of, centred)
            modules = [layer.module for layer in pair.layers]
            between = [] if of is None or of.norm is None else [of.norm]
            before_norm |= dict.fromkeys(between, fit)
            behind = [norms[norm] for norm in between]
            jobs[pair.name].append(_Job(pair.layer.name, modules, fit, pair.name in several, behind))
        for name, norm in norms.items():
            follow = _Follow(name, norm, original, plan, work, before_norm.get(name))
            jobs[name].append(_Job(name, [norm], follow, name in several))
        statistics = [t for norm in norms.values() for t in (norm.running_mean, norm.running_var)]
        parameters = list(small.parameters())
        before = [p.clone() for p in parameters]
        try:
            with preserved(small, fast_path=False):
                in_order = [job for name in order for job in jobs[name]]
                left |= _one_after_another(small, in_order, examples.chunks(together), work)
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
    much = (
        f"refit: {examples.own} examples at a time would need about {needed / 2**30:.3g} GiB on their way, more than "
        "half of what is free; "
    )
    work.note(
        f"{much}the first {examples.first(at_a_time).own} are taken: Refit(together={at_a_time}) takes all, so "
        "many at a time, which needs a forward for each layer"
        if _enough(at_a_time, examples, work)
        else f"{much}they go {at_a_time} at a time, once for each layer, which takes longer: Refit(examples=...) takes "
        "fewer, Refit(together=...) decides"
    )
    return at_a_time


def _enough(at_a_time: int | None, examples: Examples, work: Workload) -> bool:
    """Whether as many as memory has room for are taken, and no more: enough of one shape, in one process."""
    if at_a_time is None or work.processes > 1 or len(examples.chunks(None)) > 1:
        return False
    return examples.first(at_a_time).own >= FEWEST


# ------------------------------------------------------------------------------------ the way through the smaller model


@dataclass(frozen=True, eq=False)
class _Job:
    """What is done with a layer, or a norm, of the smaller model when its turn comes.

    Attributes:
        name: its path.
        modules: what runs wherever it is used: one module, or all that share its weight.
        task: what is done.
        several: whether it runs several times in a forward.
        norms: the batch norm, if any, between a layer and what its outputs are added to.
    """

    name: str
    modules: Sequence[nn.Module]
    task: _Fit | _Follow
    several: bool
    norms: Sequence[nn.Module] = ()


def _one_after_another(
    small: nn.Module, jobs: Sequence[_Job], chunks: list[Examples], work: Workload
) -> dict[str, str]:
    """Do each job once the smaller model, fitted as far as that, has shown what its modules get; what stays, why.

    The jobs are in one order on all processes. As many as can be are done on one way through the model; what runs
    several times is seen on a way of its own, and everything is if any process has several chunks.
    """
    left: dict[str, str] = {}
    most = max(torch.cat(all_gather(torch.tensor([len(chunks)], device=work.device), work.group)).tolist())
    progress = iter(work.tracked(jobs, "refit", len(jobs)))

    def do(job: _Job) -> None:
        next(progress)
        why = _done_if_nearer(small, job, chunks, work) if job.several else job.task.take()
        if why is not None:
            left[job.name] = why
        job.task.forget()

    at = 0
    while at < len(jobs):
        if jobs[at].several or most > 1:
            work.together(lambda job=jobs[at]: _ways_to(small, job, chunks))  # type: ignore[misc]
            do(jobs[at])
            at += 1
        else:
            until = next((n for n, job in enumerate(jobs) if n > at and job.several), len(jobs))
            _one_way(small, jobs[at:until], jobs[until:], chunks, do)
            at = until
    next(progress, None)
    return left


def _one_way(
    small: nn.Module, jobs: Sequence[_Job], later: Sequence[_Job], chunks: list[Examples], do: Callable[[_Job], None]
) -> None:
    """Do jobs while a forward stands before their modules, as far as the first of those that come later.

    A layer whose outputs are added to something is done before the sum, and computed again with its new weights.
    """
    ahead = list(jobs)
    waiting: _Waiting | None = None

    def reached(job: _Job, use: int, x: Tensor | None) -> None:
        nonlocal waiting
        if waiting is not None:
            if job is waiting.norm:
                return
            settle(None)  # what it is added to did not come
        while job in ahead:  # what this process's examples do not reach is done without them
            now = ahead[0]
            if now is job and x is not None:
                now.task.look(use, x, chunks[0])
                if isinstance(now.task, _Fit) and now.task.added is not None:
                    norm = next((j for j in ahead if isinstance(j.task, _Follow) and j.task.before is now.task), None)
                    waiting = _Waiting(now, norm, x)
                    return
            do(ahead.pop(0))
        if job in later:
            raise _FarEnough

    def settle(other: Tensor | None) -> Tensor:
        """Do the layer that waits, and its norm; what it gives then."""
        nonlocal waiting
        assert waiting is not None
        now, waiting = waiting, None
        if other is not None:
            now.fit.look_other(other, chunks[0])
        ahead.remove(now.job)
        do(now.job)
        y: Tensor = now.job.modules[0].forward(now.x)  # its hooks have run
        if now.norm is not None:
            now.norm.task.look(0, y, chunks[0])
            ahead.remove(now.norm)
            do(now.norm)
            y = now.norm.modules[0].forward(y)
        return y

    def summed(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        if waiting is None or waiting.u is None:
            return first, second
        if first is waiting.u:
            return settle(second).to(first.dtype), second
        return (first, settle(first).to(second.dtype)) if second is waiting.u else (first, second)

    def gave(job: _Job, y: Any) -> None:
        if waiting is not None and isinstance(y, Tensor):
            waiting.u = y

    watched = _watched([*jobs, *later[:1]], reached, gave)
    with watched, _ConvolutionsInParts(), Sums(summed), suppress(_FarEnough):
        for chunk in chunks:
            forward_part(small, chunk.joined() if later else chunk.take())
    if waiting is not None:
        settle(None)
    for job in ahead:
        do(job)


@dataclass(eq=False)
class _Waiting:
    """A layer that has seen its inputs, and waits for what its outputs are added to.

    Attributes:
        job: of the layer.
        norm: the job of the batch norm between it and the sum.
        x: its inputs.
        u: what is added: its outputs, or what the norm makes of them.
    """

    job: _Job
    norm: _Job | None
    x: Tensor
    u: Tensor | None = None

    @property
    def fit(self) -> _Fit:
        """What is done with the layer."""
        assert isinstance(self.job.task, _Fit)
        return self.job.task


def _ways_to(small: nn.Module, job: _Job, chunks: list[Examples]) -> None:
    """Let all chunks go through the smaller model as far as a module, or to the end where it runs several times."""
    for chunk in chunks:
        waiting: list[_Waiting] = []

        def reached(
            job: _Job, use: int, x: Tensor | None, chunk: Examples = chunk, waiting: list[_Waiting] = waiting
        ) -> None:
            if x is not None:
                job.task.look(use, x, chunk)
                if isinstance(job.task, _Fit) and job.task.added is not None:
                    waiting.append(_Waiting(job, None, x))
                    return
            if not job.several:
                raise _FarEnough

        def gave(_: _Job, y: Any, waiting: list[_Waiting] = waiting) -> None:
            if waiting and isinstance(y, Tensor):
                waiting[-1].u = y

        def summed(
            first: Tensor, second: Tensor, chunk: Examples = chunk, waiting: list[_Waiting] = waiting
        ) -> tuple[Tensor, Tensor]:
            if waiting and (first is waiting[-1].u or second is waiting[-1].u):
                waiting[-1].fit.look_other(second if first is waiting[-1].u else first, chunk)
                raise _FarEnough
            return first, second

        with _watched([job], reached, gave), _ConvolutionsInParts(), Sums(summed), suppress(_FarEnough):
            forward_part(small, chunk.joined())


def _done_if_nearer(small: nn.Module, job: _Job, chunks: list[Examples], work: Workload) -> str | None:
    """Do a job; undo it if it takes what runs several times further away, whose inputs may depend on what it gave."""
    parameters = [p for module in job.modules for p in module.parameters()]
    before, distance = [p.clone() for p in parameters], job.task.distance()
    why = job.task.take()
    if why is not None or distance is None:
        return why
    work.together(lambda: _ways_to(small, job, chunks))
    now = job.task.distance()
    if work.agree(now is not None and now <= max(distance, ROUNDING)):
        return None
    for p, was in zip(parameters, before, strict=True):
        p.copy_(was)
    torch.clear_autocast_cache()  # which holds copies of what they were
    return "it gets its own outputs, and fitted to what it got it comes no closer"


class _FarEnough(BaseException):
    """A forward has shown what was wanted; it is no error, which a model might catch."""


ROUNDING = 1e-6
"""Where no more of a layer's outputs is missing, nothing is."""


@contextmanager
def _watched(
    jobs: Sequence[_Job], reached: Callable[[_Job, int, Tensor | None], None], gave: Callable[[_Job, Any], None]
) -> Iterator[None]:
    """Call with what each module gets, and of which use it is, before it runs; and with what those give that wait."""
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, job=job, use=use: reached(job, use, first_argument(args, kwargs)), with_kwargs=True
        )
        for job in jobs
        for use, module in enumerate(job.modules)
    ]
    handles += [
        module.register_forward_hook(lambda _, args, y, job=job: gave(job, y), prepend=True)
        for job in jobs
        if isinstance(job.task, _Fit) and job.task.added is not None
        for module in (job.modules[0], *job.norms)
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


# ------------------------------------------------------------------------------------------------- a layer and a norm


Run = tuple[int, int, int]
"""One run of a layer: of which part, at which of its uses, and how many times it ran there before."""


@dataclass(eq=False)
class _Fit:
    """A layer of the smaller model fitted to what the original's computes, by the inputs that it gets.

    Attributes:
        pair: the layer, and the original's.
        original: what that computes.
        plan: what was removed.
        damping: see :class:`Refit`.
        work: the processes.
        turn: of queries or keys that lose numbers: by what the original's outputs are multiplied, [rows, rows left].
        added: where its outputs are added to something, if they are.
        centred: whether a batch norm follows, which takes the mean: the layer has no bias and need not.
        samples: of its inputs, [groups, samples, columns].
        elsewhere: whether some examples came to it at other positions than in the original.
        others: samples of what is added to its outputs, [groups, samples, rows].
        other_moments: of the same, see :func:`_moments`.
        makes_up: whether it was fitted to make up for what is missing there.
    """

    pair: Pair
    original: _Original
    plan: Plan
    damping: float
    work: Workload
    turn: Tensor | None = None
    added: Added | None = None
    centred: bool = False
    samples: dict[Run, Tensor] = field(default_factory=dict)
    elsewhere: bool = False
    others: dict[Run, Tensor] = field(default_factory=dict)
    other_moments: list[Tensor] = field(default_factory=list)
    makes_up: bool = False

    def look(self, use: int, x: Tensor, examples: Examples) -> None:
        """Take what it gets from these examples."""
        name, layer = self.pair.name, self.pair.layers[use]
        before = sum((part, of) == (examples.parts[0].number, use) for part, of, _ in self.samples)
        x = x.transpose(0, 1) if (name, use, before) in self.original.turned else x
        for part, some in examples.split(x):
            choice = examples.choice(part, self.original.many[name])
            samples = inputs_at(layer, some, choice)
            self.samples[part.number, use, before] = self.pair.inputs(use, samples)
        if not self.pair.of_bottleneck:  # whose parts have positions of their own
            self.elsewhere |= _places(layer, x) != self.original.places_of(name, examples, use, before)

    def look_other(self, v: Tensor, examples: Examples) -> None:
        """Take what is added to its outputs for these examples."""
        assert self.added is not None
        name, layer = self.pair.name, self.pair.layer
        v = v.transpose(0, 1) if (name, 0, 0) in self.original.turned else v
        for part, some in examples.split(v):
            choice = examples.choice(part, self.original.many[name])
            self.others[part.number, 0, 0] = outputs_at(layer, some, choice)
        if self.added.norm is not None:
            self.other_moments += [_moments(some) for some in v.split(PART)]

    def take(self) -> str | None:
        """Fit it; if it stays as it is, why."""
        if self.turn is not None:
            self.pair.write(self._turned())
        found = self._inputs_and_targets()
        self.samples, self.others, self.elsewhere = {}, {}, False
        if found is None:
            turned = "" if self.turn is None else "; it is turned to the nearest products, and not fitted"
            return f"the forward takes it to other positions than in the original{turned}"
        (x, y), table, pair = found, self.pair.table(), self.pair
        if self.centred:
            x, y = x.double() - x.double().mean(1, keepdim=True), y.double() - y.double().mean(1, keepdim=True)
        if pair.blocks is None:
            counts = self._kept(self.added.factor) if self.added is not None and self.makes_up else None
            step = least_squares(x, y, table, self.damping, pair.layer.name, counts)
        else:
            step = _in_blocks(pair.blocks, len(pair.biases), x, y, table, self.damping, pair.layer.name)
        pair.write(table + step)
        return None

    def distance(self) -> float | None:
        """How far it is from what it should compute, in units of that; what it got is kept until it is fitted."""
        found = self._inputs_and_targets()
        if found is None:
            return None
        x, y = found[0].double(), found[1].double()
        return float((y - x @ self.pair.table().mT).norm() / y.norm().clamp(min=1e-300))

    def forget(self) -> None:
        """It is done, so what the original computes is needed no longer."""
        self.samples, self.others = {}, {}
        if self.pair.last is None:
            self.original.outputs.pop(self.pair.name, None)
            self.original.others.pop(self.pair.name, None)

    def _inputs_and_targets(self) -> tuple[Tensor, Tensor] | None:
        """Samples of all processes, of which it makes nothing if any process's do not belong together."""
        pair, work = self.pair, self.work
        outputs = self.original.outputs.get(pair.name, {})
        runs = sorted(self.samples)
        alike = not self.elsewhere and runs == sorted(outputs)
        alike = alike and all(self.samples[run].shape[1] == outputs[run].shape[1] for run in runs)
        same = torch.tensor(int(alike), device=work.device)
        if int(all_reduce_(same, work.group)) < work.processes:
            return None
        none = F.pad(wide(pair.layer.table()[:, :0, 0]), (0, len(pair.biases)))
        x = _gathered(_by_examples(self.samples), none, work)
        y = _gathered(_by_examples(outputs), wide(pair.one.table()[:, :, 0, :0].mT), work)
        if self.turn is not None:
            return x, y.double() @ self.turn
        y = self._kept(y.transpose(1, 2)).transpose(1, 2)
        return x, pair.targets(y if self.added is None else self._made_up(y, runs))

    def _made_up(self, y: Tensor, runs: list[Run]) -> Tensor:
        """The targets [groups, samples, rows], and what is missing in what they are added to."""
        pair, work, added = self.pair, self.work, self.added
        assert added is not None
        then = self.original.others.get(pair.name, {})
        alike = sorted(self.others) == sorted(then) == runs
        alike = alike and all(self.others[run].shape[1] == then[run].shape[1] for run in runs)
        same = torch.tensor(int(alike), device=work.device)
        self.makes_up = int(all_reduce_(same, work.group)) == work.processes
        if not self.makes_up:
            return y
        none = wide(pair.one.table()[:, :, 0, :0].mT)
        v = self._kept(_gathered(_by_examples(then), none, work).transpose(1, 2)).transpose(1, 2)
        now = _gathered(_by_examples(self.others), v[:, :0], work)
        missing = (v.double() - now.double()) / self._kept(added.factor)[:, None]
        return y.double() + torch.where(self._kept(added.asked)[:, None], missing, 0.0)

    def _kept(self, rows: Tensor) -> Tensor:
        """Of rows of the original, [groups, rows, ...], those that are left, likewise."""
        missing = self.plan.slices.get(self.pair.one.parameter("weight"), {}).get(int(self.pair.layer.transposed), [])
        return _without(rows.flatten(0, 1), missing).unflatten(0, (self.pair.layer.groups, -1))

    def _turned(self) -> Tensor:
        """The original's weight and bias in the columns that are left, multiplied like its outputs."""
        one, layer = self.pair.one, self.pair.layer
        gone = self.plan.slices.get(one.parameter("weight"), {}).get(1 - int(layer.transposed), [])
        table = _without(one.table()[0, :, 0].mT, gone).mT
        if one.module.bias is not None:
            table = torch.cat([table, one.module.bias[:, None]], 1)
        assert self.turn is not None
        return (self.turn.mT @ table.double())[None]


def _by_examples(samples: Mapping[Run, Tensor]) -> list[Tensor]:
    """Samples [groups, samples, width] in the order of their examples, and not of the runs that an example sees.

    So the last ones, which are held out, are of other examples than those before them.
    """
    runs: dict[int, list[Tensor]] = defaultdict(list)
    for run in sorted(samples):
        runs[run[0]].append(samples[run])
    found: list[Tensor] = []
    for of in runs.values():
        slices = [x.tensor_split(2 * HELD_OUT if len(of) > 1 else 1, 1) for x in of]
        found += [x for some in zip(*slices, strict=True) for x in some]
    return found


def _gathered(parts: list[Tensor], none: Tensor, work: Workload) -> Tensor:
    """Samples [groups, samples, width] of all processes, in the order of their ranks; ``none`` has no samples."""
    own = torch.cat([none, *parts], 1)
    return torch.cat([t.transpose(0, 1) for t in all_gather(own.transpose(0, 1).contiguous(), work.group)], 1)


@dataclass(eq=False)
class _Follow:
    """A batch norm whose statistics follow what the examples show in both models.

    Attributes:
        name: its path.
        norm: of the smaller model.
        original: what the original computes.
        plan: what was removed.
        work: the processes.
        before: the layer whose outputs it norms, where they are added to something then. If that layer made up for what
            is missing there, the variance stays and the mean follows what it should have given.
        moments: of its inputs, see :func:`_moments`.
    """

    name: str
    norm: Any
    original: _Original
    plan: Plan
    work: Workload
    before: _Fit | None = None
    moments: list[Tensor] = field(default_factory=list)

    def look(self, use: int, x: Tensor, examples: Examples) -> None:
        """Take what it gets."""
        self.moments += [_moments(part) for part in x.split(PART)]

    def take(self) -> str | None:
        """Let its statistics follow; if they stay, why."""
        missing = self.plan.slices.get(tensor_of(self.name, "running_mean"), {}).get(0, [])
        channels = len(self.norm.running_mean)
        then = _without(
            _combined(self.original.moments[self.name].values(), channels + len(missing), self.work), missing
        )
        now = _combined(self.moments, channels, self.work)
        if not now[:, 0].any():
            return "the smaller model's forward does not reach it"
        self.moments = []
        self.norm.running_mean += now[:, 1] - then[:, 1]
        if self.before is not None and self.before.makes_up:
            self.norm.running_mean -= self._asked_for(self.before, channels, missing)
            return None
        varied = then[:, 2] > 1e-12  # what is constant in the original tells nothing
        self.norm.running_var *= torch.where(varied, now[:, 2] / then[:, 2].clamp(min=1e-12), 1.0).clamp(max=1e6)
        return None

    def _asked_for(self, fit: _Fit, channels: int, missing: Sequence[int]) -> Tensor:
        """By how much more the layer before it should have given in the mean, for what is missing elsewhere."""
        added = fit.added
        assert added is not None
        whole = _combined(self.original.other_moments[fit.pair.name].values(), channels + len(missing), self.work)
        then, now = _without(whole, missing), _combined(fit.other_moments, channels, self.work)
        more = (then[:, 1] - now[:, 1]) / fit._kept(added.factor).flatten()
        return torch.where(fit._kept(added.asked).flatten(), more, 0.0)

    def distance(self) -> None:
        """It is not fitted to what it should compute."""

    def forget(self) -> None:
        """It is done, so what the original shows is needed no longer."""
        self.original.moments.pop(self.name, None)
        if self.before is not None:
            self.original.other_moments.pop(self.before.pair.name, None)


def _moments(x: Tensor) -> Tensor:
    """How many numbers a channel has, their mean and their variance, float64 [channels, 3]."""
    dims, x = [d for d in range(x.ndim) if d != 1], wide(x)
    mean = x.mean(dims, keepdim=True)
    variance = (x - mean).square_().mean(dims)  # `var` is ten times slower
    return torch.stack([torch.full_like(variance, x.numel() / x.shape[1]), mean.flatten(), variance], 1).double()


def _combined(parts: Iterable[Tensor], channels: int, work: Workload) -> Tensor:
    """The moments [channels, 3] of several parts, of all processes, as one."""
    none = torch.zeros(0, channels, 3, dtype=torch.float64, device=work.device)
    own = torch.cat([none, *(part[None] for part in parts)])
    count, mean, variance = torch.cat(all_gather(own, work.group)).unbind(2)
    total = count.sum(0)
    most = total.clamp(min=1)
    middle = (count * mean).sum(0) / most
    return torch.stack([total, middle, (count * (variance + (mean - middle).square())).sum(0) / most], 1)


def least_squares(
    x: Tensor, y: Tensor, table: Tensor, damping: float, name: str = "a layer", counts: Tensor | None = None
) -> Tensor:
    """By how much a table of weights should change.

    Args:
        x: inputs, [groups, samples, columns].
        y: what should come out, [groups, samples, rows].
        table: weights, [groups, rows, columns].
        damping: in units of the mean square of the inputs; the least that is tried.
        name: for messages.
        counts: how much a row counts where the length of the step is sought, [groups, rows]; all alike by default.

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
    toward = rest if few else seen.mT @ rest
    weights = 1.0 if counts is None else counts.double()[:, None]
    held_in, held_out = x[:, fitted:], missing[:, fitted:] * weights
    steps, gains = [], []
    for less, more in pairwise((0, *DAMPED)):
        squares.diagonal(dim1=1, dim2=2).add_((more - less) * ridge[:, None])
        lower, wrong = torch.linalg.cholesky_ex(squares)
        if wrong.any() or not lower.isfinite().all():
            raise SecateurError(
                f"refit: the inputs of {name!r} are linearly dependent, and damping={damping:g}: give more damping, or "
                "more examples"
            )
        step = torch.cholesky_solve(toward, lower).mT
        step = step @ seen if few else step
        moved = held_in @ step.mT * weights
        along, length = (moved * held_out).sum((1, 2)), moved.square().sum((1, 2)).clamp(min=1e-300)
        best = (along / length).clamp(0, 1)
        steps.append(step * best[:, None, None])
        gains.append(best * (2 * along - best * length))  # by how much less is missing in what is held out
    chosen = torch.stack(gains).argmax(0)
    return torch.stack(steps)[chosen, torch.arange(len(chosen), device=chosen.device)]


def _in_blocks(
    pattern: Pattern, biases: int, x: Tensor, y: Tensor, table: Tensor, damping: float, name: str
) -> Tensor:  # fmt: skip
    """:func:`least_squares` of a layer that has weights in dense blocks alone: each block is a group of its own."""
    rows = torch.from_numpy(pattern.rows).to(x.device)
    width = x.shape[2] - biases
    taps = torch.arange(width // pattern.shape[1], device=x.device)
    columns = (torch.from_numpy(pattern.columns).to(x.device)[:, :, None] * len(taps) + taps).flatten(1)
    own = torch.arange(width, x.shape[2], device=x.device).expand(len(rows), -1)
    columns = torch.cat([columns, own], 1)
    outputs, whole = F.pad(y[0], (0, 1)), F.pad(table[0], (0, 0, 0, 1))  # the row of zeros that fills the last block
    step = least_squares(
        x[0][:, columns].transpose(0, 1), outputs[:, rows].transpose(0, 1),
        whole[rows[:, :, None], columns[:, None]], damping, name,
    )  # fmt: skip
    found = torch.zeros_like(whole, dtype=step.dtype)
    found[rows[:, :, None], columns[:, None]] = step
    return found[None, :-1]


# ------------------------------------------------------------------------------------------- what the original computes


@dataclass
class _Original:
    """What the original computes, from one forward of every part.

    Attributes:
        layers: those that could be fitted, wherever their weight is used.
        norms: the batch norms.
        many: how many positions are looked at, by layer, whenever it runs.
        examples: the examples.
        outputs: samples of the outputs of layers, [groups, samples, rows].
        places: the shape of a layer's inputs without their channels.
        moments: of the inputs of batch norms.
        calls: how often a layer or norm runs in a forward, at most.
        strange: layers that do not compute their weight times their input.
        turned: layers, uses and runs whose inputs have the examples as their second dim, not their first.
        added: the batch norm between, or None, of layers whose outputs are added to something.
        read_elsewhere: layers whose outputs something else reads too.
        others: samples of what that is, [groups, samples, rows].
        other_moments: of the same, where a batch norm is between.
        normed: the batch norm that runs on the outputs of a layer.
        order: layers and norms in the order in which they run.
        largest: bytes of the inputs and outputs of a layer for an example, at most.
    """

    layers: Mapping[str, Sequence[Layer]]
    norms: Mapping[str, nn.Module]
    many: dict[str, int]
    examples: Examples
    outputs: dict[str, dict[Run, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    places: dict[str, dict[Run, torch.Size]] = field(default_factory=lambda: defaultdict(dict))
    moments: dict[str, dict[Run, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    calls: Counter[str] = field(default_factory=Counter)
    strange: set[str] = field(default_factory=set)
    turned: set[tuple[str, int, int]] = field(default_factory=set)
    added: dict[str, str | None] = field(default_factory=dict)
    read_elsewhere: set[str] = field(default_factory=set)
    others: dict[str, dict[Run, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    other_moments: dict[str, dict[Run, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    normed: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    largest: float = 0.0

    def places_of(self, name: str, examples: Examples, use: int, before: int) -> torch.Size | None:
        """The shape for some examples together; None if that of their parts differs."""
        at = [self.places[name].get((part.number, use, before)) for part in examples.parts]
        found = [of for of in at if of is not None]
        if len(found) < len(examples.parts):
            return None
        alike = all(shape[1:] == found[0][1:] for shape in found)
        return torch.Size([sum(shape[0] for shape in found), *found[0][1:]]) if alike else None

    def watch(self, model: nn.Module) -> None:
        """Run the model."""
        with preserved(model, fast_path=False):
            many = dict(self.many)
            while True:
                try:
                    return self._see_all(model)
                except _Unclear:
                    self.many.update(many)
                    for found in (
                        self.outputs, self.places, self.moments, self.calls, self.order, self.turned, self.added,
                        self.others, self.other_moments, self.normed, self.read_elsewhere,
                    ):  # fmt: skip
                        found.clear()

    def _see_all(self, model: nn.Module) -> None:
        first, rest = self.examples.parts[:1], self.examples.parts[1:]
        self._see(model, first)
        several = [name for name, calls in self.calls.items() if calls > 1 and name in self.layers]
        for name in several:  # so that all its runs together are looked at as often as one would be
            self.many[name] = -(-self.many[name] // self.calls[name])
        self._see(model, [*first, *rest] if several else rest)

    def _see(self, model: nn.Module, parts: Iterable[Part]) -> None:
        for part in parts:
            runs: Counter[tuple[str, int]] = Counter()
            outputs = Outputs(partial(self._take_other, part))
            handles = self._attach(part, runs, outputs)
            try:
                with Sums(outputs.reached, outputs.ran):
                    forward_part(model, replace(part, inputs=copied(part.inputs)))
            finally:
                for handle in handles:
                    handle.remove()
            self.added |= outputs.added
            self.normed |= outputs.normed
            self.read_elsewhere |= outputs.read_elsewhere()
            self.read_elsewhere |= {n for n, norm in outputs.added.items() if self.added[n] != norm}
            calls: Counter[str] = Counter()
            for (name, _), number in runs.items():
                calls[name] += number
            self.calls |= calls

    def _take_other(self, part: Part, name: str, norm: str | None, v: Tensor) -> None:
        """Take what the outputs of a layer are added to."""
        run, layer = (part.number, 0, 0), self.layers[name][0]
        v = v.transpose(0, 1) if (name, 0, 0) in self.turned else v
        self.others[name][run] = outputs_at(layer, v, self.examples.choice(part, self.many[name]))
        if norm is not None:
            self.other_moments[name][run] = _moments(v)

    def _once(self, name: str, norm: str | None) -> bool:
        """Whether a layer, and a norm behind it, run once in a forward, and nothing else reads what they give."""
        alone = name not in self.read_elsewhere and self.calls[name] == 1 and len(self.layers[name]) == 1
        return alone and (norm is None or self.calls[norm] == 1)

    def normed_of_all(self, work: Workload, names: set[str]) -> set[str]:
        """The layers among these whose outputs a batch norm takes and nothing else, the same on all processes."""
        own = [[int(n in self.normed and self._once(n, self.normed[n]))] for n in sorted(names)]
        every = torch.stack(all_gather(torch.tensor(own, device=work.device).reshape(-1, 1), work.group))
        return {name for name, all_of in zip(sorted(names), every.all(0).flatten().tolist(), strict=True) if all_of}

    def sums_of_all(self, work: Workload, names: set[str]) -> dict[str, Added]:
        """Which outputs of these layers are added to something, the same on all processes."""
        norms = [None, *self.norms]
        own = [
            norms.index(self.added[n]) if n in self.added and self._once(n, self.added[n]) else -1
            for n in sorted(names)
        ]
        every = torch.stack(all_gather(torch.tensor(own, dtype=torch.int64, device=work.device), work.group))
        found = {}
        for name, of_all in zip(sorted(names), every.T.tolist(), strict=True):
            if of_all and of_all[0] >= 0 and len(set(of_all)) == 1:
                norm, layer = norms[of_all[0]], self.layers[name][0]
                table = layer.table()
                factor = torch.ones(table.shape[:2], dtype=torch.float64, device=work.device)
                if norm is not None:
                    of: Any = self.norms[norm]
                    scale = 1.0 if of.weight is None else of.weight.double()
                    factor = (scale / (of.running_var.double() + of.eps).sqrt()).reshape(factor.shape)
                found[name] = Added(norm, factor)
        return found

    def _attach(self, part: Part, runs: Counter[tuple[str, int]], outputs: Outputs) -> list[RemovableHandle]:
        def ran(name: str, use: int) -> int:
            runs[name, use] += 1
            if name not in self.order:
                self.order.append(name)
            return runs[name, use] - 1

        def layer_ran(name: str, use: int, layer: Layer, x: Any, y: Any) -> None:
            run = (part.number, use, ran(name, use))
            outputs.forget()
            if name in self.strange or not computes(layer, x, y):
                self.strange.add(name)
                return
            if _examples_dim(layer, x, part.count) is None and self.examples.halve(part):
                raise _Unclear
            turned = _examples_dim(layer, x, part.count) == 1
            if not isinstance(layer, Scale):
                outputs.layer_ran(name, x, y, not turned and (bool(layer.kernel) or y.ndim == 2))
            if turned:
                x, y = x.transpose(0, 1), y.transpose(0, 1)
                self.turned.add((name, *run[1:]))
            self.largest = max(self.largest, (x.nbytes + y.nbytes) / max(p.count for p in self.examples.parts))
            self.places[name][run] = _places(layer, x)
            self.outputs[name][run] = outputs_at(layer, y, self.examples.choice(part, self.many[name]))

        def norm_runs(name: str, x: Tensor) -> None:
            outputs.norm_runs(name, x)
            self.moments[name][part.number, 0, ran(name, 0)] = _moments(x)

        return [
            layer.module.register_forward_hook(
                lambda _, a, k, y, name=name, use=use, of=layer: outputs.looking(
                    layer_ran, name, use, of, first_argument(a, k), y
                ),
                with_kwargs=True, prepend=True,
            )
            for name, layers in self.layers.items()
            for use, layer in enumerate(layers)
        ] + [
            norm.register_forward_pre_hook(
                lambda _, a, k, name=name: outputs.looking(norm_runs, name, first_argument(a, k)), with_kwargs=True
            )
            for name, norm in self.norms.items()
        ] + [
            norm.register_forward_hook(lambda _, a, z, name=name: outputs.norm_ran(name, z), prepend=True)
            for name, norm in self.norms.items()
        ]  # fmt: skip

    def order_of_all(self, work: Workload) -> tuple[list[str], set[str], dict[str, str]]:
        """What is to be done, in the order of the forward; what runs several times; and what stays as it is, why.

        It is the same on all processes.
        """
        names = [*self.layers, *self.norms]
        own = torch.tensor([[self.calls[name], int(name in self.strange)] for name in names], device=work.device)
        most = torch.stack(all_gather(own, work.group)).amax(0).tolist() if names else []
        left: dict[str, str] = {}
        several: set[str] = set()
        for name, (calls, strange) in zip(names, most, strict=True):
            if not calls or strange:
                why = STRANGE if calls else "its own forward does not run"
                left |= dict.fromkeys([layer.name for layer in self.layers.get(name, ())] or [name], why)
            elif calls > 1:
                several.add(name)
        own = torch.tensor([names.index(name) for name in self.order], dtype=torch.int64, device=work.device)
        merged: list[int] = []
        for found in all_gather(own, work.group):
            at = 0
            for number in found.tolist():
                if number not in merged:  # what other processes did not reach, where this one did
                    merged.insert(at, number)
                at = max(at, merged.index(number) + 1)
        return [name for number in merged if (name := names[number]) not in left], several, left


def _may_make_up(pair: Pair, turned: Mapping[str, Tensor]) -> bool:
    """Whether a layer could be asked for what is missing in what its outputs are added to."""
    return len(pair.layers) == 1 and not isinstance(pair.layer, Scale) and not pair.blocks and pair.name not in turned


def _without(tensor: Tensor, positions: Iterable[int]) -> Tensor:
    stay = torch.ones(len(tensor), dtype=torch.bool, device=tensor.device)
    stay[list(positions)] = False
    return tensor[stay]


def _examples_dim(layer: Layer, x: Tensor, count: int) -> int | None:
    """Which dim of a layer's inputs the examples are, 0 or 1; None where it could be either."""
    if layer.kernel or x.ndim < 3 or x.shape[1] != count or (isinstance(layer, Scale) and layer.norm.dim == 1):
        return 0
    if x.shape[0] != count:
        return 1
    return 0 if count == 1 else None


class _Unclear(BaseException):
    """As many positions as examples, so that these could be either: the examples go in other parts."""


def _places(layer: Layer, x: Tensor) -> torch.Size:
    """The shape of a layer's inputs without their channels."""
    if isinstance(layer, Scale):
        return x.movedim(layer.norm.dim, -1).shape[:-1]
    return x.shape[:1] + x.shape[2:] if layer.kernel else x.shape[:-1]
