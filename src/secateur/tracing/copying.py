"""``copy.deepcopy`` for modules, several times faster: plain modules are copied attribute by attribute.

A network is thousands of small modules with a dozen empty dicts each, which ``copy.deepcopy`` rebuilds one by one
through pickle's protocol. Modules that define how they are copied or pickled, and all other objects, are left to it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable
from functools import cache
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ATOMS = (int, float, bool, str, bytes, type(None), type(Ellipsis))
_CLOSED = (*_ATOMS, complex, type, nn.Module, np.ndarray, torch.dtype, torch.device)  # nothing in them is looked at


def copy_model(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a whole model, whatever it keeps of its last forward.

    ``copy.deepcopy`` refuses tensors that belong to an autograd graph: kept features, the weight that weight norm or a
    pruning mask of ``torch.nn.utils`` has computed. A copy has them without their history.

    Args:
        model: what to copy.
        memo: see :func:`copy_module`.
    """
    for value in _reached(model):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo.setdefault(id(value), value.detach().clone())
    return copy_module(model, memo)


def _reached(model: nn.Module) -> Iterable[Any]:
    """All that the attributes of a model's modules hold, each once."""
    seen: dict[int, Any] = {}
    left: list[Any] = [value for module in model.modules() for value in vars(module).values()]
    while left:
        value = left.pop()
        if isinstance(value, _CLOSED) or id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple, set, frozenset)):
            left += value
        elif not isinstance(value, Tensor) and not callable(value):
            left += getattr(value, "__dict__", {}).values()


def copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy; hooks and other functions whose closures hold parts of the module hold those of the copy there.

    Args:
        module: what to copy.
        memo: id of an object to its copy, as for ``copy.deepcopy``; tensors found here are not copied.
    """
    new = _copy_module(module, memo)
    for part in new.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, FunctionType):
                vars(part)[name] = _rebound(value, memo)
            elif name.endswith("_hooks") and isinstance(value, dict):
                for key, hook in value.items():
                    value[key] = _rebound(hook, memo)
    return new


def _rebound(function: Any, memo: dict[int, Any]) -> Any:
    """A function with a closure of its own, if the closure holds anything that was copied."""
    if not isinstance(function, FunctionType) or not function.__closure__:
        return function
    cells = []
    for cell in function.__closure__:
        try:
            cells.append(CellType(memo.get(id(cell.cell_contents), cell.cell_contents)))
        except ValueError:  # an empty cell
            cells.append(cell)
    if all(a is b or a.cell_contents is b.cell_contents for a, b in zip(cells, function.__closure__, strict=True)):
        return function
    bound = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    bound.__kwdefaults__ = function.__kwdefaults__
    bound.__dict__.update(function.__dict__)
    return bound


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    known = memo.get(id(module))
    if known is not None:
        return known
    kind: Any = type(module)
    if not _plain(kind):
        return copy.deepcopy(module, memo)
    new = module.__class__.__new__(module.__class__)
    memo[id(module)] = new
    attributes = new.__dict__
    for key, value in module.__dict__.items():
        if key == "_compiled_call_impl":  # as nn.Module does when it is pickled
            continue
        if isinstance(value, _ATOMS):
            attributes[key] = value
        elif type(value) in {dict, OrderedDict} and key.startswith("_"):
            attributes[key] = type(value)((k, _copy_value(v, memo)) for k, v in value.items())
            memo[id(value)] = attributes[key]
        else:
            attributes[key] = _copy_value(value, memo)
    return new


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, _ATOMS):
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if isinstance(value, nn.Module):
        return _copy_module(value, memo)
    if type(value) is tuple and all(isinstance(v, _ATOMS) for v in value):
        return value
    return copy.deepcopy(value, memo)


# their __setstate__ only fills in what pickles of older releases lack
_LENIENT = {
    f"torch.nn.modules.{room}" for room in ("module", "conv", "activation", "pooling", "upsampling", "transformer")
}


@cache
def _plain(kind: Any) -> bool:
    for base in kind.__mro__:
        own = vars(base)
        if base not in (object, nn.Module) and own.keys() & {
            "__deepcopy__",
            "__getstate__",
            "__reduce__",
            "__reduce_ex__",
            "__slots__",
        }:
            return False
        if "__setstate__" in own and base.__module__ not in _LENIENT:
            return False
    return True
