"""One run of a skeleton, watched below the model's Python: every position of every tensor gets a label.

The watcher sees each ATen operation after it ran. The rule of the operation reads the labels of the arguments, adds to
the table what it learns, and gives the labels of the results. What was computed is written down in the op log.
"""

from __future__ import annotations

import os
import sys
import traceback
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur._internal import distributed  # noqa: F401  (it imports what a trace would import, as it must be)
from secateur._internal.batches import tensors_in
from secateur._internal.errors import SecateurError
from secateur.tracing.call import Call
from secateur.tracing.devices import without_devices
from secateur.tracing.labels import Dim, Joint, Labelled, Labels, lasting, unlabelled, vanishing
from secateur.tracing.norms import ROOT_MEAN_SQUARE, NarrowLayerNorm
from secateur.tracing.op_log import ANY, MOVES, Operation, OpLog, Place
from secateur.tracing.rules.table import RULES, unknown_operation
from secateur.tracing.shapes import quick
from secateur.tracing.skeleton import Skeleton
from secateur.tracing.slices import Patched, Removed


class Watcher(TorchDispatchMode):
    """Sees every ATen operation, and lets its rule label what it returns.

    Args:
        labels: the table, to which the rules add.
        expected: for a second run, the op log that it should show, with channels for labels. Constants take their
            labels from it.

    Attributes:
        labels: the table.
        log: what was computed so far.
        where: finds the place of an operation in the model's code.
        kind: what stands in for the tensors.
    """

    def __init__(self, labels: Labels, expected: OpLog | None = None) -> None:
        super().__init__()
        self.labels = labels
        self.log: OpLog = []
        self._expected = expected
        self.where: Whereabouts | None = None
        self.kind = ""
        self._place: Place | None = None
        labels.here = self._here
        self._agreed: dict[tuple[int, int], tuple[Dim, Dim, bool]] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], Labelled]] = {}
        self._open: list[tuple[int, int, Joint]] = []  # entry of the op log, number of the result, what varies
        self._labels_of: dict[str, tuple[Dim, ...]] = {}
        self._names: dict[int, str] = {}
        self._entry: dict[int, int | None] = {}  # of the op log, in which a tensor was made
        self._copies = False  # whether any tensor has been one value, or zero, along some dim
        self._next = 0  # entry of the expected log that comes next
        self._used: set[int] = set()  # those whose results an operation has read
        self._given: dict[int, Tensor] = {}  # held, so that their ids stay theirs

    def agree(self, want: Dim, got: Dim) -> bool:
        """Whether two dims carry the same labels. Arrays flow through a network by reference, so few pairs are new."""
        if want is got:
            return True
        key = (id(want), id(got))
        known = self._agreed.get(key)
        if known is None:
            if want is None or got is None:
                other = got if want is None else want
                same = other is None or not other.any()
            else:
                same = len(want) == len(got) and bool((want == np.abs(got)).all())
            known = self._agreed[key] = (want, got, same)  # while the arrays are held, no other gets their id
        return known[2]

    def set(self, tensor: Tensor, labelled: Labelled) -> None:
        """Remember the labels of a tensor."""
        self._known[id(tensor)] = (weakref.ref(tensor), labelled)
        self._copies = self._copies or bool(labelled.free) or labelled.zero

    def knows(self, tensor: Tensor) -> bool:
        """Whether a tensor was labelled, or came out of an operation that was watched."""
        entry = self._known.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def settle(self) -> None:
        """Settle what varies along several dims, once the run is over, and complete the op log.

        What nobody has read is not looked at: a forward may have wanted the shape alone.
        """
        unread = [] if self.labels.resolved else [i for i in range(len(self.log)) if i not in self._used]
        for at in unread:
            self.log[at] = replace(self.log[at], labels=(), shapes=(), numbers=())
        self._open = [each for each in self._open if each[0] in self._used]
        if self.labels.resolved or not (self.labels.joints or self.labels.grouped):
            return
        self.labels.settle()
        channel_of = self.labels.components()
        for at, result, joint in self._open:
            found = self.labels.along(joint, channel_of)
            if found is not None:
                dims = [list(each) for each in self.log[at].labels]
                dims[result][found[0]] = found[1]
                self.log[at] = replace(self.log[at], labels=tuple(map(tuple, dims)))
        self._open.clear()

    def returned(self) -> None:
        """The forward is over: what is frozen from now on has no place in it."""
        self.where = self._place = None

    def begin(self, tensor: Tensor, labelled: Labelled, name: str = "") -> None:
        """Give a tensor of the model, by its name, or an input, its labels."""
        self.set(tensor, labelled)
        self._given[id(tensor)] = tensor
        self._labels_of[name] = labelled.dims
        self._names[id(tensor)] = name

    def given(self, name: str) -> tuple[Dim, ...]:
        """The labels with which a parameter or buffer began."""
        return self._labels_of[name]

    def made(self) -> list[weakref.ref[Tensor]]:
        """All tensors that operations made."""
        return [reference for key, (reference, _) in self._known.items() if key not in self._given]

    def get(self, tensor: Tensor) -> Labelled:
        """The labels of a tensor. One that was never seen is a constant, whose positions are fixed."""
        entry = self._known.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return unlabelled(tensor.ndim, weight=True)
        labelled = entry[1]
        for pay in labelled.owed:
            pay()
        if labelled.owed:
            labelled = replace(labelled, owed=())
            self.set(tensor, labelled)
        return labelled

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; saying so for every operation would cost the import of PyTorch's compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        before = (tuple(args[0].shape), tuple(args[0].stride())) if func is _RESTRIDE else None
        out = quick(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs) if self.kind != "meta" else without_devices(func, args, kwargs)
        if func.namespace != "prim":
            call = Call(self.labels, self.get, func, args, kwargs, out, self._at_work, self._name_of)
            call.before = before
            self._observe(call, known=func.namespace == "aten")
        return out

    def _here(self) -> Place | None:
        """The place of the operation that is just watched."""
        if self._place is None and self.where is not None:
            self._place = self.where.now()
        return self._place

    def _name_of(self, tensor: Tensor) -> str | None:
        return self._names.get(id(tensor))

    def _at_work(self) -> tuple[str, nn.Module | None]:
        return self.where.module() if self.where is not None else ("", None)

    def _observe(self, call: Call, *, known: bool) -> None:
        """Label the results of an operation, and write it down.

        Args:
            call: the operation.
            known: whether a rule may know it. Rules are for ATen's operations only.
        """
        self._place = None
        for tensor in call.tensors():
            self._read(tensor)
            if call.base not in _SHAPE_ONLY and call.base not in _IDENTITIES:
                self.used(tensor)
        if self.labels.norm_at:
            self._entering(call)
        results = call.results()
        if not results:
            if call.op in {"item", "_local_scalar_dense", "is_nonzero", "equal"}:
                call.freeze_all("its value steers the model's Python")
                self.labels.steered = self.labels.steered or self._here()
            return
        function = RULES.get(call.base) if known and not call.overload.endswith("out") else None
        given = (function or unknown_operation)(call)
        listed = [given] if isinstance(given, Labelled) else list(given or ())
        told = len(listed) or len(results)  # what a rule is silent about (saved statistics) is nobody's input
        weight = all(self.get(t).weight for t in call.tensors())
        listed += [unlabelled(t.ndim, weight=weight) for t in results[len(listed) :]]
        name = "view" if call.base in _VIEWS else call.base
        if self._expected is not None:
            if call.base not in _IDENTITIES:
                self._aligned(name)
            listed = self._as_expected(listed, results, constant=call.base in _CONSTANTS)
        for tensor, new in zip(results, listed, strict=True):
            if call.writes:
                self._written(call, tensor, self.labels.settled(new))
            self.set(tensor, new)
        numbers = _numbers(call)
        if numbers and isinstance(self._at_work()[1], NarrowLayerNorm):
            numbers = ()  # it computes from its width what it should
        if call.base in _IDENTITIES and not numbers:
            for tensor in results:
                self._entry[id(tensor)] = self._entry.get(id(call.first()))
        else:
            for tensor in results:
                self._entry[id(tensor)] = len(self.log)
            if call.writes:  # it is seen through other tensors
                self._used.add(len(self.log))
            self._next += 1
            shapes = tuple(
                tuple(ANY if d in each.free else n for d, n in enumerate(t.shape))
                for t, each in zip(results[:told], listed, strict=False)
            )
            labels = tuple(each.dims for each in listed[:told])
            self._open += [(len(self.log), i, joint) for i, each in enumerate(listed[:told]) for joint in each.joints]
            self.log.append(Operation(name, labels, shapes, numbers, self._here()))

    def _entering(self, call: Call) -> None:
        """Note what comes into a norm from outside of it, and is not zero where its producers are."""
        place = self._here()
        if place is None or place.path not in self.labels.norm_at:
            return
        for tensor in call.tensors():
            entry = self._entry.get(id(tensor))
            made = self.log[entry].place if entry is not None else None
            if made is None or made.path != place.path:
                given = [ids for ids in self.get(tensor).dims if ids is not None and (ids < 0).any()]
                self.labels.entering.setdefault(place.path, []).extend(given)

    def used(self, tensor: Tensor) -> None:
        """Note that somebody reads a tensor's values."""
        entry = self._entry.get(id(tensor))
        if entry is not None:
            self._used.add(entry)

    def _read(self, tensor: Tensor) -> None:
        """Note that a parameter or buffer is read, and where a norm's weight is that has to change with its width."""
        name = self._names.get(id(tensor))
        if name is None:
            return
        self.labels.seen.add(name)
        path = name.rpartition(".")[0]
        norm = self.labels.norm_at.get(path)
        if norm is not None and norm.kind == ROOT_MEAN_SQUARE and self._at_work()[0] != path:
            for ids in self.get(tensor).arrays:
                self.labels.approximate(
                    ids, f"the weight of {path}, which changes with its width, is used elsewhere too"
                )

    def _aligned(self, name: str) -> None:
        """Pass by what only moves positions in the first run, and is not there in this one, where all of them stay."""
        assert self._expected is not None
        at = self._next
        while at < len(self._expected) and self._expected[at].name != name and self._expected[at].name in MOVES:
            at += 1
        if at < len(self._expected) and self._expected[at].name == name:
            self._next = at

    def _as_expected(self, listed: list[Labelled], results: list[Tensor], *, constant: bool) -> list[Labelled]:
        """The labels that results carry, those of the first run where a second run cannot know them.

        It cannot for two kinds of results. A constant has no labels of its own. And where one channel is left, all
        positions look alike: a view may drop its label, or put it on another dim.
        """
        at = self._next
        if self._expected is None or at >= len(self._expected):
            return listed
        found = list(listed)
        for i, (labelled, tensor, dims) in enumerate(zip(listed, results, self._expected[at].labels, strict=False)):
            if len(dims) != tensor.ndim or any(
                ids is not None and len(ids) != n for ids, n in zip(dims, tensor.shape, strict=True)
            ):
                continue
            pairs = enumerate(zip(dims, labelled.dims, strict=True))
            differ = [d for d, (want, got) in pairs if not self.agree(want, got)]
            if not differ:
                continue
            wanted = _values(dims[d] for d in differ) - {0}
            lone = len(wanted) == 1 and _values(labelled.dims[d] for d in differ) <= wanted
            if constant or lone:
                found[i] = Labelled(
                    tuple(ids if ids is not None and ids.any() else None for ids in dims), labelled.weight
                )
        return found

    def _written(self, call: Call, tensor: Tensor, new: Labelled) -> None:
        """What an in-place operation changes in the other views of the same storage.

        They are no weights any more if data were written, and where a channel does not vanish here any more, it does
        not there. Where labels change themselves, those of all views are frozen. What was one value, or zero,
        everywhere may be so no more.
        """
        old = self.labels.settled(self.get(tensor))
        both = list(zip(old.dims, new.dims, strict=False))
        same = new.weight == old.weight and all(_same(a, b) for a, b in both)
        if same and not self._copies:
            return
        kept = len(old.dims) == len(new.dims) and all(b is None or _same_channels(a, b) for a, b in both)
        lost = [np.zeros(0, dtype=np.int64)]
        for a, b in both if kept else ():
            if a is not None and b is None:
                call.freeze(a, "meets a tensor whose positions are fixed")
            elif a is not None and b is not None:
                lost.append(np.abs(b[(b < 0) & (a > 0)]))
        gone = np.concatenate(lost)
        storage = tensor.untyped_storage()._cdata
        for reference, known in list(self._known.values()):
            view, other = reference(), known
            if view is None or view is tensor or view.untyped_storage()._cdata != storage:
                continue
            if other.free or other.zero:
                other = replace(other, free=frozenset(), zero=other.zero and new.zero)
                self.set(view, other)
            if same:
                continue
            if not kept:
                for ids in (*other.arrays, *new.dims, *old.dims):
                    call.freeze(ids, "is written in place through a view")
                continue
            seen = self.labels.settled(other) if len(gone) else other
            dims = tuple(
                ids if ids is None or not len(gone) else vanishing(ids, (ids > 0) & ~np.isin(np.abs(ids), gone))
                for ids in seen.dims
            )
            self.set(view, replace(seen, dims=dims, weight=seen.weight and new.weight))


