"""Files that are whole or not there: written atomically, whatever happens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from secateur._internal.errors import BadFile, SecateurError


def file_at(path: str | Path | None) -> Path | None:
    """Where a checkpoint in a single file is to be.

    Raises:
        SecateurError: it cannot be there.
    """
    if path is None:
        return None
    if not isinstance(path, (str, Path)) or Path(path).is_dir() or not Path(path).parent.is_dir():
        raise SecateurError(f"checkpoint={str(path)!r}: a file in a folder that is there is expected")
    return Path(path)


def text_if_there(path: Path) -> str:
    """The text of a file, empty if it is not there; of one that cannot be read, why: whoever parses it is told."""
    if not path.exists():
        return ""
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        return f"unreadable: {error}"


def make_folder(path: Path) -> None:
    """Make a folder and those above it, unless they are there.

    Raises:
        BadFile: it cannot be made: something else is in its place, the disk is full, or it may not be written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFile(
            f"{path} cannot be written: the folder cannot be made ({error.strerror or error}): give another folder, or "
            "make room"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    Raises:
        BadFile: it cannot be written, because the disk is full, say; what was there before still is.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise BadFile(
            f"{path} cannot be written: {error.strerror or error} ({len(content):,} bytes are "
            f"to be written{_free(path)}); "
            "what was there before still is: make room, or give another folder, and run the same again"
        ) from error


def _free(path: Path) -> str:
    try:
        return f", {shutil.disk_usage(path.parent).free:,} are free"
    except OSError:
        return ""
