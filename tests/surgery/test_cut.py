"""Cutting: plans as data, the optimizer that follows, recalibration, dead channels."""

from __future__ import annotations

import copy
import dataclasses
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 16, 5),
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) / 4)  # no bias is zero by chance
    return model


X = torch.randn(7, 3, 6, 6, dtype=torch.float64)
Y = torch.arange(7) % 5
REMOVED = {"0": [1, 4, 7], "3": [0, 2]}


@pytest.fixture
def model():
    return network()


@pytest.fixture
def plan(model):
    return sc.make_plan(sc.trace(model, X), REMOVED)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
}


def step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_the_masked_network_would(model, plan, name):
    big = sc.masked(model, plan)
    kept = {n: p != 0 for n, p in big.named_parameters()}
    optimizer = OPTIMIZERS[name](big.parameters())

    def masked_step():
        optimizer.zero_grad()
        F.cross_entropy(big(X), Y).backward()
        for n, p in big.named_parameters():
            p.grad *= kept[n]
        optimizer.step()

    masked_step()
    follower = OPTIMIZERS[name](big.parameters())
    follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = sc.cut(big, plan, optimizer=follower)
    assert {id(p) for g in follower.param_groups for p in g["params"]} == {id(p) for p in small.parameters()}
    for _ in range(3):
        masked_step()
        step(small, follower)
    for p, q in zip(sc.cut(big, plan).parameters(), small.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-12)


def test_sgd_momentum_follows_exactly(model, plan):
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    before = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    small = sc.cut(model, plan, optimizer=optimizer)
    for name, p in small.named_parameters():
        wanted = before[name]
        for dim, gone in plan.slices.get(name, {}).items():
            keep = [i for i in range(wanted.shape[dim]) if i not in gone]
            wanted = wanted.index_select(dim, torch.tensor(keep))
        assert torch.equal(optimizer.state[p]["momentum_buffer"], wanted)


def test_an_optimizer_of_other_parameters_is_refused_before_anything_changes(model, plan):
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(sc.SecateurError, match="not the model's"):
        sc.cut(model, plan, optimizer=optimizer)
    assert {id(p) for p in model.parameters()} < {id(p) for g in optimizer.param_groups for p in g["params"]}


def test_an_optimizer_whose_state_cannot_follow_is_refused(model, plan):
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(sc.SecateurError, match="LBFGS"):
        sc.cut(model, plan, optimizer=optimizer)
    assert {id(p) for p in model.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}


def test_cut_shares_nothing_with_the_original(model, plan):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small = sc.cut(model, plan)
    assert not {t.data_ptr() for t in small.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}
    with torch.no_grad():
        for t in small.state_dict().values():
            t.zero_()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_requires_grad_and_mode_follow(model, plan):
    model[0].weight.requires_grad_(False)
    model.eval()
    small = sc.cut(model, plan)
    assert not small[0].weight.requires_grad
    assert small[3].weight.requires_grad
    assert not small.training


def test_the_record_replays(model, plan):
    small = sc.cut(model, plan)
    graph = sc.trace(small, X)
    second = sc.make_plan(graph, {"0": [0]})
    smaller = sc.cut(small, second)
    again = model
    for entry in sc.record(smaller):
        again = sc.cut(again, sc.Plan.from_json(entry["cut"]))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), smaller.parameters(), strict=True))


