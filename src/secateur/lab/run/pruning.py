"""Pruning as a recipe describes it: what each family of methods does with the model, and what it notes and says."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F

from secateur.allocation.budget import Budget, in_round
from secateur.allocation.latency.model import Timing
from secateur.allocation.strategies import BANDIT
from secateur.lab.run.setting import Facts, Setting
from secateur.lab.run.training import fitted, make_handle, make_optimizer
from secateur.measure.latency import threads_set
from secateur.methods import GENTLE
from secateur.methods.eigendamage import CUTTING, EIGENDAMAGE, measure_damage
from secateur.methods.pivoting import Pivoting
from secateur.pruning import DEAD, DIRECTIONAL, counts, prune
from secateur.surgery.blocks.packing import pack
from secateur.surgery.blocks.pivots import PIVOT, energy, pivot, pivoted, remembered
from secateur.surgery.channels import check, cut, recalibrate
from secateur.surgery.low_rank.separable import separable, separate
from secateur.surgery.records import record
from secateur.tracing.api import trace

TIMED = 32
"""Networks that are timed for a budget in ``latency_ms``."""
SEEDED = ("random", "obd", "obs", "kron_obd", "kron_obs")


def pruned(setting: Setting, model: nn.Module, seed: int, number: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    """The model after a round of the recipe's pruning, and what the stage notes.

    Args:
        setting: what all stages share.
        model: the one before.
        seed: of the run.
        number: of the round, from 1 on.
        checkpoints: a folder for what lets an interrupted stage go on.
    """
    section, data = setting.recipe.prune, setting.data
    model = model.to(setting.device)
    budget = section.make_budget()
    if budget is not None and section.rounds > 1:
        original = setting.begin(seed).to(setting.device)
        full, now = (vars(counts(trace(m, setting.inputs))) for m in (original, model))
        budget = in_round(budget, number, section.rounds, full, now)
    set_seed(seed)
    loader = data.loader("train", setting.recipe.data.batch_size, shuffle=True, seed=seed)
    batches = loader if section.batches is None else list(itertools.islice(loader, section.batches))
    if section.method in GENTLE:
        return _prune_gently(setting, model, seed, checkpoints)
    if section.method == PIVOT:
        return _pivot(setting, model, seed, checkpoints)
    if section.method == EIGENDAMAGE:
        assert budget is not None
        return _rotate(setting, model, budget, batches, seed, last=number == section.rounds)
    return _prune_at_once(setting, model, budget, batches, seed, checkpoints)


def _prune_at_once(
    setting: Setting, model: nn.Module, budget: Budget | None, batches: Any, seed: int, checkpoints: Path
) -> tuple[nn.Module, Facts]:
    """Score, allocate and cut; the facts are those of the result, and the widths."""
    section, timing = setting.recipe.prune, None
    if budget is not None and budget.latency_ms is not None:
        timing = timed(setting, model, TIMED, _beside(checkpoints, "timing.json"))
    result = prune(
        model,
        setting.inputs,
        method=section.method,
        budget=budget,
        data=batches,
        loss_fn=F.cross_entropy,
        strategy=section.strategy,
        approximate=section.approximate,
        recalibrate=section.recalibrate,
        compensate=section.compensate,
        refit=section.refit,
        timing=timing,
        search=None
        if section.strategy != BANDIT
        else {
            **section.search,
            "seed": seed,
            "progress": setting.progress,
            "checkpoint": _beside(checkpoints, "search.json"),
        },
        **section.options,
        **({"seed": seed} if section.method in SEEDED else {}),
    )
    if "latency_ms" in result.facts:
        setting.say("latency: {before:.3g} ms before, {after:.3g} after".format(**result.facts["latency_ms"]))
    left = result.facts.get("not refitted")
    if left:
        setting.say("refit: as they were stay " + "; ".join(f"{name} ({why})" for name, why in left.items()))
    if section.strategy == BANDIT:
        _tell_search(setting, result.facts["search"])
    kept = result.graph.kept(result.plan)
    facts: Facts = {
        "widths": {g.name: [len(g), int(k)] for g, k in zip(result.graph.groups, kept, strict=True)},
        "skipped": dict(result.plan.skipped),
        **result.facts,
    }
    if not (
        section.recalibrate
        or section.refit
        or section.approximate
        or section.compensate
        or section.method == DIRECTIONAL
    ):  # masked and cut compute the same: shown, not assumed
        images, _ = next(iter(setting.data.loader("train", 64)))
        facts["difference"] = check(model, result.model, result.plan, images)
    if section.method == DEAD:
        facts["dead"] = len(result.plan)
    return result.model, facts


def _tell_search(setting: Setting, found: Mapping[str, Any]) -> None:
    """What whoever reads the result should know of a search."""
    if not found["table"]:
        setting.say("search: no group has a choice of widths around the start, so the start is kept")
        return
    if found["started"] != found["start"]:
        setting.say("search: too few evaluations or minutes to try every group alone, so it began at uniform widths")
    if not found["better"]:
        setting.say("search: what was found is no better than the start on the same batches, so the start is kept")
    if found["late"]:
        setting.say(f"search: the minutes were up after {found['forwards']} forwards")
    for name, (weak, strong) in found["doubts"].items():
        setting.say(f"search: the best width of {name} is {weak} or {strong}, depending on what the other groups do")


def timed(setting: Setting, model: nn.Module, samples: int, checkpoint: Path | None = None) -> Timing:
    """How long the model takes as the recipe measures it: on the CPU, with its threads, at its first batch size."""
    section, how = setting.recipe.prune, setting.recipe.measure
    budget, own = section.make_budget(), copy.deepcopy(model).cpu()
    assert budget is not None
    images = setting.inputs.cpu().expand(how.batch_sizes[0], -1, -1, -1).contiguous()
    return Timing(
        own, trace(own, setting.inputs.cpu()), inputs=images, samples=samples, threads=how.threads,
        round_to=budget.round_to, approximate=section.approximate, progress=setting.progress, checkpoint=checkpoint,
    )  # fmt: skip


def _beside(checkpoints: Path, name: str) -> Path:
    checkpoints.mkdir(parents=True, exist_ok=True)
    return checkpoints / name


def _prune_gently(setting: Setting, model: nn.Module, seed: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    """Train on while channels go bit by bit, and cut what is out."""
    section = setting.recipe.prune
    assert section.train is not None
    graph = trace(model, setting.inputs)
    optimizer = make_optimizer(setting, model, section.train)
    handle = make_handle(setting, model, graph, optimizer, seed)
    facts = fitted(setting, model, optimizer, section.train, seed, checkpoints, handle)
    handle.detach()
    plan = handle.plan()
    small = cut(model, plan)
    kept = graph.kept(plan)
    facts["widths"] = {g.name: [len(g), int(k)] for g, k in zip(graph.groups, kept, strict=True)}
    facts["steps"] = handle.steps
    images, _ = next(iter(setting.data.loader("train", 64)))
    facts["difference"] = check(model, small, plan, images)
    if section.recalibrate:  # the norms behind masked channels have seen a masked network
        recalibrate(small, setting.data.loader("train", setting.recipe.data.batch_size, shuffle=True, seed=seed))
    return small, facts


def _pivot(setting: Setting, model: nn.Module, seed: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    """Zeros outside of dense blocks, at once or bit by bit while the network trains on; packed later."""
    section = setting.recipe.prune
    facts: Facts = {}
    if section.train is None:
        found = pivot(model, setting.inputs, **section.options)
        facts["captured"] = {
            name: pattern.captured(energy(model.get_submodule(name))) for name, pattern in remembered(found).items()
        }
    else:
        gradual = Pivoting(model, **section.options)
        facts = fitted(
            setting, model, make_optimizer(setting, model, section.train), section.train, seed, checkpoints, gradual
        )
        found = pivoted(model, gradual.patterns, gradual.skipped)
    patterns, facts["skipped"] = remembered(found), json.loads(record(found)[-1][PIVOT])["skipped"]
    if facts["skipped"]:
        setting.say("pivot: whole stay " + "; ".join(f"{name} ({why})" for name, why in facts["skipped"].items()))
    facts["blocks"] = {
        name: [*(int(size) for size in pattern.rows.shape), int(pattern.columns.shape[1])]
        for name, pattern in patterns.items()
    }
    return found, facts


def packed(setting: Setting, model: nn.Module) -> tuple[nn.Module, Facts]:
    """Packed layers where they are faster, for the first of the batch sizes that are measured."""
    how = setting.recipe.measure
    images = torch.rand((how.batch_sizes[0], *setting.data.image), generator=torch.Generator().manual_seed(0))
    with threads_set(how.threads):
        small = pack(model, images)
    done = json.loads(record(small)[-1]["pack"])
    if done["patterns"]:
        setting.say("pack: no slower dense, and left so: " + ", ".join(sorted(done["patterns"])))
    return small, {"packed": sorted(done["layers"]), "dense": sorted(done["patterns"]), "ms": done["ms"]}


def _rotate(
    setting: Setting, model: nn.Module, budget: Budget, batches: Any, seed: int, *, last: bool
) -> tuple[nn.Module, Facts]:
    """Bottlenecks (in the last round separable ones), the rows and columns kept, and the layers that had to stay."""
    section = setting.recipe.prune
    cutting = {name: value for name, value in section.options.items() if name in CUTTING}
    measuring = {name: value for name, value in section.options.items() if name not in {*CUTTING, "separable"}}
    damages = measure_damage(model, setting.inputs, data=batches, seed=seed, **measuring)
    small = damages.cut(budget, **cutting)
    facts: Facts = {
        "bottlenecks": json.loads(record(small)[-1][EIGENDAMAGE])["layers"],
        "skipped": dict(damages.skipped),
    }
    if last and section.options.get("separable"):
        facts["separated"] = separable(small)
        if facts["separated"]:
            small = separate(small, section.options["separable"])
        else:
            setting.say("separable: the budget made no convolution a bottleneck, so none is")
    if section.recalibrate:
        recalibrate(small, batches)
    return small, facts
