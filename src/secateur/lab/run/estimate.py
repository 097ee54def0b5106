"""What a run is going to do and about how long it will take, before it begins.

A few training steps and forwards of the recipe's own network are timed on the device that the run will use, on images
without content, and multiplied by how many of them the stages are made of. It is an estimate: a pruned network is
counted as the whole one, and what varies too much to be told is named in :data:`NOT_COUNTED`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import storage as store
from secateur._internal.batches import Batch, call_model, read_batch
from secateur._internal.losses import outputs_of, read_loss
from secateur._internal.workload import Needs
from secateur.auto import AUTO
from secateur.lab.data.dataset import Dataset
from secateur.lab.data.own import OwnData
from secateur.lab.recipe.sections import Prune, Recipe, Tune, name_of
from secateur.lab.run.setting import Setting
from secateur.lab.run.training import make_optimizer
from secateur.measure.latency import wait_for

LONG = 3 * 3600.0
"""Seconds; a run that is estimated to take longer is one that a user should have asked for."""
NOT_COUNTED = "the timing of networks for a budget in milliseconds, curvature beyond one pass, compilation"
"""What an estimate leaves out."""
MEASURED = "measured.json"
_FEW, _ENOUGH = 5, 5.0  # steps that are timed at most, and seconds after which no more are
_SMALL = 8  # images of a first step, from which a slow one is extrapolated


@dataclass(frozen=True)
class Cost:
    """Times on a device.

    Attributes:
        step: seconds of one training step.
        forward: seconds of a forward, one image's share of a batch.
        how: how they were measured, in words.
    """

    step: float
    forward: float
    how: str


@dataclass(frozen=True)
class Stage:
    """A part of a seed's work.

    Attributes:
        name: that of its folder.
        what: is done in it, in words.
        seconds: that it takes, about.
        done: whether an earlier call has done it.
    """

    name: str
    what: str
    seconds: float
    done: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a run is going to do.

    Attributes:
        stages: by seed, in their order.
        where: the device and its threads, in words.
        how: how the times were estimated, in words.
        remarks: what else is to be known before such a run.
    """

    stages: Mapping[int, Sequence[Stage]]
    where: str
    how: str
    remarks: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        """What is still to be done, about."""
        return sum(stage.seconds for stages in self.stages.values() for stage in stages if not stage.done)

    def lines(self) -> list[str]:
        """All of it as lines of text."""
        found = []
        for seed, stages in self.stages.items():
            found.append(f"seed {seed}:")
            found += [f"  {s.name}: {s.what}, {'done' if s.done else in_words(s.seconds)}" for s in stages]
        return [
            *found,
            f"{in_words(self.seconds)} in all on {self.where}",
            f"estimated {self.how}",
            f"a pruned network counts as the whole one; not counted: {NOT_COUNTED}",
            *self.remarks,
        ]


def in_words(seconds: float) -> str:
    """A time as people say it: ``about 40 s``, ``about 25 min``, ``about 7 hours``, ``about 6 days``."""
    if seconds < 1:
        return "under 1 s"
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("hours", 3600, 48)):
        if seconds < most * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds / 86400:,.0f} days"


def estimate(setting: Setting, out: Path | None = None, *, threads: int) -> Estimate:
    """What a run is going to do, and about how long that will take.

    Args:
        setting: of the run.
        out: its folder, where it goes on with what is there.
        threads: CPU threads that are set.
    """
    cost = timed_cost(setting)
    stages = stages_of(setting.recipe, setting.data, cost)
    found = {}
    for seed in setting.recipe.seeds:
        at = None if out is None else out / f"seed-{seed}"
        found[seed] = [Stage(s.name, s.what, s.seconds, at is not None and _is_done(at, s.name)) for s in stages]
    where = str(setting.device) + (f", {threads} thread{'s'[: threads - 1]}" if setting.device.type == "cpu" else "")
    return Estimate(found, where, cost.how)


def _is_done(folder: Path, name: str) -> bool:
    return (folder / MEASURED if name == "measured" else folder / name / store.FILE).exists()


