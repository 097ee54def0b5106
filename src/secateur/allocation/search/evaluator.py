r"""What the loss rises by when channels go.

Nothing is cut and the model is not changed: one forward of the whole network runs with zeros where the channels that go
would be written. The loss of the whole network on the same batch is subtracted, because some batches are harder than
others whatever is removed::

    rise = L(masked, batch) - L(whole, batch)

Several processes hold a shard of the batches each. Here all of them are one list. The process that holds a batch
evaluates whatever is asked for on it, and all processes get the result; so they find what one process with all of the
batches would find.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur._internal.batches import Batch, arguments, copied
from secateur._internal.distributed import all_gather, all_reduce, rank, together, world_size
from secateur._internal.errors import BadBatch, SecateurError
from secateur._internal.losses import batch_loss
from secateur._internal.progress import tracked
from secateur._internal.serial import digest_of
from secateur._internal.state import eval_mode, is_on_meta, preserved
from secateur._internal.workload import Workload
from secateur.allocation.problem import Problem
from secateur.allocation.search.local_repair import LocalRepair
from secateur.tracing.weight_norms import rescale

NORMS = ("batch", "running")
"""What batch norms use: the statistics of the mini-batch, as after :func:`secateur.recalibrate`, or their own."""


class SharedBatches:
    """The batches of all processes as one list, those of rank 0 first.

    Args:
        work: the table, with this process's shard of the data; all of its batches are kept on the model's device.

    Attributes:
        own: the batches that this process holds.
        owner: the rank that holds each batch of the whole list, int64 [batches].
    """

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.own = together(lambda: list(work.batches()), work.device, work.group)
        counts = all_gather(torch.tensor([len(self.own)], device=work.device), work.group)
        self.owner = np.repeat(np.arange(len(counts)), [int(count) for count in counts])
        self.first = int((self.owner < rank(work.group)).sum())

    def __len__(self) -> int:
        return len(self.owner)

    def each(self, batches: Sequence[int], compute: Callable[[int, Batch], float], what: str = "") -> np.ndarray:
        """One number for each of these batches, float64 [batches].

        Args:
            batches: places in the whole list; a batch may be there more than once.
            compute: called as ``compute(i, batch)`` for ``batches[i]``, by the process that holds the batch.
            what: what is computed, to be shown.

        Raises:
            SecateurError: ``compute`` failed in any of the processes.
        """
        me, group, device = rank(self.work.group), self.work.group, self.work.device
        mine = [i for i, batch in enumerate(batches) if self.owner[batch] == me]
        found = np.zeros(len(batches))

        def run() -> None:
            for i in tracked(mine, what, len(mine), bool(what and self.work.progress and me == 0)):
                found[i] = compute(i, self._fresh(batches[i]))

        together(run, device, group)
        return all_reduce(found, device, group)

    def _fresh(self, batch: int) -> Batch:
        """One of this process's batches, with inputs that the forward may write into."""
        own = self.own[batch - self.first]
        return replace(own, inputs=copied(own.inputs))

    @cached_property
    def digest(self) -> str:
        """What tells these batches from others, however many processes hold them."""
        rows = [list(digest_of([batch.inputs, batch.targets])) for batch in self.own]
        own = torch.tensor(rows, dtype=torch.uint8, device=self.work.device).reshape(-1, 32)
        return hashlib.sha256(torch.cat(all_gather(own, self.work.group)).cpu().numpy().tobytes()).hexdigest()


