"""Random networks: a :class:`Spec` of plain numbers, the network it describes, and a hypothesis strategy for specs.

A spec prints as the Python that makes it again, so a failing example is reproduced by pasting it:
``model, inputs = network(Spec(...))``. Every spec is a network that runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from . import joins, maps, odd, remembering, sequences  # noqa: F401  (they enter their blocks into the table)
from .blocks import BLOCKS, Do, Draw

BATCH = 3
MOST_VALUES = 4000  # a value with more numbers than this is pooled before it goes on
NUMBERS = 8  # numbers a record has to choose with
RANGE = 840  # each below this: divisible by every number up to 8
ENTRANCES = {"map": "map_to_vector", "seq": "sequence_to_vector"}
COMMON = (
    "conv_norm_act",
    "conv_norm_act",
    "convolution",
    "act",
    "normalise",
    "residual",
    "concat_values",
    "add_values",
)
INPUTS = (
    ("map",), ("map",), ("map",), ("vec",), ("seq",), ("tokens",),
    ("map", "map"), ("map", "vec"), ("seq", "vec"), ("tokens", "map"),
)  # fmt: skip
OUTPUTS = ("sum", "tuple", "dict", "feature", "raw")


@dataclass(frozen=True)
class Spec:
    """A network as plain data.

    Attributes:
        records: block name and the numbers it chooses with; the first number chooses the value it reads.
        space: spatial dims of the input maps.
        inputs: the kinds of the inputs.
        outputs: ``sum`` one tensor; ``tuple`` or ``dict`` of all loose ends; ``feature`` with an inner value beside;
            ``raw`` without the last linear layers.
        style: how example inputs are given: ``tensor`` (where there is one), ``tuple`` or ``dict`` of keywords.
        seed: of all values.
    """

    records: tuple[tuple[str, tuple[int, ...]], ...]
    space: int = 2
    inputs: tuple[str, ...] = ("map",)
    outputs: str = "sum"
    style: str = "tuple"
    seed: int = 0


class Network(nn.Module):
    """Blocks and the indices of the values they read; a value is an input or what a block returned."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.blocks = nn.ModuleList()
        self.wires: list[tuple[int, ...]] = []
        self.ends: list[int] = []
        self.outputs = "sum"

    def forward(self, a: Tensor, b: Tensor | None = None) -> Any:
        values: list[Any] = [a, b][: self.inputs]
        for block, wires in zip(self.blocks, self.wires, strict=True):
            values.append(block(*[values[i] for i in wires]))
        ends = [values[i] for i in self.ends]
        if self.outputs == "sum":
            return sum(ends[1:], ends[0])
        if self.outputs == "dict":
            return {f"out{i}": end for i, end in enumerate(ends)}
        return tuple(ends) if len(ends) > 1 else ends[0]


