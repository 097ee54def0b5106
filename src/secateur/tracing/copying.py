"""``copy.deepcopy`` for modules, several times faster: plain modules are copied attribute by attribute.

A network is thousands of small modules with a dozen empty dicts each, which ``copy.deepcopy`` rebuilds one by one
through pickle's protocol. Modules that define how they are copied or pickled, and all other objects, are left to it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from typing import Any

from torch import nn

_ATOMS = (int, float, bool, str, bytes, type(None), type(Ellipsis))


def copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy.

    Args:
        module: what to copy.
        memo: id of an object to its copy, as for ``copy.deepcopy``; tensors found here are not copied.
    """
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
        return copy_module(value, memo)
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
