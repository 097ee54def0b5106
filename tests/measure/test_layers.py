"""What every layer costs before and after: sums to what is counted, whatever was done to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.lab.models.registry import build
from secateur.measure.counting import counted
from secateur.measure.layers import BETWEEN, compare_layers


def sums_are_right(before: nn.Module, after: nn.Module, inputs) -> list:
    rows = compare_layers(before, after, inputs)
    for at, model in enumerate((before, after)):
        whole = counted(model, inputs)
        assert sum(row.macs[at] for row in rows) == whole["macs"]
        assert sum(row.params[at] for row in rows) == whole["params"]
    return rows


class Recurrent(nn.Module):
    """A layer that runs as one kernel, between two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cells, self.last = nn.Linear(4, 12), nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.cells(self.first(x).relu())[0])


IMAGE = torch.zeros(2, 3, 32, 32)
NETWORKS = {
    "resnet20": (lambda: build("resnet20"), IMAGE),
    "small_vit": (lambda: build("small_vit"), torch.zeros(1, 1, 28, 28)),
    "transformer": (lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), torch.zeros(2, 5, 32)),
    "lstm": (Recurrent, torch.zeros(2, 5, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_sum_to_what_is_counted(name: str) -> None:
    make, inputs = NETWORKS[name]
    model = make().eval()
    result = sc.prune(model, inputs, sc.Budget(params=0.6))
    rows = sums_are_right(model, result.model, inputs)
    assert [row.as_data() for row in rows] == result.layers
    kept = {g.name: int(k) for g, k in zip(result.graph.groups, result.graph.kept(result.plan), strict=True)}
    for row in rows:
        if row.layer in kept and row.kind in {"Conv2d", "Linear"} and not row.layer.endswith("qkv"):
            group = result.graph.group(row.layer)
            assert row.width == (len(group) * group.positions, kept[row.layer] * group.positions), row


def test_rows_are_in_the_order_of_the_forward_and_what_does_not_run_is_last() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.never, self.first = nn.Linear(8, 2), nn.Linear(3, 3), nn.Linear(4, 8)

        def forward(self, x):
            return self.last(self.first(x).relu())

    rows = sums_are_right(Net(), Net(), torch.zeros(1, 4))
    assert [row.layer for row in rows] == ["first", "last", "never"]
    assert rows[2].width is None and rows[2].macs == (0, 0) and rows[2].params == (12, 12)


def test_bottlenecks_are_told_at_the_layer_that_they_were() -> None:
    torch.manual_seed(0)
    model = build("resnet8")
    batches = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(2)]
    result = sc.eigendamage(model, IMAGE[:1], sc.Budget(params=0.4), data=batches, loss="cross_entropy")
    rows = {row.layer: row for row in sums_are_right(model, result.model, IMAGE[:1])}
    name = next(iter(result.facts["bottlenecks"]))
    assert rows[name].width[0] == rows[name].width[1] and rows[name].params[1] < rows[name].params[0]


def test_what_runs_several_times_counts_each_time_and_shared_parameters_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    rows = {row.layer: row for row in sums_are_right(Net(), Net(), torch.zeros(1, 6))}
    assert rows["a"].macs[0] == 72 and rows["b"].macs[0] == 36
    assert rows["a"].params[0] == 42 and rows["b"].params[0] == 6


def test_products_of_activations_are_between_layers_and_the_model_comes_back() -> None:
    model = build("small_vit").train()
    rows = sums_are_right(model, model, torch.zeros(1, 1, 28, 28))
    assert rows[-1].kind == BETWEEN and rows[-1].macs[0] > 0
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_forward_that_fails_is_told() -> None:
    with pytest.raises(sc.SecateurError, match="fails on the example inputs"):
        compare_layers(nn.Linear(4, 2), nn.Linear(4, 2), torch.zeros(1, 3))


def test_a_layer_that_is_the_whole_model_has_a_width() -> None:
    (row,) = sums_are_right(nn.Linear(4, 3), nn.Linear(4, 3), torch.zeros(2, 4))
    assert (row.layer, row.kind, row.width) == ("", "Linear", (3, 3))