class Evaluator:
    """Evaluates widths: the first items of every group go, and the loss rises by so much.

    Args:
        work: the model, the batches, the loss and the processes.
        problem: which channels the items are.
        norms: see :data:`NORMS`.
        repair: whether the layers that read what goes make up for it.

    Attributes:
        batches: those of all processes.
        whole: the loss of the whole network on each of them, float64 [batches].
        repair: what makes up for channels that go, or None.
    """

    def __init__(self, work: Workload, problem: Problem, norms: str = "batch", *, repair: bool = False) -> None:
        if is_on_meta(work.model):
            raise SecateurError("widths cannot be tried on a model on the meta device, without weights; load some")
        if norms == "batch":
            _refuse_synchronized_norms(work)
        self.work, self.problem, self.norms = work, problem, norms
        self.batches: SharedBatches = work.once("shared batches", lambda: SharedBatches(work))
        self._weights: tuple[np.ndarray, dict[str, Tensor]] = (np.zeros(0), {})
        self.repair = LocalRepair(work, problem) if repair else None
        graph = problem.meter.graph
        tensors = self._tensors = dict((*work.model.named_parameters(), *work.model.named_buffers()))
        self._weight_norms = graph.weight_norms
        axes = {(a.name, a.dim): a for g in graph.groups for a in (*g.producers, *g.constants)}.values()
        self._producers = [(a.name, a.dim, tensors[a.name], torch.from_numpy(a.channels)) for a in axes]
        self._ones = torch.ones(1 + max(int(a.channels.max(initial=0)) for a in graph.axes))
        self._channels = {i: torch.from_numpy(graph.groups[i].channels[order]) for i, order in problem.orders.items()}
        self.whole: np.ndarray = work.once(("loss of the whole network", norms), self._loss_of_the_whole)

    def rises(self, plays: Sequence[tuple[np.ndarray, int]]) -> np.ndarray:
        """The rise of the loss in each play, float64 [plays].

        Args:
            plays: the items taken from every group, and the place of a batch in the list of all.

        Raises:
            BadBatch: a loss that is not finite.
        """
        return self.batches.each([batch for _, batch in plays], lambda i, batch: self._rise(*plays[i], batch))

    def on(self, taken: Sequence[np.ndarray], batches: Sequence[int]) -> np.ndarray:
        """The rise of each combination of items on each of these batches, float64 [taken, batches]."""
        return self.rises([(own, batch) for own in taken for batch in batches]).reshape(len(taken), len(batches))

    def everywhere(self, taken: np.ndarray) -> float:
        """The mean rise over all batches."""
        return float(self.on([taken], range(len(self.batches))).mean())

    def _rise(self, taken: np.ndarray, number: int, batch: Batch) -> float:
        if not np.array_equal(taken, self._weights[0]):
            self._weights = (taken, self.masked_weights(taken))
        try:
            return self._loss(self._weights[1], batch) - float(self.whole[number])
        except BadBatch as error:
            left = self.problem.widths(taken).tolist()
            raise BadBatch(
                f"{error}. So it is with widths {left}, not with the whole network: widths nearer to a start that "
                "works (ratios nearer to 1) may help"
            ) from error

    def masked_weights(self, taken: np.ndarray) -> dict[str, Tensor]:
        """What writes channels, by name, zero where it writes those that go; and what makes up for them."""
        keep = self._ones.clone()
        gone = self.problem.start - self.problem.widths(taken)
        for group, channels in self._channels.items():
            keep[channels[: gone[group]]] = 0
        weights: dict[str, Tensor] = {} if self.repair is None else self.repair.weights(gone)
        for name, dim, parameter, ids in self._producers:
            shape = [-1 if d == dim else 1 for d in range(parameter.ndim)]
            mask = keep[ids].to(parameter).view(shape)
            weights[name] = weights.get(name, parameter.detach()) * mask
        for name, norm in self._weight_norms:  # as in the masked model: other channels' weights are what they were
            if norm.direction in weights:
                whole = self._tensors[norm.direction].detach()
                weights[name] = weights.get(name, self._tensors[name].detach()).clone()
                rescale(weights[name], weights[norm.direction], whole, norm.dim)
        return weights

    def _loss_of_the_whole(self) -> np.ndarray:
        everywhere = range(len(self.batches))
        return self.batches.each(everywhere, lambda _, batch: self._loss({}, batch), "loss of the whole network")

    def _loss(self, weights: dict[str, Tensor], batch: Batch) -> float:
        run = partial(_called, self.work.model, weights)
        with torch.no_grad(), self._mode():
            return batch_loss(run, batch, self.work.loss).item()

    def _mode(self) -> AbstractContextManager[None]:
        model = self.work.model
        return preserved(model, "batch_statistics") if self.norms == "batch" else eval_mode(model)


def _called(model: nn.Module, weights: dict[str, Tensor], inputs: Any) -> Any:
    args, kwargs = arguments(inputs)
    return functional_call(model, weights, args, kwargs)


def _refuse_synchronized_norms(work: Workload) -> None:
    """Raise where batch norms would wait for other processes, which evaluate something else meanwhile."""
    if world_size(work.group) == 1:
        return
    for name, module in work.model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise SecateurError(
                f"{name} takes its statistics from all processes, which try different widths: give norms='running', or "
                "try widths in one process"
            )
