"""``copy.deepcopy`` for modules, several times faster: plain modules are copied attribute by attribute.

A network is thousands of small modules with a dozen empty dicts each, which ``copy.deepcopy`` rebuilds one by one
through pickle's protocol. Modules that define how they are copied or pickled, and all other objects, are left to it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterable
from functools import cache
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_ATOMS = frozenset({int, float, bool, str, bytes, type(None), type(Ellipsis)})
_TABLES = frozenset({dict, OrderedDict, set})
OF_MODULES = frozenset(vars(nn.Module()))  # what nn.Module itself keeps: mostly tables, most of them empty
_OF_MODULES_TABLES = frozenset(name for name, value in vars(nn.Module()).items() if type(value) in _TABLES)
_HOOKS = tuple(sorted(name for name in OF_MODULES if "_hooks" in name))
_CLOSED: Any = (
    *_ATOMS,
    complex,
    type,
    nn.Module,
    np.ndarray,
    torch.dtype,
    torch.device,
)  # nothing in them is looked at


def copy_model(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a whole model, whatever it keeps of its last forward.

    ``copy.deepcopy`` refuses tensors that belong to an autograd graph: kept features, the weight that weight norm or a
    pruning mask of ``torch.nn.utils`` has computed. A copy has them without their history.

    Args:
        model: what to copy.
        memo: see :func:`copy_module`.
    """
    for value in reached(model):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo.setdefault(id(value), value.detach().clone())
    return copy_module(model, memo)


def reached(model: nn.Module) -> Iterable[Any]:
    """All that the attributes of a model's modules hold, each once."""
    left: list[Any] = []
    for module in model.modules():
        left += [*module._parameters.values(), *module._buffers.values()]
        left += [value for key, value in vars(module).items() if key not in OF_MODULES]
    yield from within(*left)


def within(*values: Any) -> Iterable[Any]:
    """All that some values hold, each once; modules are not looked into."""
    seen: dict[int, Any] = {}
    left = list(values)
    while left:
        value = left.pop()
        if isinstance(value, _CLOSED) or id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            left += value
        elif not isinstance(value, Tensor) and not callable(value):
            left += getattr(value, "__dict__", {}).values()


def has_handles(model: nn.Module) -> bool:
    """Whether a module of the model keeps the handle of a hook, which must be one of the copy's table in a copy."""
    return any(isinstance(value, RemovableHandle) for value in reached(model))


def copy_module(module: nn.Module, memo: dict[int, Any], *, handles: bool = True) -> nn.Module:
    """A deep copy; hooks and other functions whose closures hold parts of the module hold those of the copy there.

    Args:
        module: what to copy.
        memo: id of an object to its copy, as for ``copy.deepcopy``; tensors found here are not copied.
        handles: whether there may be handles of hooks (:func:`has_handles`).
    """
    functions: list[tuple[dict[Any, Any], Any]] = []
    for part in module.modules() if handles else ():  # wherever a handle is met, it is one of the copy's table
        for key in _HOOKS:
            table: Any = part.__dict__.get(key)
            if type(table) in _TABLES:
                memo[id(table)] = type(table)()
    new = _Copier(memo, functions).module(module)
    for names, name in functions:
        names[name] = _rebound(names[name], memo)
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


class _Copier:
    """Copies modules.

    Args:
        memo: id of an object to its copy.
        functions: to which the places of functions are added: a dict, and the key in it.
    """

    def __init__(self, memo: dict[int, Any], functions: list[tuple[dict[Any, Any], Any]]) -> None:
        self._memo, self._functions = memo, functions

    def module(self, module: nn.Module) -> nn.Module:
        """The copy of a module."""
        known = self._memo.get(id(module))
        if known is not None:
            return known
        kind: Any = type(module)
        if not _plain(kind):
            new = copy.deepcopy(module, self._memo)
            for part in new.modules():
                self._note(vars(part))
            return new
        new = kind.__new__(kind)
        self._memo[id(module)] = new
        attributes = new.__dict__
        attributes.update(module.__dict__)
        attributes.pop("_compiled_call_impl", None)  # nn.Module leaves it out when it is pickled, too
        hooked = False
        for key in _OF_MODULES_TABLES:
            value = attributes.get(key)
            if type(value) not in _TABLES:
                if value is not None:
                    attributes[key] = self._value(value)
            elif key in _HOOKS:
                known = self._memo.get(id(value))
                attributes[key] = table = type(value)() if known is None else known
                if value:
                    hooked = True
                    table.update((k, self._value(v)) for k, v in value.items())
            else:
                attributes[key] = self._table(value) if value else type(value)()
        for key in attributes.keys() - _OF_MODULES_TABLES:
            value = attributes[key]
            if type(value) not in _ATOMS:
                attributes[key] = self._value(value)
                if type(value) is FunctionType:
                    self._functions.append((attributes, key))
        if hooked:
            self._note(attributes)
        return new

    def _note(self, attributes: dict[str, Any]) -> None:
        self._functions += [(attributes, key) for key, value in attributes.items() if isinstance(value, FunctionType)]
        for key in _HOOKS:
            self._functions += [(attributes[key], number) for number in attributes.get(key) or ()]

    def _table(self, value: Any) -> Any:
        if type(value) is set:
            return set(value)
        new = type(value)((k, self._value(v)) for k, v in value.items())
        self._memo[id(value)] = new
        return new

    def _value(self, value: Any) -> Any:
        if type(value) in _ATOMS:
            return value
        known = self._memo.get(id(value))
        if known is not None:
            return known
        if isinstance(value, nn.Module):
            return self.module(value)
        if type(value) is tuple and all(type(v) in _ATOMS for v in value):
            return value
        return copy.deepcopy(value, self._memo)


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
