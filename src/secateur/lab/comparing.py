"""``secateur compare``: finished runs, and what ``secateur prune`` has saved, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from secateur import storage as store
from secateur._internal.errors import BadFile, SecateurError
from secateur._internal.files import write_atomically
from secateur.lab.reporting import finished_run
from secateur.lab.run import folder
from secateur.lab.run.table import flat, needs
from secateur.report.comparison import WORDS, Comparison, Entry
from secateur.report.metrics import Measured, measured_in
from secateur.report.page import write_page
from secateur.result import Result

FORMATS = ("table", "markdown", "csv", "latex", "json", "html")
SEATS = ("criterion", "strategy", "repair")
FEW = 3
"""So many runs are a column each."""
SUFFIXES = {".md": "markdown", ".csv": "csv", ".tex": "latex", ".json": "json", ".html": "html"}


def compare(given: Sequence[str | Path] | Mapping[str, Result | str | Path]) -> Comparison:
    """Runs and results side by side.

    Args:
        given: folders of finished runs, or that ``secateur prune`` has saved; or what each is called, and the folder or
            the :class:`secateur.Result`.

    Raises:
        SecateurError: a folder holds neither, or a run that is not finished.
    """
    if not isinstance(given, Mapping):
        paths = [Path(path) for path in given]
        given = dict(zip(_names(paths), paths, strict=True))
    return Comparison(told_apart([_entry(name, one) for name, one in given.items()]))


def told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, where different metrics that are called alike have names of their own."""
    names: dict[Measured, str] = {}
    for m in (m for e in entries for m in e.measured):
        alike = sum(other.name == m.name for other in names if other != m)
        names.setdefault(m, f"{m.name} [{alike + 1}]" if alike else m.name)
    found = []
    for e in entries:
        new = [replace(m, name=names[m]) for m in e.measured]
        keys = {old.test: m.test for old, m in zip(e.measured, new, strict=True)}
        sides = [{keys.get(key, key): some for key, some in side.items()} for side in (e.before, e.after)]
        found.append(replace(e, before=sides[0], after=sides[1], measured=tuple(new)))
    return found


def written(found: Comparison, kind: str | None, out: Path | None, terminal_width: int | None = None) -> str | Table:
    """A comparison in a form, written to a file if one is given.

    Args:
        found: the comparison.
        kind: one of ``FORMATS``; None for what the file is called, or a table for the terminal.
        out: the file.
        terminal_width: signs in a line of the terminal, None where it is none.

    Returns:
        What is to be shown.

    Raises:
        SecateurError: no such form; a table for the terminal is no file; the file cannot be written.
    """
    kind = kind or (SUFFIXES.get(out.suffix) if out is not None else "table")
    if kind not in FORMATS:
        names = f"{', '.join(FORMATS)}, or a file that ends in {', '.join(SUFFIXES)}"
        raise SecateurError(f"--format {kind}: {names} is expected" if kind else f"--out {out}: {names} is expected")
    if out is not None and out.is_dir():
        raise SecateurError(f"--out {out}: it is a folder; give the name of a file")
    if kind == "html":
        if out is None:
            raise SecateurError("--format html wants --out FILE.html")
        return f"{write_page(found.page(), out)}"
    if kind == "table":
        if out is not None:
            raise SecateurError(f"--out {out}: a table for the terminal is no file; give --format markdown")
        return terminal_table(found, terminal_width)
    text = {"markdown": found.markdown, "csv": found.csv, "latex": found.latex, "json": found.json}[kind]()
    if out is None:
        return text.rstrip("\n")
    if not out.parent.is_dir():
        raise BadFile(f"--out {out}: there is no folder {out.parent}; make it, or give another name")
    write_atomically(out, text.encode())
    return f"{out}"


def terminal_table(found: Comparison, width: int | None = None) -> Table:
    """The comparison for a terminal: a row a run, or a column a run, or below each other, whatever fits.

    Args:
        found: the comparison.
        width: signs in a line; None where there is no limit, as in a file.
    """
    tried = [_a_row_each, _a_column_each] if len(found.rows()) > FEW else [_a_column_each, _a_row_each]
    for draw in tried:
        drawn = draw(found)
        if width is None or needs(drawn) <= width:
            return drawn
    return _below_each_other(found)


def _a_row_each(found: Comparison) -> Table:
    """What is the same of all is told below."""
    shown, told = found.told_apart()
    head = found.head()
    drawn = Table(caption=" ".join(filter(None, [told and f"{told[2:]}.", *found.notes])) or None)
    for at in shown:
        drawn.add_column(head[at], justify="left" if at < WORDS else "right", no_wrap=True)
    for row in found.rows():
        drawn.add_row(*(row[at] for at in shown))
    return drawn


