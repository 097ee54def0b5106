"""The folder of a run: whose it is, what is in it, and that only one process works in it.

``run.json`` is written first, unfinished, and replaced last; in between every stage is kept in ``seed-N/STAGE``. All is
written atomically, so whatever is there is whole.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.files import make_folder, write_atomically
from secateur.lab.recipe.reading import validate
from secateur.lab.recipe.sections import Recipe

VERSION = 1
FILE, REPORT = "run.json", "report.html"
_FREE = ("name", "about")  # what may be changed without making it another run


def versions() -> dict[str, str]:
    """What the last bits of a result depend on."""
    from secateur import __version__

    return {"secateur": __version__, "torch": torch.__version__, "python": platform.python_version()}


def earlier(out: Path, recipe: Recipe, *, fresh: bool = False) -> dict[str, Any] | None:
    """What ``run.json`` says of this very run; ``None`` if nothing has been done yet, or it shall be done afresh.

    Raises:
        SecateurError: the folder holds something else, another run, or one that other versions began.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise SecateurError(f"--out {out}: it is a file; give a folder")
    path = out / FILE
    if not path.exists():
        if any(entry.suffix != ".tmp" for entry in out.iterdir()):
            raise SecateurError(f"--out {out}: it holds other files and no {FILE}; give a new folder")
        return None
    found = read(out)
    if fresh:
        return None
    changes = list(_differences(_with_defaults(found.get("recipe", {})), recipe.model_dump()))
    if changes:
        raise SecateurError(
            f"--out {out}: it holds another run ({'; '.join(changes[:5])}): give another folder, or --fresh to replace "
            "it"
        )
    if not found.get("finished") and found.get("versions") != versions():
        raise SecateurError(
            f"--out {out}: this run was begun with other versions ({_words(found.get('versions'))}; now "
            f"{_words(versions())}) and would not end the same: give another folder, or --fresh to begin anew"
        )
    return found


def read(out: Path) -> dict[str, Any]:
    """The ``run.json`` of a folder.

    Raises:
        BadFile: it is damaged, or not a run's.
    """
    try:
        found = json.loads((out / FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(f"{out / FILE} is damaged ({error}): give another folder, or delete this one") from error
    if not isinstance(found, dict) or found.get("secateur_run") != VERSION:
        raise BadFile(f"{out / FILE} is not a run of this version of secateur: give another folder")
    return found


def write(out: Path, content: Mapping[str, Any]) -> None:
    """Replace ``run.json``."""
    write_json(out / FILE, {"secateur_run": VERSION, **content})


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def dump(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data, defaults included."""
    return recipe.model_dump(mode="json")


@contextmanager
def held(out: Path, *, wait: bool = False) -> Iterator[None]:
    """Make the folder, and keep other processes out of it; the lock goes with the process.

    Args:
        out: the folder.
        wait: until another process is done with it, instead of an error.
    """
    make_folder(out)
    try:
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise BadFile(f"--out {out}: it cannot be read ({error})") from error
    try:
        _lock(handle, out, wait=wait)
        yield
    finally:
        os.close(handle)


def sweep(out: Path) -> None:
    """Remove what a process left that was killed while it wrote."""
    for pattern in (f"{FILE}.*.tmp", f"{REPORT}.*.tmp", "seed-*/**/*.tmp"):
        for left in out.glob(pattern):
            left.unlink(missing_ok=True)


def clear(out: Path) -> None:
    """Remove what a run has left, ``run.json`` last."""
    sweep(out)
    for entry in out.glob("seed-*"):
        shutil.rmtree(entry)
    (out / REPORT).unlink(missing_ok=True)
    (out / FILE).unlink(missing_ok=True)


def _lock(handle: int, out: Path, *, wait: bool) -> None:
    try:
        import fcntl
    except ImportError:  # a system without it
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise SecateurError(
            f"--out {out}: another process is at work in it; wait for it, or give another folder"
        ) from error


def _with_defaults(old: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe written down before a setting was there means that setting's default."""
    try:
        return dump(validate(old))
    except SecateurError:
        return old


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        if not path and key in _FREE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{path}{key}.")
        elif before != after:
            yield f"{path}{key} {_short(before)}, now {_short(after)}"


def _short(value: Any) -> str:
    """A setting in a few signs: a section as dots, a number as it was written."""
    return "..." if isinstance(value, dict) else repr(value) if isinstance(value, float) else json.dumps(value)


def _words(found: Mapping[str, str] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in (found or {}).items())
