"""SDPrun with a budget, weights by group, and groups left alone."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from test_sdprun import Net, batches, group, net, same, train
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.allocation.budget import Meter
from secateur.methods.sdprun import SDPrun
from secateur.tracing.api import trace

INPUTS = torch.randn(1, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def traced(model):
    return trace(model, INPUTS)


@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.4}, {"channels": 0.6}, {"macs": 0.6, "params": 0.3}])
@pytest.mark.parametrize("options", [{}, {"prox_every": 3}], ids=str)
def test_the_threshold_grows_until_the_budget_is_met_and_then_stands(budget, options):
    model = net(1)
    graph = traced(model)
    opt = SDPrun(model, graph, lr=0.1, c=1.0, mu=0.7, budget=sc.Budget(**budget), **options)
    meter = Meter(graph, sc.Budget(**budget))
    before, held = 0.0, []
    for x in batches(90):
        was, g = opt.reached, opt.param_groups[0]["g"]
        train(model, opt, [x])
        assert (opt.param_groups[0]["g"] > g) != was, "it grows exactly as long as the budget is not met"
        if opt.param_groups[0]["n"] % options.get("prox_every", 1) == 0:
            assert opt.reached == meter.met(graph.kept(sc.zero_channels(model, graph)))
        before, held = g, [*held, opt.reached]
    assert before > 0
    assert not held[0]
    assert held[-1]
    small = sc.cut(model, sc.zero_channels(model, graph))
    plan = sc.zero_channels(model, graph)
    assert sc.check(model, small, plan, INPUTS) < 1e-10
    for unit, fraction in budget.items():
        left = {"macs": graph.macs(plan), "params": graph.params(plan), "channels": int(graph.kept(plan).sum())}[unit]
        full = {"macs": graph.macs(), "params": graph.params(), "channels": int(graph.widths.sum())}[unit]
        assert left <= fraction * full


def test_with_a_constant_threshold_nothing_is_left_of_the_shrinkage():
    # the flat channel goes, and the one that stays ends at the minimum of the loss itself; without the hold it lags
    target = torch.tensor([[0.1, 0.0], [2.0, 1.0]], dtype=torch.float64)
    steep = torch.tensor([[0.0], [1.0]], dtype=torch.float64)

    def end(budget):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
        graph = trace(model, torch.ones(1, 2, dtype=torch.float64))
        with torch.no_grad():
            model[0].weight.copy_(target)
        model[1].requires_grad_(False)
        opt = SDPrun(model, graph, lr=0.1, c=0.2, mu=0.9, budget=budget)
        for _ in range(1500):
            model[0].weight.grad = (model[0].weight.detach() - target) * steep
            opt.step()
        return model[0].weight.detach()

    held = end(sc.Budget(channels=0.5))
    torch.testing.assert_close(held[1], target[1], rtol=1e-9, atol=1e-9)
    assert not held[0].any()
    assert (end(None)[1] - target[1]).norm() > 1e-3


def test_a_channel_that_comes_back_lets_the_threshold_grow_again():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    graph = trace(model, torch.ones(1, 1, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.5], [2.0]]))
    model[1].requires_grad_(False)
    opt = SDPrun(model, graph, lr=0.1, c=3.0, mu=0.7, budget=sc.Budget(channels=0.5))
    push = torch.zeros(2, 1, dtype=torch.float64)
    seen = []
    for n in range(150):
        push[0] = -3.0 if 10 <= n < 20 else 0.0
        model[0].weight.grad = push.clone()
        opt.step()
        seen.append(opt.reached)
    assert seen[9]
    assert not all(seen[10:30])
    assert seen[-1]


def test_the_hold_is_part_of_the_state():
    model = net(1)
    graph = traced(model)
    data = list(batches(80))

    def make(m):
        return SDPrun(m, graph, lr=0.1, c=1.0, mu=0.7, budget=sc.Budget(macs=0.5))

    opt = make(model)
    train(model, opt, data[:60])
    assert opt.reached
    again = copy.deepcopy(model)
    resumed = make(again)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert resumed.reached
    train(model, opt, data[60:])
    train(again, resumed, data[60:])
    same(model, again)
    assert opt.state_dict()["param_groups"] == resumed.state_dict()["param_groups"]


def test_after_a_cut_what_is_gone_still_counts():
    model = net(1)
    graph = traced(model)
    data = list(batches(80))
    opt = SDPrun(model, graph, lr=0.1, c=1.0, mu=0.7, budget=sc.Budget(macs=0.5))
    train(model, opt, data[:60])
    assert opt.reached
    whole, its = copy.deepcopy((model, opt))
    small = sc.cut(model, sc.zero_channels(model, graph), optimizer=opt)
    train(small, opt, data[60:])
    train(whole, its, data[60:])
    assert opt.reached
    assert opt.param_groups[0]["g"] == its.param_groups[0]["g"]
    x = next(iter(batches(1)))[0]
    torch.testing.assert_close(small.eval()(x), whole.eval()(x), rtol=1e-8, atol=1e-8)


def test_groups_that_are_not_wholly_pruned_do_not_count():
    model = net(1)
    graph = traced(model)
    norms = [p for n, p in model.named_parameters() if n.startswith("norm1")]
    rest = [p for p in model.parameters() if not any(p is q for q in norms)]
    opt = SDPrun(
        model, graph, lr=0.1, c=1.0, mu=0.7, budget=sc.Budget(channels=0.7),
        param_groups=[{"params": rest}, {"params": norms, "c": 0.0}],
    )  # fmt: skip
    train(model, opt, batches(80))
    dead = sc.zero_channels(model, graph)
    assert opt.reached
    assert graph.kept(dead).sum() <= 0.7 * graph.widths.sum()
    inner = next(g.name for g in graph.groups if g.name.startswith("conv1"))
    assert inner not in dead.removed or not dead.removed[inner]


def test_excluded_groups_are_plain_sgd():
    model = net(1)
    graph = traced(model)
    names = [g.name for g in graph.groups]
    opt = SDPrun(model, graph, lr=0.1, c=1.0, mu=0.7, exclude=names[:1])
    train(model, opt, batches(60))
    dead = sc.zero_channels(model, graph).removed
    assert not dead.get(names[0])
    assert any(dead.get(name) for name in names[1:])
    own = {a.name for a in graph.group(names[0]).producers}
    assert all("v" not in opt.state.get(p, {}) for n, p in model.named_parameters() if n in own)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_weight_is_a_factor_of_the_threshold(factor):
    with_weight, with_c = net(1), net(1)
    graph = traced(with_weight)
    every = {g.name: factor for g in graph.groups}
    train(with_weight, SDPrun(with_weight, graph, lr=0.1, c=0.3, mu=0.7, weights=every), batches(30))
    train(with_c, SDPrun(with_c, graph, lr=0.1, c=0.3 * factor, mu=0.7), batches(30))
    for p, q in zip(with_weight.parameters(), with_c.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    one = net(1)
    name = graph.groups[-1].name
    opt = SDPrun(one, graph, lr=0.1, c=0.3, mu=0.7, weights={name: 1e6})
    train(one, opt, batches(1))
    assert len(sc.zero_channels(one, graph).removed[name]) == len(graph.group(name)) - graph.group(name).least


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"conv9": 1.0}}, r"unknown group in SDPrun\(weights=...\)"),
        ({"weights": {"hidden.weight": 0.0}}, r"above 0.*exclude="),
        ({"weights": {"hidden.weight": math.nan}}, r"above 0"),
        ({"exclude": ["hiden"]}, r"unknown group or module in exclude 'hiden': did you mean 'hidden'"),
        ({"budget": sc.Budget(macs=0.001)}, r"the budget cannot be met"),
        ({"budget": sc.Budget(macs=0.5, round_to=8)}, r"round_to.*channel by channel"),
    ],
    ids=str,
)
def test_bad_values_are_told(options, message):
    model = Net().eval()
    graph = trace(model, INPUTS)
    hidden = next(g.name for g in graph.groups if "hidden" in g.name)
    if "hidden.weight" in options.get("weights", {}):
        options = {"weights": {hidden: options["weights"]["hidden.weight"]}}
    with pytest.raises(SecateurError, match=message):
        SDPrun(model, graph, **options)


def test_a_budget_needs_a_traced_graph():
    model = nn.Linear(2, 2, bias=False)
    by_hand = SimpleNamespace(groups=(group([1, 2], ("weight", 0)),))
    with pytest.raises(SecateurError, match="trace"):
        SDPrun(model, by_hand, budget=sc.Budget(channels=0.5))


def test_its_plan_is_that_of_the_zero_channels_until_the_model_is_cut():
    model = net(1)
    graph = traced(model)
    opt = SDPrun(model, graph, lr=0.1, c=1.0, mu=0.7, budget=sc.Budget(macs=0.5))
    assert not opt.done
    assert opt.steps_needed is None
    train(model, opt, batches(60))
    assert opt.done
    assert opt.plan() == sc.zero_channels(model, graph)
    assert len(opt.plan()) > 0
    sc.cut(model, opt.plan(), optimizer=opt)
    with pytest.raises(SecateurError, match="trace the smaller model"):
        opt.plan()


def test_detached_it_is_plain_sgd():
    model = net(1)
    graph = traced(model)
    opt = SDPrun(model, graph, lr=0.1, c=1.0, mu=0.7, budget=sc.Budget(macs=0.5))
    train(model, opt, batches(60))
    assert opt.reached
    plain = copy.deepcopy(model)
    opt.detach()
    assert not opt.done
    train(model, opt, batches(10))
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), batches(10))
    same(model, plain)
    assert not opt.state


def test_patterns_modules_and_types_are_left_alone():
    for exclude in ("conv*", [nn.Conv2d], "module"):
        model = net(1)
        graph = traced(model)
        given = [model.stem, model.conv1, model.conv2] if exclude == "module" else exclude
        opt = SDPrun(model, graph, lr=0.1, c=1.0, mu=0.7, exclude=given)
        train(model, opt, batches(60))
        assert set(opt.skipped) == {"stem", "conv1"}
        assert set(opt.plan().skipped) == {"stem", "conv1"}
        assert set(opt.plan().removed) == {"hidden"}
