"""What all stages of a run share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from secateur import storage as store
from secateur._internal.serial import digest_of
from secateur.lab.data.dataset import Dataset
from secateur.lab.models.registry import build
from secateur.lab.recipe.sections import Recipe

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
        key = (digest_of(list(model.state_dict().values())), key)
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
    data: Dataset
    accelerator: Accelerator
    progress: bool
    say: Callable[[str], None]
    sharing: Sharing | None = None

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
