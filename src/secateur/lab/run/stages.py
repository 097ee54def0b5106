"""The stages of one seed: baseline, trained, pruned, tuned, measured.

Each begins from what the one before has left on disk, with the seed's own random state, whether the run was interrupted
or not; so it ends the same. Inside a training stage the loop's checkpoints do that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur import storage as store
from secateur._internal.batches import call_model
from secateur._internal.errors import BadFile, SecateurError
from secateur.lab.data.dataset import Dataset
from secateur.lab.given import INPUT, described
from secateur.lab.recipe.sections import Recipe, Tune, name_of
from secateur.lab.run.folder import held, write_json
from secateur.lab.run.pruning import finish, make_handle, pruned, timed
from secateur.lab.run.setting import TEST_BATCH, Facts, Setting
from secateur.lab.run.training import fitted, make_optimizer, plain
from secateur.measure.backends import EAGER
from secateur.measure.counting import counted
from secateur.measure.latency import file_size, latency
from secateur.measure.layers import layer_data
from secateur.pruning import check_feasible
from secateur.tracing.api import trace
from secateur.tracing.graph import ChannelGraph
from secateur.tracing.selection import excluded


def check_setting(setting: Setting, *, new: bool) -> None:
    """Try what can be tried before any work: the weights, one image through the network, the budget.

    Args:
        setting: what all stages share.
        new: whether the run begins; one that goes on has times of its own.

    Raises:
        SecateurError: the network does not take the images, has too few outputs, or cannot meet the budget.
    """
    models = [setting.begin(seed) for seed in setting.recipe.seeds]
    model = models[0].to(setting.device)
    graph = trace(model, setting.inputs)
    _ = setting.metric, setting.loss
    with torch.no_grad():
        output = call_model(model.eval(), setting.inputs)
    classes = setting.data.classes if isinstance(setting.data, Dataset) else None
    if classes is not None and (not isinstance(output, Tensor) or output.shape != (1, classes)):
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise SecateurError(
            f"model {setting.recipe.model.name!r}: for one image of data {setting.data.name!r} it gives {shape}, and "
            f"[1, {classes}] is due, one value a class; see model.options"
        )
    if setting.recipe.train is not None:
        make_optimizer(setting, model, setting.recipe.train)  # it refuses what it cannot do
    _try_pruning(setting, model, graph, new=new)


def _try_pruning(setting: Setting, model: nn.Module, graph: ChannelGraph, *, new: bool) -> None:
    """Raise if the budget cannot be met, or a method that prunes while training has not the time to."""
    section, budget = setting.recipe.prune, setting.recipe.prune.make_budget()
    method = section.make_method()
    if method is None:
        if budget is not None and (budget.latency_ms is None or new):
            clock = None if budget.latency_ms is None else timed(setting, model, samples=4)
            without = excluded(model, graph, section.exclude)
            check_feasible(graph, budget, approximate=section.approximate, latency=clock, without=without)
        return
    if section.train is None:
        if hasattr(method, "check"):
            method.check(model, setting.inputs, budget)
        return
    if budget is not None:
        check_feasible(graph, budget)
    handle = make_handle(setting, model, make_optimizer(setting, model, section.train), budget, 0)
    needed = getattr(handle, "steps_needed", 0)
    if hasattr(handle, "detach"):
        handle.detach()
    steps = section.train.epochs * len(setting.data.loader("train", setting.recipe.data.batch_size))
    if steps < needed:
        advice = handle.advice() if hasattr(handle, "advice") else "let the method take larger steps"
        raise SecateurError(
            f"prune.train.epochs={section.train.epochs} are {steps} steps, and {name_of(section.method or '')} takes "
            f"{needed} at least until everything is out: train longer, or {advice}"
        )


def one_seed(setting: Setting, seed: int, folder: Path) -> Facts:
    """All stages of one seed; what is already in the folder is not done again.

    Returns:
        ``before``, ``round 1``, ... and ``after`` (metrics; ``after`` is missing if nothing is pruned) and ``stages``
        (what each noted).
    """
    recipe, train = setting.recipe, setting.recipe.train
    stage = partial(_stage, setting, folder)
    stages: dict[str, Facts] = {}
    before: Path | None = None

    def kept(name: str, make: Callable[[Path], tuple[nn.Module, Facts]]) -> Path:
        stages[name] = stage(name, make)
        return folder / name

    def trained(name: str, section: Tune) -> Path:
        make = partial(_train_once, setting, folder / name, section, seed)
        return kept(name, make)

    if train is None:
        last = before = kept("baseline", lambda _: (setting.begin(seed), {}))
    elif train.baseline or not train.make_optimizer().prunes:
        last = before = trained("baseline", plain(train))
    if train is not None and train.make_optimizer().prunes:
        last = trained("trained", train)
        before = before or last
    assert before is not None
    columns = {"before": before}
    rounds = recipe.prune.rounds if recipe.prune.prunes else 0
    for number in range(1, rounds + 1):
        mark = "" if number == rounds else f"-{number}"
        last = kept(f"pruned{mark}", partial(_prune, setting, last, seed, number))
        if recipe.finetune is not None:
            last = kept(f"tuned{mark}", partial(_tune, setting, last, recipe.finetune, seed))
        columns["after" if number == rounds else f"round {number}"] = last
    if hasattr(recipe.prune.make_method(), "finish"):
        columns["after"] = last = kept("finished", lambda _: finish(setting, _load(setting, last)))
    if last != before:  # pruned in training beside its baseline, even where nothing is cut
        columns["after"] = last
    pruned = folder / "pruned" if "pruned" in stages and "tuned" in stages else None
    return {**_measured(setting, folder, columns, pruned), "stages": stages}


def _stage(setting: Setting, folder: Path, name: str, make: Callable[[Path], tuple[nn.Module, Facts]]) -> Facts:
    """Do a stage unless it is there; what it noted."""
    at, checkpoints = folder / name, folder / f"{name}-checkpoints"
    if not (at / store.FILE).exists():
        setting.say(f"{folder.name}: {name}")
        model, facts = make(checkpoints)
        noted = list(setting.inputs.shape) if isinstance(setting.data, Dataset) else described(setting.data.example())
        store.save(model, at, notes={**facts, **({} if noted is None else {INPUT: noted})})
    shutil.rmtree(checkpoints, ignore_errors=True)
    return {name: fact for name, fact in store.read_head(at)["notes"].items() if name != INPUT}


def _load(setting: Setting, at: Path) -> nn.Module:
    try:
        return store.load(at, setting.build)
    except BadFile as error:
        raise BadFile(f"{error}; delete {at} to have this stage done again") from error


def _train(setting: Setting, model: nn.Module, section: Tune, seed: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    optimizer = make_optimizer(setting, model, section)
    facts = fitted(setting, model, optimizer, section, seed, checkpoints)
    found, remark = section.make_optimizer().outcome(optimizer, section.epochs)
    if remark:
        setting.say(remark)
    return model, {**facts, **found}


def _train_once(setting: Setting, at: Path, section: Tune, seed: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    """Train from the beginning, unless another run has trained the same, from which it is taken then."""
    if setting.sharing is None:
        return _train(setting, setting.begin(seed), section, seed, checkpoints)
    where = setting.sharing.trained / training_key(setting.recipe, section, seed)
    with held(where, wait=True):
        if not (where / "model" / store.FILE).exists():
            model, facts = _train(setting, setting.begin(seed), section, seed, where / "checkpoints")
            store.save(model, where / "model", notes=facts)
            shutil.rmtree(where / "checkpoints", ignore_errors=True)
    setting.say(f"{at.parent.name}: {at.name} is that of {where}")
    return _load(setting, where / "model"), dict(store.read_head(where / "model")["notes"])


def training_key(recipe: Recipe, section: Tune, seed: int) -> str:
    """What a training from the beginning depends on, in a few signs."""
    what = [one.model_dump(mode="json") for one in (recipe.data, recipe.model, section)]
    given = [*what, recipe.loss, recipe.measure.metric, recipe.device, recipe.threads, seed]
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def _tune(setting: Setting, source: Path, section: Tune, seed: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    model = _load(setting, source)
    method = setting.recipe.prune.make_method()
    if not hasattr(method, "keeper"):
        return _train(setting, model, section, seed, checkpoints)
    optimizer, keeper = make_optimizer(setting, model, section), method.keeper(model)
    return model, fitted(setting, model, optimizer, section, seed, checkpoints, keeper)


def _prune(setting: Setting, source: Path, seed: int, number: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    return pruned(setting, _load(setting, source), seed, number, checkpoints)


def _measured(setting: Setting, folder: Path, columns: Mapping[str, Path], pruned: Path | None) -> Facts:
    """Metrics of the models in these directories, by column; the test images are looked at here alone.

    Args:
        setting: what all stages share.
        folder: of the seed.
        columns: name -> a saved model.
        pruned: the pruned model before its fine-tuning, of which the accuracies are told too.
    """
    path = folder / "measured.json"
    if not path.exists():
        setting.say(f"{folder.name}: measured")
        models = {name: _load(setting, at) for name, at in columns.items()}
        found: Facts = {name: metrics(setting, model) for name, model in models.items()}
        if pruned is not None:
            found["pruned"] = measured(setting, _load(setting, pruned))
        if "after" in models:
            found["layers"] = layer_data(models["before"].cpu(), models["after"].cpu(), setting.data.example())
        write_json(path, found)
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise BadFile(f"{path} is damaged ({error}); delete it to have this stage done again") from error


def metrics(setting: Setting, model: nn.Module) -> Facts:
    """Accuracies, counts, bytes of the file, and latencies on the CPU, of a model on the CPU."""
    how, data = setting.recipe.measure, setting.data

    def timed_by(backend: str) -> Facts:
        return {
            str(size): latency(
                model, data.example(size), repeats=how.repeats, threads=how.threads, backend=backend
            )
            for size in how.batch_sizes
        }  # fmt: skip

    found: Facts = {**counted(model, data.example()), "file_bytes": file_size(model), "latency": timed_by(EAGER)}
    if others := [backend for backend in how.backends if backend != EAGER]:
        found["latency_of"] = {backend: timed_by(backend) for backend in others}
    return {**found, **measured(setting, model)}


def measured(setting: Setting, model: nn.Module) -> Facts:
    """The metric on the examples held out, where some are, and on the test examples."""
    data, found = setting.data, Facts()
    model.to(setting.device)
    for split in ("validation", "test"):
        if getattr(data, split) is not None:
            found[f"{split}_{setting.metric.shown.name}"] = setting.metric.of(model, data.loader(split, TEST_BATCH))
    return found
