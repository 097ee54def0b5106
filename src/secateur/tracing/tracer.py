"""Run a model once, watched from below, and name every position of every tensor.

The model itself is never run: a *skeleton* is, a deep copy whose parameters and buffers hold no data (meta tensors).
Where the model's Python wants more than shapes, fake tensors are tried, then a copy with real data.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateur._internal.batches import Inputs, call_model, tensors_in
from secateur._internal.errors import SecateurError
from secateur._internal.state import Switch, fork_rng_of, rng_state, without_fast_path
from secateur.tracing.call import Call
from secateur.tracing.copying import copy_module
from secateur.tracing.labels import Dim, Labelled, Labels, anonymous, lasting
from secateur.tracing.op_log import Step
from secateur.tracing.rules.table import RULES, unknown_operation
from secateur.tracing.shapes import quick


class Watcher(TorchDispatchMode):
    """Sees every ATen operation and lets the rules name what it returns.

    Args:
        names: the table to fill.
        expected: in a second run, the steps of the first one (with final names): constants take their names from there.
    """

    def __init__(self, names: Labels, expected: list[Step] | None = None) -> None:
        super().__init__()
        self.names = names
        self.expected = expected
        self.steps: list[Step] = []
        self._agreed: dict[tuple[int, int], tuple[Dim, Dim, bool]] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], Labelled]] = {}

    def agree(self, want: Dim, got: Dim) -> bool:
        """Whether two dims carry the same names; arrays flow through a network by reference, so few pairs are new."""
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
            known = self._agreed[key] = (want, got, same)  # holding the arrays keeps their ids theirs
        return known[2]

    def set(self, tensor: Tensor, named: Labelled) -> None:
        """Remember the names of a tensor."""
        self._known[id(tensor)] = (weakref.ref(tensor), named)

    def knows(self, tensor: Tensor) -> bool:
        """Whether it was named, or came out of an operation that was watched."""
        entry = self._known.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    def get(self, tensor: Tensor) -> Labelled:
        """The names of a tensor; one never seen is a constant, with fixed positions."""
        entry = self._known.get(id(tensor))
        if entry is None or entry[0]() is not tensor:
            return anonymous(tensor.ndim, weight=True)
        return entry[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = quick(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if func.namespace == "aten":
            self._observe(Call(self.names, self.get, func, args, kwargs, out))
        elif func.namespace != "prim":
            self._observe(Call(self.names, self.get, func, args, kwargs, out), known=False)
        return out

    def _observe(self, call: Call, *, known: bool = True) -> None:
        results = call.results()
        if not results:
            if call.op in {"item", "_local_scalar_dense", "is_nonzero", "equal"}:
                call.freeze_all("its value steers the model's Python")
            return
        function = RULES.get(call.base) if known and not call.overload.endswith("out") else None
        named = (function or unknown_operation)(call)
        listed = [named] if isinstance(named, Labelled) else list(named or ())
        told = len(listed) or len(results)  # what a rule is silent about (saved statistics) is nobody's input
        weight = all(self.get(t).weight for t in call.tensors())
        listed += [anonymous(t.ndim, weight=weight) for t in results[len(listed) :]]
        if self.expected is not None:
            listed = self._as_expected(listed, results, constant=call.base in _CONSTANTS)
        for tensor, new in zip(results, listed, strict=True):
            if call.writes:
                self._written(call, tensor, new)
            self.set(tensor, new)
        numbers = _numbers(call)
        if call.base not in _IDENTITIES or numbers:
            op = "view" if call.base in _VIEWS else call.base
            shapes = tuple(tuple(t.shape) for t in results[:told])
            self.steps.append(Step(op, tuple(n.dims for n in listed[:told]), shapes, numbers))

    def _as_expected(self, listed: list[Labelled], results: list[Tensor], *, constant: bool) -> list[Labelled]:
        """Labels that a second run cannot know take those of the first: constants', and those of a lone channel.

        Where one channel is left, all places look alike: a view may drop its name, or put it on another dim.
        """
        at = len(self.steps)
        if self.expected is None or at >= len(self.expected):
            return listed
        result = list(listed)
        for i, (named, tensor, dims) in enumerate(zip(listed, results, self.expected[at].names, strict=False)):
            if len(dims) != tensor.ndim or any(
                ids is not None and len(ids) != n for ids, n in zip(dims, tensor.shape, strict=True)
            ):
                continue
            differ = [
                d for d, (want, got) in enumerate(zip(dims, named.dims, strict=True)) if not self.agree(want, got)
            ]
            if not differ:
                continue
            given = _values(named.dims[d] for d in differ)
            if constant or (len(lone := _values(dims[d] for d in differ) - {0}) == 1 and given <= lone):
                result[i] = Labelled(dims, named.weight)
        return result

    def _written(self, call: Call, tensor: Tensor, new: Labelled) -> None:
        """An in-place operation that changes what the names say must not be seen through another view."""
        old = self.get(tensor)
        if len(old.dims) == len(new.dims) and all(_same(a, b) for a, b in zip(old.dims, new.dims, strict=True)):
            return
        storage = tensor.untyped_storage()._cdata
        for reference, other in list(self._known.values()):
            view = reference()
            if view is not None and view is not tensor and view.untyped_storage()._cdata == storage:
                for ids in (*other.dims, *new.dims, *old.dims):
                    call.freeze(ids, "is written in place through a view")


# whether PyTorch copies or views depends on strides, and so on widths
_IDENTITIES = {"clone", "contiguous", "detach", "alias", "_to_copy", "lift_fresh"}
_VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_CONSTANTS = {"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "empty", "new_empty", "scalar_tensor"}


# operations whose whole numbers are values, not places or sizes
_ARITHMETIC = {
    "add",
    "sub",
    "rsub",
    "mul",
    "div",
    "pow",
    "fill",
    "full",
    "new_full",
    "scalar_tensor",
    "clamp",
    "eq",
    "ne",
    "lt",
    "gt",
    "le",
    "ge",
    "maximum",
    "minimum",
    "remainder",
    "fmod",
    "floor_divide",
    "arange",
    "linspace",
}


def _numbers(call: Call) -> tuple[float, ...]:
    """Plain numbers that enter an operation's values: they must not depend on a width."""
    numbers = [v for v in call.scalars() if isinstance(v, float) or call.base in _ARITHMETIC]
    numbers += [v for v in map(call.arg, ("alpha", "beta", "correction")) if isinstance(v, int)]
    if call.base.startswith("lift_fresh"):
        constant = call.first()
        if constant.numel() <= 64 and not constant.is_meta and type(constant) is Tensor and not constant.is_complex():
            numbers += [float(v) for v in constant.flatten().tolist()]
    return tuple(numbers)


