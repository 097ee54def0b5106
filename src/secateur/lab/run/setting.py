"""What all stages of a run share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from secateur import storage as store
from secateur._internal.serial import digest_of
from secateur.auto import AUTO
from secateur.lab.data.dataset import Dataset
from secateur.lab.data.own import OwnData, on_device
from secateur.lab.given import loss_of
from secateur.lab.models.registry import build
from secateur.lab.recipe.sections import Recipe
from secateur.lab.run.metric import Metric, metric_of

Facts = dict[str, Any]
TEST_BATCH = 500


@dataclass
class Sharing:
    """What runs that differ in how they prune do once.

    Attributes:
        trained: the folder of networks that were trained, each by the same section from the same seed.
        model: the network that was pruned last.
        known: what was found of it: factors, scores.
        key: of which weights and data that is.
    """

    trained: Path
    model: nn.Module | None = None
    known: dict[Hashable, Any] = field(default_factory=dict)
    key: Hashable = None

    def of(self, model: nn.Module, key: Hashable) -> tuple[nn.Module, dict[Hashable, Any]]:
        """The network, or the same one of an earlier run, with what was found of it."""
        tensors = [*model.named_parameters(), *model.named_buffers()]
        key = (digest_of([[name, tensor.detach()] for name, tensor in tensors]), key)
        if key != self.key or self.model is None:
            self.key, self.model, self.known = key, model, {}
        return self.model, self.known


@dataclass(frozen=True)
class Setting:
    """What all stages share.

    Attributes:
        recipe: what to do.
        data: the data set, on the accelerator's device.
        accelerator: of Hugging Face accelerate.
        progress: show bars.
        say: prints a line on what is being done.
        sharing: what other runs may have done already.
    """

    recipe: Recipe
    data: Dataset | OwnData
    accelerator: Accelerator
    progress: bool
    say: Callable[[str], None]
    sharing: Sharing | None = None

    @property
    def device(self) -> torch.device:
        """Where training runs."""
        return torch.device(self.accelerator.device)

    @property
    def inputs(self) -> Any:
        """One example."""
        return on_device(self.data.example(), self.device)

    @cached_property
    def metric(self) -> Metric:
        """What is measured on data."""
        return metric_of(self.recipe.measure.metric)

    @cached_property
    def loss(self) -> Any:
        """The loss, as every verb takes it."""
        given = self.recipe.loss
        if given == AUTO:
            own = isinstance(self.data, OwnData) and self.data.train.first.labelled
            return "model" if own else "cross_entropy"
        return loss_of(given, "loss")

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
