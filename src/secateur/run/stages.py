"""The stages of one seed: baseline, trained, pruned, tuned, measured.

Each begins from what the one before has left on disk, with the seed's own random state, whether the run was interrupted
or not; so it ends the same. Inside a training stage the loop's checkpoints do that.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import store
from secateur.allocate import BANDIT, Budget
from secateur.allocate.budget import budget_from, in_round
from secateur.curvature.layers import CONVOLUTIONS
from secateur.cut import Bottleneck, check, cut, pack, pivot, recalibrate, record, separate
from secateur.cut.pivots import PIVOT, energy, pivoted, remembered
from secateur.cut.separable import separable
from secateur.data import Dataset
from secateur.eigendamage import CUTTING, EIGENDAMAGE, check_budget, measure_damage
from secateur.errors import SecateurError
from secateur.measure import accuracy, counted, file_size, latency
from secateur.measure.latency import threads_set
from secateur.models import build
from secateur.prune import DEAD, DIRECTIONAL, check_feasible, counts, prune
from secateur.recipe import OPTIMIZERS, Recipe, Train, Tune
from secateur.run.folder import write_json
from secateur.trace import ChannelGraph, trace
from secateur.train import GENTLE
from secateur.train.gentle import Gentle
from secateur.train.loop import fit
from secateur.train.pivoting import Pivoting
from secateur.train.sdprun import SDPrun

Facts = dict[str, Any]
TEST_BATCH = 500
SEEDED = ("random", "obd", "obs", "kron_obd", "kron_obs")


@dataclass(frozen=True)
class Setting:
    """What all stages share.

    Attributes:
        recipe: what to do.
        data: the data set, on the accelerator's device.
        accelerator: of Hugging Face accelerate.
        progress: show bars.
        say: prints a line on what is being done.
    """

    recipe: Recipe
    data: Dataset
    accelerator: Accelerator
    progress: bool
    say: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        """Where training runs."""
        return torch.device(self.accelerator.device)

    @property
    def inputs(self) -> Tensor:
        """One example image."""
        return torch.zeros(1, *self.data.image, device=self.device)

    def build(self) -> nn.Module:
        """The network as the recipe describes it, from the present random state."""
        return build(self.recipe.model.name, **self.recipe.model.options)

    def begin(self, seed: int) -> nn.Module:
        """The network at the beginning: initialised from the seed, or with the recipe's weights."""
        set_seed(seed)
        weights = self.recipe.model.weights
        if weights is None:
            return self.build()
        return store.load_weights(weights.replace("{seed}", str(seed)), self.build)


def check_setting(setting: Setting) -> None:
    """Try what can be tried before any work: the weights, one image through the network, the budget.

    Raises:
        SecateurError: the network does not take the images, has too few outputs, or cannot meet the budget.
    """
    models = [setting.begin(seed) for seed in setting.recipe.seeds]
    model = models[0].to(setting.device)
    graph = trace(model, setting.inputs)
    with torch.no_grad():
        output = model.eval()(setting.inputs)
    classes = setting.data.classes
    if not isinstance(output, Tensor) or output.shape != (1, classes):
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise SecateurError(
            f"model {setting.recipe.model.name!r}: for one image of data {setting.data.name!r} it gives {shape}, and "
            f"[1, {classes}] is due, one value a class; see model.options"
        )
    if setting.recipe.train is not None:
        make_optimizer(setting, model, setting.recipe.train)  # it refuses what it cannot do
    budget = setting.recipe.prune.make_budget()
    section = setting.recipe.prune
    if budget is not None and section.method == EIGENDAMAGE:
        layers = section.options.get("layers")
        check_budget(model, setting.inputs, budget, layers)
        named = dict(model.named_modules())
        if section.options.get("separable") and not any(
            isinstance(named[name], (*CONVOLUTIONS, Bottleneck)) for name in layers or named
        ):
            raise SecateurError("prune.options.separable: no layer is a convolution that could be; leave it out")
    elif budget is not None:
        check_feasible(graph, budget, inexact=section.inexact)
    if section.method in GENTLE:
        assert section.train is not None
        handle = make_handle(setting, model, graph, make_optimizer(setting, model, section.train), 0)
        handle.detach()
        batches = len(setting.data.loader("train", setting.recipe.data.batch_size))
        if section.train.epochs * batches < handle.steps_needed():
            raise SecateurError(
                f"prune.train.epochs={section.train.epochs} are {section.train.epochs * batches} steps, and "
                f"{section.method} takes {handle.steps_needed()} at least until everything is out: train longer, or "
                f"{handle.advice()}"
            )
    if section.method == PIVOT:
        _try_pivoting(setting, model)


