"""An optimizer of a recipe is its settings: each makes what PyTorch calls by that name, and one's own needs no list."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.lab import recipe
from secateur.lab.training.optimizers.contract import OPTIMIZERS, Optimizer
from secateur.methods.sdprun import SDPrun

INPUTS = torch.zeros(1, 4)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


CASES = [
    ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, torch.optim.SGD),
    ("adam", {"weight_decay": 0.1}, torch.optim.Adam),
    ("adamw", {"weight_decay": 0.1}, torch.optim.AdamW),
    ("sdprun", {"c": 0.25, "mu": 0.5}, SDPrun),
]


@pytest.mark.parametrize(("name", "settings", "kind"), CASES)
def test_the_settings_reach_the_optimizer(name: str, settings: dict, kind: type) -> None:
    model = network()
    made = OPTIMIZERS.make({"name": name, **settings}).make(model, INPUTS, 0.25)
    assert type(made) is kind
    assert {id(p) for group in made.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    for group in made.param_groups:
        assert group["lr"] == 0.25 and {key: group[key] for key in settings} == settings


def test_all_are_tried_here() -> None:
    assert list(OPTIMIZERS) == sorted(name for name, *_ in CASES)


def test_without_its_threshold_sdprun_is_what_it_is_compared_with() -> None:
    weights = []
    for settings in (OPTIMIZERS.make({"name": "sdprun", "c": 0.0}), OPTIMIZERS.make("sdprun").unpruned()):
        torch.manual_seed(0)
        model = network()
        optimizer = settings.make(model, INPUTS, 0.5)
        for x in torch.randn(5, 3, 4):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_ones_own_optimizer_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Mine(Optimizer):
        rho: float = 0.5

        def make(self, model, inputs, lr):
            return torch.optim.Adadelta(model.parameters(), lr=lr, rho=self.rho)

    class Foreign:
        def make(self, model, inputs, lr):
            return None

    module = types.ModuleType("mine_alone")
    module.Mine, module.Foreign = Mine, Foreign
    monkeypatch.setitem(sys.modules, "mine_alone", module)
    section = recipe.Train.model_validate(
        {"epochs": 1, "lr": 0.1, "optimizer": {"name": "mine_alone:Mine", "rho": 0.75}}
    )
    made = section.make_optimizer().make(network(), INPUTS, section.lr)
    assert type(made) is torch.optim.Adadelta and made.param_groups[0]["rho"] == 0.75
    given = {"data": {"name": "digits"}, "model": {"name": "digits_cnn"}}
    for bad, message in (("mine_alone:Foreign", "a subclass of Optimizer"), ("mine_alone:None", "has no 'None'")):
        with pytest.raises(sc.SecateurError, match=message):
            recipe.validate({**given, "train": {"epochs": 1, "lr": 0.1, "optimizer": bad}})
