"""What all stages of a run share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from secateur import storage as store
from secateur.lab.data.dataset import Dataset
from secateur.lab.models.registry import build
from secateur.lab.recipe.sections import Recipe

Facts = dict[str, Any]
TEST_BATCH = 500


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
