"""Training as a section of a recipe describes it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F

from secateur._internal.errors import SecateurError
from secateur.lab.data.dataset import Dataset
from secateur.lab.recipe.sections import Train, Tune
from secateur.lab.run.setting import TEST_BATCH, Facts, Setting
from secateur.lab.training.loop import fit


def plain(train: Train) -> Tune:
    """The same training without pruning, under the same schedule."""
    optimizer = train.make_optimizer()
    return train if not optimizer.prunes else train.model_copy(update={"optimizer": optimizer.unpruned().name})


def make_optimizer(setting: Setting, model: nn.Module, section: Tune) -> torch.optim.Optimizer:
    """The optimizer that a section describes."""
    return section.make_optimizer().make(model, setting.inputs, section.lr)


def fitted(
    setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer, section: Tune, seed: int, checkpoints: Path,
    *handles: Any,
) -> Facts:  # fmt: skip
    """The training loop as a section describes it; its history."""
    set_seed(seed)
    data, recipe = setting.data, setting.recipe
    held_out = data.loader("validation", TEST_BATCH) if data.validation is not None else None
    metric, loss = setting.metric, setting.loss
    if loss == "cross_entropy" and isinstance(data, Dataset):
        loss = partial(F.cross_entropy, label_smoothing=section.label_smoothing)
    elif section.label_smoothing:
        raise SecateurError("label_smoothing is for the built-in data and the cross entropy: leave it out")
    history = fit(
        model,
        optimizer,
        data.loader("train", recipe.data.batch_size, shuffle=True, augment=recipe.data.augment, seed=seed),
        epochs=section.epochs,
        loss_fn=loss,
        schedule=section.schedule,
        checkpoint_dir=checkpoints,
        after_step=handles,
        after_epoch=None if held_out is None else lambda: {metric.shown.held_out: metric.of(model, held_out)},
        accelerator=setting.accelerator,
        progress=setting.progress,
        channels_last=section.channels_last,
        compile=section.compile,
    )
    return {"history": history, "seconds": sum(row["seconds"] for row in history)}
