"""A page that a person reads: sections of tables, pictures and words, as one HTML file that needs nothing else.

It opens from disk, light or dark as the reader has it, on a phone, and prints. Who has something to tell makes a
:class:`Page` of plain data; what it looks like is in ``templates/``.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.extras import extra
from secateur._internal.files import write_atomically

Cell = str | tuple[str, float]
"""What a cell says, and the number it is sorted by if that is not what it says."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Code:
    """Words to copy."""

    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Table:
    """Rows that can be sorted; the first column is names, the others are numbers where they look like some.

    Attributes:
        head: of the columns.
        rows: cells.
        note: what is to be known of it.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A layer in the picture of a network.

    Attributes:
        name: its path.
        title: what is shown where the pointer rests.
        label: its widths.
        length: of all the bar, in [0, 1].
        kept: of that, what is left.
        taken: how much of its cost went, in [0, 1]: the colour.
        frozen: of what is left, what could not go.
    """

    name: str
    title: str
    label: str
    length: float
    kept: float
    taken: float
    frozen: float


@dataclass(frozen=True)
class Bars:
    """The network as a picture."""

    kind: ClassVar[str] = "bars"
    bars: Sequence[Bar]
    note: str = ""


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side where there is room.

    Attributes:
        pictures: (caption, SVG element).
        small: many small ones.
        note: what is to be known of them.
    """

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[tuple[str, str]]
    small: bool = False
    note: str = ""


@dataclass(frozen=True)
class Folded:
    """What is shown on demand."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: Sequence[Any]


Block = Text | Code | Table | Bars | Pictures | Folded


@dataclass(frozen=True)
class Section:
    """What stands under a heading; without blocks it is left out."""

    title: str
    blocks: Sequence[Block | None] = ()


@dataclass(frozen=True)
class Page:
    """All of it.

    Attributes:
        title: of the page.
        verdict: all there is to know, in a line.
        facts: what it is about, in a few words each.
        sections: in the order in which they are read.
    """

    title: str
    verdict: str
    facts: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=tuple)


def image(data: bytes, kind: str) -> str:
    """A picture that is no SVG of ours as an element, with all that it needs.

    Args:
        data: of the file.
        kind: ``png`` or ``svg+xml``.
    """
    return f'<img alt="" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def render(page: Page) -> str:
    """The page as HTML.

    Raises:
        MissingExtra: Jinja2 is not installed.
    """
    return str(_template().render(page=page, sections=[s for s in map(_whole, page.sections) if s.blocks]))


def write_page(page: Page, path: str | Path) -> Path:
    """Write the page, atomically.

    Raises:
        BadFile: it cannot be written.
        MissingExtra: Jinja2 is not installed.
    """
    path = Path(path)
    if path.is_dir():
        raise SecateurError(f"{path} is a folder: give the name of a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise SecateurError(f"{path}: there is no folder {path.parent}; make it, or give another name")
    if not os.access(path.parent, os.W_OK):
        raise BadFile(f"{path}: the folder {path.parent} cannot be written to; give another name")
    write_atomically(path, render(page).encode())
    return path


def _whole(section: Section) -> Section:
    return Section(section.title, [block for block in section.blocks if block is not None])


@cache
def _template() -> Any:
    with extra("lab", "a report"):
        from jinja2 import Environment, FunctionLoader, StrictUndefined
    folder = resources.files("secateur.report") / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")
