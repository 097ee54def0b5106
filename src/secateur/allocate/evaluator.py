r"""What the loss rises by when channels go: one forward of the whole network with zeros at their producers.

Nothing is cut, and the model is not changed. The loss of the whole network on the same batch is taken off, which is
what makes one batch harder than another::

    rise = L(masked, batch) - L(whole, batch)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.allocate.strategies import Problem
from secateur.errors import SecateurError
from secateur.measure.accuracy import evaluating
from secateur.processes import processes, rank, summed
from secateur.score.taylor import Loss, batch_statistics
from secateur.trace import ChannelGraph


class Evaluator:
    """What the loss rises by when the first items of every group go: one forward with zeros at their producers.

    Args:
        model: the model.
        problem: which channels the items are.
        batches: pairs.
        loss_fn: a mean over a batch.
        seed: of the choice of batches.
        norms: see :class:`Search`.
    """

    def __init__(
        self,
        model: nn.Module,
        problem: Problem,
        batches: Sequence[tuple[Any, Any]],
        loss_fn: Loss,
        seed: int,
        norms: str = "batch",
    ) -> None:
        self.model, self.problem, self.batches, self.loss_fn, self.seed = model, problem, batches, loss_fn, seed
        self.mode = batch_statistics if norms == "batch" else evaluating
        self.seconds = 0.0
        self.whole: dict[int, float] = {}
        self.last: tuple[np.ndarray, dict[str, Tensor]] = (np.zeros(0), {})
        graph: ChannelGraph = problem.meter.graph
        parameters = dict(model.named_parameters())
        self.device = next(iter(parameters.values())).device
        axes = {(a.name, a.dim): a for g in graph.groups for a in g.producers if a.name in parameters}.values()
        self.parts = [(a.name, a.dim, parameters[a.name], torch.from_numpy(a.channels)) for a in axes]
        self.keep = torch.ones(1 + max(int(a.channels.max(initial=0)) for a in graph.axes))
        self.channels = {i: torch.from_numpy(graph.groups[i].channels[order]) for i, order in problem.orders.items()}

    def __call__(self, wanted: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        """The rise of each combination of items on the batch that belongs to its play's number, float64 [wanted]."""
        return self._shared([(taken, self.batch(number)) for taken, number in wanted])

    def everywhere(self, taken: np.ndarray) -> float:
        """The mean rise over all batches."""
        return float(self._shared([(taken, batch) for batch in range(len(self.batches))]).mean())

    def batch(self, number: int) -> int:
        """Which batch belongs to a play's number."""
        return int(np.random.default_rng([self.seed, number]).integers(len(self.batches)))

    def _shared(self, wanted: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        """The rises of combinations on batches; each process evaluates its part of them, and all get the whole."""
        begun, found = time.monotonic(), np.zeros(len(wanted))
        for position in range(rank(), len(wanted), processes()):
            found[position] = self._rise(*wanted[position])
        found = summed(found, self.device)
        self.seconds += time.monotonic() - begun
        wrong = np.flatnonzero(~np.isfinite(found))
        if len(wrong):  # only now, when all processes see it
            where = f"{found[wrong[0]]} on batch {wanted[wrong[0]][1]}"
            raise SecateurError(f"Search: the loss is {where}; check the data, or give ratios nearer to 1")
        return found

    def _rise(self, taken: np.ndarray, batch: int) -> float:
        if batch not in self.whole:
            self.whole[batch] = self._loss({}, batch)
        if not np.array_equal(taken, self.last[0]):
            self.last = (taken, self.without(taken))
        return self._loss(self.last[1], batch) - self.whole[batch]

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
        inputs, targets = _moved(self.batches[batch], self.device)
        with torch.no_grad(), self.mode(self.model):
            args = inputs if isinstance(inputs, tuple) else (inputs,)
            return float(self.loss_fn(functional_call(self.model, weights, args), targets))


def _moved(value: Any, device: torch.device) -> Any:
    move: Callable[[Any], Any] = lambda v: v.to(device) if isinstance(v, Tensor) else v  # noqa: E731
    return torch.utils._pytree.tree_map(move, value)
