"""``secateur report``: the page of what a folder holds."""

from __future__ import annotations

from pathlib import Path

from secateur import storage as store
from secateur._internal.errors import BadFile, SecateurError
from secateur.lab.run import folder
from secateur.report.of_answer import page_of_answer
from secateur.report.of_run import page_of_run
from secateur.report.page import Page, write_page


def report(what: Path, out: Path | None = None) -> Path:
    """Write the page of a run, or of what ``secateur prune`` has saved.

    Args:
        what: the folder.
        out: the file; ``report.html`` in the folder by default.

    Returns:
        The file.

    Raises:
        SecateurError: the folder holds neither, or a run that is not finished; the file cannot be written.
    """
    return write_page(page_of_folder(what), what / folder.REPORT if out is None else out)


def page_of_folder(what: Path) -> Page:
    """The page of what a folder holds.

    Raises:
        SecateurError: it holds nothing that has a page.
    """
    if (what / folder.FILE).is_file():
        return page_of_run(finished_run(what), what)
    if (what / store.FILE).is_file():
        notes = store.read_head(what)["notes"]
        if "layers" in notes and "question" in notes:
            return page_of_answer(notes)
        raise SecateurError(
            f"{what}: it was saved without what a report tells; of what sc.prune returns, result.report(...) writes one"
        )
    kind = "a file" if what.is_file() else "no folder" if not what.exists() else "a folder that is no run"
    raise SecateurError(
        f"{what} is {kind}: give the folder of a run ({folder.FILE} is in it), or one that `secateur prune` has saved"
    )


def finished_run(what: Path) -> dict[str, object]:
    """What the ``run.json`` of a folder holds, of a finished run.

    Raises:
        SecateurError: it is damaged, or the run is not finished.
    """
    found = folder.read(what)
    if not found.get("finished"):
        raise SecateurError(f"{what}: this run is not finished; the command that began it goes on")
    if missing := [key for key in ("recipe", "versions", "summary", "seeds") if not found.get(key)]:
        raise BadFile(f"{what / folder.FILE} is damaged: it has no {' and no '.join(missing)}")
    return found
