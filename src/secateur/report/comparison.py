"""Several runs, or results, side by side: a table in whatever form it is wanted, and what is best at which cost."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur._internal.errors import SecateurError
from secateur.report.charts import scatter_chart
from secateur.report.metrics import HELD_OUT, LATENCY, Measured, metric_title, with_spread
from secateur.report.page import Block, Page, Pictures, Section, Table, Text

COSTS = ("macs", "params")
WORDS = 5
"""The columns before this one are words."""


@dataclass(frozen=True)
class Entry:
    """One run, or one result.

    Attributes:
        name: what it is called here.
        network: its model.
        data: its data set; empty where nothing was measured on data.
        how: criterion, strategy and repair, or the method, and what trains.
        seeds: how many.
        before: metric -> one value a seed, of the original.
        after: likewise, of the smaller network; empty where nothing was pruned.
        measured: what was measured on data.
    """

    name: str
    network: str
    data: str
    how: str
    seeds: int
    before: Mapping[str, Sequence[float]]
    after: Mapping[str, Sequence[float]] = field(default_factory=dict)
    measured: Sequence[Measured] = ()

    def kept(self, metric: str) -> list[float]:
        """What is left of a metric, in parts of the original, one value a seed."""
        pairs = zip(self.after.get(metric, ()), self.before.get(metric, ()), strict=False)
        return [after / before for after, before in pairs if before]

    def change(self, metric: str) -> list[float]:
        """By how much a metric is larger than the original's, one value a seed."""
        pairs = zip(self.after.get(metric, ()), self.before.get(metric, ()), strict=False)
        return [after - before for after, before in pairs]


