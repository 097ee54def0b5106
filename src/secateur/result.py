"""What pruning returns: the smaller model, what was removed, what it costs, and what is to be known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from torch import Tensor, nn

from secateur.plan import Plan
from secateur.tracing.graph import ChannelGraph

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
    """

    model: nn.Module
    before: Counts
    after: Counts
    plan: Plan | None = None
    graph: ChannelGraph | None = None
    scores: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict)

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


def _row(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{after / max(before, 1):.1%}"
