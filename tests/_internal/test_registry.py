"""Things by name: what is registered is found and made; what has no such verb is refused at the door."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.repair.contract import REPAIRS
from secateur.scoring.contract import CRITERIA


@dataclass(frozen=True)
class Ones:
    """A criterion of one's own."""

    size: float = 1.0

    def scores(self, graph, work):
        return {g.name: torch.full((len(g),), self.size) for g in graph.groups}


@dataclass(frozen=True)
class OldStyle:
    """As criteria were called before there was a table."""

    def scores(self, model, graph, data, loss):
        return {}


class NeedsOptions:
    """Cannot be made without."""

    def __init__(self, size):
        self.size = size

    def scores(self, graph, work):
        return {}


def test_every_built_in_is_there_and_made_with_its_defaults():
    assert {"magnitude", "bn_scale", "random", "taylor", "obd", "obs", "kron_obd", "kron_obs", "directional"} <= set(
        CRITERIA
    )
    assert {"none", "recalibrate", "compensate", "directed", "refit"} <= set(REPAIRS)
    for registry in (CRITERIA, REPAIRS):
        for name in registry:
            assert registry.make(name) == registry.find(name)() == registry.make(registry.find(name))
            assert registry.make(name).name == name


def test_a_name_a_dict_a_class_and_settings_are_taken():
    made = sc.Taylor(batches=3)
    for given in (made, {"name": "taylor", "batches": 3}):
        assert CRITERIA.make(given) == made
    assert CRITERIA.make("taylor", {"batches": 3}) == made
    assert CRITERIA.make(f"{__name__}:Ones", {"size": 2.0}) == Ones(2.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tailor", "unknown criterion 'tailor': did you mean 'taylor'"),
        ({"name": "taylor", "batch": 3}, "unknown option of criterion 'taylor' 'batch': did you mean 'batches'"),
        ({"batches": 3}, r"it needs a name, such as \{'name': 'bn_scale'\}"),
        (OldStyle(), r"'OldStyle': its scores\(\) must take 2 arguments"),
        (OldStyle, r"'OldStyle': its scores\(\) must take 2 arguments"),
        (f"{__name__}:OldStyle", r"its scores\(\) must take 2 arguments"),
        (lambda graph, work: {}, r"a name \(bn_scale, .*settings with a method scores\(\) of 2 arguments are expected"),
        (3, r"settings with a method scores\(\)"), (None, r"settings with a method scores\(\)"),
        (NeedsOptions, "criterion 'NeedsOptions': .*size"), ({"name": "taylor", "batches": 0}, "batches=0"),
        ("math:hypot", "a class is expected"),
    ],
)  # fmt: skip
def test_what_cannot_sit_there_is_refused_at_the_door(given, message):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with pytest.raises(SecateurError, match=message):
        sc.score(model, sc.trace(model, torch.zeros(1, 3)), given)


def test_settings_that_are_made_take_no_more_options():
    with pytest.raises(SecateurError, match="settings are given already; leave batches out"):
        CRITERIA.make(sc.Taylor(), {"batches": 3})


def test_a_name_is_given_once():
    with pytest.raises(SecateurError, match="criterion 'taylor' is there already"):
        CRITERIA.register("taylor")(Ones)
