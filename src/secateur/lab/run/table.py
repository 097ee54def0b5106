"""The before/after table of a run, and the means and spreads it is made from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("before", "after")


def summary(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every metric, by column, and of the accuracy's change."""
    found: dict[str, Any] = {}
    for column in COLUMNS:
        rows = [_flat(seed[column]) for seed in seeds if column in seed]
        if rows:
            found[column] = {name: _spread([row[name] for row in rows]) for name in rows[0]}
    if "after" in found:
        changes = [seed["after"]["test_accuracy"] - seed["before"]["test_accuracy"] for seed in seeds]
        found["change"] = {"test_accuracy": _spread(changes)}
    return found


def table(result: Mapping[str, Any]) -> Table:
    """What ``run.json`` holds, as a table for the terminal."""
    from rich.table import Table

    found, recipe = result["summary"], result["recipe"]
    seeds = recipe["seeds"]
    over = f"mean ± sd of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    note = f" ({result['data']})" if result["data"] else ""
    how = recipe["measure"]
    timed = f"latency: CPU, {how['threads']} thread{'s'[: how['threads'] - 1]}, median of {how['repeats']}"
    caption = f"{recipe['data']['name']}{note}; {over}; {timed}"
    drawn = Table(title=f"{recipe['name']}: {recipe['model']['name']}", caption=caption, title_style="bold")
    drawn.add_column("")
    for column in found:
        drawn.add_column({"change": "after / before"}.get(column, column), justify="right")
    for name in found["before"]:
        if name != "validation_accuracy":
            drawn.add_row(_title(name), *_cells(name, found))
    return drawn


def _flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics in the table's order, latencies by batch size."""
    accuracies = {name: metrics[name] for name in ("test_accuracy", "validation_accuracy") if name in metrics}
    times = {f"latency_ms_{size}": took["median_ms"] for size, took in metrics["latency"].items()}
    return {**accuracies, **{name: metrics[name] for name in ("params", "macs", "file_bytes")}, **times}


def _spread(values: Sequence[float]) -> dict[str, float]:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd}


def _title(name: str) -> str:
    if name.startswith("latency_ms_"):
        return f"latency, batch {name.removeprefix('latency_ms_')}"
    return {"test_accuracy": "test accuracy", "params": "parameters", "macs": "MACs", "file_bytes": "file size"}[name]


def _cells(name: str, found: Mapping[str, Any]) -> list[str]:
    cells = [_cell(name, found[column][name]) for column in COLUMNS if column in found]
    if "change" not in found:
        return cells
    if name == "test_accuracy":
        change = found["change"][name]
        return [*cells, _with_spread(100 * change["mean"], 100 * change["sd"], "+.2f", " pts")]
    return [*cells, f"{100 * found['after'][name]['mean'] / found['before'][name]['mean']:.1f} %"]


def _cell(name: str, value: Mapping[str, float]) -> str:
    mean, sd = value["mean"], value["sd"]
    if name == "test_accuracy":
        return _with_spread(100 * mean, 100 * sd, ".2f", " %")
    if name.startswith("latency_ms_"):
        return _with_spread(mean, sd, ".3f", " ms")
    if name == "file_bytes":
        return _with_spread(mean / 1000, sd / 1000, ",.1f", " kB")
    return _with_spread(mean, sd, ",.0f", "")


def _with_spread(mean: float, sd: float, form: str, unit: str) -> str:
    spread = f" ± {sd:{form.lstrip('+')}}" if sd else ""
    return f"{mean:{form}}{spread}{unit}"
