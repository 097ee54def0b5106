"""The before/after table of a run, and the means and spreads it is made from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.report.metrics import (
    ACCURACY,
    CHANGE,
    COLUMNS,
    LATENCY,
    Measured,
    measured_in,
    metric_cells,
    metric_title,
    run_caption,
    run_title,
    shown,
)

if TYPE_CHECKING:
    from rich.table import Table


def summary(seeds: Sequence[Mapping[str, Any]], measured: Measured = ACCURACY) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every metric, by column, and of the change on data."""
    found: dict[str, Any] = {}
    for column in COLUMNS:
        rows = [flat(seed[column], measured) for seed in seeds if column in seed]
        if rows:
            found[column] = {name: _spread([row[name] for row in rows]) for name in rows[0]}
    if "after" in found:
        changes = [seed["after"][measured.test] - seed["before"][measured.test] for seed in seeds]
        found["change"] = {measured.test: _spread(changes)}
    return found


def table(result: Mapping[str, Any], width: int = 80) -> Table:
    """What ``run.json`` holds, as a table for the terminal.

    Args:
        result: what :func:`secateur.lab.run.run` returns.
        width: signs in a line; where the columns do not fit side by side, they are below each other, and no number is
            cut short.
    """
    drawn = _side_by_side(result)
    return drawn if needs(drawn) <= width else _below_each_other(result)


def _side_by_side(result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    found = result["summary"]
    drawn = Table(title=run_title(result), caption=run_caption(result), title_style="bold")
    drawn.add_column("")
    for column in found:
        drawn.add_column(_head(column), justify="right", no_wrap=True)
    for name in shown(found):
        drawn.add_row(metric_title(name), *metric_cells(name, found, measured_in(result)))
    return drawn


def _below_each_other(result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    found = result["summary"]
    drawn = Table(title=run_title(result), caption=run_caption(result), title_style="bold", box=None, show_header=False)
    drawn.add_column("")
    drawn.add_column("", justify="right", no_wrap=True)
    for name in shown(found):
        drawn.add_row(metric_title(name), "")
        for column, cell in zip(found, metric_cells(name, found, measured_in(result)), strict=True):
            drawn.add_row(f"  {_head(column)}", cell)
    return drawn


def _head(column: str) -> str:
    return CHANGE if column == "change" else column


def needs(drawn: Table) -> int:
    """Signs in a line that a table needs if nothing in it is to be broken."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=1000)
    return Measurement.get(console, console.options, drawn).maximum


def flat(metrics: Mapping[str, Any], measured: Measured = ACCURACY) -> dict[str, float]:
    """Metrics in the table's order, latencies by batch size."""
    on_data = {name: metrics[name] for name in (measured.test, measured.held_out) if name in metrics}
    times = {f"{LATENCY}{size}": took["median_ms"] for size, took in metrics["latency"].items()}
    for backend, sizes in metrics.get("latency_of", {}).items():
        times |= {f"{LATENCY}{size}_{backend}": took["median_ms"] for size, took in sizes.items()}
    return {**on_data, **{name: metrics[name] for name in ("params", "macs", "file_bytes")}, **times}


def _spread(values: Sequence[float]) -> dict[str, float]:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "sd": sd}
