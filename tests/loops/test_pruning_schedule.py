"""Pruning in loops of others: a method beside the optimizer, cuts after epochs, an optimizer that prunes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import secateur as sc
from secateur.loops.schedule import PruningSchedule

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 3
BATCHES = [(X[i : i + 16], Y[i : i + 16]) for i in range(0, 64, 16)]
INCREG = {"name": "increg", "every": 1, "rate": 0.5, "limit": 1.0, "settle": 1}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def trained(schedule, epochs, model=None, optimizer=None):
    """A loop that knows nothing of pruning but whom to call."""
    model = model or network()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule.begin(model, optimizer)
    for _ in range(epochs):
        for x, y in BATCHES:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            if schedule.averaged is not None:
                schedule.averaged.update_parameters(model)
            schedule.step()
        schedule.end_epoch()
    schedule.end()
    return model, optimizer


def holds(model, optimizer):
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return held == {id(p) for p in model.parameters()}


def fits(model, optimizer):
    states = [(p, value) for p, state in optimizer.state.items() for value in state.values()]
    return holds(model, optimizer) and all(value.shape == p.shape for p, value in states if value is not None)


def test_channels_go_after_an_epoch_and_training_goes_on():
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.5), after=2, data=BATCHES, loss="cross_entropy")
    model, optimizer = trained(schedule, 4)
    (cut,) = schedule.cuts
    assert (cut["step"], cut["epoch"]) == (8, 2)
    assert 0.3 < cut["macs"] <= 0.5
    assert fits(model, optimizer)
    assert sc.trace(model, X[:2]).macs() == round(cut["macs"] * sc.trace(network(), X[:2]).macs())


def test_the_repair_is_in_the_model_that_goes_on():
    model = network()
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.5), after=1, data=BATCHES, loss="cross_entropy")
    schedule.begin(model, torch.optim.SGD(model.parameters(), 0.0))
    expected = sc.prune(copy.deepcopy(model), X[:2], sc.Budget(macs=0.5), data=BATCHES, loss="cross_entropy").model
    assert schedule.end_epoch()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_several_epochs_bring_it_equally_nearer():
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.25, round_to=1), after=[1, 3], criterion="magnitude")
    trained(schedule, 3)
    assert [cut["epoch"] for cut in schedule.cuts] == [1, 3]
    assert 0.4 < schedule.cuts[0]["macs"] <= 0.5
    assert 0.2 < schedule.cuts[1]["macs"] <= 0.25
    own = PruningSchedule(X[:2], after={1: sc.Budget(macs=0.8, round_to=1), 2: sc.Budget(params=0.5, round_to=1)})
    trained(own, 2)
    assert own.cuts[0]["macs"] <= 0.8
    assert 0.4 < own.cuts[1]["params"] <= 0.5  # of the original, not of what was left


@pytest.mark.parametrize("method", [INCREG, {"name": "greg", "every": 1, "rate": 0.5, "limit": 1.0, "settle": 1}])
def test_a_method_steps_until_all_is_out_and_then_it_goes(method):
    model = network()
    averaged = AveragedModel(model)
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.5), method=method, averaged=averaged)
    _, optimizer = trained(schedule, 100, model)
    (cut,) = schedule.cuts
    assert cut["macs"] <= 0.5
    assert cut["step"] < 400
    assert fits(model, optimizer)
    assert {n: p.shape for n, p in averaged.module.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert int(averaged.n_averaged) == 400


def test_an_optimizer_that_prunes_needs_no_method():
    model = network()
    graph = sc.trace(model, X[:2])
    optimizer = sc.SDPrun(model, graph, lr=0.05, c=2.0, budget=sc.Budget(macs=0.6))
    schedule = PruningSchedule(X[:2])
    trained(schedule, 200, model, optimizer)
    (cut,) = schedule.cuts
    assert cut["macs"] <= 0.6
    assert holds(model, optimizer)


def test_what_is_not_done_at_the_end_is_told():
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.5), method="increg")
    with pytest.warns(sc.SecateurWarning, match="before the method was done"):
        trained(schedule, 1)
    assert schedule.cuts == []


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"budget": sc.Budget(macs=0.5), "method": "increg", "after": 1}, "give method= or after="),
        ({"budget": sc.Budget(macs=0.5), "method": "incregg"}, "did you mean 'increg'"),
        ({"budget": sc.Budget(macs=0.5), "method": "increg", "criterion": "taylor"}, "are of secateur.prune"),
        ({"budget": sc.Budget(macs=0.5), "after": 0}, "epochs from 1 on"),
        ({"budget": sc.Budget(macs=0.5), "after": [3, 2]}, "in their order"),
        ({"budget": sc.Budget(macs=0.5), "after": []}, "epochs from 1 on"),
        ({"after": 1}, "a Budget is expected"),
        ({"budget": sc.Budget(macs=0.5), "after": {1: sc.Budget(macs=0.5)}}, "and no budget="),
        ({"after": {1: 0.5}}, "a Budget for each epoch"),
        ({"budget": sc.Budget(channels=0.5), "after": [1, 2]}, "rounds=2"),
    ],
)
def test_what_is_no_schedule_is_refused(how, words):
    with pytest.raises(sc.SecateurError, match=words):
        PruningSchedule(X[:2], **how)


def test_an_optimizer_that_prunes_nothing_is_refused():
    model = network()
    with pytest.raises(sc.SecateurError, match="the optimizer prunes nothing"):
        PruningSchedule(X[:2]).begin(model, torch.optim.SGD(model.parameters(), 0.1))


def test_a_schedule_begins_anew_with_every_training():
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.5), after=1, data=BATCHES, loss="cross_entropy")
    ends = [trained(schedule, 2)[0] for _ in range(2)]
    assert len(schedule.cuts) == 1
    assert [p.shape for p in ends[0].parameters()] == [p.shape for p in ends[1].parameters()]


def test_epochs_that_never_came_are_told():
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.5), after=[1, 5], criterion="magnitude")
    with pytest.warns(sc.SecateurWarning, match=r"ended after 2 epochs; nothing was cut after \[5\]"):
        trained(schedule, 2)


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Adafactor])
def test_what_cannot_follow_is_refused_before_training(optimizer):
    model = network()
    schedule = PruningSchedule(X[:2], sc.Budget(macs=0.5), after=1)
    with pytest.raises(sc.SecateurError, match=r"LBFGS|Adafactor"):
        schedule.begin(model, optimizer(model.parameters()))
    other = torch.optim.SGD([*model.parameters(), *nn.Linear(2, 2).parameters()], 0.1)
    with pytest.raises(sc.SecateurError, match="is not the model's"):
        schedule.begin(model, other)