def _a_column_each(found: Comparison) -> Table:
    head, rows = found.head(), found.rows()
    drawn = Table(caption=" ".join(found.notes) or None)
    drawn.add_column("", no_wrap=True)
    for row in rows:
        drawn.add_column(row[0], justify="right", no_wrap=True)
    for at, name in enumerate(head[1:], 1):
        drawn.add_row(name, *(row[at] for row in rows))
    return drawn


def _below_each_other(found: Comparison) -> Table:
    drawn = Table(caption=" ".join(found.notes) or None, box=None, show_header=False)
    drawn.add_column("")
    drawn.add_column("", justify="right")
    for row in found.rows():
        drawn.add_row(row[0], "", style="bold")
        for name, cell in zip(found.head()[1:], row[1:], strict=True):
            if cell:
                drawn.add_row(f"  {name}", cell)
    return drawn


def _names(paths: Sequence[Path]) -> list[str]:
    """What folders are called: as little of their paths as tells them apart."""
    whole = [path.resolve().parts for path in paths]
    if len(set(whole)) < len(whole):
        raise SecateurError("compare: a folder is named twice; name each once")
    for count in range(1, max(map(len, whole), default=1) + 1):
        names = ["/".join(parts[-count:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return list(map(str, paths))


def _entry(name: str, one: Result | str | Path) -> Entry:
    if isinstance(one, Result):
        return _of_answer(name, one.as_data())
    path = Path(one)
    if (path / folder.FILE).is_file():
        return entry_of_run(name, finished_run(path))
    if (path / store.FILE).is_file():
        notes = store.read_head(path)["notes"]
        if "before" in notes and "facts" in notes:
            return _of_answer(name, notes)
    raise SecateurError(
        f"{path}: give the folder of a finished run ({folder.FILE} is in it), or one that `secateur prune` has saved"
    )


def entry_of_run(name: str, run: Mapping[str, Any]) -> Entry:
    """A run as an entry.

    Args:
        name: what it is called.
        run: what ``run.json`` holds.
    """
    recipe, seeds, of = run["recipe"], run["seeds"], measured_in(run)
    sides = {side: [flat(found[side], of) for found in seeds.values() if side in found] for side in ("before", "after")}
    values = {side: {m: [one[m] for one in some] for m in some[0]} if some else {} for side, some in sides.items()}
    return Entry(
        name=name, network=recipe["model"]["name"], data=recipe["data"]["name"], how=how(recipe, seeds),
        seeds=len(seeds), before=values["before"], after=values["after"], measured=(of,),
    )  # fmt: skip


def how(recipe: Mapping[str, Any], seeds: Mapping[str, Any] = {}) -> str:
    """What prunes, in a word or three; of what was left to "auto", what that became."""
    chosen: Mapping[str, Any] = next((s["stages"].get("pruned", {}).get("chosen", {}) for s in seeds.values()), {})
    recipe = {**recipe, "prune": {**recipe["prune"], **{k: v for k, v in chosen.items() if k in SEATS}}}
    section = recipe["prune"]
    train = recipe.get("train")
    if section["method"] is not None:
        words = _who(section["method"])
        words += "" if section["repair"] == "auto" else f"/{_repair(section['repair'])}"
    elif section["budget"] is not None:
        words = "/".join([_who(section["criterion"]), _who(section["strategy"]), _repair(section["repair"])])
    else:
        words = _who(train["optimizer"]) if train is not None else "nothing"
    words += f", {section['rounds']} rounds" if section["rounds"] > 1 else ""
    return words + (f", {recipe['finetune']['epochs']} epochs" if recipe.get("finetune") else "")


def _who(seat: Any) -> str:
    return str(seat["name"] if isinstance(seat, Mapping) else seat).rpartition(":")[2]


def _repair(seat: Any) -> str:
    return "+".join(map(_who, seat)) if isinstance(seat, list) else _who(seat)


def _of_answer(name: str, notes: Mapping[str, Any]) -> Entry:
    """What :meth:`secateur.Result.as_data` holds, or what ``secateur prune`` has saved, as an entry."""
    before = {m: [float(v)] for m, v in notes["before"].items() if v is not None}
    after = {m: [float(v)] for m, v in notes["after"].items() if v is not None}
    evaluated = notes.get("evaluated") or {}
    last = evaluated.get("tuned", evaluated.get("pruned", {}))
    for m, value in evaluated.get("before", {}).items():
        if value is not None and last.get(m) is not None:
            before[m], after[m] = [float(value)], [float(last[m])]
    seats = notes["facts"].get("chosen", {})
    who = [_repair(seat) for seat in seats.values()]
    model = notes.get("question", {}).get("source", {}).get("model", notes.get("model", ""))
    data = notes.get("question", {}).get("data") or ""
    words = "/".join(who) + (f", {len(notes['history'])} epochs" if notes.get("history") else "")
    return Entry(name, str(model), str(data), words, 1, before, after)
