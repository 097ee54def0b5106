"""``compare_latency``: models in turn, by backend, threads and batch, with the spread of what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur._internal.batches import Inputs, examples_of, some_of
from secateur._internal.checks import check_count
from secateur._internal.errors import CannotMeasure, SecateurError
from secateur._internal.progress import tracked
from secateur.measure.backends import EAGER, check_backend, ready, runs_on
from secateur.measure.latency import in_turn, threads_set
from secateur.shipping.programs import first_line

TURNS = 7
"""In each of so many turns every model is timed; what slows the machine down for a while slows all of a turn."""
SECONDS = 0.15
"""So long a model is timed in a turn, or for ``FEWEST`` forwards."""
FEWEST, MOST = 3, 200
WARM_UP = 2


@dataclass(frozen=True)
class Timing:
    """How long one model takes in one setting.

    Attributes:
        model: its name.
        backend: what runs it.
        threads: of the CPU.
        batch: examples in the inputs.
        device: where it ran.
        median_ms: milliseconds of a forward: of the turns' medians, the median; NaN where it cannot be run.
        low_ms: the lower quartile of the turns' medians.
        high_ms: the upper quartile.
        speed_up: how many times as fast as the first model: the median over turns, in which both were timed.
        speed_up_low: its lower quartile.
        speed_up_high: its upper quartile.
        why: why it could not be run, where it could not.
    """

    model: str
    backend: str
    threads: int
    batch: int
    device: str
    median_ms: float = math.nan
    low_ms: float = math.nan
    high_ms: float = math.nan
    speed_up: float = math.nan
    speed_up_low: float = math.nan
    speed_up_high: float = math.nan
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_latency` gives.

    Attributes:
        timings: of each setting all models, the first is what the others are compared with.
    """

    timings: tuple[Timing, ...]

    def as_data(self) -> list[dict[str, Any]]:
        """The timings as JSON holds them; what could not be measured is null."""
        return [
            {key: None if isinstance(v, float) and math.isnan(v) else v for key, v in asdict(timing).items()}
            for timing in self.timings
        ]

    @property
    def median_speed_up(self) -> float:
        """The median of what the last model's speed-ups are, over the settings in which it could be run."""
        last = self.timings[-1].model
        found = [t.speed_up for t in self.timings if t.model == last and not math.isnan(t.speed_up)]
        return float(np.median(found)) if found else math.nan

    def __str__(self) -> str:
        first = self.timings[0].model
        rows = [("backend", "threads", "batch", "model", "ms", "quartiles", "times as fast", "quartiles")]
        for t in self.timings:
            setting = (t.backend, str(t.threads), str(t.batch), t.model)
            if t.why:
                rows.append((*setting, "-", "", "", t.why))
                continue
            times = (
                (f"{t.speed_up:.2f}", _range(t.speed_up_low, t.speed_up_high, ".2f")) if t.model != first else ("", "")
            )
            rows.append((*setting, f"{t.median_ms:.3f}", _range(t.low_ms, t.high_ms, ".3f"), *times))
        wide = [max(len(row[i]) for row in rows if row[4] != "-" or i < 7) for i in range(8)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


def _range(low: float, high: float, form: str) -> str:
    return f"{low:{form}} to {high:{form}}"


def compare_latency(
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    *,
    backends: Sequence[str] | str = EAGER,
    threads: Sequence[int] | int | None = None,
    batches: Sequence[int] | int | None = None,
    turns: int = TURNS,
    seconds: float = SECONDS,
    progress: bool = False,
) -> Comparison:
    """Time models in turn, in eval mode and without gradients, in all settings.

    In a turn every model is timed for a while, one after the other, so that a machine that is slower for a while is so
    for all; a turn's time is its median, and ratios are those within a turn. Forwards before the first that counts warm
    caches up, and whatever compiles.

    Args:
        models: by name; the first is what others are compared with. Each is timed on its device.
        inputs: example inputs.
        backends: ``"eager"``, ``"compile"``, ``"onnxruntime"``: one, or several.
        threads: of the CPU; as many as are set, if not given.
        batches: how many examples; those of the inputs, repeated or some of them. As many as there are, if not given.
        turns: how often each is timed.
        seconds: how long in a turn, about.
        progress: show how far it is.

    Returns:
        What was measured; what a backend cannot run has its reason in it.

    Raises:
        SecateurError: no models, an unknown backend, numbers that are none.
    """
    if not isinstance(models, Mapping) or not models or not all(isinstance(m, nn.Module) for m in models.values()):
        raise SecateurError("compare_latency(models=...): modules by name are expected, such as {'whole': a, 'cut': b}")
    named = [backends] if isinstance(backends, str) else list(backends)
    for backend in named:
        check_backend(backend)
    many = [threads] if isinstance(threads, int) or threads is None else list(threads)
    sizes = [batches] if isinstance(batches, int) or batches is None else list(batches)
    for count in (*many, *sizes):
        check_count("threads and batches", count, optional=True)
    if not named or not many or not sizes:
        raise SecateurError("compare_latency: at least one backend, number of threads and size of batch are expected")
    check_count("turns", turns)
    settings = [(backend, n, size) for backend in named for n in many for size in sizes]
    found: list[Timing] = []
    for backend, n, size in tracked(settings, "timing", len(settings), progress):
        given = inputs if size is None else some_of(inputs, torch.arange(size) % examples_of(inputs))
        with threads_set(n) as used:
            setting = {"backend": backend, "threads": used, "batch": examples_of(given)}
            found += _timed(models, given, turns, seconds, setting)
    return Comparison(tuple(found))


def _timed(
    models: Mapping[str, nn.Module], inputs: Inputs, turns: int, seconds: float, setting: Mapping[str, Any]
) -> list[Timing]:
    """All models in one setting."""
    backend, why, forwards = setting["backend"], dict[str, str](), dict[str, Any]()
    with ExitStack() as stack:
        for name, model in models.items():
            try:
                forwards[name] = stack.enter_context(ready(model, inputs, backend))
            except (CannotMeasure, SecateurError) as error:
                why[name] = first_line(error)
        repeats = []
        for name in list(forwards):
            try:
                repeats.append(_repeats(forwards[name], inputs, seconds))
            except Exception as error:  # whatever a forward says of inputs that it does not take
                why[name] = f"{type(error).__name__}: {first_line(error)}"
                del forwards[name]
        runs = list(forwards.values())
        medians = np.zeros((len(runs), turns))
        for turn in range(turns):
            for number, run in enumerate(runs):
                medians[number, turn] = np.median(in_turn([run], inputs, repeats[number], WARM_UP, 1, backend))
    of = dict(zip(forwards, medians, strict=True))
    first = of.get(next(iter(models)))
    found = []
    for name, model in models.items():
        device = str(runs_on(model, backend))
        if name in why:
            found.append(Timing(name, device=device, why=why[name], **setting))
            continue
        low, median, high = np.percentile(of[name], (25, 50, 75)).tolist()
        times = first / of[name] if first is not None else np.full(turns, np.nan)
        slow, usual, fast = np.percentile(times, (25, 50, 75)).tolist()
        found.append(
            Timing(
                name, device=device, median_ms=median, low_ms=low, high_ms=high, speed_up=usual, speed_up_low=slow,
                speed_up_high=fast, **setting,
            )
        )  # fmt: skip
    return found


def _repeats(run: Any, inputs: Inputs, seconds: float) -> int:
    """How many forwards take about so long."""
    once = float(np.median(in_turn([run], inputs, FEWEST, WARM_UP, 1))) / 1000
    return int(np.clip(round(seconds / max(once, 1e-7)), FEWEST, MOST))
