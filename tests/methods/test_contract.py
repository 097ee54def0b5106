"""What all methods share: registries, settings, handles with the same members, and no knowledge of each other."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import FrozenInstanceError, dataclass, is_dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.workload import Workload
from secateur.methods.contract import METHODS, TRAINING_METHODS, described, finished, settings_from
from secateur.methods.sdprun import SDPrun

MEMBERS = ("step", "done", "plan", "steps_needed", "state_dict", "load_state_dict", "detach")


class ByKeyword(nn.Module):
    """Takes a dict of inputs and calls its layers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, *, pixels, scale=1.0):
        x = torch.tanh(self.enter(input=pixels * scale))
        return {"logits": self.head(input=torch.relu(self.norm(input=self.inner(input=x))))}


def case():
    torch.manual_seed(0)
    model, x = ByKeyword(), torch.randn(24, 6)
    return model, {"pixels": x, "scale": 0.5}, {"pixels": x, "labels": torch.arange(24) % 3}


HANDLES = {
    "increg": lambda m, g, o: sc.IncReg(m, g, o, sc.Budget(macs=0.6), rate=0.5, limit=1.0),
    "greg": lambda m, g, o: sc.GReg(m, g, o, sc.Budget(macs=0.6), rate=0.5, limit=1.0),
    "spp": lambda m, g, o: sc.SPP(m, g, o, sc.Budget(macs=0.6), rate=0.5, every=1),
    "pivot": lambda m, g, o: sc.Pivoting(m, keep=0.5, every=1, times=3),
    "sdprun": lambda m, g, o: SDPrun(m, g, lr=0.1, c=2.0, mu=0.7, budget=sc.Budget(macs=0.6)),
}


@pytest.mark.parametrize("name", HANDLES)
def test_all_handles_have_the_same_members_and_never_look_at_a_batch(name):
    model, inputs, batch = case()
    graph = sc.trace(model, inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = HANDLES[name](model, graph, optimizer)
    for member in MEMBERS:
        assert hasattr(handle, member)
    assert isinstance(inspect.getattr_static(type(handle), "steps_needed"), property)
    assert isinstance(handle.steps_needed, int) or name == "sdprun"
    work = Workload(model, [batch], "cross_entropy")
    for _ in range(400):
        for read in work.batches():
            model.zero_grad()
            work.loss_of(read).backward()
            (handle if name == "sdprun" else optimizer).step()
            if name != "sdprun":
                handle.step()
        if handle.done:
            break
    assert handle.done
    small, plan = finished(model, handle)
    if plan is not None:
        assert graph.macs(plan) <= 0.6 * graph.macs()
        assert sc.check(model, small, plan, inputs) < 1e-5
    json.dumps(getattr(handle, "facts", {}))
    handle.load_state_dict(handle.state_dict())
    handle.detach()


def test_the_registries_know_the_built_in_ones():
    assert {"eigendamage", "pivot", "zero"} <= set(METHODS)
    assert {"greg", "increg", "pivot", "spp"} <= set(TRAINING_METHODS)


@pytest.mark.parametrize(
    ("registry", "name"), [(r, n) for r in (METHODS, TRAINING_METHODS) for n in r], ids=lambda v: getattr(v, "kind", v)
)
def test_settings_are_frozen_checked_and_described(registry, name):
    made = registry.make(name)
    assert is_dataclass(made)
    assert type(made).__doc__
    with pytest.raises(FrozenInstanceError):
        made.exclude = ("head",)
    with pytest.raises(sc.SecateurError, match="exclude=3: patterns"):
        registry.make(name, {"exclude": 3})
    assert json.loads(json.dumps(described(made)))["name"] == name


def test_a_method_knows_of_no_other():
    folder = Path(inspect.getfile(METHODS.find("zero"))).parent
    source = {path.stem: ast.parse(path.read_text()) for path in folder.glob("*.py")}
    methods = {cls.__module__.rpartition(".")[2] for r in (METHODS, TRAINING_METHODS) for cls in map(r.find, r)}
    methods |= {"sdprun"}
    for name, tree in source.items():
        imported = {node.module.rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & methods, f"{name} imports {imported & methods}"


@dataclass(frozen=True)
class Few:
    first: int = 1


def test_settings_are_given_as_such_or_field_by_field():
    assert settings_from(Few, None, {"first": 2}, "few") == Few(2) == settings_from(Few, Few(2), {}, "few")
    for given, options, message in (
        (Few(2), {"first": 2}, "either settings or their fields"),
        (2, {}, r"Few\(...\) is expected"),
        (None, {"frist": 2}, "unknown option of few 'frist': did you mean 'first'"),
    ):
        with pytest.raises(sc.SecateurError, match=message):
            settings_from(Few, given, options, "few")


def test_zero_cuts_what_is_zero_and_nothing_else():
    model, inputs, _ = case()
    with torch.no_grad():
        for p in (model.enter.weight, model.enter.bias, model.inner.weight, model.inner.bias):
            p[:5] = 0
        model.norm.bias[2:5] = 1.0  # a constant that the head reads: not zero
        model.norm.weight[:5] = model.norm.bias[:2] = 0
    before = {name: t.clone() for name, t in model.state_dict().items()}
    method = METHODS.make({"name": "zero", "exclude": ["ent*"]})
    result = method.apply(model, inputs, None, Workload(model))
    assert result.plan.removed == {"inner": [0, 1]}
    assert "excluded by 'ent*'" in result.plan.skipped["enter"]
    assert len(METHODS.make("zero").apply(model, inputs, None, Workload(model)).plan.removed["enter"]) == 5
    assert sc.check(model, result.model, result.plan, inputs) < 1e-6
    assert result.after.macs == result.graph.macs(result.plan) < result.before.macs
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(sc.SecateurError, match="leave the budget out"):
        method.apply(model, inputs, sc.Budget(macs=0.5), Workload(model))
    with pytest.warns(sc.SecateurWarning, match="no channel is zero"):
        whole = METHODS.make("zero").apply(case()[0], inputs, None, Workload(model))
    assert len(whole.plan) == 0
    assert whole.facts["notices"]