def stages_of(recipe: Recipe, data: Dataset | OwnData, cost: Cost) -> list[Stage]:
    """The stages of one seed, in their order, as :func:`secateur.lab.run.stages.one_seed` does them."""
    steps = len(data.loader("train", recipe.data.batch_size))
    held_out = len(data.validation) if data.validation is not None else 0
    train, tune, prune = recipe.train, recipe.finetune, recipe.prune

    def training(name: str, section: Tune, optimizer: str) -> Stage:
        seconds = section.epochs * (steps * cost.step + held_out * cost.forward)
        return Stage(name, f"{section.epochs} epochs of {steps:,} steps with {optimizer}", seconds)

    found, columns = [], 1
    if train is None:
        found.append(Stage("baseline", "the weights that are given", 0.0))
    else:
        optimizer = train.make_optimizer()
        if train.baseline or not optimizer.prunes:
            found.append(training("baseline", train, optimizer.unpruned().name))
        if optimizer.prunes:
            found.append(training("trained", train, name_of(train.optimizer)))
            columns += train.baseline
    for number in range(1, prune.rounds + 1) if prune.prunes else ():
        mark = "" if number == prune.rounds else f"-{number}"
        if prune.train is None:
            batches = steps if prune.batches is None else min(prune.batches, steps)
            found.append(Stage(f"pruned{mark}", _pruning_in_words(prune), _at_once(prune, batches, recipe, cost)))
        else:
            found.append(training(f"pruned{mark}", prune.train, f"{name_of(prune.method)} beside {_name(prune.train)}"))
        if tune is not None:
            found.append(training(f"tuned{mark}", tune, _name(tune)))
    columns += prune.rounds if prune.prunes else 0
    if hasattr(prune.make_method(), "finish"):
        found.append(Stage("finished", f"what {name_of(prune.method)} does last", 0.0))
    how = recipe.measure
    forwards = len(data.test) + held_out + sum(how.batch_sizes) * how.repeats
    found.append(Stage("measured", "accuracy or your metric, counts and latency", columns * forwards * cost.forward))
    return found


def _name(section: Tune) -> str:
    return name_of(section.optimizer)


def _pruning_in_words(prune: Prune) -> str:
    limits = ", ".join(f"{unit} {value}" for unit, value in (prune.budget or {}).items())
    if prune.method is not None:
        return name_of(prune.method) + (f" to {limits}" if limits else "")
    seats = {"criterion": prune.criterion, "strategy": prune.strategy}
    return f"{', '.join(f'{seat} {name_of(who)}' for seat, who in seats.items())}, to {limits}"


def _at_once(prune: Prune, batches: int, recipe: Recipe, cost: Cost) -> float:
    """Seconds of pruning at once: a pass for each seat that looks at data, and the forwards of a search."""
    seats: list[Any] = [prune.make_method()]
    evaluations = 0
    if prune.method is None:
        seats = [prune.make_criterion(), *prune.make_repairs()]
        evaluations = getattr(prune.make_strategy(), "evaluations", 0)
    passes = sum(seat == AUTO or getattr(seat, "needs", Needs()).data for seat in seats)
    return passes * batches * cost.step + evaluations * recipe.data.batch_size * cost.forward


def timed_cost(setting: Setting) -> Cost:
    """How long a training step and a forward of the recipe's network take on its device.

    A step that is slow is extrapolated from one of fewer images.
    """
    recipe = setting.recipe
    section = recipe.train or recipe.prune.train or recipe.finetune
    model = setting.begin(recipe.seeds[0]).to(setting.device).train()
    order = torch.channels_last if section is not None and section.channels_last else torch.contiguous_format
    if order is torch.channels_last:
        model.to(memory_format=order)  # type: ignore[call-overload]
    optimizer = None if section is None else make_optimizer(setting, model, section)
    loader = setting.data.loader("train", recipe.data.batch_size, shuffle=True, augment=recipe.data.augment)

    own = isinstance(setting.data, OwnData)

    def batch(most: int | None) -> Batch:
        raw = next(iter(loader))
        raw = raw if own else [t[:most] for t in raw]  # those of a user's own may be anything
        found = read_batch(raw, 0, setting.device)
        image = isinstance(found.inputs, Tensor) and found.inputs.ndim == 4
        return replace(found, inputs=found.inputs.contiguous(memory_format=order)) if image else found

    loss = read_loss(setting.loss, batch(None))

    def both_ways(most: int | None = None) -> None:
        some = batch(most)
        loss.mean(outputs_of(partial(call_model, model), some, loss), some.targets).backward()  # whatever it is

    def update() -> None:
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    def step() -> None:
        both_ways()
        update()

    def forward(most: int | None = None) -> None:
        with torch.no_grad():
            call_model(model, batch(most).inputs)

    full = batch(None).examples
    small = full if own else min(_SMALL, full)
    both_ways(small)
    update()  # both have warmed up
    update_seconds = _timed(setting.device, update)
    seconds = full / small * _timed(setting.device, lambda: both_ways(small)) + update_seconds
    model.eval()
    if seconds > _ENOUGH:
        how = f"from {small} images both ways, times {full / small:g} for a training step of a batch,"
        return _cost(seconds, _timed(setting.device, lambda: forward(small)) / small, how)
    each = _timed(setting.device, forward) / full
    model.train()
    times: list[float] = []
    while len(times) < _FEW and sum(times) < _ENOUGH:
        times.append(_timed(setting.device, step))
    return _cost(statistics.median(times), each, f"from {len(times)} training steps and a forward")


def _cost(step: float, forward: float, how: str) -> Cost:
    told = f"{1000 * step:.3g} ms" if step < 1 else f"{step:.0f} s"
    return Cost(step, forward, f"{how} timed now ({told} a step)")


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds that some work takes, on a GPU until it is done there."""
    wait_for(device)
    begun = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - begun
