"""The table at which criterion, strategy and repair sit: all that any of them may ask of the outside, done once.

The model, the data, the loss, where they are, who works along, and what is shown meanwhile. Whoever needs batches gets
them on the model's device; what two seats both want is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur._internal.batches import Batch, Inputs, demands_labels, read_batches, tensors_in
from secateur._internal.checks import check_count
from secateur._internal.distributed import Group, broadcast_json, rank, together, world_size
from secateur._internal.errors import BadBatch, SecateurError, notice
from secateur._internal.losses import Loss, batch_loss, named_logits, needs_gradient, read_loss
from secateur._internal.progress import length_of, tracked
from secateur._internal.state import device_of, rng_state

T = TypeVar("T")


@dataclass(frozen=True)
class Needs:
    """What a seat asks of the user.

    Attributes:
        data: batches.
        loss: a loss, and targets for it.
        plan: a plan of channels that went (of a repair).
    """

    data: bool = False
    loss: bool = False
    plan: bool = False


@dataclass(frozen=True, eq=False)
class _Found:
    """Something that was computed once: what that took and told, without what else was asked for in it."""

    value: Any
    forwards: int
    notices: list[str]
    facts: dict[str, Any]
    inside: set[Hashable]


class Workload:
    """What the seats share.

    Args:
        model: the model, which everybody leaves as it was.
        data: batches, see :mod:`secateur._internal.batches`; of an iterator, which ends after one pass, the batches
            that were read are kept.
        loss: see :mod:`secateur._internal.losses`; None is the model's own where batches have labels.
        inputs: example inputs.
        batches: no step uses more than so many batches of the data.
        group: the processes that work along; each has its own shard of the data.
        progress: whether to show what takes long.
        outputs: which of what a forward returns matters.
        known: what workloads of the same model, data and loss have found, to be shared by several.

    Attributes:
        forwards: batches that were run through the model so far.
        notices: what was substituted or left out, in the order in which it was told.
        facts: what a seat wants the result to say, as what JSON can hold.
        remarks: what whoever reads the result should know, in a sentence each.
    """

    def __init__(
        self, model: nn.Module, data: Iterable[Any] | None = None, loss: Any = None, *, inputs: Inputs | None = None,
        batches: int | None = None, group: Group = None, progress: bool = False,
        outputs: Callable[[Any], Any] | None = None, known: dict[Hashable, Any] | None = None,
    ) -> None:  # fmt: skip
        check_count("batches", batches, optional=True)
        self.model, self.inputs, self.most, self.group, self.progress = model, inputs, batches, group, progress
        self.outputs = outputs
        self.device = device_of(model)
        self.data = _Kept(data) if isinstance(data, Iterator) else data
        self._loss = loss
        self._read: Loss | None = None
        self._first: Batch | None = None
        self._known: dict[Hashable, _Found] = {} if known is None else known
        self._counted: set[Hashable] = set()
        self._asked: list[set[Hashable]] = [set()]
        self.forwards = 0
        self.notices: list[str] = []
        self.facts: dict[str, Any] = {}
        self.remarks: list[str] = []

    @property
    def has_data(self) -> bool:
        """Whether there are batches."""
        return self.data is not None

    @property
    def has_loss(self) -> bool:
        """Whether there is a loss: it was given, or batches have labels that the model takes itself."""
        return self._loss is not None or (self.data is not None and self.first.labelled)

    @property
    def first(self) -> Batch:
        """The first batch."""
        if self._first is None:
            back = rng_state()  # a loader may draw the order of its batches
            try:
                self._first = next(iter(self._read_batches(1)))
            finally:
                back()
        return self._first

    @property
    def loss(self) -> Loss:
        """The loss, as methods need it."""
        if self._read is None:
            self._read = read_loss(self._loss, self.first if self._loss is None and self.has_data else None)
        return self._read

    def require(self, needs: Needs, who: str) -> None:
        """Raise if something that a seat needs was not given, or is no data or loss."""
        if (needs.data and not self.has_data) or (needs.loss and not self.has_loss):
            loss = " and loss= ('cross_entropy', 'mse', an nn.Module or a callable)" if needs.loss else ""
            raise SecateurError(f"{who} needs data= (batches of inputs{' and targets' if needs.loss else ''}){loss}")
        if needs.loss and self._loss is not None:
            _ = self.loss

    def batches(self, most: int | None = None, what: str = "") -> Iterator[Batch]:
        """Batches on the model's device, each counted as a forward; at most so many.

        Args:
            most: at most so many; never more than the workload's own limit.
            what: what they are for, to be shown.
        """
        limit = min((n for n in (most, self.most) if n is not None), default=None)
        for batch in self.tracked(self._read_batches(limit), what, length_of(self.data, limit)):
            self.forwards += 1
            yield batch

    def _read_batches(self, limit: int | None) -> Iterator[Batch]:
        """Batches as the forward takes them: with their labels if it does not run without."""
        for batch in read_batches(self._given(), self.device, limit):
            yield replace(batch, inputs=batch.with_labels()) if demands_labels(self.model, batch) else batch

    def tracked(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        """The items of a long loop, with a bar where progress was asked for; on rank 0 alone."""
        return tracked(items, what, total, bool(self.progress and what and rank(self.group) == 0))

    def that_matter(self, outputs: Any) -> list[Tensor]:
        """The tensors of real numbers, of all that a forward has returned, that matter.

        What the user says matters; else ``logits``, where there are some, or everything.
        """
        if self.outputs is not None:
            outputs = self.outputs(outputs)
        elif (logits := named_logits(outputs)) is not None:
            outputs = logits
        return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]

    def loss_of(self, batch: Batch, run: Callable[[Any], Any] | None = None) -> Tensor:
        """The mean loss of a batch, with a gradient."""
        return needs_gradient(batch_loss(self.model if run is None else run, batch, self.loss))

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What two seats both want: computed by the first that asks.

        Of what another workload has found, what it told and what it took are told and counted here too, so that a
        result says the same whoever computed it.
        """
        self._asked[-1].add(key)
        if key not in self._known:
            before, told, facts, counted = self.forwards, len(self.notices), set(self.facts), set(self._counted)
            self._asked.append(set())
            try:
                value = compute()
            finally:
                inside = self._asked.pop()
            spent = self.forwards - before - sum(self._known[other].forwards for other in self._counted - counted)
            new = {name: fact for name, fact in self.facts.items() if name not in facts}
            self._known[key] = _Found(value, spent, self.notices[told:], new, inside)
            self._counted.add(key)
        self.recall(key)
        found: T = self._known[key].value
        return found

    def recall(self, key: Hashable) -> None:
        """Count and tell what something took and told that another workload has found, and what it was found with."""
        self._asked[-1].add(key)
        if key in self._counted:
            return
        self._counted.add(key)
        found = self._known[key]
        self.forwards += found.forwards
        self.facts |= found.facts
        for other in found.inside:
            self.recall(other)
        for text in found.notices:
            self.note(text)

    def note(self, text: str) -> None:
        """Tell the user, once, and remember it for the result."""
        if text not in self.notices:
            self.notices.append(text)
            notice(text, stacklevel=4)

    def agree(self, value: T) -> T:
        """What rank 0 decided, of the kinds that JSON can hold."""
        found: T = broadcast_json(value, self.device, self.group)
        return found

    def together(self, compute: Callable[[], T]) -> T:
        """What each process computes of its own shard, without the others; an error of one is an error of all."""
        return together(compute, self.device, self.group)

    @property
    def processes(self) -> int:
        """How many work along."""
        return world_size(self.group)

    def _given(self) -> Iterable[Any]:
        if self.data is None:
            raise BadBatch("data= is needed: batches of inputs, with targets where there is a loss")
        return self.data


class _Kept:
    """What an iterator gives, as often as it is wanted; nothing is read before."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source, self.kept = source, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        number = 0
        while True:
            if number == len(self.kept):
                try:
                    self.kept.append(next(self.source))
                except StopIteration:
                    return
            yield self.kept[number]
            number += 1


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    """A random generator of its own."""
    return torch.Generator(device).manual_seed(seed)
