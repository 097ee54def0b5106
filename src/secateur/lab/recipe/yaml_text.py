"""YAML without three of its traps: a key given twice, 1e-3 read as a word, and a number that is told back otherwise."""

from __future__ import annotations

import re
from typing import Any

import yaml

from secateur._internal.errors import SecateurError


class TypedFloat(float):
    """A number that remembers how it was written: 0.10 is told back as 0.10, and 1e-3 as 1e-3.

    It is a float in every other way. A copy of it, and all that is computed from it, is a plain one.
    """

    text: str

    def __new__(cls, value: float, text: str) -> TypedFloat:
        """The number and how it was written."""
        typed = super().__new__(cls, value)
        typed.text = text
        return typed

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__

    def __reduce__(self) -> tuple[type[float], tuple[float]]:
        return float, (float(self),)


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds.

    Args:
        text: the YAML; a key twice in one mapping is refused, and 1e-3 is a number.
        where: what the text is, for messages.

    Raises:
        SecateurError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Yaml)
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        raise SecateurError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


class _Yaml(yaml.SafeLoader):
    """Safe YAML, without its traps."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise SecateurError(f"line {node.start_mark.line + 1}: the key {twice!r} is given twice; keep one")
        return super().construct_mapping(node, deep)

    def construct_typed_float(self, node: yaml.ScalarNode) -> float:
        """A float; one that Python writes otherwise remembers how it was written."""
        value: float = self.construct_yaml_float(node)
        return value if repr(value) == node.value else TypedFloat(value, node.value)


_Yaml.add_constructor("tag:yaml.org,2002:float", _Yaml.construct_typed_float)
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
