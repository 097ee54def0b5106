"""All keys of a recipe as a page, from the classes that check them: ``python -m secateur.lab.recipe.reference``."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from secateur.lab.recipe.sections import Recipe

BEGIN, END = "<!-- keys: written by python -m secateur.lab.recipe.reference -->", "<!-- keys: end -->"


def reference() -> str:
    """A table for each section: key, default, meaning."""
    parts = []
    for path, section in _sections("", Recipe):
        words = _meanings(section)
        about = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0].replace("\n", " ").replace("``", "`")
        parts += [
            f"## `{path}`" if path else "## A recipe",
            "",
            about,
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for name, field in section.model_fields.items():
            default = _default(field.get_default(call_default_factory=True))
            meaning = words.get(name, "").replace("|", "\\|")
            parts.append(f"| `{f'{path}.{name}' if path else name}` | {default} | {meaning} |")
        parts.append("")
    return "\n".join(parts)


def _sections(path: str, section: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The section, and those in it, each with its key; what has no section below it comes first."""
    yield path, section
    for name, field in section.model_fields.items():
        kinds = [one for one in (field.annotation, *get_args(field.annotation)) if isinstance(one, type)]
        for kind in kinds:
            if issubclass(kind, BaseModel):
                yield from _sections(f"{path}.{name}" if path else name, kind)


def _meanings(section: type[BaseModel]) -> dict[str, str]:
    """Attribute to what the docstrings of a class and of what it inherits from say of it."""
    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        text = inspect.cleandoc(vars(kind).get("__doc__") or "")
        _, _, listed = text.partition("Attributes:\n")
        for entry in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", listed, re.MULTILINE):
            text = re.sub(r"\s*\n\s*", " ", entry[1])
            found[entry[0]] = re.sub(r":\w+:`", "`", text).replace("``", "`")
    return found


def _default(value: Any) -> str:
    if value is PydanticUndefined:
        return "must be given"
    if isinstance(value, BaseModel):
        return "its defaults"
    return f"`{json.dumps(value)}`" if value is not None else "none"


if __name__ == "__main__":
    print(reference())
