"""What a run leaves behind outside of the model: taken out again, so that nobody meets a tensor without data.

A forward may keep what it computes in places that the copies of a model share with it: the cache of a function
(``functools.lru_cache``), a dict or a global name of the user's module, an attribute of a class. A tensor that is still
alive when its run is over is in one of these.
"""

from __future__ import annotations

import functools
import gc
import sys
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from secateur._internal.errors import notice

_CACHES: Any = type(functools.lru_cache(lambda: None))
_CONTAINERS = (dict, list, set)
_DEPTH = 4
_MANY = 1000
_YOUNG = 1  # generations of the collector, in which most of what a run made still is; looking through all takes long


class Shared:
    """What the copies of a model share with it, as it is now: the names of classes and files, and what these hold.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        kinds = {base for module in model.modules() for base in type(module).__mro__}
        kinds = {kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "builtins")}
        files = [vars(sys.modules[name]) for name in {kind.__module__ for kind in kinds} if name in sys.modules]
        self._names: list[tuple[Any, dict[str, Any]]] = [(file, dict(file)) for file in files]
        self._names += [(kind, dict(vars(kind))) for kind in kinds]
        self._containers: dict[int, tuple[Any, Any]] = {}
        for _, names in self._names:
            for name, value in names.items():
                if not name.startswith("__"):
                    self._add(value, 2)

    def _add(self, value: Any, depth: int) -> None:
        if not isinstance(value, _CONTAINERS) or id(value) in self._containers or "__builtins__" in value:
            return
        if len(value) < _MANY and len(self._containers) < _MANY:
            self._containers[id(value)] = (value, value.copy())
            for inner in (value.values() if isinstance(value, dict) else value) if depth else ():
                self._add(inner, depth - 1)

    def restore(self) -> None:
        """Make everything what it was."""
        for where, before in self._names:
            now = where if isinstance(where, dict) else vars(where)
            for name in [name for name in {**before, **now} if before.get(name, self) is not now.get(name, self)]:
                if isinstance(where, dict):
                    where.pop(name, None)
                    where.update({name: before[name]} if name in before else {})
                elif name in before:
                    setattr(where, name, before[name])
                else:
                    delattr(where, name)
        for value, before in self._containers.values():
            if isinstance(value, list):
                value[:] = before
            else:
                value.clear()
                value.update(before)


def clean(made: Iterable[weakref.ref[Tensor]], shared: Shared) -> None:
    """Take tensors out of wherever they are still held.

    Args:
        made: what a run has made.
        shared: what it may have been left in, as it was before.
    """
    made = list(made)
    if not _alive(made):
        return
    gc.collect(_YOUNG)  # a copy that refers to itself holds what it kept until now
    if not _alive(made):
        return
    shared.restore()
    _clear_caches(_alive(made))
    gc.collect(_YOUNG)
    if not _alive(made):
        return
    gc.collect()
    if left := _alive(made):
        notice(
            f"{len(left)} tensors without data stay where the model's forward has put them, outside of the model (the "
            f"first one: {list(left[0].shape)}): let it keep what it computes in its modules"
        )


def _alive(made: list[weakref.ref[Tensor]]) -> list[Tensor]:
    return [tensor for tensor in (reference() for reference in made) if tensor is not None]


def _clear_caches(values: list[Any]) -> None:
    """Clear the caches of functions that hold any of these values, perhaps within tuples, lists or dicts."""
    seen = {id(values)}
    for _ in range(_DEPTH):
        holders = [holder for holder in gc.get_referrers(*values) if id(holder) not in seen] if values else []
        seen |= {id(holder) for holder in holders} | {id(holders)}
        for holder in holders:
            if isinstance(holder, _CACHES):
                holder.cache_clear()
        values = [holder for holder in holders if isinstance(holder, (*_CONTAINERS, tuple))]
        seen.add(id(values))
