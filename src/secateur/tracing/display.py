"""Tables for people: as text that fits a terminal, and as plain HTML for notebooks."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from html import escape

GAP = "  "
NARROW = 20
"""Columns of lists that would get less room than this are left out."""
LONGEST = 10**6
MOST_NAMES = 4
"""A cell names no more, however wide the terminal is."""
MOST_ROWS = 60
"""An HTML table has no more rows; how many there are is said below it."""

Cell = str | Sequence[str]
"""A text, or a list of names, of which as many are shown as there is room for."""


def terminal_width(width: int | None = None) -> int:
    """The width that is given, or that of the terminal (80 where there is none)."""
    return shutil.get_terminal_size().columns if width is None else width


def shortened(name: str, width: int) -> str:
    """A dotted name of at most that width: parts in its middle give way to an ellipsis, its end is kept longest."""
    if len(name) <= width:
        return name
    parts = name.split(".")
    for kept in range(len(parts) - 1, 0, -1):
        for front in range((kept - 1) // 2, -1, -1):
            text = ".".join([*parts[:front], "…", *parts[len(parts) - (kept - front) :]])
            if len(text) <= width:
                return text
    return "…" + name[len(name) - max(width - 1, 0) :] if width > 1 else "…"[:width]


def listed(names: Sequence[str], width: int, most: int | None = None) -> str:
    """Names in one line of at most that width: as many as fit, then how many more there are."""
    for shown in range(min(len(names), most or len(names)), 0, -1):
        text = ", ".join(names[:shown]) + _more(len(names) - shown)
        if len(text) <= width:
            return text
    more = _more(len(names) - 1)
    return shortened(names[0], max(width - len(more), 1)) + more if names else ""


def _more(count: int) -> str:
    return f" +{count}" if count else ""


def text_table(rows: Sequence[Sequence[Cell]], width: int) -> list[str]:
    """Rows as lines of at most that width, the first row being the heads.

    What is too wide is shortened; columns of lists for which no room is left are not shown, and a last line says so.
    """
    wanted = [max(len(_fitted(row[c], LONGEST)) for row in rows) for c in range(len(rows[0]))]
    lists = [c for c in range(len(rows[0])) if any(not isinstance(row[c], str) for row in rows)]
    others = [c for c in range(len(rows[0])) if c not in lists]
    room = width - sum(wanted[c] for c in others) - len(GAP) * (len(rows[0]) - 1)  # for the lists
    if room >= sum(min(NARROW, wanted[c]) for c in lists):
        own = dict(zip(lists, _shared([wanted[c] for c in lists], room), strict=True))
        widths = {c: own.get(c, wanted[c]) for c in range(len(rows[0]))}
    else:
        widths = dict(
            zip(others, _shared([wanted[c] for c in others], width - len(GAP) * (len(others) - 1)), strict=True)
        )
    lines = [GAP.join(_fitted(row[c], w).ljust(w) for c, w in widths.items()).rstrip() for row in rows]
    missing = [str(rows[0][c]) for c in range(len(rows[0])) if c not in widths]
    if missing:
        lines += wrapped(f"({' and '.join(missing)} need a wider terminal)", width)
    return lines


def _fitted(cell: Cell, width: int) -> str:
    return shortened(cell, width) if isinstance(cell, str) else listed(cell, width, MOST_NAMES)


def _shared(wanted: Sequence[int], room: int) -> list[int]:
    """Room for each column: what it wants if that is no more than its share, and the others share the rest."""
    widths = list(wanted)
    if sum(wanted) <= room:
        return widths
    left, open_ones = room, list(range(len(wanted)))
    while open_ones:
        share = max(left // len(open_ones), 1)
        modest = [c for c in open_ones if wanted[c] <= share]
        for c in modest or open_ones:
            widths[c] = min(wanted[c], share)
            left -= widths[c]
        open_ones = [c for c in open_ones if c not in modest] if modest else []
    return widths


def wrapped(text: str, width: int) -> list[str]:
    """A text in lines of at most that width, broken between words where they are not longer than a line."""
    return textwrap.wrap(text, max(width, 1), break_on_hyphens=False)


def paragraph(text: str, names: Sequence[str], width: int) -> list[str]:
    """A sentence in lines of at most that width, and below it, indented, as many names as fit into one line."""
    return [*wrapped(text, width), "  " + listed(names, width - 2)]


def html_table(rows: Sequence[Sequence[object]], caption: str = "", notes: Iterable[str] = ()) -> str:
    """Rows as a plain HTML table, the first row being the heads; all text is escaped."""

    def line(cells: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    body = [line(row, "td") for row in rows[1 : MOST_ROWS + 1]]
    if len(rows) > MOST_ROWS + 1:
        body.append(line([f"and {len(rows) - MOST_ROWS - 1} more"], "td"))
    head = f"<caption>{escape(caption)}</caption>" if caption else ""
    below = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<table>{head}<thead>{line(rows[0], 'th')}</thead><tbody>{''.join(body)}</tbody></table>{below}"
