"""YAML without two of its traps: a key given twice, and 1e-3 read as a word."""

from __future__ import annotations

import re
from typing import Any

import yaml

from secateur._internal.errors import SecateurError


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds; a key twice in one mapping is refused, and 1e-3 is a number."""
    try:
        return yaml.load(text, Loader=_Yaml)
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        raise SecateurError(f"{where}: not YAML: {' '.join(str(error).split())}") from error


class _Yaml(yaml.SafeLoader):
    """Safe YAML, without two of its traps."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys are all different."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise SecateurError(f"line {node.start_mark.line + 1}: the key {twice!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