@dataclass(frozen=True)
class Comparison:
    """Entries side by side.

    Attributes:
        entries: in the order in which they are shown.
        failures: what has no numbers: name -> why.
        remarks: what else whoever compares should know.
    """

    entries: Sequence[Entry]
    failures: Mapping[str, str] = field(default_factory=dict)
    remarks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.entries and not self.failures:
            raise SecateurError("compare: nothing is given; name two or more runs")

    @property
    def metrics(self) -> list[str]:
        """What was measured on data, in the order in which it first occurs; what is held out is no result."""
        found = dict.fromkeys(m for e in self.entries for m in e.before)
        costs = {*COSTS, "file_bytes", "channels"}
        return [m for m in found if m not in costs and not m.startswith((LATENCY, HELD_OUT))]

    def measured(self, metric: str) -> Measured:
        """What is known of a metric."""
        known = {m.test: m for e in self.entries for m in e.measured}
        return known.get(metric, Measured(metric))

    @property
    def latencies(self) -> list[str]:
        """The latencies that were measured."""
        return list(dict.fromkeys(m for e in self.entries for m in e.before if m.startswith(LATENCY)))

    @property
    def notes(self) -> list[str]:
        """What whoever compares should know."""
        found = list(self.remarks)
        called: dict[str, set[Measured]] = {}
        for m in (m for e in self.entries for m in e.measured):
            called.setdefault(m.name.partition(" [")[0], set()).add(m)
        found += [f"Different metrics are called {name}." for name, some in called.items() if len(some) > 1]
        for what, values in (
            ("data sets", {e.data for e in self.entries if e.data}),
            ("networks", {e.network for e in self.entries}),
            ("numbers of seeds", {str(e.seeds) for e in self.entries}),
        ):
            if len(values) > 1:
                found.append(f"Different {what} are compared: {', '.join(sorted(values))}.")
        begins = {m: {round(sum(e.before[m]) / len(e.before[m]), 6) for e in self.entries if e.before.get(m)}
                  for m in self.metrics}  # fmt: skip
        if several := [metric_title(m) for m, values in begins.items() if len(values) > 1]:
            found.append(f"Not all begin with the same network: {', '.join(several)} before pruning differs.")
        return found

    # ------------------------------------------------------------------------------------------------------------ forms

    def head(self) -> list[str]:
        """The names of the columns."""
        measured = [
            c for m in self.metrics for c in (f"{metric_title(m)} before", f"{metric_title(m)} after", "change")
        ]
        times = [f"times as fast ({metric_title(m).removeprefix('latency, ')})" for m in self.latencies]
        return ["", "network", "data", "how", "seeds", "MACs left", "parameters left", *measured, *times]

    def rows(self) -> list[list[str]]:
        """The cells as text, a row an entry, and the failures last."""
        found = []
        for e in self.entries:
            row = [e.name, e.network, e.data, e.how, str(e.seeds)]
            row += [_spread(e.kept(m), lambda v, s: with_spread(100 * v, 100 * s, ".1f", " %")) for m in COSTS]
            for m in self.metrics:
                of = self.measured(m)
                row += [_spread(e.before.get(m, ()), of.cell), _spread(e.after.get(m, ()), of.cell)]
                row.append(_spread(e.change(m), of.change))
            for m in self.latencies:
                row.append(_spread([1 / v for v in e.kept(m) if v], lambda v, s: with_spread(v, s, ".2f", "")))
            found.append(row)
        wide = len(self.head())
        return found + [[name, f"failed: {why}", *[""] * (wide - 2)] for name, why in self.failures.items()]

    def told_apart(self) -> tuple[list[int], str]:
        """The columns that are not the same of all, and in words what is."""
        head, rows = self.head(), self.rows()[: len(self.entries)]
        words = [at for at, name in enumerate(head) if 0 < at < WORDS or name.endswith(" before")]
        alike = [at for at in words if len({row[at] for row in rows}) == 1]
        told = "".join(f"; {head[at]}: {rows[0][at]}" for at in alike if rows[0][at])
        return [at for at in range(len(head)) if at not in alike], told

    def markdown(self) -> str:
        """As a table in Markdown."""
        head, rows = self.head(), self.rows()
        clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
        lines = [f"| {' | '.join(row)} |" for row in clean]
        lines.insert(1, "|" + "---|" * len(head))
        return "\n".join([*lines, *(["", *self.notes] if self.notes else [])]) + "\n"

    def csv(self) -> str:
        """As comma-separated values: numbers alone, a mean and a standard deviation each."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        data = self.as_data()["entries"]
        names = list(dict.fromkeys(f"{m}_{side}" for e in data for m, both in e["metrics"].items() for side in both))
        columns = [f"{name}_{what}" for name in names for what in ("mean", "sd")]
        writer.writerow(["name", "network", "data", "how", "seeds", *columns, "failed"])
        for e in data:
            flat = {f"{m}_{side}": v for m, both in e["metrics"].items() for side, v in both.items()}
            cells = [flat.get(name, {}).get(what, "") for name in names for what in ("mean", "sd")]
            writer.writerow([e["name"], e["network"], e["data"], e["how"], e["seeds"], *cells, ""])
        for name, why in self.failures.items():
            writer.writerow([name, "", "", "", "", *[""] * len(columns), why])
        return text.getvalue()

    def latex(self) -> str:
        """As a ``tabular`` that needs no package."""
        head, rows = self.head(), self.rows()
        lines = [rf"\begin{{tabular}}{{{'l' * 4}{'r' * (len(head) - 4)}}}", r"\hline"]
        lines += [" & ".join(map(_tex, head)) + r" \\", r"\hline"]
        lines += [" & ".join(map(_tex, row)) + r" \\" for row in rows]
        return "\n".join([*lines, r"\hline", r"\end{tabular}", *(f"% {note}" for note in self.notes)]) + "\n"

    def as_data(self) -> dict[str, Any]:
        """As JSON holds it: means, standard deviations and single seeds."""
        entries = []
        for e in self.entries:
            metrics: dict[str, Any] = {}
            for side, values in (("before", e.before), ("after", e.after)):
                for m, some in values.items():
                    metrics.setdefault(m, {})[side] = _statistics(some)
            entries.append({
                "name": e.name, "network": e.network, "data": e.data, "how": e.how, "seeds": e.seeds,
                "metrics": metrics,
            })  # fmt: skip
        return {"entries": entries, "failures": dict(self.failures), "notes": self.notes}

    def json(self) -> str:
        """As JSON text."""
        return json.dumps(self.as_data(), indent=1) + "\n"

    def page(self, title: str = "") -> Page:
        """As a page: the table, and every metric over every cost."""
        shown, told = self.told_apart()
        head, rows = self.head(), self.rows()
        blocks: list[Block] = [Table([head[at] for at in shown], [[row[at] for at in shown] for row in rows])]
        blocks += [Text(note) for note in self.notes]
        many = f"{len(self.entries)} runs" + (f", {len(self.failures)} failed" if self.failures else "") + told
        return Page(
            title=title or "Side by side",
            verdict=self.verdict(),
            facts=[many],
            sections=[Section("All of them", blocks), Section("What is best at which cost", self._pictures())],
        )

    def verdict(self) -> str:
        """Which is best, by the first metric that was measured on data."""
        pruned = [e for e in self.entries if e.after]
        if not pruned or not self.metrics:
            return f"{len(self.entries)} side by side."
        m = self.metrics[0]
        of = self.measured(m)
        sign = -1 if of.higher else 1
        ranked = sorted(
            (e for e in pruned if e.after.get(m)), key=lambda e: (sign * _mean(e.after[m]), _mean(e.kept("macs")))
        )
        if not ranked:
            return f"{len(self.entries)} side by side."
        best, cost = ranked[0], _mean(ranked[0].kept("macs"))
        which = "Highest" if of.higher else "Lowest"
        words = f"{which} {metric_title(m)} of the pruned: {_spread(best.after[m], of.cell)}, {best.name}"
        return f"{words}, with {100 * cost:.1f} % of the MACs."

    def _pictures(self) -> list[Block | None]:
        pictures = []
        for m in self.metrics:
            for cost in (*COSTS, *self.latencies):
                drawn = self._picture(m, cost)
                if drawn:
                    pictures.append((f"{metric_title(m)} over {metric_title(cost)} left", drawn))
        note = (
            "Large: means, with their standard deviations; small: seeds. What was pruned alike is joined. Ringed: no "
            "other is as good at as little cost."
        )
        return [Pictures(pictures, note=note) if pictures else None]

    def _picture(self, metric: str, cost: str) -> str:
        """A metric of what is left over what it costs, in parts of the original."""
        of = self.measured(metric)
        means: dict[str, list[tuple[float, float, float, float]]] = {}
        seeds: dict[str, list[tuple[float, float]]] = {}
        several = len({(e.network, e.data) for e in self.entries}) > 1
        for e in self.entries:
            xs, ys = [100 * v for v in e.kept(cost)], [of.factor * v for v in e.after.get(metric, ())]
            if not xs or len(xs) != len(ys):
                continue
            name = f"{e.how} ({e.network}, {e.data})" if several else e.how
            x, y = _statistics(xs), _statistics(ys)
            means.setdefault(name, []).append((x["mean"], y["mean"], x["sd"], y["sd"]))
            seeds.setdefault(name, []).extend(zip(xs, ys, strict=True))
        unit = f" ({of.unit})" if of.unit else ""
        across, up = f"{metric_title(cost)} left (%)", f"{metric_title(metric)}{unit}"
        return scatter_chart(means, across, up, seeds, higher=of.higher) if means else ""


# ---------------------------------------------------------------------------------------------------------------- parts


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    mean = _mean(values)
    many = len(values)
    sd = (sum((v - mean) ** 2 for v in values) / (many - 1)) ** 0.5 if many > 1 else 0.0
    return {"mean": mean, "sd": sd, "each": list(values)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _spread(values: Sequence[float], say: Callable[[float, float], str]) -> str:
    """Mean and spread as text; nothing where nothing was measured."""
    if not values:
        return ""
    found = _statistics(values)
    return say(found["mean"], found["sd"])


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\rightarrow$", "\n": " ",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in text)
