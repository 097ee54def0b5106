"""``measure_latency``: how long a network takes, and what is cut from it."""

from __future__ import annotations

import hashlib

from torch import nn

from secateur._internal.batches import Inputs
from secateur._internal.distributed import Group
from secateur._internal.errors import SecateurError
from secateur.allocation.latency.checkpoint import Known, LatencyFile
from secateur.allocation.latency.model import LatencyModel
from secateur.allocation.latency.sampler import DECIDING_TURNS, LatencySettings, Stopwatch, measured_model
from secateur.plan import Plan
from secateur.tracing.graph import ChannelGraph, fingerprint


class LatencyClock:
    """Tells how long a network takes, and what is cut from it: a fitted model for any widths, a stopwatch for a plan.

    :func:`measure_latency` makes one.

    Attributes:
        fitted: the latency model.
        known: the plans that were measured, by a digest -> which part of the whole network's time they take.
    """

    def __init__(self, fitted: LatencyModel, stopwatch: Stopwatch, file: LatencyFile, known: Known) -> None:
        self.fitted, self.known = fitted, known
        self._stopwatch, self._file = stopwatch, file

    @property
    def graph(self) -> ChannelGraph:
        """The graph of the network that it measures."""
        return self.fitted.graph

    @property
    def backend(self) -> str:
        """What runs the networks."""
        return self._stopwatch.backend

    @property
    def whole_ms(self) -> float:
        """Milliseconds of the whole network."""
        return self.fitted.whole_ms

    def measured(self, plan: Plan) -> float:
        """How many milliseconds a forward of the cut network takes: its part of the whole one's time, in turns.

        Asked for the same plan again it says the same; another clock measures anew.
        """
        name = hashlib.sha256(plan.to_json().encode()).hexdigest()[:16]
        if name not in self.known:
            self.known[name] = self._part(plan)
            self._file.write(self.fitted, self.known)
        return self.whole_ms * self.known[name]

    def facts(self, plan: Plan) -> dict[str, float]:
        """Milliseconds ``before`` and ``after`` a plan, the latter measured anew, and the fit's ``error``."""
        return {"before": self.whole_ms, "after": self.whole_ms * self._part(plan), "error": self.fitted.error}

    def _part(self, plan: Plan) -> float:
        return self._stopwatch.part(plan, DECIDING_TURNS, self.fitted.repeats)[1]

    def __repr__(self) -> str:
        return (
            f"LatencyClock({self.whole_ms:.3g} ms for the whole network, fit with an error of {self.fitted.error:.1%})"
        )


def measure_latency(
    model: nn.Module,
    graph: ChannelGraph,
    settings: LatencySettings | None = None,
    *,
    inputs: Inputs | None = None,
    group: Group = None,
    progress: bool = False,
) -> LatencyClock:
    """Measure a model at random widths, to know about how long any others take.

    What is timed are forwards of the model as it is: its hooks run too.

    Args:
        model: the traced model, on the device that counts; it is left untouched.
        graph: its graph.
        settings: how many networks, CPU threads, and a file that keeps what is measured.
        inputs: forwards of these are timed, so their batch counts; ``None`` for the graph's example inputs.
        group: the processes that work along; all go by the clock of rank 0.
        progress: show how far it is.

    Returns:
        What ``prune(latency=...)`` and ``allocate(latency=...)`` take, for a budget in ``latency_ms``.

    Raises:
        SecateurError: a graph of another model, inputs that do not fit, no group that can be narrowed, a file of
            something else.
    """
    settings = LatencySettings() if settings is None else settings
    if not isinstance(settings, LatencySettings):
        raise SecateurError(f"measure_latency(settings={settings!r}): secateur.LatencySettings are expected")
    if not isinstance(model, nn.Module) or not isinstance(graph, ChannelGraph):
        raise SecateurError("measure_latency(model, graph): a module and what secateur.trace gave for it are expected")
    if fingerprint(model) != graph.fingerprint:
        raise SecateurError(
            "measure_latency(model, graph): the graph is of another model; give the one that was traced"
        )
    stopwatch = Stopwatch(model, graph.inputs if inputs is None else inputs, settings.threads, group, settings.backend)
    file = LatencyFile(settings, stopwatch)
    kept = file.read(graph)
    if kept is not None:
        return LatencyClock(kept[0], stopwatch, file, kept[1])
    fitted = measured_model(stopwatch, graph, settings, progress=progress)
    file.write(fitted, {})
    return LatencyClock(fitted, stopwatch, file, {})
