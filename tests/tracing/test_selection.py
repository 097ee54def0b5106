"""What is left alone: excluded modules keep all they write, and so do layers that are not trained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import Run
from torch import nn

import secateur as sc
from secateur.tracing.selection import excluded


def network():
    """Two blocks on one stream (stem), a table tied to the head, and a gate on its own."""

    def forward(m, ids):
        x = m.stem(m.table(ids))
        for block in m.blocks:
            x = x + block(x)
        x = m.out(x * torch.sigmoid(m.gate(x)))
        return F.linear(x, m.tied.weight)

    blocks = [nn.Sequential(nn.Linear(6, 9 + i), nn.ReLU(), nn.Linear(9 + i, 6)) for i in range(11)]
    table = nn.Embedding(7, 5)
    parts = {"stem": nn.Linear(5, 6), "blocks": nn.ModuleList(blocks), "gate": nn.Linear(6, 6), "out": nn.Linear(6, 5)}
    return Run(forward, table=table, **parts, tied=table)


@pytest.fixture(scope="module")
def traced():
    model = network()
    return model, sc.trace(model, torch.arange(4))


# what is excluded (a function of the model) -> the groups that stay whole
MEANT = {
    "nothing": (lambda m: (), []),
    "a group": (lambda m: "blocks.0.0", ["blocks.0.0"]),
    "groups, in a list": (lambda m: ["blocks.0.0", "blocks.3.0"], ["blocks.0.0", "blocks.3.0"]),
    "a layer that writes another's group": (lambda m: "blocks.4.2", ["stem"]),
    "all of a block": (lambda m: "blocks.1.*", ["stem", "blocks.1.0"]),
    "a block": (lambda m: ["blocks.1"], ["stem", "blocks.1.0"]),
    "one of several numbers": (lambda m: "blocks.[12].0", ["blocks.1.0", "blocks.2.0"]),
    "the other name of a shared module": (lambda m: "tied", ["table"]),
    "a module": (lambda m: m.blocks[10], ["stem", "blocks.10.0"]),
    "a type": (lambda m: nn.Embedding, ["table"]),
    "a module without parameters": (lambda m: m.blocks[0][1], []),
    "everything": (lambda m: "*", None),
    "the model": (lambda m: m, None),
    "some of each": (lambda m: (nn.Embedding, "blocks.2.0", m.gate), ["table", "stem", "blocks.2.0"]),
}


@pytest.mark.parametrize("name", MEANT)
def test_what_is_excluded_keeps_all_it_writes(traced, name):
    model, graph = traced
    given, expected = MEANT[name]
    found = excluded(model, graph, given(model))
    every = [g.name for g in graph.groups]
    assert list(found) == [n for n in every if expected is None or n in expected]
    assert all(reason.startswith("excluded by") for reason in found.values())


def test_reasons_name_the_pattern_and_the_layer(traced):
    model, graph = traced
    assert excluded(model, graph, "blocks.1") == {
        "stem": "excluded by 'blocks.1': its layer blocks.1.2 stays whole",
        "blocks.1.0": "excluded by 'blocks.1': its layer blocks.1.0 stays whole",
    }
    assert excluded(model, graph, ["blocks.1.0"]) == {"blocks.1.0": "excluded by 'blocks.1.0'"}
    assert excluded(model, graph, model.blocks[1][0])["blocks.1.0"].startswith("excluded by blocks.1.0:")


def test_the_inputs_of_an_excluded_layer_may_become_fewer(traced):
    model, graph = traced
    alone = excluded(model, graph, "stem")
    assert "table" not in alone
    small = sc.cut(model, sc.make_plan(graph, {"table": [0]}))
    assert small.stem.weight.shape == (6, 4)


def test_an_output_layer_has_nothing_to_keep_and_that_is_fine():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert excluded(model, sc.trace(model, torch.randn(1, 4)), "2") == {}


BAD = {
    "no such layer": (lambda m: "blocks.3.7", r"unknown group or module in exclude 'blocks.3.7': did you mean 'blocks"),
    "a pattern without a match": (lambda m: ["stem", "layers.*"], r"unknown group or module in exclude 'layers.\*'"),
    "a module of another model": (lambda m: nn.Linear(6, 6), "this Linear is no module of the model"),
    "a type that is not there": (lambda m: nn.Conv2d, "unknown type of module in exclude 'Conv2d'"),
    "no type of modules": (lambda m: int, "are expected, not <class 'int'>"),
    "a number": (lambda m: [3], "are expected, not 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_nothing_is_is_told(traced, name):
    model, graph = traced
    given, message = BAD[name]
    with pytest.raises(sc.SecateurError, match=message):
        excluded(model, graph, given(model))


def test_layers_that_are_not_trained_are_left_alone_unless_asked_for():
    model = network()
    graph = sc.trace(model, torch.arange(4))
    model.blocks[3][2].bias.requires_grad_(False)  # which writes the stream
    model.blocks[5][0].weight.requires_grad_(False)
    found = {
        "stem": "its layer blocks.3.2 does not require gradients",
        "blocks.5.0": "its layer blocks.5.0 does not require gradients",
    }
    assert excluded(model, graph) == found
    assert excluded(model, graph, frozen=False) == {}
    assert excluded(model, graph, "stem") == found | {"stem": "excluded by 'stem'"}


def test_a_model_of_which_nothing_is_trained_any_more_is_pruned_like_any_other():
    model = network().requires_grad_(False)
    assert excluded(model, sc.trace(model, torch.arange(4))) == {}


def test_the_graph_of_another_model_is_refused(traced):
    with pytest.raises(sc.SecateurError, match="another model"):
        excluded(nn.Linear(2, 2), traced[1], "0")