_RESTRIDE = torch.ops.aten.as_strided_.default
_IDENTITIES = {"clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh"}
"""Not in the op log: whether PyTorch copies depends on strides, and so on widths."""
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
"""One operation in the op log: whether PyTorch views or reshapes depends on strides too."""
_NEW = {"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided"}
_SHAPE_ONLY = _NEW | {"zeros_like", "ones_like", "full_like", "empty_like"}
"""They read no values."""
_CONSTANTS = _NEW | {"zeros", "ones", "full", "empty", "scalar_tensor", "empty_strided", "empty_permuted"}

# the whole numbers that these take are values, not positions or sizes
_ARITHMETIC = {
    "add", "sub", "rsub", "mul", "div", "pow", "fill", "full", "new_full", "scalar_tensor", "clamp", "eq", "ne", "lt",
    "gt", "le", "ge", "maximum", "minimum", "remainder", "fmod", "floor_divide", "arange", "linspace",
}  # fmt: skip


def _numbers(call: Call) -> tuple[float, ...]:
    """The plain numbers that enter the values of the results. They must not depend on a width."""
    numbers = [v for v in call.scalars() if isinstance(v, float) or call.base in _ARITHMETIC]
    numbers += [v for v in map(call.arg, ("alpha", "beta", "correction")) if isinstance(v, int)]
    if call.base.startswith("lift_fresh"):
        constant = call.first()
        if constant.numel() <= 64 and not constant.is_meta and type(constant) is Tensor and not constant.is_complex():
            numbers += [float(v) for v in constant.flatten().tolist()]
    return tuple(numbers)