def _values(dims: Iterable[Dim]) -> set[int]:
    return {int(v) for ids in dims if ids is not None for v in np.unique(np.abs(ids))}


def _same(a: Dim, b: Dim) -> bool:
    return a is b or (a is not None and b is not None and len(a) == len(b) and bool((a == b).all()))


_ONE_RUN = threading.RLock()


class Skeleton:
    """A copy of a model that can be run without data, made smaller, and changed back.

    Args:
        model: the user's model, left untouched.
        inputs: example inputs, left untouched.
        kind: ``"meta"``, ``"fake"`` or ``"real"``: what stands in for the tensors.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, kind: str) -> None:
        self.kind = kind
        self.fake = FakeTensorMode(allow_non_fake_inputs=True) if kind == "fake" else None
        stand_in = {"meta": _to_meta, "fake": self._to_fake, "real": _to_real}[kind]
        memo: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            smaller = stand_in(tensor.detach())
            if isinstance(tensor, nn.Parameter):
                smaller = nn.Parameter(smaller, requires_grad=False)
            memo[id(tensor)] = smaller
        with copyable(model):
            self.module = copy_module(model, memo)
        self.module.eval()
        with _ONE_RUN:
            self.begin = rng_state()
        self.inputs = pytree.tree_map(lambda v: stand_in(v.detach()) if isinstance(v, Tensor) else v, inputs)

    def _to_fake(self, tensor: Tensor) -> Tensor:
        assert self.fake is not None
        return self.fake.from_tensor(tensor)

    def run(self, watcher: Watcher) -> Any:
        """One forward under the watcher, in eval mode, without gradients; the random state comes back.

        All runs begin with the same one: a forward that draws must not seem to depend on widths. The process has one
        random state for all threads, so runs wait for each other.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(_ONE_RUN)
            stack.enter_context(fork_rng_of(self.module))
            self.begin()
            stack.enter_context(torch.inference_mode(False))  # in which operations would come in larger pieces
            stack.enter_context(torch.no_grad())
            stack.enter_context(without_fast_path())
            if self.fake is not None:
                stack.enter_context(self.fake)
            stack.enter_context(watcher)
            return call_model(self.module, self.inputs)


def _to_meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _to_real(tensor: Tensor) -> Tensor:
    return tensor.clone()


@contextlib.contextmanager
def copyable(model: nn.Module) -> Iterator[None]:
    """Raise in our words if a model cannot be copied."""
    try:
        yield
    except Exception as error:
        raise SecateurError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); secateur works on a deep "
            "copy so that your model stays untouched: make copy.deepcopy(model) work first"
        ) from error


_LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
_LOG = Switch(lambda: not _LOGGER.disabled, lambda on: setattr(_LOGGER, "disabled", not on))


def quiet() -> contextlib.AbstractContextManager[None]:
    """A forward that fails is an answer here: PyTorch shall not log it as an accident."""
    return _LOG.off()


@contextlib.contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Training mode for all but dropout, whose noise is no matter of channels; eval mode afterwards."""
    if not training:
        yield
        return
    for part in module.modules():
        part.training = not isinstance(part, nn.modules.dropout._DropoutNd)
    try:
        yield
    finally:
        module.eval()


def watch(
    skeleton: Skeleton,
    name: Callable[[Labels, str, Tensor], tuple[Dim, ...]],
    expected: list[Step] | None = None,
    names: Labels | None = None,
) -> Watcher:
    """Run a skeleton with its parameters and buffers named, and freeze what it returns.

    Args:
        skeleton: what to run.
        name: gives the names of a parameter or buffer.
        expected: steps of an earlier run, see :class:`Watcher`.
        names: the table to add to, a new one if not given.

    Raises:
        SecateurError: no tensor is found in what the model returns.
    """
    watcher = Watcher(names or Labels(), expected)
    for key, tensor in (*skeleton.module.named_parameters(), *skeleton.module.named_buffers()):
        dims = name(watcher.names, key, tensor)
        if not isinstance(tensor, nn.Parameter):  # nothing zeroes a buffer
            dims = tuple(lasting(ids) for ids in dims)
        watcher.set(tensor, Labelled(dims, weight=True))
    for tensor in tensors_in(skeleton.inputs):
        watcher.set(tensor, anonymous(tensor.ndim, weight=False))
    out = skeleton.run(watcher)
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
    for tensor in outputs:
        for ids in watcher.get(tensor).dims:
            watcher.names.freeze(ids, "output", "belongs to the model's output")
    watcher.steps.append(
        Step("output", tuple(watcher.get(t).dims for t in outputs), tuple(tuple(t.shape) for t in outputs))
    )
    return watcher
