"""A model looked at, exported or timed, as commands do it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.lab.given import Source, outputs_of
from secateur.measure.comparison import Comparison, compare_latency
from secateur.shipping.api import Exported, export
from secateur.tracing.api import trace
from secateur.tracing.graph import ChannelGraph


def inspected(source: Source, outputs: str | None = None) -> ChannelGraph:
    """Which channels of a model can be removed, which cannot, and why."""
    model = source.network("inspect")
    return trace(model, source.example(model), outputs=outputs_of(outputs))


def graph_data(graph: ChannelGraph) -> dict[str, Any]:
    """What is known of a graph, as JSON holds it."""
    return {
        "macs": graph.macs(),
        "params": graph.params(),
        "groups": [
            {"name": g.name, "channels": len(g), "exact": g.exact, "reason": g.reason, "least": g.least}
            for g in graph.groups
        ],
        "frozen": [
            {"axis": f.axis, "dim": f.dim, "positions": f.positions, "reason": f.words, "advice": f.advice}
            for f in graph.frozen
        ],
        "notes": list(graph.notes),
    }


def exported(source: Source, path: Path, outputs: str | None = None, **how: Any) -> Exported:
    """Write a model for where it runs, see :func:`secateur.export`."""
    model = source.network("export").eval()
    return export(model, path, source.example(model), outputs=outputs_of(outputs), **how)


def exported_data(done: Exported) -> dict[str, Any]:
    """What was written, as JSON holds it."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(done), default=str))
    return found


def timed(
    source: Source, backends: Sequence[str], threads: Sequence[int], batches: Sequence[int], *, progress: bool
) -> Comparison:
    """A saved model beside the original, or a model alone."""
    model = source.network("measure").eval()
    inputs = source.example(model)
    models = {"model": model}
    if source.saved:
        models = {"original": source.original().eval(), "pruned": model}
    return compare_latency(
        models, inputs, backends=backends, threads=threads or None, batches=batches or None, progress=progress
    )


def comparison_data(found: Comparison) -> dict[str, Any]:
    """Timings, as JSON holds them."""
    median = found.median_speed_up
    return {"timings": found.as_data(), "median_speed_up": None if math.isnan(median) else median}