def _values(dims: Iterable[Dim]) -> set[int]:
    return {int(v) for ids in dims if ids is not None for v in np.unique(np.abs(ids))}


def _same_channels(a: Dim, b: Dim) -> bool:
    return a is b or (a is not None and b is not None and len(a) == len(b) and bool((np.abs(a) == np.abs(b)).all()))


def _same(a: Dim, b: Dim) -> bool:
    return a is b or (a is not None and b is not None and len(a) == len(b) and bool((a == b).all()))


class Whereabouts:
    """Finds out where in the model's code an operation comes from, by the frames on the stack.

    Args:
        module: the module that is run.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = dict(module.named_modules())
        self._paths = {id(part): path for path, part in parts.items()}
        homes = {type(part).__module__ for part in parts.values()}
        known = [sys.modules.get(name) for name in homes if name.partition(".")[0] != "torch"]
        self._files = {getattr(home, "__file__", None) for home in known} - {None}
        self._own: dict[CodeType, bool] = {}

    def module(self) -> tuple[str, nn.Module | None]:
        """The module whose forward runs, and its path."""
        for frame, _ in _outwards(sys._getframe(1)):
            if frame.f_code is _CALL_MODULE:
                part = frame.f_locals["self"]
                return self._paths.get(id(part), ""), part
        return "", None

    def now(self) -> Place:
        """The place of the operation that is just dispatched."""
        return self._place(_outwards(sys._getframe(1)))

    def of(self, error: BaseException) -> Place:
        """The place where an error was raised."""
        return self._place(reversed(list(traceback.walk_tb(error.__traceback__))))

    def _place(self, frames: Iterable[tuple[FrameType, int]]) -> Place:
        path = file = None
        line = 0
        for frame, number in frames:
            code = frame.f_code
            if code is _RUN:  # what is further out has called us
                break
            if code is _CALL_MODULE:
                if path is None:
                    path = self._paths.get(id(frame.f_locals["self"]))
            elif file is None:
                own = self._own.get(code)
                if own is None:
                    own = self._own[code] = self._is_own(code.co_filename)
                if own:
                    file, line = code.co_filename, number
            elif path is not None:
                break
        return Place(path or "", file or "", line)

    def _is_own(self, file: str) -> bool:
        return file in self._files or not file.startswith(_LIBRARIES)


def _outwards(frame: FrameType | None) -> Iterable[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


_CALL_MODULE = nn.Module._call_impl.__code__
_RUN = Skeleton.run.__code__
_OURS = os.path.dirname(os.path.dirname(__file__))
_LIBRARIES = (os.path.dirname(os.path.dirname(torch.__file__)), os.path.dirname(os.__file__), _OURS, "<")


@dataclass(frozen=True, eq=False)
class Attempt:
    """A run that was watched.

    Attributes:
        watcher: what it saw.
        error: what the run raised, if anything.
        place: where in the model it was raised.
    """

    watcher: Watcher
    error: Exception | None
    place: Place | None


def attempt(
    skeleton: Skeleton,
    watcher: Watcher,
    label: Callable[[Labels, str, Tensor], tuple[Dim, ...]],
    *,
    removed: Removed | None = None,
    patched: Patched | None = None,
    run: tuple[bool, int] = (False, 0),
) -> Attempt:
    """Run an instance of a skeleton with its parameters and buffers labelled, and freeze what it returns.

    Nothing of the run is left anywhere but in the watcher.

    Args:
        skeleton: what to run.
        watcher: watches.
        label: gives the labels of a parameter or buffer: ``label(table, name, tensor)``.
        removed: what the instance lacks.
        patched: what its modules remember otherwise.
        run: whether it runs in training mode, and which of the inputs it has.
    """
    error, place = None, None
    try:
        _run(skeleton, watcher, label, removed, patched, run)
    except Exception as failure:
        error = failure
        place = watcher.where.of(error) if watcher.where is not None else None
        _emptied(error)
    skeleton.forget(watcher.made())
    return Attempt(watcher, error, place)


def _emptied(error: BaseException | None) -> None:
    """Let an error, and those before it, hold nothing that the run has made: frames hold it, and their closures."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        if isinstance(error, AttributeError):
            error.obj = None
        error = error.__cause__ or error.__context__


