"""Examples in parts: so many as go through a model together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from secateur._internal.batches import Batch, Inputs, call_without_cache, copied, some_of, tensors_in
from secateur._internal.distributed import all_gather, rank
from secateur._internal.errors import BadBatch
from secateur._internal.losses import outputs_of
from secateur._internal.state import fork_rng_of
from secateur._internal.workload import Workload
from secateur.curvature.layers import Choice, spread

PART = 128
"""So many examples go through a model at a time, at most."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some examples that go through a model together.

    Attributes:
        number: its place among the parts of this process.
        batch: the number of the batch that it is of.
        first: the number of its first example, among those of all processes.
        count: how many examples.
        inputs: what the forward is called with.
    """

    number: int
    batch: int
    first: int
    count: int
    inputs: Inputs


@dataclass(eq=False)
class Examples:
    """The parts of this process, how many examples these are, and how many all processes have."""

    parts: list[Part]
    own: int
    total: int

    def first(self, most: int) -> Examples:
        """So many of them, or fewer, in whole parts; of one process."""
        some = [part for part in self.parts if part.first + part.count <= most] or self.parts[:1]
        count = sum(part.count for part in some)
        return Examples(some, count, count)

    def chunks(self, together: int | None) -> list[Examples]:
        """Those whose inputs are of the same shapes, so many at a time."""
        alike: dict[Any, list[Part]] = {}
        for part in self.parts:
            alike.setdefault(_shapes(part), []).append(part)
        found: list[Examples] = []
        for parts in alike.values():
            some: list[Part] = []
            for part in parts:
                if some and together is not None and sum(p.count for p in some) + part.count > together:
                    found.append(Examples(some, sum(p.count for p in some), self.total))
                    some = []
                some = [*some, part]
            found.append(Examples(some, sum(p.count for p in some), self.total))
        return found

    def halve(self, part: Part) -> bool:
        """Let a part be two; False if it cannot be."""
        count, half = part.count, part.count // 2
        if count < 2 or not _are_alike(part.inputs, count):
            return False
        both = [
            replace(part, first=part.first + begin, count=end - begin, inputs=some_of(part.inputs, slice(begin, end)))
            for begin, end in ((0, half), (half, count))
        ]
        parts = [new for old in self.parts for new in (both if old is part else [old])]
        self.parts = [replace(new, number=number) for number, new in enumerate(parts)]
        return True

    def take(self) -> Part:
        """All parts as one, which have no inputs from then on."""
        joined = self.joined()
        self.parts = [replace(part, inputs=None) for part in self.parts]
        return joined

    def joined(self) -> Part:
        """All parts as one. Inputs whose first dim is not that of the examples are taken from the first part."""
        counts = [part.count for part in self.parts]

        def join(*tensors: Any) -> Any:
            same = [isinstance(t, Tensor) and t.ndim > 0 and len(t) == n for t, n in zip(tensors, counts, strict=True)]
            if all(same):
                return torch.cat(tensors)
            return tensors[0].clone() if isinstance(tensors[0], Tensor) else tensors[0]

        return replace(self.parts[0], count=self.own, inputs=tree_map(join, *(part.inputs for part in self.parts)))

    def split(self, x: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """Each part's share of what a layer of the joined parts gets; it is as long as a multiple of the examples."""
        each, rest = divmod(len(x), self.own)
        if rest:
            yield replace(self.parts[0], count=self.own), x
        else:
            yield from zip(self.parts, x.split([each * part.count for part in self.parts]), strict=True)

    def choice(self, part: Part, many: int) -> Choice:
        """Which of a part's positions are looked at: spread over those of all examples."""

        def chosen(positions: int) -> Tensor:
            first = part.first * positions // part.count
            of_all = spread(self.total * positions // part.count, many)
            return of_all[(of_all >= first) & (of_all < first + positions)] - first

        return chosen


def _shapes(part: Part) -> Any:
    """What the inputs of parts that are joined have in common: their structure, and all dims but the examples'."""
    leaves, structure = tree_flatten(part.inputs)
    shapes = [
        (leaf.shape[1:] if leaf.ndim and len(leaf) == part.count else leaf.shape, leaf.dtype)
        if isinstance(leaf, Tensor)
        else None
        for leaf in leaves
    ]
    return str(structure), tuple(shapes)


def read_examples(work: Workload, examples: int, most: int = PART) -> Examples:
    """This process's share of so many examples."""
    wanted = examples // work.processes + (rank(work.group) < examples % work.processes)

    def read() -> list[tuple[int, Inputs, int]]:
        found: list[tuple[int, Inputs, int]] = []
        for batch in work.batches(None, "refit, examples"):
            found += _split(batch, wanted - sum(count for *_, count in found), most)
            if sum(count for *_, count in found) >= wanted:
                break
        return found

    with fork_rng_of(work.model.parameters()):  # a loader may draw the order of its batches
        found = work.together(read)
    counts = [count for *_, count in found]
    of_all = torch.cat(all_gather(torch.tensor([sum(counts)], device=work.device), work.group)).tolist()
    if not sum(of_all):
        raise BadBatch("refit: the data holds no example; give batches of inputs")
    before = sum(of_all[: rank(work.group)])
    parts = [
        Part(number, batch, before + sum(counts[:number]), count, inputs)
        for number, (batch, inputs, count) in enumerate(found)
    ]
    return Examples(parts, sum(counts), sum(of_all))


def _split(batch: Batch, most: int, part: int) -> Iterator[tuple[int, Inputs, int]]:
    """The first examples of a batch, in parts: its number, inputs, their count; one part where first dims differ."""
    count = batch.examples
    step = part if _are_alike(batch.inputs, count) else max(count, 1)
    for begin in range(0, min(count, most), step):
        end = min(begin + step, count, most)
        yield batch.number, some_of(batch.inputs, slice(begin, end)), end - begin


def _are_alike(inputs: Inputs, count: int) -> bool:
    """Whether the first dim of all inputs is that of the examples."""
    return all(len(t) == count for t in tensors_in(inputs) if t.ndim)


def forward_part(model: nn.Module, part: Part) -> Any:
    """Run one part, without a cache of keys and values for which nobody has asked."""
    return outputs_of(partial(call_without_cache, model), Batch(part.batch, part.inputs))


def few_of(part: Part, most: int) -> Part:
    """A part's first examples, in tensors of their own; all of them where the inputs do not say which they are."""
    count = min(part.count, most) if _are_alike(part.inputs, part.count) else part.count
    return replace(part, count=count, inputs=copied(some_of(part.inputs, slice(count))))