class _Builder:
    """Adds blocks one by one, running each on the example inputs to know the shapes."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.model = Network(len(spec.inputs))
        self.kinds = list(spec.inputs)
        self.values = [_input(kind, spec.space, i) for i, kind in enumerate(spec.inputs)]
        self.read: set[int] = set()

    def add(self, name: str, numbers: tuple[int, ...], source: int) -> int:
        reads, returns, make = BLOCKS[name]
        assert self.kinds[source] == reads, (name, self.kinds[source])
        draw = Draw(numbers, self.values, self.kinds, source)
        block = make(draw, self.values[source]).double()
        randomise(block)
        wires = (source, *draw.used)
        with torch.no_grad():
            value = block.eval()(*[self.values[i] for i in wires])
        self.model.blocks.append(block)
        self.model.wires.append(wires)
        self.values.append(value)
        self.kinds.append(returns if value.ndim > 2 or returns == "vec" else "vec")
        self.read.update(wires)
        return len(self.values) - 1

    def source(self, kind: str, number: int) -> int:
        """The value that a block of this kind reads: mostly the last one; made from another kind if there is none."""
        found = [i for i, k in enumerate(self.kinds) if k == kind]
        if found:
            skip = number // 3 % len(found) if number % 3 == 2 else 0
            return self._small(found[-1 - skip])
        last = len(self.kinds) - 1
        ways = [name for name, (reads, returns, _) in BLOCKS.items() if (reads, returns) == (self.kinds[last], kind)]
        if ways:
            return self.add(ways[0], (number,), last)
        between = self.add("embedding", (number,), last) if self.kinds[last] == "tokens" else last
        if self.kinds[between] == kind:
            return between
        return self.source_through_vector(kind, between, number)

    def source_through_vector(self, kind: str, last: int, number: int) -> int:
        if self.kinds[last] != "vec":
            last = self.add(ENTRANCES[self.kinds[last]], (number,), last)
        ways = [name for name, (reads, returns, _) in BLOCKS.items() if (reads, returns) == ("vec", kind)]
        return self.add(ways[0], (number,), last) if ways else last

    def _small(self, index: int) -> int:
        """Large maps are pooled, wide ones narrowed: examples stay small."""
        value, kind = self.values[index], self.kinds[index]
        if kind == "map" and value.numel() > MOST_VALUES:
            return self.add("pool", (2 if min(value.shape[2:]) < 2 else 0,), index)
        if kind == "map" and value.size(1) > 24:
            return self.add("convolution", (), index)
        if kind == "seq" and value.size(-1) > 24:
            return self.add("token_linear", (), index)
        if kind == "vec" and value.size(-1) > 64:
            return self.add("linear", (), index)
        return index

    def finish(self) -> Network:
        """Every loose end is an output, most of them through a linear layer, so that nothing is idle."""
        loose = [i for i in range(len(self.values)) if i not in self.read]
        spec = self.spec
        if spec.outputs != "raw":
            loose = [self._head(i) for i in loose]
        if spec.outputs == "feature":
            loose.append(len(self.model.blocks) // 2)
        if spec.outputs == "sum":
            assert {self.values[i].shape for i in loose} == {(BATCH, 3)}
        self.model.ends, self.model.outputs = loose, spec.outputs
        return self.model

    def _head(self, index: int) -> int:
        if self.kinds[index] == "tokens":
            index = self.add("embedding", (), index)
        if self.kinds[index] != "vec":
            index = self.add(ENTRANCES[self.kinds[index]], (self.spec.seed,), index)
        return self.add("classifier", (), index)


def _classifier(d: Draw, x: Tensor) -> Do:
    return Do(lambda m, x: m.linear(x), linear=nn.Linear(x.size(-1), 3))


BLOCKS["classifier"] = ("vec", "vec", _classifier)


def _input(kind: str, space: int, which: int) -> Tensor:
    size = {1: (7,), 2: (5, 4), 3: (3, 4, 3)}[space]
    if kind == "tokens":
        return torch.randint(0, 7, (BATCH, 5))
    shape = {"map": (BATCH, 3 - which, *size), "seq": (BATCH, 4, 4), "vec": (BATCH, 5)}[kind]
    return torch.randn(shape, dtype=torch.float64)


def randomise(module: nn.Module) -> None:
    """Give every parameter and statistic a value that is typical of nothing."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(0, max(p[0].numel(), 1) ** -0.5)
            elif name.endswith("weight"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(0, 0.5)
        for name, b in module.named_buffers():
            if b.is_floating_point() and name.endswith("var"):
                b.uniform_(0.5, 2)
            elif name.endswith("mean") or (b.is_floating_point() and not ((b == 0) | (b == 1)).all()):
                b.normal_(0, 0.5)


def network(spec: Spec) -> tuple[Network, Any]:
    """The network of a spec, in eval mode and float64, and its example inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        builder = _Builder(spec)
        for name, numbers in spec.records:
            builder.add(name, numbers[1:], builder.source(BLOCKS[name][0], numbers[0]))
        values = builder.values[: len(spec.inputs)]
        model = builder.finish().eval()
    if spec.style == "dict":
        return model, dict(zip("ab", values, strict=False))
    return model, values[0] if spec.style == "tensor" and len(values) == 1 else tuple(values)


def names() -> list[str]:
    """Blocks to draw from, the common ones several times."""
    return [*COMMON, *COMMON, *(name for name in BLOCKS if name not in {"classifier", "embedding"})]


def random_spec(seed: int) -> Spec:
    """A spec from a seed."""
    source = random.Random(seed)
    kinds = names()
    records = [
        (source.choice(kinds), tuple(source.randrange(RANGE) for _ in range(NUMBERS)))
        for _ in range(source.randint(3, 12))
    ]
    return Spec(
        tuple(records),
        source.choice((2, 1, 3)),
        source.choice(INPUTS),
        source.choice(OUTPUTS),
        source.choice(("tuple", "tensor", "dict")),
        source.randrange(1000),
    )


def specs(most: int = 12) -> st.SearchStrategy[Spec]:
    """Specs of 3 to ``most`` blocks; they shrink towards few plain blocks."""
    numbers = st.tuples(*[st.integers(0, RANGE - 1)] * NUMBERS)
    return st.builds(
        Spec,
        records=st.lists(st.tuples(st.sampled_from(names()), numbers), min_size=2, max_size=most).map(tuple),
        space=st.sampled_from((2, 1, 3)),
        inputs=st.sampled_from(INPUTS),
        outputs=st.sampled_from(OUTPUTS),
        style=st.sampled_from(("tuple", "tensor", "dict")),
        seed=st.integers(0, 999),
    )


def reduced(spec: Spec, fails: Callable[[Spec], bool]) -> Spec:
    """A smaller spec that still fails: blocks left out, numbers made zero, plain inputs and outputs."""
    plain, before = Spec(()), None
    while spec != before:
        before = spec
        for i in reversed(range(len(spec.records))):
            spec = _if(fails, replace(spec, records=spec.records[:i] + spec.records[i + 1 :]), spec)
        for field in ("outputs", "style", "inputs", "space"):
            spec = _if(fails, replace(spec, **{field: getattr(plain, field)}), spec)
        for i, (name, numbers) in enumerate(spec.records):
            for j in range(len(numbers)):
                now = spec.records[i][1]
                zeroed = (name, (*now[:j], 0, *now[j + 1 :]))
                spec = _if(fails, replace(spec, records=(*spec.records[:i], zeroed, *spec.records[i + 1 :])), spec)
    return spec


def _if(fails: Callable[[Spec], bool], candidate: Spec, spec: Spec) -> Spec:
    return candidate if candidate != spec and fails(candidate) else spec
