"""The metrics of a run as rows that a person reads: in the terminal, on a page, beside those of other runs.

A run's ``summary`` has, by column (``before``, ``after``) and metric, a mean and a standard deviation over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

COLUMNS = ("before", "after")
CHANGE = "after / before"
LATENCY = "latency_ms_"
TEST, HELD_OUT = "test_", "validation_"
"""Of which split a metric was taken."""


@dataclass(frozen=True)
class Measured:
    """What was measured on data.

    Attributes:
        name: what it is called.
        unit: of its numbers.
        higher: whether more is better.
        percent: whether its numbers are shares, which are shown as percent.
    """

    name: str
    unit: str = ""
    higher: bool = True
    percent: bool = False

    @property
    def test(self) -> str:
        """Its key, on the test examples."""
        return f"{TEST}{self.name}"

    @property
    def held_out(self) -> str:
        """Its key, on the examples held out."""
        return f"{HELD_OUT}{self.name}"

    @property
    def factor(self) -> float:
        """What its numbers are multiplied by to be shown."""
        return 100.0 if self.percent else 1.0

    def cell(self, mean: float, sd: float = 0.0) -> str:
        """A number with its spread."""
        if self.percent:
            return with_spread(100 * mean, 100 * sd, ".2f", " %")
        return with_spread(mean, sd, ".4g", f" {self.unit}".rstrip())

    def change(self, mean: float, sd: float = 0.0) -> str:
        """A difference with its spread."""
        if self.percent:
            return with_spread(100 * mean, 100 * sd, "+.2f", " pts")
        return with_spread(mean, sd, "+.4g", f" {self.unit}".rstrip())


ACCURACY = Measured("accuracy", "%", percent=True)


def measured_in(run: Mapping[str, Any]) -> Measured:
    """What a run has measured."""
    return Measured(**run["metric"]) if run.get("metric") else ACCURACY


def shown(summary: Mapping[str, Any]) -> list[str]:
    """The metrics that a reader gets, in their order: what was chosen by is no result."""
    return [name for name in summary["before"] if not name.startswith(HELD_OUT)]


def metric_title(name: str) -> str:
    """What a metric is called."""
    if name.startswith(LATENCY):
        size, _, backend = name.removeprefix(LATENCY).partition("_")
        return f"latency, batch {size}{f', {backend}' if backend else ''}"
    if name.startswith(TEST):
        return f"test {name.removeprefix(TEST)}"
    return {"params": "parameters", "macs": "MACs", "file_bytes": "file size"}.get(name, name)


def metric_cell(name: str, value: Mapping[str, float], measured: Measured = ACCURACY) -> str:
    """A metric's mean, and its spread where there is one, with its unit."""
    mean, sd = value["mean"], value["sd"]
    if name in {measured.test, measured.held_out}:
        return measured.cell(mean, sd)
    if name.startswith(LATENCY):
        return with_spread(mean, sd, ".3f", " ms")
    if name == "file_bytes":
        return with_spread(mean / 1000, sd / 1000, ",.1f", " kB")
    return with_spread(mean, sd, ",.0f", "") if name in {"params", "macs"} else with_spread(mean, sd, ".4g", "")


def metric_cells(name: str, summary: Mapping[str, Any], measured: Measured = ACCURACY) -> list[str]:
    """Before, after, and what that is of before; of what is measured on data the difference."""
    cells = [metric_cell(name, summary[column][name], measured) for column in COLUMNS if column in summary]
    if "change" not in summary:
        return cells
    if name in summary["change"]:
        change = summary["change"][name]
        return [*cells, measured.change(change["mean"], change["sd"])]
    return [*cells, f"{100 * summary['after'][name]['mean'] / summary['before'][name]['mean']:.1f} %"]


def with_spread(mean: float, sd: float, form: str, unit: str) -> str:
    """A number, and its spread where there is one."""
    spread = f" ± {sd:{form.lstrip('+')}}" if sd else ""
    return f"{mean:{form}}{spread}{unit}"


def run_title(run: Mapping[str, Any]) -> str:
    """What a run is called."""
    return f"{run['recipe']['name']}: {run['recipe']['model']['name']}"


def run_caption(run: Mapping[str, Any]) -> str:
    """What a reader of a run's numbers must know: data, seeds, how time was measured."""
    recipe = run["recipe"]
    seeds, how = recipe["seeds"], recipe["measure"]
    over = f"mean ± sd of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    note = f" ({run['data']})" if run["data"] else ""
    timed = f"latency: CPU, {how['threads']} thread{'s'[: how['threads'] - 1]}, median of {how['repeats']}"
    return f"{recipe['data']['name']}{note}; {over}; {timed}"
