"""Things by name: settings dataclasses that a decorator registers, and nothing else keeps a list of.

::

    @CRITERIA.register("random")
    @dataclass(frozen=True)
    class Random:
        seed: int = 0

The class is used from Python (``Random(seed=1)``), from a recipe (``criterion: {name: random, seed: 1}``) and from the
command line (``prune.criterion.name=random``). A user's own needs no registering there: ``my_module:MyCriterion``.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from secateur._internal.errors import SecateurError, unknown
from secateur._internal.importing import import_string, is_import_string

T = TypeVar("T")


class Registry(Generic[T]):
    """Settings classes by name.

    Args:
        kind: what they are, for messages.
        room: the package whose modules hold the built-in ones; they are imported at the first look-up.
        verb: the method that each must have, and how many arguments it is called with, self not counted.
    """

    def __init__(self, kind: str, room: str, **verb: int) -> None:
        self.kind, self.room, self.verb = kind, room, verb
        self._known: dict[str, type] = {}
        self._looked = False

    def register(self, name: str) -> Callable[[type], type]:
        """A decorator that gives a settings class its name."""

        def decorate(cls: type) -> type:
            known = self._known.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise SecateurError(f"{self.kind} {name!r} is there already: {known.__module__}:{known.__qualname__}")
            self._check(cls, name)
            self._known[name] = cls
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return decorate

    def names(self) -> list[str]:
        """All names, in the alphabet's order."""
        self._look()
        return sorted(self._known)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._look()
        return name in self._known

    def find(self, name: str) -> type:
        """The class of that name, or behind ``package.module:Class``."""
        self._look()
        if is_import_string(name):
            found: Any = import_string(self.kind, name)
            if not inspect.isclass(found):
                raise SecateurError(f"{self.kind} {name!r}: a class is expected, this is a {type(found).__name__}")
            self._check(found, name)
            return found
        if name not in self._known:
            raise unknown(self.kind, name, self._known)
        return self._known[name]

    def make(self, given: Any, options: Mapping[str, Any] | None = None) -> T:
        """Settings from what a user gives: a name (short for the defaults), a dict with a name, a class, or settings.

        Raises:
            SecateurError: an unknown name or option, a value that is not allowed, something else.
        """
        if isinstance(given, Mapping):
            given = dict(given)
            if not isinstance(given.get("name"), str):
                raise SecateurError(f"{self.kind}={given!r}: it needs a name, such as {{'name': {self.names()[0]!r}}}")
            name = given.pop("name")
            return self.make(name, {**given, **(options or {})})
        if isinstance(given, str):
            cls = self.find(given)
            return self._made(cls, given, options or {})
        if inspect.isclass(given):
            self._check(given, given.__name__)
            return self._made(given, given.__name__, options or {})
        self._check(type(given), type(given).__name__)
        if options:
            raise SecateurError(f"{self.kind}={given!r}: settings are given already; leave {', '.join(options)} out")
        return given

    def _made(self, cls: type, name: str, options: Mapping[str, Any]) -> T:
        known = options_of(cls)
        for option in options:
            if option not in known:
                raise unknown(f"option of {self.kind} {name!r}", option, known)
        given = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
        try:
            inspect.signature(cls).bind(**given)
        except TypeError as error:
            raise SecateurError(f"{self.kind} {name!r}: {error}; give settings, or a dict with all options") from error
        made: T = cls(**given)
        return made

    def _check(self, cls: type, name: str) -> None:
        for method, count in self.verb.items():
            function = getattr(cls, method, None)
            if function is None or not callable(function):
                raise SecateurError(
                    f"{self.kind} {name!r}: a name ({', '.join(self.names())}), or settings with a method "
                    f"{method}() of {count} arguments are expected"
                )
            try:
                inspect.signature(function).bind(*[None] * (count + 1))
            except TypeError as error:
                raise SecateurError(
                    f"{self.kind} {name!r}: its {method}() must take {count} arguments ({error})"
                ) from error

    def _look(self) -> None:
        if not self._looked:
            self._looked = True
            room = importlib.import_module(self.room)
            for module in pkgutil.walk_packages(room.__path__, f"{self.room}."):
                importlib.import_module(module.name)


def options_of(cls: type) -> list[str]:
    """The names of the settings that a class takes."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls) if field.init]
    return [name for name in inspect.signature(cls).parameters if name not in {"self", "args", "kwargs"}]
