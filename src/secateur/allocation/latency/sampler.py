"""Networks to time, and the stopwatch: random widths are cut from a network and timed as a whole, in turn with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur._internal.batches import Inputs, tensors_in
from secateur._internal.checks import check_count, check_flag, check_seed
from secateur._internal.distributed import Group, broadcast_json, rank, together
from secateur._internal.errors import CannotCut, SecateurError
from secateur._internal.files import file_at
from secateur._internal.progress import progress_bar
from secateur._internal.state import device_of
from secateur.allocation.budget import Budget, check_round_to
from secateur.allocation.latency.model import LatencyModel, Sample
from secateur.measure.backends import EAGER, LASTING, Forward, check_backend, ready, runs_on
from secateur.measure.latency import in_turn, latency, threads_set
from secateur.plan import Plan, make_plan
from secateur.surgery.channels import cut
from secateur.tracing.graph import ChannelGraph

SECONDS_PER_NETWORK = 0.3
"""How long the forwards of the whole network may take for each network that is timed in turn with it."""
LEAST_REPEATS, MOST_REPEATS = 3, 25
"""Forwards of each network in a turn."""
SAMPLE_TURNS, DECIDING_TURNS = 4, 10
"""Turns that a network has where it is one sample of many, and where its time decides."""
WARM_UP_FORWARDS = 3
"""Forwards of each network in a turn that do not count."""
TRIES_PER_SAMPLE = 4
"""Networks that are tried, at most, for each that is asked for: some cannot be cut."""
WIDTH_SPREAD = 0.5
"""How far the kept part of a single group is from that of all groups, at most."""


@dataclass(frozen=True)
class LatencySettings:
    """How a latency model is measured.

    Attributes:
        samples: networks that are cut and timed, four or more; the whole one and the narrowest are among them. In place
            of one that cannot be cut another one is timed.
        threads: CPU threads; ``None`` for as many as are set.
        round_to: widths of these networks are multiples of this, as a budget may ask for.
        approximate: also narrow groups that cannot be cut exactly.
        seed: of the widths.
        backend: what runs the networks: ``"eager"``, ``"compile"`` or ``"onnxruntime"``.
        checkpoint: a file that keeps what was measured, also of single plans. What is in it is not measured again, so
            that work which goes by the clock and was interrupted ends as it would have.
    """

    samples: int = 32
    threads: int | None = None
    round_to: int | str = 1
    approximate: bool = False
    seed: int = 0
    backend: str = EAGER
    checkpoint: str | Path | None = None

    def __post_init__(self) -> None:
        check_count("samples", self.samples, 4)
        check_count("threads", self.threads, optional=True)
        check_round_to("LatencySettings", self.round_to)
        check_flag("approximate", self.approximate)
        check_seed(self.seed)
        check_backend(self.backend)
        file_at(self.checkpoint)

    def of_the_samples(self) -> dict[str, Any]:
        """What the measurements depend on: all but the file, and what is in it of old."""
        without = {"checkpoint"} | ({"backend"} if self.backend == EAGER else set())
        return {name: value for name, value in asdict(self).items() if name not in without}


class Stopwatch:
    """Times a network and what is cut from it, in turns. Of several processes all go by the clock of rank 0.

    Args:
        network: the network, on the device that counts; it is not changed.
        inputs: forwards of these are timed, so their batch counts.
        threads: CPU threads; ``None`` for as many as are set.
        group: the processes.
        backend: what runs them.
    """

    def __init__(
        self, network: nn.Module, inputs: Inputs, threads: int | None = None, group: Group = None, backend: str = EAGER
    ) -> None:
        self.network, self.inputs, self.threads, self.group = network, inputs, threads, group
        self.backend = backend
        self._whole: dict[int, Forward] = {}
        self.device = device_of(network)
        if self.device.type == "meta" or not tensors_in(inputs):
            raise SecateurError(
                "measure_latency: a network with weights and example inputs with tensors are needed to be timed"
            )

    def where(self, graph: ChannelGraph) -> dict[str, Any]:
        """What must be the same for times to be the same."""
        return {
            "device": runs_on(self.network, self.backend).type,
            "inputs": [list(tensor.shape) for tensor in tensors_in(self.inputs)],
            "threads": torch.get_num_threads() if self.threads is None else self.threads,
            "macs": graph.macs(),
            **({} if self.backend == EAGER else {"backend": self.backend}),
        }

    def repeats(self) -> int:
        """How many forwards a turn has, so that a network takes no longer than it may."""
        try:
            how: dict[str, Any] = {"repeats": 3, "warm_up": 2, "threads": self.threads, "backend": self.backend}
            once = together(lambda: latency(self.network, self.inputs, **how)["median_ms"], self.device, self.group)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, SecateurError):
                raise
            raise SecateurError(f"measure_latency(inputs=...): they do not fit the network: {error}") from error
        ms = max(self._told(float(once)), 1e-3)
        return int(np.clip(1000 * SECONDS_PER_NETWORK / SAMPLE_TURNS / ms, LEAST_REPEATS, MOST_REPEATS))

    def part(self, plan: Plan, turns: int, repeats: int) -> tuple[float, float]:
        """Milliseconds of the whole network, and which part of it the cut one takes: medians over the turns.

        Raises:
            CannotCut: the network does not bear the plan.
        """

        def timed() -> list[float]:
            small = cut(self.network, plan)
            with threads_set(self.threads):
                both = [self._ready(), small]
                times = in_turn(both, self.inputs, repeats, WARM_UP_FORWARDS, turns, self.backend)
            whole, own = np.median(times, axis=2)
            return [float(np.median(whole)), float(np.median(own / whole))]

        whole, part = self._told(together(timed, self.device, self.group))
        return whole, part

    def _ready(self) -> nn.Module | Forward:
        """The whole network; where that lasts, made ready once for a number of threads."""
        if self.backend not in LASTING:
            return self.network
        threads = torch.get_num_threads()
        if threads not in self._whole:
            with ready(self.network, self.inputs, self.backend) as self._whole[threads]:
                pass
        return self._whole[threads]

    def _told(self, value: Any) -> Any:
        return broadcast_json(value, self.device, self.group)


def measured_model(
    stopwatch: Stopwatch, graph: ChannelGraph, settings: LatencySettings, *, progress: bool
) -> LatencyModel:
    """A latency model of networks of random widths."""
    rng, count = np.random.default_rng(settings.seed), settings.samples
    drawn = [random_widths(graph, settings, rng) for _ in range(TRIES_PER_SAMPLE)]
    repeats, wholes = stopwatch.repeats(), []
    samples: list[Sample] = []
    with progress_bar("networks timed", count, progress and rank(stopwatch.group) == 0) as shown:
        for own in np.concatenate(drawn):
            gone = {g.name: range(k, len(g)) for g, k in zip(graph.groups, own, strict=True) if k < len(g)}
            try:
                plan = make_plan(graph, gone, approximate=settings.approximate)
                whole, part = stopwatch.part(plan, SAMPLE_TURNS, repeats)
            except CannotCut:
                continue  # these widths are for no budget either
            wholes.append(whole)
            samples.append((tuple(own.tolist()), part))
            shown(len(samples))
            if len(samples) == count:
                break
    whole_ms = min(wholes, default=math.nan)
    where: Mapping[str, Any] = stopwatch.where(graph)
    return LatencyModel(graph, where, settings.of_the_samples(), whole_ms, repeats, tuple(samples))


def random_widths(graph: ChannelGraph, settings: LatencySettings, rng: np.random.Generator) -> np.ndarray:
    """Widths to measure, int64 [samples, groups]: all, the least, and evenly between, each group in its own way.

    Raises:
        SecateurError: no group can be narrowed.
    """
    full, count, round_to = graph.widths, settings.samples, settings.round_to
    budget = Budget(latency_ms=1.0, round_to=round_to)
    movable = np.array([group.exact or settings.approximate for group in graph.groups])
    least = np.where(movable, budget.floors(graph), full)
    if (least == full).all():
        why = f"all have {round_to} channels or fewer, which round_to= keeps" if movable.any() else "none is exact"
        more = "" if movable.all() else " (approximate=True may allow more)"
        raise SecateurError(f"measure_latency: no group can be narrowed, {why}{more}: there is nothing to time")
    parts = np.concatenate([[1.0, 0.0], (np.arange(count - 2) + 0.5) / (count - 2)])
    own = (
        parts[:, None]
        + rng.uniform(-WIDTH_SPREAD, WIDTH_SPREAD, (count, len(full))) * (parts * (1 - parts) * 4)[:, None]
    )
    wanted = least + (full - least) * np.clip(own, 0, 1)
    steps = budget.steps(graph)
    rounded = steps * np.round(wanted / steps).astype(np.int64)
    return np.where(wanted == full, full, np.clip(rounded, least, full))
