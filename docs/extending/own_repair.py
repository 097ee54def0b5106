"""A repair: what reads channels that went is scaled up, so that its filters are as long as they were."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from secateur import REPAIRS, Needs, Plan, Workload


@REPAIRS.register("rescale")
@dataclass(frozen=True)
class Rescale:
    needs: ClassVar[Needs] = Needs(plan=True)
    most: float = 2.0  # no weight grows by more

    @torch.no_grad()
    def apply(self, original: nn.Module, small: nn.Module, plan: Plan, work: Workload) -> dict[str, list[str]]:
        readers = [name for name, dims in plan.slices.items() if 1 in dims]
        for name in readers:
            old, new = (m.get_parameter(name).square().flatten(1).sum(1).mean() for m in (original, small))
            small.get_parameter(name).mul_((old / new).sqrt().clamp(max=self.most))
        return {"rescaled": readers}