def _run(
    skeleton: Skeleton,
    watcher: Watcher,
    label: Callable[[Labels, str, Tensor], tuple[Dim, ...]],
    removed: Removed | None,
    patched: Patched | None,
    run: tuple[bool, int],
) -> None:
    training, number = run
    module, tensors = skeleton.instance(removed, patched)
    watcher.where, watcher.kind = Whereabouts(module), skeleton.kind
    for name, tensor in tensors.items():
        dims = label(watcher.labels, name, tensor)
        if not isinstance(tensor, nn.Parameter):
            if not tensor.is_floating_point() or name in watcher.labels.divisors:
                dims = tuple(lasting(ids) for ids in dims)
            else:
                watcher.labels.buffers.add(name)
        watcher.begin(tensor, Labelled(dims, weight=True), name)
    inputs = skeleton.inputs(number)
    for tensor in tensors_in(inputs):
        watcher.begin(tensor, unlabelled(tensor.ndim, weight=False))
    out = skeleton.run(module, inputs, watcher, training=training)
    if skeleton.outputs is not None:
        out = skeleton.outputs(out)
    outputs = tensors_in(out)
    if not outputs:
        raise SecateurError(
            f"the model's forward returns no tensor that can be found (it gave {type(out).__name__}): "
            "return tensors, or containers or plain objects that hold them"
        )
    if not all(watcher.knows(tensor) for tensor in outputs):
        raise SecateurError(
            f"{type(skeleton.module).__name__}: a copy's forward returns a tensor that it has not computed, so some"
            "thing in it, a hook's closure perhaps, holds the original: let it use what it is called with (a bound "
            "method's self), or register the tensor as a buffer"
        )
    watcher.returned()
    for tensor in outputs:
        watcher.used(tensor)
        for ids in watcher.get(tensor).arrays:
            watcher.labels.freeze(ids, "output", "belongs to the model's output")
    shapes = tuple(tuple(t.shape) for t in outputs)
    labels = tuple(watcher.labels.settled(watcher.get(t)).dims for t in outputs)
    watcher.settle()
    watcher.log.append(Operation("output", labels, shapes))
