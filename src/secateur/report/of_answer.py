"""The page of what ``secateur prune`` has answered: a model of one's own, by its own measure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from secateur.report import parts
from secateur.report.of_result import SHOWN, count_rows, effort, pruning_sections, verdict
from secateur.report.page import Code, Folded, Page, Section, Table


def page_of_answer(notes: Mapping[str, Any]) -> Page:
    """The page.

    Args:
        notes: what is saved beside the model: of :meth:`secateur.Result.as_data`, with ``question``, ``bytes``,
            ``evaluated``, ``history`` and ``versions``.
    """
    asked, facts = notes["question"], notes["facts"]
    evaluated = notes.get("evaluated") or {}
    last = "tuned" if "tuned" in evaluated else "pruned"
    told = [
        f"{name} {_number(value)} → {_number(evaluated[last].get(name))}"
        for name, value in evaluated.get("before", {}).items()
    ]
    history = {"fine-tuning": notes["history"]} if notes.get("history") else {}
    return Page(
        title=f"{asked['source']['model']}: {notes['model']}",
        verdict=f"{'; '.join([verdict(notes), *told])}.",
        facts=[
            f"Pruned by secateur {notes['versions']['secateur']}; "
            + ("what is measured on data is the user's own function" if told else "nothing was measured on data")
        ],
        sections=[
            Section("Before and after", _tables(notes, evaluated, last)),
            *pruning_sections(notes),
            parts.section("Fine-tuning", parts.history(history)),
            parts.section("How", parts.chosen(facts), effort(facts), parts.others(facts, SHOWN), _asked(notes)),
        ],
    )


def _tables(notes: Mapping[str, Any], evaluated: Mapping[str, Any], last: str) -> list[Any]:
    rows = count_rows(notes)
    size = notes["bytes"]
    kept = f"{100 * size['after'] / size['before']:.1f} %"
    rows.append(["bytes of the file", f"{size['before']:,}", f"{size['after']:,}", kept])
    for name, value in evaluated.get("before", {}).items():
        pruned, tuned = evaluated["pruned"].get(name), evaluated[last].get(name)
        between = f"{_number(pruned)} before fine-tuning" if last == "tuned" else ""
        rows.append([name, _number(value), _number(tuned), between])
    return [Table(["", "before", "after", "after / before"], rows)]


def _asked(notes: Mapping[str, Any]) -> list[Any]:
    asked = notes["question"]
    rows = [[name, json.dumps(value)] for name, value in asked.items() if value not in (None, [], {}, "")]
    rows += [["version", f"{name} {version}"] for name, version in notes["versions"].items()]
    rest = {name: value for name, value in notes.items() if name not in {"groups", "layers"}}
    return [
        Folded("What was asked", [Table(["", ""], rows)]),
        Folded("Everything that was kept", [Code(json.dumps(rest, indent=1))]),
    ]


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"
