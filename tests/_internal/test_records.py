"""The record that travels with a model is plain data."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

import secateur as sc

WITHOUT_SECATEUR = """
import sys
sys.modules["secateur"] = None  # whoever imports it now finds nothing
import torch
model = torch.load(sys.argv[1], weights_only=False)
print(model(torch.ones(1, 4)).shape, [type(step) for step in model._secateur_record])
"""


def cut_twice() -> nn.Module:
    model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for removed in ([1, 5], [0]):
        graph = sc.trace(model, torch.zeros(1, 4))
        model = sc.cut(model, sc.make_plan(graph, {graph.groups[0].name: removed}))
    return model


def test_a_cut_model_pickled_whole_is_read_where_secateur_is_not_installed(tmp_path: Path) -> None:
    small = cut_twice()
    torch.save(small, tmp_path / "small.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SECATEUR, str(tmp_path / "small.pt")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([1, 3]) [<class 'dict'>, <class 'dict'>]"


def test_a_record_has_one_plain_step_for_each_thing_done() -> None:
    steps = sc.record(cut_twice())
    assert [list(step) for step in steps] == [["cut"], ["cut"]]
    assert all(type(text) is str for step in steps for text in step.values())
    plans = [sc.Plan.from_json(step["cut"]) for step in steps]
    assert [len(plan) for plan in plans] == [2, 1]


def test_what_is_read_from_a_record_can_be_changed_without_changing_the_model() -> None:
    small = cut_twice()
    before = sc.record(small)
    sc.record(small)[0]["cut"] = "changed"
    sc.record(small).clear()
    assert sc.record(small) == before
