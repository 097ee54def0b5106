"""A recipe from a YAML file and ``key=value`` overrides; what is wrong with it is told in this project's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from secateur._internal.errors import SecateurError, unknown
from secateur.lab.recipe.sections import SECTIONS, Recipe
from secateur.lab.recipe.yaml_text import parse_yaml


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, with ``key=value`` overrides (dotted keys, values in YAML).

    Raises:
        SecateurError: a file that cannot be read, unknown or contradicting settings, all told in one message.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SecateurError(f"recipe {path}: it cannot be read ({error})") from error
    given = parse_yaml(text, f"recipe {path}")
    if not isinstance(given, dict):
        raise SecateurError(f"recipe {path}: keys and values are expected, such as 'seeds: [0]'")
    return validate(_overridden(given, overrides), f"recipe {path}")


def validate(given: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data."""
    try:
        return Recipe.model_validate(dict(given))
    except ValidationError as error:
        raise SecateurError(f"{where}: {'; '.join(_told(error))}") from error


def _overridden(given: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise SecateurError(f"override {text!r}: key=value is expected, such as train.epochs=3")
        new = parse_yaml(value, f"override {text!r}")
        for other, before in values.items():
            if (other == key and before != new) or other.startswith(key + ".") or key.startswith(other + "."):
                raise SecateurError(f"override {text!r} contradicts {other}={before!r}: give one of the two")
        values[key] = new
    for key, value in values.items():
        *path, last = key.split(".")
        section = given
        for part in path:
            before = section.get(part)
            if not isinstance(before, dict):  # a name alone is short for a mapping of a name
                section[part] = {"name": before} if isinstance(before, str) else {}
            section = section[part]
        section[last] = value
    return given


def _told(error: ValidationError) -> Iterator[str]:
    """What pydantic found, in this project's words."""
    for entry in error.errors():
        *path, last = (str(part) for part in entry["loc"]) if entry["loc"] else ("",)
        key = ".".join([*path, last])
        cause = entry.get("ctx", {}).get("error")
        if entry["type"] == "extra_forbidden":
            yield str(unknown("key" + (f" in {'.'.join(path)}" if path else ""), last, _fields(path)))
        elif entry["type"] == "missing":
            yield f"{key} is missing"
        elif isinstance(cause, SecateurError):
            yield f"{key}: {cause}" if key else str(cause)
        else:
            text = entry["msg"].replace("Input should be", "must be")
            text = re.sub(r"dictionary or instance of \w+", "section of keys and values", text)
            yield f"{key}={entry['input']!r} {text}"


def _fields(path: Sequence[str]) -> list[str]:
    """The keys that a section knows."""
    return list((SECTIONS[path[0]] if path else Recipe).model_fields)