def _try_pivoting(setting: Setting, model: nn.Module) -> None:
    """Raise if no layer can have blocks, or the training ends before the last update."""
    section = setting.recipe.prune
    gradual = Pivoting(model, **section.options)
    if section.train is not None:
        steps = section.train.epochs * len(setting.data.loader("train", setting.recipe.data.batch_size))
        if steps < gradual.steps_needed:
            raise SecateurError(
                f"prune.train.epochs={section.train.epochs} are {steps} steps; pivoting takes every={gradual.every} "
                f"times {gradual.times}: train longer, or give less of one"
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

    if train is None:
        last = before = kept("baseline", lambda _: (setting.begin(seed), {}))
    elif train.optimizer != "sdprun" or train.baseline:
        last = before = kept("baseline", lambda at: _train(setting, setting.begin(seed), plain(train), seed, at))
    if train is not None and train.optimizer == "sdprun":
        last = kept("trained", lambda at: _train(setting, setting.begin(seed), train, seed, at))
        before = before or last
    assert before is not None
    columns = {"before": before}
    rounds = recipe.prune.rounds if recipe.prune.method != "none" else 0
    for number in range(1, rounds + 1):
        mark = "" if number == rounds else f"-{number}"
        last = kept(f"pruned{mark}", partial(_prune, setting, last, seed, number))
        if recipe.finetune is not None:
            last = kept(f"tuned{mark}", partial(_tune, setting, last, recipe.finetune, seed))
        columns["after" if number == rounds else f"round {number}"] = last
    if recipe.prune.method == PIVOT:
        columns["after"] = last = kept("packed", partial(_pack, setting, last))
    if last != before:  # sdprun beside its baseline, even where nothing is pruned
        columns["after"] = last
    return {**_measured(setting, folder, columns), "stages": stages}


def plain(train: Train) -> Tune:
    """The same training without pruning: of sdprun, plain SGD under the same schedule."""
    if train.optimizer != "sdprun":
        return train
    own = {*OPTIMIZERS["sdprun"], "optimizer"}
    return Tune.model_validate({**train.model_dump(exclude=own, exclude_unset=True), "optimizer": "sgd"})


def _stage(setting: Setting, folder: Path, name: str, make: Callable[[Path], tuple[nn.Module, Facts]]) -> Facts:
    """Do a stage unless it is there; what it noted."""
    at, checkpoints = folder / name, folder / f"{name}-checkpoints"
    if not (at / store.FILE).exists():
        setting.say(f"{folder.name}: {name}")
        model, facts = make(checkpoints)
        store.save(model, at, notes=facts)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return dict(store.read_head(at)["notes"])


def _load(setting: Setting, at: Path) -> nn.Module:
    try:
        return store.load(at, setting.build)
    except SecateurError as error:
        raise SecateurError(f"{error}; delete {at} to have this stage done again") from error


def _train(setting: Setting, model: nn.Module, section: Tune, seed: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    optimizer = make_optimizer(setting, model, section)
    facts = _fit(setting, model, optimizer, section, seed, checkpoints)
    if isinstance(section, Train) and section.budget is not None and isinstance(optimizer, SDPrun):
        facts["reached"] = optimizer.reached
        if not optimizer.reached:
            setting.say(
                f"the budget {section.budget} was not reached in {section.epochs} epochs with c={section.c:g}: give a "
                "larger c, or more epochs; what is zero by now is cut"
            )
    return model, facts


def _fit(
    setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer, section: Tune, seed: int, checkpoints: Path,
    *handles: Any,
) -> Facts:  # fmt: skip
    """The training loop as a section describes it; its history."""
    set_seed(seed)
    data, recipe = setting.data, setting.recipe
    held_out = data.loader("validation", TEST_BATCH) if data.validation is not None else None
    history = fit(
        model,
        optimizer,
        data.loader("train", recipe.data.batch_size, shuffle=True, augment=recipe.data.augment, seed=seed),
        epochs=section.epochs,
        loss_fn=partial(F.cross_entropy, label_smoothing=section.label_smoothing),
        schedule=section.schedule,
        checkpoint_dir=checkpoints,
        after_step=handles,
        after_epoch=(lambda: {"validation_accuracy": accuracy(model, held_out)}) if held_out is not None else None,
        accelerator=setting.accelerator,
        progress=setting.progress,
        channels_last=section.channels_last,
        compile=section.compile,
    )
    return {"history": history, "seconds": sum(row["seconds"] for row in history)}


def _tune(setting: Setting, source: Path, section: Tune, seed: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    model = _load(setting, source)
    if setting.recipe.prune.method != PIVOT:
        return _train(setting, model, section, seed, checkpoints)
    blocks = Pivoting(model, patterns=remembered(model))
    return model, _fit(setting, model, make_optimizer(setting, model, section), section, seed, checkpoints, blocks)


def make_optimizer(setting: Setting, model: nn.Module, section: Tune) -> torch.optim.Optimizer:
    """The optimizer that a section describes."""
    if isinstance(section, Train) and section.optimizer == "sdprun":
        graph = trace(model, setting.inputs.cpu())
        return SDPrun(
            model, graph, lr=section.lr, c=section.c, mu=section.mu, weights=section.weights, exclude=section.exclude,
            budget=None if section.budget is None else budget_from(section.budget),
        )  # fmt: skip
    common: dict[str, Any] = {"lr": section.lr, "weight_decay": section.weight_decay}
    if section.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=section.momentum, nesterov=section.nesterov, **common)
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    return kinds[section.optimizer](model.parameters(), **common)


def _prune(setting: Setting, source: Path, seed: int, number: int, checkpoints: Path) -> tuple[nn.Module, Facts]:
    section, data = setting.recipe.prune, setting.data
    model = _load(setting, source).to(setting.device)
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
    result = prune(
        model,
        setting.inputs,
        method=section.method,
        budget=budget,
        data=batches,
        loss_fn=F.cross_entropy,
        strategy=section.strategy,
        inexact=section.inexact,
        recalibrate=section.recalibrate,
        compensate=section.compensate,
        refit=section.refit,
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
        section.recalibrate or section.refit or section.inexact or section.compensate or section.method == DIRECTIONAL
    ):  # masked and cut compute the same: shown, not assumed
        images, _ = next(iter(data.loader("train", 64)))
        facts["difference"] = check(model, result.model, result.plan, images)
    if section.method == DEAD:
        facts["dead"] = len(result.plan)
    return result.model, facts


def _tell_search(setting: Setting, found: Mapping[str, Any]) -> None:
    """What whoever reads the result should know of a search."""
    if not found["table"]:
        setting.say("search: no group has a choice of widths around the start, so the start is kept")
        return
    if not found["better"]:
        setting.say("search: what was found is no better than the start on all batches, so the start is kept")
    wanted = setting.recipe.prune.search.get("evaluations", found["forwards"])
    if found["forwards"] < wanted:
        setting.say(f"search: {found['forwards']} of {wanted} forwards were made: the minutes were up")
    for name, (weak, strong) in found["doubts"].items():
        setting.say(f"search: the best width of {name} is {weak} or {strong}, depending on what the other groups do")


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
    facts = _fit(setting, model, optimizer, section.train, seed, checkpoints, handle)
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
        facts = _fit(
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


def _pack(setting: Setting, source: Path, _: Path) -> tuple[nn.Module, Facts]:
    """Packed layers where they are faster, for the first of the batch sizes that are measured."""
    how = setting.recipe.measure
    images = torch.rand((how.batch_sizes[0], *setting.data.image), generator=torch.Generator().manual_seed(0))
    with threads_set(how.threads):
        small = pack(_load(setting, source), images)
    done = json.loads(record(small)[-1]["pack"])
    if done["patterns"]:
        setting.say("pack: no slower dense, and left so: " + ", ".join(sorted(done["patterns"])))
    return small, {"packed": sorted(done["layers"]), "dense": sorted(done["patterns"]), "ms": done["ms"]}


def make_handle(
    setting: Setting, model: nn.Module, graph: ChannelGraph, optimizer: torch.optim.Optimizer, seed: int
) -> Gentle:
    """What the prune section describes, attached to the optimizer."""
    section = setting.recipe.prune
    given = {"budget": section.make_budget(), "strategy": section.strategy, **section.options}
    if section.method == "spp":
        given["seed"] = seed
    return GENTLE[section.method](model, graph, optimizer, **given)


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


def _measured(setting: Setting, folder: Path, columns: Mapping[str, Path]) -> Facts:
    """Metrics of the models in these directories, by column; the test images are looked at here alone."""
    path = folder / "measured.json"
    if not path.exists():
        setting.say(f"{folder.name}: measured")
        write_json(path, {name: metrics(setting, _load(setting, at)) for name, at in columns.items()})
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        raise SecateurError(f"{path} is damaged ({error}); delete it to have this stage done again") from error


def metrics(setting: Setting, model: nn.Module) -> Facts:
    """Accuracies, counts, bytes of the file, and latencies on the CPU, of a model on the CPU."""
    how, data = setting.recipe.measure, setting.data
    image = torch.zeros(1, *data.image)
    found: Facts = {
        **counted(model, image),
        "file_bytes": file_size(model),
        "latency": {
            str(size): latency(
                model, image.expand(size, -1, -1, -1).contiguous(), repeats=how.repeats, threads=how.threads
            )
            for size in how.batch_sizes
        },
    }
    model.to(setting.device)
    for split in ("validation", "test"):
        if getattr(data, split) is not None:
            found[f"{split}_accuracy"] = accuracy(model, data.loader(split, TEST_BATCH))
    return found
