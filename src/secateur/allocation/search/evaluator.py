r"""What the loss rises by when channels go: one forward of the whole network with zeros at their producers.

Nothing is cut, and the model is not changed. The loss of the whole network on the same batch is taken off, which is
what makes one batch harder than another::

    rise = L(masked, batch) - L(whole, batch)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur._internal.batches import Batch, arguments
from secateur._internal.distributed import all_reduce, rank, world_size
from secateur._internal.errors import SecateurError
from secateur._internal.losses import Loss, batch_loss
from secateur._internal.state import eval_mode, preserved
from secateur.allocation.problem import Problem
from secateur.tracing.graph import ChannelGraph


class Evaluator:
    """What the loss rises by when the first items of every group go: one forward with zeros at their producers.

    Args:
        model: the model.
        problem: which channels the items are.
        batches: what plays are played on.
        loss: the loss.
        seed: of the choice of batches.
        norms: see :class:`Search`.
    """

    def __init__(
        self,
        model: nn.Module,
        problem: Problem,
        batches: Sequence[Batch],
        loss: Loss,
        seed: int,
        norms: str = "batch",
    ) -> None:
        self.model, self.problem, self.batches, self.loss, self.seed = model, problem, batches, loss, seed
        self.mode = partial(preserved, mode="batch_statistics") if norms == "batch" else eval_mode
        self.seconds = 0.0
        self.last: tuple[np.ndarray, dict[str, Tensor]] = (np.zeros(0), {})
        graph: ChannelGraph = problem.meter.graph
        parameters = dict(model.named_parameters())
        self.device = next(iter(parameters.values())).device
        axes = {(a.name, a.dim): a for g in graph.groups for a in g.producers if a.name in parameters}.values()
        self.parts = [(a.name, a.dim, parameters[a.name], torch.from_numpy(a.channels)) for a in axes]
        self.keep = torch.ones(1 + max(int(a.channels.max(initial=0)) for a in graph.axes))
        self.channels = {i: torch.from_numpy(graph.groups[i].channels[order]) for i, order in problem.orders.items()}
        self.whole = self._shared(len(self.batches), lambda number: self._loss({}, number))

    def __call__(self, wanted: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        """The rise of each combination of items on the batch that belongs to its play's number, float64 [wanted]."""
        return self._rises([(taken, self.batch(number)) for taken, number in wanted])

    def on(self, taken: Sequence[np.ndarray], batches: Sequence[int]) -> np.ndarray:
        """The rise of each combination of items on each of these batches, float64 [taken, batches]."""
        return self._rises([(own, batch) for own in taken for batch in batches]).reshape(len(taken), len(batches))

    def everywhere(self, taken: np.ndarray) -> float:
        """The mean rise over all batches."""
        return float(self.on([taken], range(len(self.batches))).mean())

    def batch(self, number: int) -> int:
        """Which batch belongs to a play's number."""
        return int(np.random.default_rng([self.seed, number]).integers(len(self.batches)))

    def _rises(self, wanted: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        """The rises of combinations on batches."""
        found = self._shared(len(wanted), lambda number: self._rise(*wanted[number]))
        wrong = np.flatnonzero(~np.isfinite(found))
        if len(wrong):
            where = f"{found[wrong[0]]} on batch {wanted[wrong[0]][1]}"
            raise SecateurError(f"Search: the loss is {where}; check the data, or give ratios nearer to 1")
        return found

    def _shared(self, count: int, compute: Callable[[int], float]) -> np.ndarray:
        """So many numbers; each process computes its part of them, and all get the whole, or learn that it failed."""
        begun, found, failed = time.monotonic(), np.zeros(count), None
        for number in range(rank(), count, world_size()):
            try:
                found[number] = compute(number)
            except SecateurError as error:
                found[number], failed = math.nan, error
                break
        found = all_reduce(found, self.device)
        self.seconds += time.monotonic() - begun
        if failed is not None:  # only now: the others would wait
            raise failed
        return found

    def _rise(self, taken: np.ndarray, batch: int) -> float:
        if not np.array_equal(taken, self.last[0]):
            self.last = (taken, self.without(taken))
        return self._loss(self.last[1], batch) - float(self.whole[batch])

    def without(self, taken: np.ndarray) -> dict[str, Tensor]:
        """The parameters that write channels, zero where they write those that go."""
        keep = self.keep.clone()
        gone = self.problem.start - self.problem.widths(taken)
        for group, channels in self.channels.items():
            keep[channels[: gone[group]]] = 0
        weights: dict[str, Tensor] = {}
        for name, dim, parameter, ids in self.parts:
            shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
            mask = keep[ids].to(parameter).view(shape)
            weights[name] = weights.get(name, parameter.detach()) * mask
        return weights

    def _loss(self, weights: dict[str, Tensor], batch: int) -> float:
        run = partial(_called, self.model, weights)
        with torch.no_grad(), self.mode(self.model):
            return batch_loss(run, self.batches[batch], self.loss).item()


def _called(model: nn.Module, weights: dict[str, Tensor], inputs: Any) -> Any:
    args, kwargs = arguments(inputs)
    return functional_call(model, weights, args, kwargs)
