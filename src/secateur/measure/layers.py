"""What every layer costs, before and after: in the order of the forward, whatever was done to it.

A layer is a module that holds parameters itself. Nothing is asked of a plan: what became a bottleneck, lost rows or is
packed in blocks is whatever now stands at, or below, its path. Multiply-accumulates belong to the innermost layer that
was running, and those of attention, which belong to no layer, to what is between them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from secateur._internal.batches import Inputs
from secateur.measure.counting import counting

BETWEEN = "between layers"
"""The kind of what belongs to no layer."""


@dataclass(frozen=True)
class LayerCost:
    """A layer before and after.

    Attributes:
        layer: its path; empty for all that is between layers.
        kind: its class.
        width: its outputs' channels before, and after; None where it has not run or has none.
        macs: multiply-accumulates of one forward on the example inputs, before and after.
        params: parameters, shared ones at the first layer that has them.
    """

    layer: str
    kind: str
    width: tuple[int, int] | None
    macs: tuple[int, int]
    params: tuple[int, int]

    def as_data(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


def compare_layers(before: nn.Module, after: nn.Module, inputs: Inputs) -> list[LayerCost]:
    """What every layer of a model costs, and what is left of it in the smaller one.

    Args:
        before: the model.
        after: the smaller one; what stands at or below the path of a layer is what became of it.
        inputs: example inputs of both, on their device; each runs once.

    Returns:
        The layers in the order in which they run, those that do not run last.

    Raises:
        SecateurError: a forward fails on the inputs.
    """
    names = [name for name, module in before.named_modules() if _own(module)]
    first = _seen(before, inputs, names)
    place = {name: at for at, name in enumerate(first.shapes)}
    rows = sorted((name for name in names if name in place and name), key=place.__getitem__)
    known = set(rows)
    rows += [name for name in names if name and name not in known and not _above(name, known)]
    second = _seen(after, inputs, names)
    costs = [_totals(model, seen, rows) for model, seen in ((before, first), (after, second))]
    modules, found = dict(before.named_modules()), []
    for name in rows:
        one, other = first.shapes.get(name), second.shapes.get(name)
        dim = _channels(modules[name], one)
        width = None if one is None or other is None or len(one) != len(other) else (one[dim], other[dim])
        (macs, params), (macs_after, params_after) = (cost[name] for cost in costs)
        found.append(LayerCost(name, type(modules[name]).__name__, width, (macs, macs_after), (params, params_after)))
    (macs, params), (macs_after, params_after) = (cost[""] for cost in costs)
    if macs or macs_after or params or params_after:
        one, other = first.shapes.get(""), second.shapes.get("")
        alone = not rows and one is not None and other is not None and len(one) == len(other)
        dim = _channels(before, one)
        width = (one[dim], other[dim]) if alone and one and other else None
        kind = type(before).__name__ if alone else BETWEEN
        found.append(LayerCost("", kind, width, (macs, macs_after), (params, params_after)))
    return found


def layer_data(before: nn.Module, after: nn.Module, inputs: Inputs) -> list[dict[str, Any]]:
    """:func:`compare_layers` as JSON holds it."""
    return [row.as_data() for row in compare_layers(before, after, inputs)]


# --------------------------------------------------------------------------------------------------------- one forward


@dataclass
class _Seen:
    """What one forward showed.

    Attributes:
        macs: by the innermost module that was running, "" for none.
        shapes: of the first outputs of modules, in the order in which they began.
    """

    macs: dict[str, int]
    shapes: dict[str, tuple[int, ...] | None]


def _own(module: nn.Module) -> bool:
    """Whether a module holds parameters itself."""
    return any(p is not None for p in module._parameters.values())


def _seen(model: nn.Module, inputs: Inputs, also: Iterable[str]) -> _Seen:
    also = set(also)
    watched = {name: m for name, m in model.named_modules() if _own(m) or name in also}
    seen = _Seen({"": 0}, {})
    with counting(model, inputs) as (run, total), _watching(watched, seen, total):
        run()
        seen.macs[""] += total() - sum(seen.macs.values())
    return seen


@contextmanager
def _watching(modules: dict[str, nn.Module], seen: _Seen, total: Callable[[], int]) -> Iterator[None]:
    """Tell what is counted while a module runs, without what runs in it, in this thread alone."""
    own, running = threading.get_ident(), list[list[int]]()

    def begins(name: str) -> None:
        if threading.get_ident() == own:
            seen.shapes.setdefault(name, None)
            running.append([total(), 0])

    def ends(name: str, y: Any) -> None:
        if threading.get_ident() == own and running:
            began, inside = running.pop()
            whole = total() - began
            seen.macs[name] = seen.macs.get(name, 0) + whole - inside
            if running:
                running[-1][1] += whole
            y = y[0] if isinstance(y, (tuple, list)) and y else y
            if isinstance(y, Tensor) and y.ndim and seen.shapes[name] is None:
                seen.shapes[name] = tuple(y.shape)

    handles = [
        m.register_forward_pre_hook(lambda _, __, name=name: begins(name), prepend=True) for name, m in modules.items()
    ] + [
        m.register_forward_hook(lambda _, __, y, name=name: ends(name, y), always_call=True)
        for name, m in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -------------------------------------------------------------------------------------------------------- what is whose


def _above(name: str, rows: set[str]) -> str:
    """The nearest layer at, or above, a path; empty for none."""
    while name and name not in rows:
        name = name.rpartition(".")[0]
    return name


def _totals(model: nn.Module, seen: _Seen, rows: list[str]) -> dict[str, tuple[int, int]]:
    """Multiply-accumulates and parameters by layer of the original, "" for what is in none."""
    macs, params = dict.fromkeys(["", *rows], 0), dict.fromkeys(["", *rows], 0)
    known = set(rows)
    for name, n in seen.macs.items():
        macs[_above(name, known)] += n
    for name, p in model.named_parameters():
        params[_above(name.rpartition(".")[0], known)] += p.numel()
    return {name: (macs[name], params[name]) for name in macs}


def _channels(module: nn.Module, shape: tuple[int, ...] | None) -> int:
    """Which dim of a layer's outputs are its channels."""
    kernel = len(getattr(module, "kernel_size", ())) if isinstance(module, nn.modules.conv._ConvNd) else None
    if kernel is not None:
        return -kernel - 1
    first = isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU))
    return 1 if first and shape is not None and len(shape) > 1 else -1
