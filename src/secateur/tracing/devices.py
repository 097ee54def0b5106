"""Operations on tensors of which some have no data: whole numbers that a forward makes have some where they can.

A skeleton's parameters are on the meta device, its token ids and masks on the CPU. What is made of the latter alone is
computed; where both meet, the result has no data. Zeros, into which hidden states are often written, have none either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

_COUNTING = {torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step}
_MASKS = {torch.ops.aten.ones.default, torch.ops.aten.full.default}
_ROOM = {torch.ops.aten.zeros.default, torch.ops.aten.empty.memory_format}
_LARGE = 1_000_000


def without_devices(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation, wherever its arguments are.

    Args:
        func: the ATen operation.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Raises:
        RuntimeError: what has no data would be written into what has.
    """
    hollow = data = False
    for value in (*args, *kwargs.values()):
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, Tensor):
                hollow, data = hollow or each.is_meta, data or not each.is_meta
    if hollow and data:
        if any(isinstance(value, Tensor) and not value.is_meta for value in _written(func, args, kwargs)):
            raise RuntimeError("a tensor without data is written into one that has data")
        args, kwargs = tuple(map(_hollow, args)), {name: _hollow(value) for name, value in kwargs.items()}
    elif not hollow and kwargs.get("device") == _META and (data or _is_looked_at(func, args, kwargs)):
        kwargs = {**kwargs, "device": _CPU}
    elif func in _ROOM and kwargs.get("device") in (None, _CPU) and (kwargs.get("dtype") or _FLOAT).is_floating_point:
        kwargs = {**kwargs, "device": _META}
    return func(*args, **kwargs)


_FLOAT = torch.float32  # stands for the default


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """The arguments that an operation writes into."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[place] if place < len(args) else kwargs.get(argument.name)


_META, _CPU = torch.device("meta"), torch.device("cpu")


def _hollow(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if value.is_meta else torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device="meta"
        )  # fmt: skip
    return type(value)(map(_hollow, value)) if type(value) in (list, tuple) else value


def _is_looked_at(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation makes, of nothing but numbers, what a forward may look at: whole numbers, or a mask."""
    dtype = kwargs.get("dtype")
    if func in _MASKS:
        return prod(args[0]) <= _LARGE
    if dtype is not None:
        return not (dtype.is_floating_point or dtype.is_complex)
    return func in _COUNTING and all(isinstance(v, int) for v in args if v is not None)
