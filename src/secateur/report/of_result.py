"""The page of one result: what :meth:`secateur.Result.as_data` holds, for a person."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from secateur.report import parts
from secateur.report.page import Block, Page, Pictures, Section, Table, Text, image

SHOWN = ("chosen", "notices", "remarks", "left whole", "not fitted", "approximate", "forwards", "latency_ms", "search")


def page_of_result(data: Mapping[str, Any], *, title: str = "") -> Page:
    """The page.

    Args:
        data: of :meth:`secateur.Result.as_data`.
        title: of the page.
    """
    facts = data["facts"]
    return Page(
        title=title or data["model"],
        verdict=f"{verdict(data)}.",
        facts=[f"{data['model']}, pruned by secateur"],
        sections=[
            Section("Before and after", [Table(["", "before", "after", "after / before"], count_rows(data))]),
            *pruning_sections(data),
            parts.section("How", parts.chosen(facts), effort(facts), parts.others(facts, SHOWN)),
        ],
    )


def verdict(data: Mapping[str, Any]) -> str:
    """What is left, in words."""
    kept = {
        unit: data["after"][unit] / max(data["before"][unit], 1)
        for unit in ("macs", "params")
        if data["before"].get(unit) is not None
    }
    words = [f"{100 * part:.1f} % of the {parts.UNITS[unit]}" for unit, part in kept.items()]
    time = data["facts"].get("latency_ms")
    words += [f"{time['before'] / time['after']:.2f} times as fast"] if time and time.get("after") else []
    return " and ".join(words[:2]) + " are left" + "".join(f", {word}" for word in words[2:])


def count_rows(data: Mapping[str, Any]) -> list[Any]:
    """Counts before and after, and the milliseconds of a budget in these."""
    rows = parts.counts_rows(data["before"], data["after"])
    if time := data["facts"].get("latency_ms"):
        kept = f"{100 * time['after'] / time['before']:.1f} %"
        rows.append(["latency (ms)", f"{time['before']:.4g}", f"{time['after']:.4g}", kept])
    return rows


def pruning_sections(data: Mapping[str, Any]) -> list[Section]:
    """The network, scores, curves, a search, and reasons."""
    groups, facts = data.get("groups", ()), data["facts"]
    measured = facts.get("sensitivity", {}).get("rises", {})
    return [
        parts.section("The network", parts.network(data["layers"], data.get("frozen in", {}))),
        parts.section("What the channels are worth", parts.scores(groups), parts.rises(groups, measured)),
        parts.section("What the search learned", searched(facts)),
        parts.section("What was not done, and why", parts.reasons(facts, data)),
    ]


def searched(facts: Mapping[str, Any]) -> list[Block]:
    """The widths that a search has tried."""
    found = facts.get("search")
    if not found or not found.get("table"):
        return []
    best = [row for row in found["table"] if row.get("found")]
    words = f"{found.get('forwards', '?')} forwards; begun with the widths of {found.get('started', '?')}."
    rows = [
        [row["group"], str(row["width"]), str(row["of"]), f"{row['gap']:.4g}", str(row["plays"]),
         "found" if row.get("found") else "" if row["active"] else "ruled out"]
        for row in found["table"]
    ]  # fmt: skip
    table = Table(["group", "width", "of", "gap (reward)", "plays", ""], rows)
    chosen = Text(f"{words} Found: {_widths(best)}; then rounded, and the budget filled.") if best else None
    drawn = Pictures([("How good every width looks, how often it was tried, and what was found", _as_image(found))])
    folded = parts.Folded(f"All {len(rows)} widths that were tried", [table])
    return [block for block in (chosen, drawn, folded) if block is not None]


def _as_image(found: Mapping[str, Any]) -> str:
    """The figure of a search as an element of a page."""
    from secateur.report.search import draw_search

    text = io.BytesIO()
    draw_search(found["table"]).savefig(text, format="svg", metadata={"Date": None})
    return image(text.getvalue(), "svg+xml")


def effort(facts: Mapping[str, Any]) -> Text | None:
    """What it took."""
    return Text(f"Batches that went through the model: {facts['forwards']:,}.") if "forwards" in facts else None


def _widths(rows: list[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['group']} {row['width']}" for row in rows)
