"""What every repair must do: leave the original untouched, change all or nothing, know what it cannot change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from odd_layers import ODD
from secateur.repair.contract import REPAIRS

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(24, 3, 6, 6, generator=G), torch.randint(0, 4, (24,), generator=G)
DATA = [(X[:16], Y[:16]), (X[16:], Y[16:])]
QUICK = {"distill": {"steps": 4}}
"""Settings with which a repair is quick."""
NAMES = REPAIRS.names()
LOOKING = [name for name in NAMES if REPAIRS.find(name).needs.data]


def quick(name):
    """A repair by its name, quick."""
    return REPAIRS.make(name, QUICK.get(name, {})) if isinstance(name, str) else name


CONSUMERS = sc.Compensate(at="consumers")


def cut(model, fraction=0.6):
    graph = sc.trace(model, X[:2])
    plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(channels=fraction), strategy="uniform")
    return plan, sc.cut(model, plan)


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


# ----------------------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("name", NAMES)
def test_the_original_is_left_untouched(restless, untouched, name):
    plan, small = cut(restless)
    before = values(small)
    with untouched(restless):
        sc.apply_repair(restless, small, plan, quick(name), data=DATA, loss="cross_entropy")
    assert same(before, values(small)) == (name == "none")
    assert small.written == before["written"]


@pytest.mark.parametrize("name", LOOKING)
def test_a_second_batch_that_fails_changes_neither_model(restless, untouched, name):
    plan, small = cut(restless)
    for second in ((X[:4, :2], Y[:4]), (None, Y)):
        with untouched(restless), untouched(small), pytest.raises(sc.BadBatch):
            sc.apply_repair(restless, small, plan, quick(name), data=[DATA[0], second], loss="cross_entropy")


@pytest.mark.parametrize("name", LOOKING)
def test_a_loader_that_shuffles_leaves_the_random_state(restless, untouched, name):
    plan, small = cut(restless)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=12, shuffle=True)
    with untouched(restless):
        sc.apply_repair(restless, small, plan, quick(name), data=loader, loss="cross_entropy")


@pytest.mark.parametrize("name", LOOKING)
def test_inference_mode_changes_nothing(restless, name):
    plan, small = cut(restless.eval())
    inside = copy.deepcopy(small)
    sc.apply_repair(restless, small, plan, quick(name), data=DATA, loss="cross_entropy")
    with torch.inference_mode():
        data = [(x.clone(), y.clone()) for x, y in DATA]
        sc.apply_repair(restless, inside, plan, quick(name), data=data, loss="cross_entropy")
    assert same(values(small), values(inside))
    inside(X).sum().backward()  # what was changed can still be trained


@pytest.mark.parametrize("name", ["compensate", "directed"])
def test_a_smaller_model_of_another_plan_is_refused_and_stays(restless, name):
    plan, _ = cut(restless)
    _, other = cut(restless, 0.8)
    before = values(other)
    with pytest.raises(sc.SecateurError, match=r"the plan leaves .* with shape"):
        sc.apply_repair(restless, other, plan, quick(name), data=DATA, loss="cross_entropy")
    assert same(before, values(other))


def test_what_cannot_sit_there_is_refused(restless):
    plan, small = cut(restless)
    for given, message in (("refitt", "did you mean 'refit'"), (3, r"settings with a method apply\(\) of 4 arguments")):
        with pytest.raises(sc.SecateurError, match=message):
            sc.apply_repair(restless, small, plan, given, data=DATA)
    with pytest.raises(sc.SecateurError, match=r"repair 'refit' needs data="):
        sc.apply_repair(restless, small, plan, "refit")


# ------------------------------------------------------------------------------------------------- recalibrating


@pytest.mark.parametrize(
    "data", [[], [(X[:8], Y[:8]), (X[:8, :2], Y[:8])], [X[:8], None], iter([]), None], ids=range(5)
)
def test_recalibrating_changes_all_or_nothing(restless, untouched, data):
    restless.norm.momentum = 0.3
    with untouched(restless), pytest.raises(sc.BadBatch):
        sc.recalibrate(restless, data)
    assert restless.norm.momentum == 0.3


def test_recalibrated_statistics_are_the_averages_over_the_batches(restless):
    restless.norm.momentum = 0.3
    seen = []
    restless.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    sc.recalibrate(restless, DATA)
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen])
    torch.testing.assert_close(restless.norm.running_mean, means.mean(0))
    torch.testing.assert_close(restless.norm.running_var, variances.mean(0))
    assert (restless.norm.num_batches_tracked, restless.norm.momentum, restless.norm.training) == (2, 0.3, False)


# ---------------------------------------------------------------------- layers that are not their weight times inputs


class Odd(nn.Module):
    """A convolution of some kind between two plain ones."""

    def __init__(self, make) -> None:
        super().__init__()
        self.plain, self.odd, self.head = nn.Conv2d(3, 6, 1), make(6, 8, 3), nn.Linear(8, 4)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.head(self.odd(self.norm(self.plain(x)).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("repair", ["refit", CONSUMERS], ids=["refit", "compensate"])
def test_what_is_no_plain_layer_is_left_whole_and_told(kind, repair):
    make, why = ODD[kind]
    torch.manual_seed(0)
    model = Odd(make).eval()
    plan = sc.make_plan(sc.trace(model, X[:2]), {"plain": [1, 4]}, approximate=True)
    small = sc.cut(model, plan)
    before = values(small)
    facts = sc.apply_repair(model, small, plan, quick(repair), data=DATA, loss="cross_entropy")
    assert facts["left whole"] == {"odd": why}
    assert all(torch.equal(value, before[name]) for name, value in values(small).items() if name.startswith("odd"))


@pytest.mark.parametrize("at", ["producers", "consumers"])
def test_only_weights_of_layers_are_said_to_be_left_whole(at):
    """A norm and a bias lose channels too, and are no layers that could be made up for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten()).eval()
    plan = sc.make_plan(sc.trace(model, X[:2]), {"0": [1, 4]})
    facts = sc.apply_repair(model, sc.cut(model, plan), plan, sc.Compensate(at=at), data=DATA, loss="cross_entropy")
    assert facts == {"compensated": ["0" if at == "producers" else "3"], "left whole": {}}


class Keyword(nn.Module):
    """Layers are called by position or by keyword."""

    def __init__(self, by_keyword) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 4)
        self.by_keyword = by_keyword

    def forward(self, x):
        if not self.by_keyword:
            return self.two(self.norm(self.one(x)).relu().mean((2, 3)))
        return self.two(input=self.norm(input=self.one(input=x)).relu().mean((2, 3)))


@pytest.mark.parametrize("repair", [*LOOKING, CONSUMERS], ids=str)
def test_layers_may_be_called_by_keyword(repair):
    found = []
    for by_keyword in (False, True):
        torch.manual_seed(0)
        model = Keyword(by_keyword).double().eval()
        data = [(x.double(), y) for x, y in DATA]
        plan = sc.make_plan(sc.trace(model, data[0][0][:2]), {"one": [1, 4]})
        small = sc.cut(model, plan)
        facts = sc.apply_repair(model, small, plan, quick(repair), data=data, loss="cross_entropy")
        assert not facts.get("left whole")
        found.append(values(small))
    assert same(*found)
