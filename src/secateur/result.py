"""What pruning returns: the smaller model, what was removed, what it costs, and what is to be known."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur.plan import Plan
from secateur.report.of_result import page_of_result
from secateur.report.page import write_page
from secateur.tracing.graph import ChannelGraph, Frozen

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Counts:
    """What a model costs.

    Attributes:
        macs: multiply-accumulates of one forward on the example inputs.
        params: parameters, shared ones once.
        channels: removable channels; None where nothing was traced.
    """

    macs: int
    params: int
    channels: int | None = None


def counts_of(graph: ChannelGraph, plan: Plan | None = None) -> Counts:
    """What the traced model costs, after a plan."""
    return Counts(graph.macs(plan), graph.params(plan), int(graph.kept(plan).sum()))


@dataclass(frozen=True, eq=False)
class Result:
    """What every verb that prunes a model returns.

    Attributes:
        model: the smaller model.
        before: counts of the original.
        after: counts of the smaller model.
        plan: what was removed; None where a method removes no channels.
        graph: the channel graph of the original; None likewise.
        scores: group name to one score a channel; empty where nothing was scored.
        facts: what else is to be known, as what JSON can hold: ``"chosen"`` (which criterion, strategy and repair),
            ``"forwards"`` (batches that were run through the model), ``"round_to"`` (group -> what its width is a
            multiple of, where that is more than 1), ``"notices"`` (what was substituted), ``"left whole"`` (layer ->
            why it stays as it was), and what the seats add.
        layers: what every layer costs before and after, in the order of the forward
            (:func:`secateur.measure.layers.compare_layers`); empty where a method does not tell.
    """

    model: nn.Module
    before: Counts
    after: Counts
    plan: Plan | None = None
    graph: ChannelGraph | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict)
    layers: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def as_data(self) -> dict[str, Any]:
        """All but the model, as JSON holds it: counts, layers, groups with their scores, what is frozen, facts."""
        data: dict[str, Any] = {
            "model": type(self.model).__name__,
            "before": asdict(self.before), "after": asdict(self.after), "layers": [dict(row) for row in self.layers],
            **traced_data(self.graph, self.plan, self.scores), "facts": dict(self.facts),
        }  # fmt: skip
        found: dict[str, Any] = json.loads(json.dumps(data, default=str))
        return found

    def report(self, path: str | Path, *, title: str = "") -> Path:
        """Write a page that a person reads: one HTML file that needs nothing else.

        Args:
            path: of the file.
            title: of the page; the model's class by default.

        Returns:
            The path.

        Raises:
            BadFile: it cannot be written.
            MissingExtra: Jinja2 is not installed.
        """
        return write_page(page_of_result(self.as_data(), title=title), path)

    def rows(self) -> Rows:
        """Counts before and after, and what every group kept."""
        rows: Rows = [("", "before", "after", "kept")]
        for unit in ("macs", "params", "channels"):
            one, other = getattr(self.before, unit), getattr(self.after, unit)
            if one is not None and other is not None:
                rows.append(_row(unit, one, other))
        if self.graph is not None and self.plan is not None:
            kept = self.graph.kept(self.plan)
            rows += [_row(g.name, len(g), int(k)) for g, k in zip(self.graph.groups, kept, strict=True)]
        return rows

    def table(self) -> str:
        """Counts before and after, and what every group kept, as text."""
        rows = self.rows()
        wide = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            f"{name.ljust(wide[0])}  {'  '.join(c.rjust(w) for c, w in zip(cells, wide[1:], strict=True))}"
            for name, *cells in rows
        )

    def __repr__(self) -> str:
        macs, params = (getattr(self.after, unit) / max(getattr(self.before, unit), 1) for unit in ("macs", "params"))
        return f"Result({type(self.model).__name__}: {macs:.1%} of the MACs, {params:.1%} of the parameters)"

    def _repr_html_(self) -> str:
        head, *body = self.rows()
        cells = [
            "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
            for tag, rows in (("th", [head]), ("td", body))
            for row in rows
        ]
        return f"<table>{''.join(cells)}</table>"


MOST_SCORES = 48
"""A group's scores are told as so many numbers at most."""


