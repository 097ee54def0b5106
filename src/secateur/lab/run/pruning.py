"""Pruning as a recipe describes it: by the three seats, by a method at once, or by a method while training."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn

from secateur._internal.batches import read_batch
from secateur._internal.files import make_folder
from secateur._internal.workload import Workload
from secateur.allocation.budget import Budget, in_round
from secateur.allocation.latency.api import LatencyClock, measure_latency
from secateur.allocation.latency.sampler import LatencySettings
from secateur.auto import AUTO
from secateur.lab.data.dataset import Dataset
from secateur.lab.run.setting import Facts, Setting
from secateur.lab.run.training import fitted, make_optimizer
from secateur.measure.latency import threads_set
from secateur.methods.contract import described, finished
from secateur.plan import Plan
from secateur.pruning import pruned as pruned_at
from secateur.repair.api import repaired
from secateur.result import Result, counts_of, traced_data
from secateur.surgery.channels import check
from secateur.tracing.api import trace

TIMED = 32
"""Networks that are timed for a budget in ``latency_ms``."""


def pruned(setting: Setting, model: nn.Module, seed: int, number: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    """The model after a round of the recipe's pruning, and what the stage notes.

    Args:
        setting: what all stages share.
        model: the one before.
        seed: of the run.
        number: of the round, from 1 on.
        checkpoints: a folder for what lets an interrupted stage go on.
    """
    section = setting.recipe.prune
    model = model.to(setting.device)
    budget = _budget_of_round(setting, model, seed, number)
    set_seed(seed)
    if section.train is not None:
        return _while_training(setting, model, budget, seed, checkpoints)
    if section.method is not None:
        return _by_method(setting, model, budget, seed, last=number == section.rounds)
    assert budget is not None
    return _by_seats(setting, model, budget, seed, checkpoints)


def _budget_of_round(setting: Setting, model: nn.Module, seed: int, number: int) -> Budget | None:
    section, budget = setting.recipe.prune, setting.recipe.prune.make_budget()
    if budget is None or section.rounds == 1:
        return budget
    original = setting.begin(seed).to(setting.device)
    full, now = (vars(counts_of(trace(m, setting.inputs))) for m in (original, model))
    return in_round(budget, number, section.rounds, full, now)


def _batches(setting: Setting, seed: int) -> Any:
    """The training images that pruning may look at."""
    section = setting.recipe.prune
    loader = setting.data.loader("train", setting.recipe.data.batch_size, shuffle=True, seed=seed)
    return loader if section.batches is None else list(itertools.islice(loader, section.batches))


def _workload(setting: Setting, model: nn.Module, seed: int) -> Workload:
    """The table; what other runs have found of the same network by the same images lies there already."""
    known = None
    if setting.sharing is not None:
        recipe = setting.recipe
        what = [recipe.data.model_dump_json(), recipe.model.model_dump_json(), recipe.loss, recipe.prune.batches, seed]
        model, known = setting.sharing.of(model, tuple(what))
    return Workload(
        model, _batches(setting, seed), setting.loss, inputs=setting.inputs, progress=setting.progress, known=known
    )


def _by_seats(
    setting: Setting, model: nn.Module, budget: Budget, seed: int, checkpoints: Path
) -> tuple[nn.Module, Facts]:
    """Criterion, strategy and repair; the facts are those of the result, and the widths."""
    section, clock = setting.recipe.prune, None
    make_folder(checkpoints)
    if budget.latency_ms is not None:
        clock = timed(setting, model, TIMED, checkpoints / "timing.json")
    open_ones = {"seed": seed, "checkpoint": str(checkpoints / "strategy.json")}
    repairs = section.make_repairs(seed=seed)
    work = _workload(setting, model, seed)
    model = work.model
    result = pruned_at(
        work,
        setting.inputs,
        budget,
        criterion=section.make_criterion(seed=seed),
        strategy=section.make_strategy(**open_ones),
        repair=AUTO if repairs == [AUTO] else repairs,
        exclude=section.exclude,
        approximate=section.approximate,
        latency=clock,
    )
    if clock is not None:
        setting.say("latency: {before:.3g} ms before, {after:.3g} after".format(**result.facts["latency_ms"]))
    facts = _facts(setting, result)
    if result.plan is not None and not section.approximate and all(getattr(r, "name", "") == "none" for r in repairs):
        facts["difference"] = _difference(setting, model, result.model, result.plan)
    return result.model, facts


def _by_method(
    setting: Setting, model: nn.Module, budget: Budget | None, seed: int, *, last: bool
) -> tuple[nn.Module, Facts]:
    """A method that prunes at once."""
    section = setting.recipe.prune
    method = section.make_method(seed=seed, exclude=tuple(section.exclude))
    if not last and hasattr(method, "before_last"):
        method = method.before_last()
    work = _workload(setting, model, seed)
    model = work.model
    result = method.apply(model, setting.inputs, budget, work)
    repairs = section.make_repairs(seed=seed)
    repaired_facts = repaired(repairs, model, result.model, result.plan, work)
    facts = _facts(setting, replace(result, facts={**result.facts, **repaired_facts}))
    if result.plan is not None and not repairs and not getattr(method, "approximate", False):
        facts["difference"] = _difference(setting, model, result.model, result.plan)
    return result.model, facts


def _while_training(
    setting: Setting, model: nn.Module, budget: Budget | None, seed: int, checkpoints: Path
) -> tuple[nn.Module, Facts]:
    """Train on while channels go bit by bit, and cut what is out."""
    section = setting.recipe.prune
    assert section.train is not None
    before = copy.deepcopy(model)
    optimizer = make_optimizer(setting, model, section.train)
    handle = make_handle(setting, model, optimizer, budget, seed)
    facts = fitted(setting, model, optimizer, section.train, seed, checkpoints, handle)
    if hasattr(handle, "detach"):
        handle.detach()
    small, plan = finished(model, handle)
    if plan is not None and plan.graph is not None:
        kept = plan.graph.kept(plan)
        facts["widths"] = {g.name: [len(g), int(k)] for g, k in zip(plan.graph.groups, kept, strict=True)}
        facts |= traced_data(plan.graph, plan)
        facts["difference"] = _difference(setting, model, small, plan)
    facts |= {"chosen": {"method": described(section.make_method())}, **getattr(handle, "facts", {})}
    work = Workload(before, _batches(setting, seed), setting.loss, inputs=setting.inputs, progress=setting.progress)
    facts |= repaired(section.make_repairs(seed=seed), model, small, plan, work)  # type: ignore[arg-type]
    _say_left_whole(setting, facts)
    return small, facts


def make_handle(
    setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer, budget: Budget | None, seed: int
) -> Any:
    """What the prune section describes, attached to the optimizer."""
    section = setting.recipe.prune
    method = section.make_method(seed=seed, exclude=tuple(section.exclude))
    return method.attach(model, trace(model, setting.inputs), optimizer, budget)


def finish(setting: Setting, model: nn.Module) -> tuple[nn.Module, Facts]:
    """What a method does last, after all fine-tuning (:attr:`finishes` says whether it does)."""
    how = setting.recipe.measure
    size = how.batch_sizes[0]
    inputs: Any = setting.data.example(size)
    if isinstance(setting.data, Dataset):
        inputs = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(0))
    with threads_set(how.threads):
        result: Result = setting.recipe.prune.make_method().finish(model, inputs)
    for remark in result.facts.get("remarks", ()):
        setting.say(remark)
    return result.model, dict(result.facts)


def timed(setting: Setting, model: nn.Module, samples: int, checkpoint: Path | None = None) -> LatencyClock:
    """How long the model takes as the recipe measures it: on the CPU, with its threads, at its first batch size."""
    section, how = setting.recipe.prune, setting.recipe.measure
    budget, own = section.make_budget(), copy.deepcopy(model).cpu()
    assert budget is not None
    inputs = setting.data.example(how.batch_sizes[0])
    settings = LatencySettings(
        samples=samples, threads=how.threads, round_to=budget.round_to, approximate=section.approximate,
        checkpoint=checkpoint,
    )  # fmt: skip
    graph = trace(own, setting.data.example())
    return measure_latency(own, graph, settings, inputs=inputs, progress=setting.progress)


def _facts(setting: Setting, result: Result) -> Facts:
    """What a stage notes of a result; what whoever reads it should know is said."""
    facts: Facts = dict(result.facts)
    if result.graph is not None and result.plan is not None:
        kept = result.graph.kept(result.plan)
        facts["widths"] = {g.name: [len(g), int(k)] for g, k in zip(result.graph.groups, kept, strict=True)}
        facts |= traced_data(result.graph, result.plan, result.scores)
        facts["removed"] = len(result.plan)
    for remark in (*facts.get("notices", ()), *facts.get("remarks", ())):
        setting.say(remark)
    _say_left_whole(setting, facts)
    return facts


def _say_left_whole(setting: Setting, facts: Facts) -> None:
    if facts.get("left whole"):
        setting.say("left whole: " + "; ".join(f"{name} ({why})" for name, why in facts["left whole"].items()))


def _difference(setting: Setting, model: nn.Module, small: nn.Module, plan: Plan) -> float:
    """Masked and cut compute the same: shown, not assumed."""
    inputs = read_batch(next(iter(setting.data.loader("train", 64))), 0, setting.device).inputs
    return check(model, small, plan, inputs)
