"""Every reason says which operation, where in the model's code, and what can be done."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformer_networks import NETWORKS, made

import secateur as sc
from secateur._internal.errors import NothingToPrune
from secateur.tracing import rules
from secateur.tracing.advice import advice

WITHOUT_PLACE = {"is not used as a channel by the forward", "nothing writes it"}
"""No operation is to blame for these, so no line is."""


TELL = {"freeze", "approximate", "freeze_all", "divides"}


def said(tree: ast.AST) -> set[str]:
    """The reasons that a file gives: the last argument of what freezes or approximates."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {
            "freeze",
            "approximate",
            "freeze_all",
            "divides",
        }:
            last = node.args[-1] if node.args else None
            if isinstance(last, ast.Constant) and isinstance(last.value, str):
                found.add(last.value)
            elif isinstance(last, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "add" for v in last.values)
                found.add("".join(map(str, parts)))
    return found


def test_there_is_advice_for_every_reason_in_the_source():
    files = [*Path(rules.__file__).parent.glob("*.py"), *Path(rules.__file__).parents[1].glob("*.py")]
    reasons = set().union(*(said(ast.parse(file.read_text(encoding="utf-8"))) for file in files))
    assert len(reasons) > 40
    assert [reason for reason in sorted(reasons) if not advice(reason)] == []


@pytest.mark.parametrize("name", NETWORKS)
def test_reasons_of_transformers(name: str):
    model, inputs, outputs = made(name)
    check(sc.trace(model, inputs, outputs=outputs))
    check(sc.trace(model, inputs))


def check(graph: sc.ChannelGraph) -> None:
    for frozen in graph.frozen:
        assert frozen.operation and frozen.advice, frozen
        if frozen.reason not in WITHOUT_PLACE and frozen.operation != "output":
            assert frozen.place, frozen
            assert ".py:" in frozen.place or frozen.place.startswith("in '"), frozen
    for group in graph.groups:
        assert group.exact or advice(group.reason), group


ODD: list[Callable[[nn.Module, Tensor], Tensor]] = [
    lambda m, x: x.cumsum(1), lambda m, x: x[:, [1, 0, 2, 3, 4, 5, 7, 6]], lambda m, x: x + m.plain,
    lambda m, x: x.view(-1, 2, 4, 6, 6).flip(1).flatten(1, 2), lambda m, x: x.renorm(2, 1, 1.0),
    lambda m, x: x if float(x.sum()) > -1e9 else x * 2, lambda m, x: x + torch.fft.fft(x, dim=1).real,
    lambda m, x: x.unfold(1, 2, 1).sum(-1).repeat(1, 2, 1, 1)[:, :8], lambda m, x: 1 / x,
    lambda m, x: x + x.amax(1, keepdim=True), lambda m, x: x.softmax(1),
]  # fmt: skip


class Odd(nn.Module):
    """Everything that must not be done to channels, one after the other."""

    def __init__(self, which: int):
        super().__init__()
        self.a, self.b, self.which = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), which
        self.plain = torch.ones(1, 8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = ODD[self.which](self, x)
        return self.b(x)


@pytest.mark.parametrize("which", range(len(ODD)))
def test_reasons_of_odd_networks(which: int):
    try:
        check(sc.trace(Odd(which), torch.randn(2, 3, 6, 6)))
    except NothingToPrune as error:
        assert "what can be done:" in str(error)
