"""Six small networks, of six kinds, each with data and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolutional(nn.Module):
    """Batch norms, a residual, dropout, and a buffer that counts forwards; called with images by keyword too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(12, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        x = F.relu(self.bn1(self.conv1(input=images)))
        x = F.relu(self.conv3(x + self.bn2(self.conv2(x))))
        return self.head(self.drop(x.mean((2, 3))))


class Perceptron(nn.Module):
    """A weight that is used twice, one that is used by a function alone, and a layer that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.again = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.again.weight, self.again.bias = self.inner.weight, self.inner.bias
        self.aside, self.head = nn.Linear(10, 9), nn.Linear(9, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = torch.tanh(self.enter(input=x))
        x = F.relu(self.again(F.relu(self.inner(x))))
        return self.head(torch.relu(F.linear(x, self.aside.weight)))


class UShaped(nn.Module):
    """Down and up again, with a skip that is concatenated; maps of classes come out."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.up, self.join = nn.ConvTranspose2d(10, 6, 2, stride=2), nn.Conv2d(12, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = self.up(F.relu(self.down2(one)))
        return self.head(F.relu(self.norm(self.join(torch.cat([one, two], 1)))))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.grouped = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.wide, self.depthwise = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm, self.narrow, self.head = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.enter(x))))
        x = F.relu(self.norm(self.depthwise(F.relu(self.wide(x)))))
        return self.head(F.relu(self.narrow(x)).mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A network with all that pruning wants.

    Attributes:
        make: the network, the same at every call.
        inputs: example inputs.
        batches: data.
        loss: the loss; None for the model's own.
        keyword: the forward's name of the input, for batches as dicts.
        tolerance: how far masked and cut may be apart, of the largest output.
    """

    make: Callable[[], nn.Module]
    inputs: Any
    batches: list[Any]
    loss: Any
    keyword: str
    tolerance: float = 1e-5


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    nn.init.uniform_(module.weight, 0.5, 1.5)
            return model.train()

    return made


def images(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 1, size, size, generator=generator), torch.arange(6) % 3) for _ in range(count)]


def maps(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [(x, torch.randint(0, 3, (6, 8, 8), generator=generator)) for x, _ in images(count)]


def vectors(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 6, generator=generator), torch.arange(8) % 3) for _ in range(count)]


def tokens(count: int, labels: Callable[[Tensor], Tensor]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(count):
        ids = torch.randint(0, 40, (5, 7), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels(ids)})
    return found


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16, num_labels=3,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=24, max_position_embeddings=16,
        )
    )  # fmt: skip


IDS = {"input_ids": torch.ones(1, 7, dtype=torch.int64), "attention_mask": torch.ones(1, 7, dtype=torch.int64)}
CASES: dict[str, Case] = {
    "batch norms": Case(seeded(Convolutional), torch.zeros(1, 1, 8, 8), images(3), "cross_entropy", "images"),
    "tied weights": Case(seeded(Perceptron), torch.zeros(1, 6), vectors(3), "cross_entropy", "x"),
    "U-shaped": Case(seeded(UShaped), torch.zeros(1, 1, 8, 8), maps(3), "cross_entropy", "x"),
    "grouped, bfloat16": Case(
        seeded(lambda: Grouped().bfloat16()), torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16),
        [(x.bfloat16(), y) for x, y in images(3)], "cross_entropy", "x", 0.05,
    ),
    "BERT": Case(seeded(bert), IDS, tokens(3, lambda ids: ids[:, 0] % 3), None, ""),
    "Llama": Case(seeded(llama), IDS, tokens(3, lambda ids: ids), None, ""),
}  # fmt: skip


def case(name: str) -> Case:
    """One of them, skipped with a word where transformers is not here."""
    if name in {"BERT", "Llama"}:
        pytest.importorskip("transformers", reason="transformers is not installed")
    return CASES[name]


def as_dicts(given: Case) -> list[Any]:
    """The same batches as dicts, with labels beside; for models that take none, a loss is given too."""
    if not given.keyword:
        return given.batches
    return [{given.keyword: x, "labels": y} for x, y in given.batches]
