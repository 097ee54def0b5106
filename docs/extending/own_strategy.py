"""A strategy: every group keeps a power of its width, so that wide groups lose more than narrow ones."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from secateur import STRATEGIES, Needs, Problem, Workload


@STRATEGIES.register("power_law")
@dataclass(frozen=True)
class PowerLaw:
    needs: ClassVar[Needs] = Needs()
    steps: int = 100

    def widths(self, problem: Problem, work: Workload) -> np.ndarray:
        for power in np.linspace(1, 0, self.steps):
            widths = np.maximum(problem.start**power, problem.least).astype(np.int64)
            if problem.meter.met(widths):  # within the budget
                return widths
        return problem.least
