"""Training as a section of a recipe describes it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F

from secateur.allocation.budget import budget_from
from secateur.lab.recipe.sections import OPTIMIZERS, Train, Tune
from secateur.lab.run.setting import TEST_BATCH, Facts, Setting
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy
from secateur.methods.sdprun import SDPrun
from secateur.tracing.api import trace


def plain(train: Train) -> Tune:
    """The same training without pruning: of sdprun, plain SGD under the same schedule."""
    if train.optimizer != "sdprun":
        return train
    own = {*OPTIMIZERS["sdprun"], "optimizer"}
    return Tune.model_validate({**train.model_dump(exclude=own, exclude_unset=True), "optimizer": "sgd"})


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


def fitted(
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