DAMAGED = {
    "no JSON": ("{", "not JSON"),
    "no plan": ("{}", "not a plan"),
    "a list": ("[]", "not a plan"),
    "a newer version": ('{"secateur_plan": 99}', "version"),
    "no slices": ('{"secateur_plan": 1, "removed": {}, "fingerprint": "x"}', "damaged"),
    "unsorted": ('{"secateur_plan": 1, "removed": {"0": [2, 1]}, "fingerprint": "x", "slices": {}}', "sorted"),
    "negative": ('{"secateur_plan": 1, "removed": {"0": [-1]}, "fingerprint": "x", "slices": {}}', "whole numbers"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_plans_are_refused(name):
    text, message = DAMAGED[name]
    with pytest.raises(sc.SecateurError, match=message):
        sc.Plan.from_json(text)


def test_a_plan_for_another_model_is_refused(plan):
    with pytest.raises(sc.SecateurError, match="another model"):
        sc.cut(nn.Sequential(nn.Linear(3, 3)), plan)
    data = json.loads(plan.to_json())
    data["slices"]["0.weight"]["0"] = [99]
    with pytest.raises(sc.SecateurError, match="damaged"):
        sc.cut(network(), sc.Plan.from_json(json.dumps(data)))


BAD_PLANS = {
    "all of a group": ({"3": list(range(6))}, "one must stay"),
    "out of range": ({"3": [6]}, "positions 0 to 5"),
    "unknown group": ({"33": [0]}, "did you mean '3'"),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plans_are_refused(model, name):
    removed, message = BAD_PLANS[name]
    with pytest.raises(sc.SecateurError, match=message):
        sc.make_plan(sc.trace(model, X), removed)


def test_dead_channels_are_those_that_are_zero_at_all_producers(model, plan):
    graph = plan.graph
    dead = sc.zero_channels(sc.masked(model, plan), graph)
    assert dead.removed == plan.removed
    assert not sc.zero_channels(model, graph).removed
    nothing = network()
    with torch.no_grad():
        nothing[3].weight.zero_()
        nothing[3].bias.zero_()
    assert sc.zero_channels(nothing, graph).removed == {"3": [1, 2, 3, 4, 5]}


def test_recalibration_gives_the_plain_averages(model):
    model.train()
    modes = [m.training for m in model.modules()]
    sc.recalibrate(model, [(X[:4], Y[:4]), (X[3:], Y[3:])])
    with torch.no_grad():
        parts = [model[0](x) for x in (X[:4], X[3:])]
    mean = torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0)
    assert torch.allclose(model[1].running_mean, mean, atol=1e-12)
    assert model[1].momentum == 0.1
    assert modes == [m.training for m in model.modules()]
    with pytest.raises(sc.SecateurError, match="no batches"):
        sc.recalibrate(model, [])


def test_check_sees_a_wrong_network(model, plan):
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, X) < 1e-12
    with torch.no_grad():
        small[0].bias[0] += 1e-3
    assert sc.check(model, small, plan, X) > 1e-6


def test_tensors_in_plain_lists_are_the_new_model_s():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.e = nn.Linear(6, 8), nn.Linear(8, 3), nn.Parameter(torch.randn(3, 3))
            self.listed = [self.e]

        def forward(self, x):
            return self.b(self.a(x).relu()) @ self.listed[0]

    model = Listed()
    graph = sc.trace(model, torch.randn(2, 6))
    small = sc.cut(model, sc.make_plan(graph, {"a": [0]}))
    small(torch.randn(2, 6)).sum().backward()
    assert small.e.grad is not None
    assert model.e.grad is None


def test_check_sees_what_is_not_finite(model, plan):
    small = sc.cut(model, plan)
    with torch.no_grad():
        small[0].weight[0] = float("nan")
    assert sc.check(model, small, plan, X) == float("inf")


def test_sdprun_follows_two_cuts():
    torch.manual_seed(0)
    big = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(16, 6, dtype=torch.float64), torch.arange(16) % 3
    graph = sc.trace(big, x)
    optimizer = sc.SDPrun(big, graph, lr=0.1, c=1.6)
    small, other = big, sc.cut(big, sc.make_plan(graph, {}))
    uncut = sc.SDPrun(other, sc.trace(other, x), lr=0.1, c=1.6)
    cuts = 0
    for step in range(40):
        for network, opt in ((small, optimizer), (other, uncut)):
            opt.zero_grad()
            F.cross_entropy(network(x), y).backward()
            opt.step()
        if step in {15, 30}:
            dead = sc.zero_channels(small, sc.trace(small, x))
            cuts += len(dead) > 0
            small = sc.cut(small, dead, optimizer=optimizer)
    assert cuts == 2
    assert torch.allclose(small(x), other(x), atol=1e-10)


class Noisy(nn.Module):
    """Draws in its forward from all three sources, counts its forwards and averages what it sees."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.steps = self.steps + 1
        found = self.second(self.norm(self.first(x)).relu())
        self.mean.mul_(0.9).add_(found.detach().mean(0))
        return found + torch.randn_like(found) + random.random() + np.random.rand()


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_forwards_that_draw_and_count_are_compared_alike_and_leave_no_trace():
    torch.manual_seed(0)
    model, x = Noisy().train(), torch.randn(8, 6)
    before, state = copy.deepcopy(model.state_dict()), states()
    graph = sc.trace(model, x)
    assert states() == state
    scores = sc.score(model, graph)  # here beartype draws from Python's, which changes nothing of what follows
    state = states()
    plan = sc.allocate(graph, scores, sc.Budget(macs=0.5))
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, x) < 1e-5
    assert states() == state
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert small.steps == 0 and (small.mean == 0).all() and small.training
    assert sc.check(model, small, plan, x) < 1e-5  # nor does a comparison change the next


def test_recalibration_is_that_of_eval_mode_and_leaves_the_random_state():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 4), nn.BatchNorm1d(4)
    )
    data, found = [torch.randn(32, 6) for _ in range(3)], []
    state = states()
    for training in (True, False):
        model.train(training)
        sc.recalibrate(model, data)
        assert model.training is training and states() == state
        found.append(model[-1].running_var.clone())
    assert torch.equal(*found)


def test_in_inference_mode_the_same_is_cut_and_can_be_trained():
    model = network()
    graph = sc.trace(model, X)
    with torch.inference_mode():
        again = sc.trace(model, X)
        assert [group.name for group in again.groups] == [group.name for group in graph.groups]
        small = sc.cut(model, sc.make_plan(again, REMOVED))
        assert sc.check(model, small, sc.make_plan(again, REMOVED), X) < 1e-9
    F.cross_entropy(small(X), Y).backward()


def test_slices_without_positions_or_of_no_dimension_are_told():
    model = network()
    data = json.loads(sc.make_plan(sc.trace(model, X), REMOVED).to_json())
    for dims, message in (
        ({"0": []}, "a slice of '0.weight' has no positions"),
        ({"-1": [0]}, "dimensions of '0.weight'"),
    ):
        with pytest.raises(sc.SecateurError, match=message):
            sc.Plan.from_json(json.dumps(data | {"slices": {"0.weight": dims}}))


def sizes(model):
    """Everything whole that the modules of a model remember."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) is int or (isinstance(value, tuple) and value and all(type(v) is int for v in value))
    }


