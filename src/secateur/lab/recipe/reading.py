"""A recipe from a YAML file and ``key=value`` overrides; what is wrong with it is told in this project's words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from secateur._internal.errors import BadFile, SecateurError, unknown
from secateur.lab.recipe.sections import Recipe
from secateur.lab.recipe.yaml_text import parse_yaml

PATHS = (("data", "root"), ("model", "weights"))
"""The settings that are paths."""


def read(path: str | Path | Traversable, overrides: Sequence[str] = (), folder: Path | None = None) -> Recipe:
    """A recipe from a YAML file, with ``key=value`` overrides (dotted keys, values in YAML).

    Args:
        path: the file.
        overrides: what to change; a path among them is relative to the current folder.
        folder: what paths in the file are relative to; without it, the folder that the file is in.

    Returns:
        The recipe; its paths are absolute.

    Raises:
        BadFile: a file that cannot be read.
        SecateurError: unknown or contradicting settings, all told in one message.
    """
    file = Path(path) if isinstance(path, str) else path
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"recipe {path}: it cannot be read ({error})") from error
    given = parse_yaml(text, f"recipe {path}")
    if not isinstance(given, dict):
        raise SecateurError(f"recipe {path}: keys and values are expected, such as 'seeds: [0]'")
    if folder is None and isinstance(file, Path):
        folder = file.parent
    given = _anchored(given, folder or Path.cwd())
    return validate(_overridden(given, overrides), f"recipe {path}")


def _anchored(value: Any, folder: Path, key: tuple[str, ...] = ()) -> Any:
    """The same settings with absolute paths, so that they mean the same wherever the run goes on."""
    if key in PATHS and isinstance(value, str):
        return str(folder.absolute() / Path(value).expanduser())
    if isinstance(value, dict) and any(path[: len(key)] == key for path in PATHS):
        return {name: _anchored(inner, folder, (*key, str(name))) for name, inner in value.items()}
    return value


def validate(given: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from plain data."""
    try:
        return Recipe.model_validate(dict(given))
    except ValidationError as error:
        raise SecateurError(f"{where}: {'; '.join(_told(error))}") from error


def _overridden(given: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    texts: dict[str, str] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise SecateurError(f"override {text!r}: key=value is expected, such as train.epochs=3")
        new = _anchored(parse_yaml(value, f"override {text!r}"), Path.cwd(), tuple(key.split(".")))
        for other, before in values.items():
            if (other == key and before != new) or other.startswith(key + ".") or key.startswith(other + "."):
                raise SecateurError(f"override {text!r} contradicts {texts[other]!r}: give one of the two")
        values[key], texts[key] = new, text
    for key, value in values.items():
        *path, last = key.split(".")
        section = given
        for part in path:
            section[part] = section = _section(section.get(part))
        section[last] = value
    return given


def value_of(override: str) -> Any:
    """The value of a ``key=value``."""
    return parse_yaml(override.partition("=")[2], f"override {override!r}")


def _section(given: Any) -> dict[str, Any]:
    """What is below a key of which an override sets a part; a name alone is short for a section with that name."""
    if isinstance(given, str):
        return {"name": given}
    return given if isinstance(given, dict) else {}


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
    """The keys that a section knows, or one in a section."""
    section: type[BaseModel] = Recipe
    for part in path:
        kind = section.model_fields[part].annotation
        section = next(one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel))
    return list(section.model_fields)
