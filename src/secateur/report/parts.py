"""What several pages show alike: the network as a picture, scores, curves, and what was not done and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.report.charts import line_chart, score_chart
from secateur.report.metrics import ACCURACY, Measured
from secateur.report.page import Bar, Bars, Block, Cell, Folded, Pictures, Section, Table, Text

LONG = 40
"""A list of so many rows is shown on demand."""
UNITS = {"macs": "MACs", "params": "parameters", "channels": "removable channels"}


def counts_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[list[Cell]]:
    """MACs, parameters and channels before and after."""
    return [
        [name, f"{before[unit]:,}", f"{after[unit]:,}", f"{100 * after[unit] / max(before[unit], 1):.1f} %"]
        for unit, name in UNITS.items()
        if before.get(unit) is not None and after.get(unit) is not None
    ]


# -------------------------------------------------------------------------------------------------------- the network


def network(layers: Sequence[Mapping[str, Any]], frozen: Mapping[str, Sequence[Any]] = {}) -> list[Block]:
    """Every layer before and after, as a picture and as a table.

    Args:
        layers: of :func:`secateur.measure.layers.compare_layers`, as data.
        frozen: layer -> how many of its outputs cannot go, and why.
    """
    if not layers:
        return []
    wide = max((row["width"][0] for row in layers if row["width"]), default=1)
    bars = [_bar(row, wide, frozen.get(row["layer"])) for row in layers if row["width"] and row["macs"][0]]
    note = (
        "In the order of the forward; dashed: before, filled: what is left. A bar is as long as the root of the width. "
        "A layer gets cheaper, too, when its inputs do. Hatched: outputs that cannot go; the table says why."
    )
    shown: list[Block] = [Bars(bars, note)] if bars else []
    return [*shown, Folded(f"All {len(layers)} layers as a table", [_layer_table(layers, frozen)])]


def _bar(row: Mapping[str, Any], wide: int, frozen: Sequence[Any] | None) -> Bar:
    before, after = row["width"]
    macs, left = row["macs"]
    stuck = min(frozen[0], after) / max(after, 1) if frozen else 0.0
    title = f"{row['layer']} ({row['kind']}): {before} -> {after} channels, {macs:,} -> {left:,} MACs"
    title += f"; {frozen[0]} cannot go: {frozen[1]}" if frozen else ""
    label = f"{before}" if before == after else f"{before} → {after}"
    return Bar(
        row["layer"], title, label, math.sqrt(before / wide), after / max(before, 1), 1 - left / max(macs, 1), stuck
    )


def _layer_table(layers: Sequence[Mapping[str, Any]], frozen: Mapping[str, Sequence[Any]]) -> Table:
    total = max(sum(row["macs"][0] for row in layers), 1)
    rows: list[list[Cell]] = []
    for row in layers:
        before, after = row["width"] or ("", "")
        macs, left = row["macs"]
        stuck = frozen.get(row["layer"])
        rows.append([
            row["layer"] or "-", row["kind"], str(before), str(after), f"{macs:,}", f"{left:,}",
            f"{100 * macs / total:.1f} %", f"{row['params'][0]:,}", f"{row['params'][1]:,}",
            f"{stuck[0]}: {stuck[1]}" if stuck else "",
        ])  # fmt: skip
    head = ["layer", "kind", "channels", "left", "MACs", "left", "of all MACs", "parameters", "left", "cannot go"]
    return Table(head, rows)


# ------------------------------------------------------------------------------------------------------ scores, curves


def scores(groups: Sequence[Mapping[str, Any]]) -> list[Block]:
    """What the criterion said of the channels of every group, and what was decided."""
    with_scores = [g for g in groups if g.get("scores")]
    if not with_scores:
        return []
    pictures = [
        (f"{g['name']}: {g['width'][0]} → {g['width'][1]}",
         score_chart([(math.nan if s is None else s, gone) for s, gone in g["scores"]]))
        for g in with_scores
    ]  # fmt: skip
    note = (
        "One picture a group, channels from the lowest score to the highest; orange: went, blue: stays. Where scores "
        "differ by more than a hundred times, heights are logarithmic."
    )
    shown = Pictures(pictures, small=True, note=note)
    return [shown] if len(pictures) <= LONG else [Folded(f"The scores of {len(pictures)} groups", [shown])]


def rises(groups: Sequence[Mapping[str, Any]], measured: Mapping[str, Sequence[Sequence[float]]] = {}) -> list[Block]:
    """By how much the loss rises with every width of a group: predicted, measured, or both.

    Args:
        groups: with ``rises``, [channels that went, rise].
        measured: group -> the same, as it was measured.
    """
    pictures = []
    for g in groups:
        lines = {"predicted": _points(g.get("rises", ())), "measured": _points(measured.get(g["name"], ()))}
        lines = {name: points for name, points in lines.items() if points}
        if lines and any(y for points in lines.values() for _, y in points):
            drawn = line_chart(lines, "channels that went", "rise of the loss", dots="measured" in lines)
            pictures.append((f"{g['name']} ({g['width'][0] - g['width'][1]} of {g['width'][0]} went)", drawn))
    if not pictures:
        return []
    return [Folded(f"The loss by width: {len(pictures)} groups", [Pictures(pictures)])]


def _points(rows: Sequence[Sequence[float | None]]) -> list[tuple[float, float]]:
    return [(float(n), float(rise)) for n, rise in rows if n is not None and rise is not None]


def history(stages: Mapping[str, Sequence[Mapping[str, Any]]], measured: Measured = ACCURACY) -> list[Block]:
    """Training curves.

    Args:
        stages: of a training, its rows by epoch.
        measured: what was measured on the examples held out.
    """
    pictures = []
    for name, rows in stages.items():
        unit = f" ({measured.unit})" if measured.unit else ""
        titles = {"loss": "training loss", measured.held_out: f"{measured.name} held out{unit}"}
        for key, title in titles.items():
            factor = measured.factor if key == measured.held_out else 1
            points = [(row["epoch"], factor * row[key]) for row in rows if row.get(key) is not None]
            if points:
                pictures.append((name, line_chart({name: points}, "epoch", title)))
    return [Pictures(pictures)] if pictures else []


# ------------------------------------------------------------------------------------------- what was not done, and why


def reasons(facts: Mapping[str, Any], traced: Mapping[str, Any]) -> list[Block]:
    """What was frozen, skipped, left whole, patched, approximated, substituted: with reasons.

    Args:
        facts: of a result.
        traced: of :func:`secateur.result.traced_data`.
    """
    blocks: list[Block] = []
    said = [*facts.get("notices", ()), *facts.get("remarks", ()), *traced.get("notes", ())]
    blocks += [Text(text) for text in dict.fromkeys(said)]
    if frozen := traced.get("frozen"):
        blocks.append(Text("Frozen, which cannot be removed:"))
        blocks.append(_frozen_table(frozen))
    loose = [[g["name"], g["reason"]] for g in traced.get("groups", ()) if not g["exact"]]
    blocks += _why("Not exact: their removal changes more than the removed channels.", "group", loose)
    blocks += _why("Skipped: groups that kept all their channels.", "group", _items(traced.get("skipped", {})))
    for name, title in (
        ("left whole", "Left whole: layers that stay as they were."),
        ("not fitted", "Not fitted to the original."),
    ):
        blocks += _why(title, "layer", _items(facts.get(name, {})))
    if approximate := facts.get("approximate"):
        blocks.append(
            Text(
                f"Approximated: {', '.join(approximate['groups'])}; the cut network differs from the masked one by "
                f"{approximate['difference']:.2g} of its largest output."
            )
        )
    if patched := traced.get("patched"):
        rows = [[key, before, after] for key, (before, after) in patched.items()]
        table = Table(["attribute", "before", "after"], rows)
        blocks.append(Folded(f"{len(rows)} attributes that modules remember otherwise now", [table]))
    return blocks


def _frozen_table(frozen: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for f in frozen:
        axes = ", ".join(f["some"]) + (f" and {f['axes'] - len(f['some'])} more" if f["axes"] > len(f["some"]) else "")
        where = f"; {f['places'][0]}" if f.get("places") else ""
        rows.append([f"{f['reason']} ({f['operation']})", f"{f['positions']:,}", axes + where, f["advice"]])
    return Table(["why", "positions", "of", "what can be done"], rows)


def _why(title: str, what: str, rows: Sequence[Sequence[str]]) -> list[Block]:
    if not rows:
        return []
    table = Table([what, "why"], rows)
    return [Text(title), table] if len(rows) <= LONG else [Folded(f"{title} ({len(rows)})", [table])]


def _items(found: Any) -> list[list[str]]:
    return [[str(name), str(why)] for name, why in found.items()] if isinstance(found, Mapping) else []


# --------------------------------------------------------------------------------------------------------- facts at all


def chosen(facts: Mapping[str, Any]) -> list[Block]:
    """Which seats were taken, or which method, with their settings."""
    rows: list[list[Cell]] = []
    for seat, settings in facts.get("chosen", {}).items():
        for one in settings if isinstance(settings, list) else [settings]:
            given = {name: value for name, value in one.items() if name != "name"} if isinstance(one, Mapping) else {}
            name = one.get("name", "") if isinstance(one, Mapping) else str(one)
            rows.append([seat, str(name), ", ".join(f"{key}={value}" for key, value in given.items())])
    return [Table(["seat", "who", "settings"], rows)] if rows else []


def others(facts: Mapping[str, Any], known: Sequence[str]) -> Block | None:
    """All other facts, as they are."""
    rows = [[name, _short(value)] for name, value in facts.items() if name not in known and value not in ({}, [], None)]
    return Folded("Other facts", [Table(["fact", "is"], rows)]) if rows else None


def _short(value: Any, most: int = 600) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]} ... ({len(text):,} signs in all)"


def section(title: str, *blocks: Sequence[Block] | Block | None) -> Section:
    """Blocks, and lists of them, under a heading."""
    found: list[Block] = []
    for one in blocks:
        found += list(one) if isinstance(one, Sequence) else [one] if one is not None else []
    return Section(title, found)