def conv(i, o, k=3, **kw):
    return nn.Conv2d(i, o, k, padding=k // 2, **kw)


# name -> (network, inputs, what goes, what its modules remember before and after)
PATCHED = {
    "plain": (
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.PReLU(8), conv(8, 2)), (1, 3, 4, 4), {"0": [0, 3, 7]},
        {"0.out_channels": (8, 5), "1.num_features": (8, 5), "2.num_parameters": (8, 5), "3.in_channels": (8, 5)},
    ),
    "depthwise with a multiplier": (
        nn.Sequential(conv(3, 4), conv(4, 8, groups=4), nn.GroupNorm(8, 8), conv(8, 2)), (1, 3, 4, 4), {"0": [1]},
        {
            "0.out_channels": (4, 3), "1.in_channels": (4, 3), "1.out_channels": (8, 6), "1.groups": (4, 3),
            "2.num_groups": (8, 6), "2.num_channels": (8, 6), "3.in_channels": (8, 6),
        },
    ),
    "grouped": (
        nn.Sequential(conv(3, 12), conv(12, 8, groups=2), nn.GroupNorm(2, 8), conv(8, 2)), (1, 3, 4, 4),
        {"0": [5], "1": [0, 1]},
        {
            "0.out_channels": (12, 10), "1.in_channels": (12, 10), "1.out_channels": (8, 4), "2.num_channels": (8, 4),
            "3.in_channels": (8, 4),
        },
    ),
    "transposed": (
        nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 12, 2, 2, groups=6), nn.ConvTranspose2d(12, 8, 2), conv(8, 2)),
        (1, 3, 4, 4), {"0": [1, 2], "2": [0]},
        {
            "0.out_channels": (6, 4), "1.in_channels": (6, 4), "1.out_channels": (12, 8), "1.groups": (6, 4),
            "2.in_channels": (12, 8), "2.out_channels": (8, 7), "3.in_channels": (8, 7),
        },
    ),
    "layer norm": (
        nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)), (2, 5), {"0": [1]},
        {"0.out_features": (8, 7), "1.normalized_shape": ((8,), (7,)), "2.in_features": (8, 7)},
    ),
    "embedding": (
        nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3)), (2, 4), {"0": [0, 5]},
        {"0.embedding_dim": (6, 4), "1.in_features": (6, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PATCHED)
def test_a_plan_says_what_the_cut_changes_in_modules(name):
    model, shape, removed, expected = PATCHED[name]
    inputs = torch.randint(0, 9, shape) if isinstance(model[0], nn.Embedding) else torch.randn(shape)
    plan = sc.make_plan(sc.trace(model, inputs), removed, approximate=True)
    assert plan.patched == expected
    read = sc.Plan.from_json(plan.to_json())
    assert read == plan and read.patched == expected
    silent = dataclasses.replace(read, patched={})  # as a plan of a release that did not say
    for each in (plan, read, silent):
        small = sc.cut(model, each)
        before, after = sizes(model), sizes(small)
        assert {k: (before[k], after[k]) for k in before if before[k] != after[k]} == expected
        assert sc.Plan.from_json(sc.record(small)[-1]["cut"]).patched == expected


def test_the_whole_model_may_be_one_module():
    class Grown(nn.Linear):
        def __init__(self):
            super().__init__(4, 8)
            self.last = nn.Linear(8, 2)

        def forward(self, x):
            return self.last(super().forward(x).relu())

    model = Grown()
    plan = sc.make_plan(sc.trace(model, torch.randn(2, 4)), {"weight": [3]})
    assert plan.patched == {"out_features": (8, 7), "last.in_features": (8, 7)}
    assert sc.cut(model, plan).out_features == 7


@pytest.mark.parametrize(
    ("patched", "message"),
    [
        ({"0.out_channels": [8, 4]}, "changes 0.out_channels from 8 to 4, where its slices make 5 of 8"),
        ({"9.out_channels": [8, 4]}, "but it is None here"),
        ({"0.stride": [[2, 2], [1, 1]]}, r"but it is \(1, 1\) here"),
        ({"0.out_channels": [8]}, "what '0.out_channels' is before and after"),
        ({"0.out_channels": [8.0, 5.0]}, "must be whole numbers"),
        ({"0.out_channels": [True, False]}, "must be whole numbers"),
        ({"1.normalized_shape": [[-8], [5]]}, "must be whole numbers"),
    ],
)
def test_a_plan_that_changes_modules_otherwise_is_refused(model, plan, patched, message):
    before = sizes(model)
    text = json.dumps(json.loads(plan.to_json()) | {"patched": patched})
    with pytest.raises(sc.SecateurError, match=message):
        sc.cut(model, sc.Plan.from_json(text))
    assert sizes(model) == before
