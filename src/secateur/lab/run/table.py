"""The before/after table of a run, and the means and spreads it is made from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("before", "after")
_HEADS = {"change": "after / before"}


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


def table(result: Mapping[str, Any], width: int = 80) -> Table:
    """What ``run.json`` holds, as a table for the terminal.

    Args:
        result: what :func:`secateur.lab.run.run` returns.
        width: signs in a line; where the columns do not fit side by side, they are below each other, and no number is
            cut short.
    """
    drawn = _side_by_side(result)
    return drawn if _needs(drawn) <= width else _below_each_other(result)


def _side_by_side(result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    found = result["summary"]
    drawn = Table(title=_name(result), caption=_caption(result), title_style="bold")
    drawn.add_column("")
    for column in found:
        drawn.add_column(_HEADS.get(column, column), justify="right", no_wrap=True)
    for name in _shown(found):
        drawn.add_row(_title(name), *_cells(name, found))
    return drawn


def _below_each_other(result: Mapping[str, Any]) -> Table:
    from rich.table import Table

    found = result["summary"]
    drawn = Table(title=_name(result), caption=_caption(result), title_style="bold", box=None, show_header=False)
    drawn.add_column("")
    drawn.add_column("", justify="right", no_wrap=True)
    for name in _shown(found):
        drawn.add_row(_title(name), "")
        for column, cell in zip(found, _cells(name, found), strict=True):
            drawn.add_row(f"  {_HEADS.get(column, column)}", cell)
    return drawn


def _needs(drawn: Table) -> int:
    """Signs in a line that a table needs if nothing in it is to be broken."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=1000)
    return Measurement.get(console, console.options, drawn).maximum


def _name(result: Mapping[str, Any]) -> str:
    return f"{result['recipe']['name']}: {result['recipe']['model']['name']}"


def _caption(result: Mapping[str, Any]) -> str:
    recipe = result["recipe"]
    seeds, how = recipe["seeds"], recipe["measure"]
    over = f"mean ± sd of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    note = f" ({result['data']})" if result["data"] else ""
    timed = f"latency: CPU, {how['threads']} thread{'s'[: how['threads'] - 1]}, median of {how['repeats']}"
    return f"{recipe['data']['name']}{note}; {over}; {timed}"


def _shown(found: Mapping[str, Any]) -> list[str]:
    return [name for name in found["before"] if name != "validation_accuracy"]


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
