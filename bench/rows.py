"""Rows of results in a JSON file: what is there need not be run again, and several runs may add to the same file."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Rows:
    """The rows in a file; each new one is written at once, and a file is there whole or not at all.

    Args:
        path: the file; it need not be there.
        indent: of the JSON; ``None`` for rows of long lists.
        facts: what holds for all rows, written beside them.
    """

    def __init__(self, path: Path, indent: int | None = 1, **facts: Any) -> None:
        self.path, self.indent, self.facts = path, indent, facts

    @property
    def rows(self) -> list[Row]:
        """All rows that are there."""
        found: list[Row] = self._whole().get("rows", [])
        return found

    def fact(self, name: str, otherwise: Any = None) -> Any:
        """What stands beside the rows under a name."""
        return self._whole().get(name, otherwise)

    def has(self, key: Row) -> bool:
        """Whether there is a row with these values."""
        wanted = json.loads(json.dumps(key))
        return any(all(row.get(name) == value for name, value in wanted.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        """One row more."""
        self._write({}, [row])

    def state(self, **facts: Any) -> None:
        """Write what holds for all rows, or stands beside them."""
        self._write(facts, [])

    def _write(self, facts: dict[str, Any], rows: list[Row]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.parent):
            whole = self._whole()
            whole |= self.facts | facts | {"rows": [*whole.pop("rows", []), *rows]}
            new = self.path.with_suffix(".tmp")
            new.write_text(json.dumps(whole, indent=self.indent))
            new.replace(self.path)

    def _whole(self) -> dict[str, Any]:
        return dict(json.loads(self.path.read_text())) if self.path.exists() else {}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other run writes in this folder meanwhile."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