def traced_data(graph: ChannelGraph | None, plan: Plan | None, scores: Mapping[str, Tensor] = {}) -> dict[str, Any]:
    """What is known of the groups, of what is frozen and of what is patched, as JSON holds it; empty without a graph.

    Args:
        graph: the channel graph of the original.
        plan: what was removed.
        scores: group name to one score a channel.

    Returns:
        ``groups`` (name, width before and after, exact, reason, scores from low to high with the share that went there,
        and predicted rises), ``frozen`` (by operation and reason), ``frozen in`` (layer -> positions of its outputs and
        why), ``skipped``, ``patched``, ``notes``.
    """
    if graph is None or plan is None:
        return {}
    groups = []
    rises = getattr(scores, "rises", {})
    for group, kept in zip(graph.groups, graph.kept(plan).tolist(), strict=True):
        gone = plan.removed.get(group.name, ())
        found: dict[str, Any] = {"name": group.name, "width": [len(group), kept], "exact": group.exact}
        found |= {"reason": group.reason} if group.reason else {}
        if group.name in scores:
            found["scores"] = _thinned(np.asarray(scores[group.name].detach().double().cpu()), gone)
        if group.name in rises:
            found["rises"] = _curve(np.asarray(rises[group.name].detach().double().cpu()))
        groups.append(found)
    return {
        "groups": groups,
        "frozen": frozen_data(graph.frozen),
        "frozen in": _frozen_outputs(graph.frozen),
        "skipped": dict(plan.skipped),
        "patched": {key: [str(before), str(after)] for key, (before, after) in plan.patched.items()},
        "notes": list(graph.notes),
    }


def frozen_data(frozen: Sequence[Frozen], most: int = 4) -> list[dict[str, Any]]:
    """What cannot be removed, by operation and reason: how many positions, of which axes, where, and what can be done.

    Args:
        frozen: of a graph.
        most: so many axes and places of each are named.
    """
    alike: dict[tuple[str, str], list[Frozen]] = defaultdict(list)
    for one in frozen:
        alike[one.operation, one.reason].append(one)
    return [
        {
            "operation": operation, "reason": reason, "advice": some[0].advice,
            "positions": sum(f.positions for f in some), "axes": len(some),
            "some": [f"{f.axis}:{f.dim}" for f in some[:most]],
            "places": list(dict.fromkeys(f.place for f in some if f.place))[:most],
        }
        for (operation, reason), some in alike.items()
    ]  # fmt: skip


def _frozen_outputs(frozen: Sequence[Frozen]) -> dict[str, list[Any]]:
    """Layer -> how many positions of its weight's rows cannot go, and why."""
    found: dict[str, list[Any]] = {}
    for f in frozen:
        layer, _, tensor = f.axis.rpartition(".")
        if f.dim == 0 and tensor.endswith("weight"):
            before = found.setdefault(layer, [0, f.words])
            before[0] += f.positions
    return found


def _thinned(scores: np.ndarray, gone: Sequence[int]) -> list[list[float | None]]:
    """Scores from low to high, not too many, each with the share of the channels around it that went."""
    went = np.zeros(len(scores))
    went[list(gone)] = 1.0
    order = np.argsort(scores, kind="stable")
    parts = np.array_split(order, min(len(order), MOST_SCORES))
    return [[_plain(scores[part].mean()), float(went[part].mean())] for part in parts]


def _curve(rises: np.ndarray) -> list[list[float | None]]:
    """[channels that went, rise of the loss], not too many."""
    at = np.unique(np.linspace(0, len(rises) - 1, min(len(rises), MOST_SCORES)).round().astype(int))
    return [[int(n), _plain(rises[n])] for n in at]


def _plain(value: float) -> float | None:
    """Four digits, as JSON holds it; what is not finite is nothing."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%}"
