"""IncReg, GReg and SPP: what the theory says of fixed sizes, exact cuts, exact resumption, what they leave alone."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import nn

import secateur as sc
from secateur._internal.errors import SecateurError
from secateur.methods.greg import GReg
from secateur.methods.increg import IncReg
from secateur.methods.spp import SPP
from secateur.methods.units import channel_units

HANDLES = {
    "increg": lambda *a, **k: IncReg(*a, **({"rate": 0.1, "limit": 1.0} | k)),
    "linear": lambda *a, **k: IncReg(*a, **({"rate": 0.1, "limit": 1.0, "rank_schedule": "piecewise_linear"} | k)),
    "greg1": lambda *a, **k: GReg(*a, **({"rule": "greg1", "rate": 0.1, "limit": 1.0} | k)),
    "greg2": lambda *a, **k: GReg(*a, **({"rule": "greg2", "rate": 0.1, "limit": 1.0, "pick": 0.02} | k)),
    "spp": lambda *a, **k: SPP(*a, **({"rate": 0.1, "every": 1} | k)),
}


class Residual(nn.Module):
    """A stream of eight channels and a block on it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.middle = nn.BatchNorm2d(12)
        self.back = nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.first(x)).tanh()  # at zero it has a slope: what is out must be held there
        return self.head((x + self.back(self.middle(self.up(x)).tanh())).tanh().mean((2, 3)))


def case(seed=0, **options):
    torch.manual_seed(seed)
    model = Residual()
    x = torch.randn(16, 2, 5, 5)
    optimizer = torch.optim.SGD(model.parameters(), **({"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3} | options))
    return model, sc.trace(model, x), optimizer, x, torch.randint(0, 4, (16,))


def train(model, optimizer, handle, x, y, steps, loss=True):
    for _ in range(steps):
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(x), y)
        (value if loss else 0 * value).backward()
        optimizer.step()
        handle.step()
        if handle.done:
            return


def test_ranks_are_within_groups_and_among_what_is_left():
    model, graph, *_ = case()
    names = [g.name for g in graph.groups]
    units = channel_units(model, graph, dict.fromkeys(names, 2))
    assert len(units) == sum(len(g) for g in graph.groups)
    scores = torch.rand(len(units), dtype=torch.float64)
    gone = torch.zeros(len(units), dtype=torch.bool)
    gone[[1, 9, 10]] = True
    ranks = units.ranks(scores, gone)
    for i in range(len(names)):
        own = torch.nonzero((units.group_of == i) & ~gone).flatten()
        assert ranks[own].tolist() == scores[own].argsort().argsort().tolist()
    assert (ranks[gone] == -1).all()


def test_sizes_are_those_of_everything_that_writes_a_channel():
    model, graph, *_ = case()
    units = channel_units(model, graph, {g.name: 1 for g in graph.groups})
    stream = next(i for i, n in enumerate(units.names) if len(graph.group(n)) == 8)
    writers = (model.first, model.norm, model.back)
    by_hand = sum(p.detach().abs().double().flatten(1).sum(1) if p.ndim > 1 else p.detach().abs().double()
                  for m in writers for p in m.parameters())  # fmt: skip
    torch.testing.assert_close(units.sizes()[units.group_of == stream], by_hand)


@pytest.mark.parametrize("name", HANDLES)
def test_with_fixed_sizes_exactly_the_smallest_go(name):
    model, graph, optimizer, _x, _y = case(lr=0.0, weight_decay=0.0, momentum=0.0)
    handle = HANDLES[name](model, graph, optimizer, keep=0.6)
    sizes = handle.units.sizes()
    expected = handle.units.ranks(sizes, handle.pruned) < handle.units.to_prune[handle.units.group_of]
    for _ in range(500):
        optimizer.step()
        handle.step()
        if handle.done:
            break
    assert handle.done
    assert torch.equal(handle.pruned, expected)
    assert handle.unfinished() == {}
    assert [int(k) for k in handle.units.to_prune] == [
        math.ceil(0.4 * len(graph.group(n)) - 1e-9) for n in handle.units.names
    ]


@pytest.mark.parametrize(
    ("handle", "options", "expected"),
    [(IncReg, {"rate": 0.05, "limit": 1.0, "every": 3}, 60), (SPP, {"rate": 0.05, "every": 2}, 40)],
)
def test_the_first_is_out_after_limit_over_rate_updates(handle, options, expected):
    model, graph, optimizer, *_ = case(lr=0.0)
    handle = handle(model, graph, optimizer, keep=0.5, **options)
    out = []
    for _ in range(expected):
        optimizer.step()
        handle.step()
        out.append(bool(handle.pruned.any()))
    assert out == [False] * (expected - 1) + [True]


@pytest.mark.parametrize("name", HANDLES)
@pytest.mark.parametrize("rate", [0.1, 0.002])
def test_how_long_it_takes_is_known_beforehand(name, rate):
    model, graph, optimizer, *_ = case(lr=0.0)
    options = {"settle": 7} if "greg" in name else {}
    handle = HANDLES[name](model, graph, optimizer, keep=0.4, rate=rate, every=2 if rate == 0.1 else 1, **options)
    needed = handle.steps_needed
    if rate < 0.01 and name != "increg":  # one is enough
        assert needed > 250
        return
    for _ in range(2 * needed):
        optimizer.step()
        handle.step()
    assert needed <= handle.steps <= needed * (1.02 if rate < 0.01 else 1) + 1


@pytest.mark.parametrize("name", ["increg", "spp"])
def test_sizes_that_waver_do_not_keep_a_group_from_being_through(name):
    """200 channels of nearly the same size: by the ranks of one moment some twenty would never be out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = HANDLES[name](model, sc.trace(model, torch.zeros(1, 4)), optimizer, keep=0.5, rate=0.05)
    for _ in range(2 * handle.steps_needed):
        optimizer.step()
        with torch.no_grad():
            sizes = (1 + 2e-3 * torch.arange(200)) * (1 + 0.05 * torch.randn(200))
            model[0].weight.copy_(sizes[:, None] / 5).masked_fill_(handle.pruned[:, None], 0)
            model[0].bias.zero_()
        handle.step()
    assert handle.done


@pytest.mark.parametrize("name", ["increg", "spp"])
def test_a_channel_that_grows_recovers(name):
    model, graph, optimizer, *_ = case(lr=0.0)
    handle = HANDLES[name](model, graph, optimizer, keep=0.5, rate=0.02)
    which = "probability" if name == "spp" else "penalty"
    first = int(handle.units.sizes().argmin())
    for _ in range(10):
        optimizer.step()
        handle.step()
    assert getattr(handle, which)[first] == pytest.approx(0.2)
    if name == "spp":
        handle.unmask()
    with torch.no_grad():
        for p, number in handle.units.owned:
            p[(number == first).expand_as(p)] = 50.0
    for _ in range(60):
        optimizer.step()
        handle.step()
    assert getattr(handle, which)[first] == 0
    assert not handle.pruned[first]


@pytest.mark.parametrize("name", HANDLES)
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_it_ends_in_an_exact_cut_and_what_is_out_stays_out(name, make):
    model, graph, _, x, y = case()
    extra = {"momentum": 0.9} if make is torch.optim.SGD else {}
    optimizer = make(model.parameters(), lr=0.01, weight_decay=1e-3, **extra)
    handle = HANDLES[name](model, graph, optimizer, budget=sc.Budget(macs=0.5))
    train(model, optimizer, handle, x, y, 400)
    assert handle.done
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        handle.step()
    for p, gone in handle.units.by_parameter(handle.pruned):
        assert not p[gone.expand_as(p)].any()
        for value in optimizer.state[p].values():
            if isinstance(value, torch.Tensor) and value.shape == p.shape:
                assert not value[gone.expand_as(p)].any()
    plan = handle.plan()
    assert graph.macs(plan) <= 0.5 * graph.macs()
    small = sc.cut(model, plan, optimizer=optimizer)
    assert sc.check(model, small, plan, x) < 1e-5
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    handle.detach()
    nn.functional.cross_entropy(small.train()(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", HANDLES)
@pytest.mark.parametrize("stop", [3, 11])
def test_a_resumed_run_ends_with_the_same_bits(name, stop):
    runs = []
    for resumed in (False, True):
        model, graph, optimizer, x, y = case()
        handle = HANDLES[name](model, graph, optimizer, keep=0.5)
        train(model, optimizer, handle, x, y, stop)
        if resumed:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), handle.state_dict()))
            model, graph, optimizer, x, y = case(seed=0)
            with torch.no_grad():
                model.first.weight.mul_(2)  # other sizes at the start must not matter
            handle = HANDLES[name](model, graph, optimizer, keep=0.5)
            for thing, state in zip((model, optimizer, handle), saved, strict=True):
                thing.load_state_dict(state)
        train(model, optimizer, handle, x, y, 25 - stop)
        runs.append((model.state_dict(), handle.pruned))
    assert all(torch.equal(v, runs[1][0][k]) for k, v in runs[0][0].items())
    assert torch.equal(runs[0][1], runs[1][1])


def test_the_penaltys_gradient_is_that_of_half_lambda_times_the_square():
    model, graph, optimizer, x, _y = case()
    handle = IncReg(model, graph, optimizer, keep=0.5)
    handle.penalty = torch.rand(len(handle.units), dtype=torch.float64)
    parameters = [p for p, _ in handle.units.owned]
    total = sum((lam / 2 * p.square()).sum() for p, lam in handle.units.by_parameter(handle.penalty))
    expected = torch.autograd.grad(total, parameters)
    optimizer.zero_grad()
    (0 * model(x).sum()).backward()
    handle.before()
    for p, g in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, g.to(p), rtol=1e-5, atol=1e-8)


class Quadratic(nn.Module):
    """Two channels with weights ``w`` under ``h/2 (w - w0)^2``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(1, 2, bias=False).double()
        self.b = nn.Linear(2, 1, bias=False).double()
        with torch.no_grad():
            self.a.weight.fill_(1.0)
            self.b.weight.fill_(1.0)

    def forward(self, x):
        return self.b(self.a(x))


def test_a_slowly_growing_penalty_follows_the_ridge_path_and_greg2_picks_the_flat_one():
    model = Quadratic()
    graph = sc.trace(model, torch.ones(2, 1).double())
    optimizer = torch.optim.SGD([model.a.weight], lr=0.05)
    handle = GReg(
        model,
        graph,
        torch.optim.SGD(model.parameters(), lr=0.05),
        keep=0.5,
        rule="greg2",
        rate=0.004,
        limit=2.0,
        pick=0.8,
    )
    optimizer = handle.optimizer
    h = torch.tensor([[3.0], [1.0]], dtype=torch.float64)  # both start at w0 = 1
    for _ in range(1500):
        optimizer.zero_grad()
        (h / 2 * (model.a.weight - 1).square()).sum().backward()
        optimizer.step()
        handle.step()
    lam = float(handle.penalty[0])
    assert 0.5 < lam < 0.8
    assert not handle.selected.any()
    torch.testing.assert_close(model.a.weight.detach(), h / (h + lam), rtol=2e-2, atol=0)
    while not handle.selected.any():
        optimizer.zero_grad()
        (h / 2 * (model.a.weight - 1).square()).sum().backward()
        optimizer.step()
        handle.step()
    assert handle.selected.tolist() == [False, True]


def test_masks_come_as_often_as_they_should_and_weights_come_back_to_the_bit():
    model, graph, optimizer, _x, _y = case(lr=0.0, momentum=0.0, weight_decay=0.0)
    handle = SPP(model, graph, optimizer, keep=0.5, every=10**6, seed=3)
    before = [p.detach().clone() for p, _ in handle.units.owned]
    handle.probability = torch.linspace(0, 0.9, len(handle.units), dtype=torch.float64)
    count, many = torch.zeros(len(handle.units)), 2000
    for _ in range(many):
        optimizer.step()
        handle.step()
        count += handle.masked
    spread = (handle.probability * (1 - handle.probability) / many).sqrt()
    assert ((count / many - handle.probability).abs() < 4.5 * spread + 1e-12).all()
    assert any(not torch.equal(a, p) for a, (p, _) in zip(before, handle.units.owned, strict=True))
    handle.unmask()
    assert all(torch.equal(a, p) for a, (p, _) in zip(before, handle.units.owned, strict=True))


def test_masked_weights_get_no_gradient_and_no_momentum():
    model, graph, optimizer, x, y = case(weight_decay=0.0)
    handle = SPP(model, graph, optimizer, keep=0.5, every=10**6)
    train(model, optimizer, handle, x, y, 2)
    handle.probability.fill_(0.5)
    handle.before()  # a step in which the optimizer does nothing
    handle.step()
    true = [kept.clone() for _, _, kept in handle.mask.hidden[: len(handle.units.owned)]]
    hidden = [h.clone() for _, h in handle.units.by_parameter(handle.masked)]
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    for p, h in zip((p for p, _ in handle.units.owned), hidden, strict=True):
        assert not p[h.expand_as(p)].any()
    optimizer.step()
    moved = False
    for (p, _), h, kept in zip(handle.units.owned, hidden, true, strict=True):
        where = h.expand_as(p)
        assert torch.equal(p[where], kept[where])
        assert not p.grad[where].any()
        assert not optimizer.state[p]["momentum_buffer"][where].any()
        moved |= not torch.equal(p[~where], kept[~where])
    assert moved


def test_at_the_end_the_readers_are_scaled_to_the_mean_over_masks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = SPP(model, sc.trace(model, x), optimizer, keep=0.75)
    handle.probability = torch.tensor([0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    mean = torch.zeros(5, 2, dtype=torch.float64)
    for bits in range(16):
        mask = torch.tensor([bits >> i & 1 for i in range(4)], dtype=torch.float64)
        chance = torch.where(mask > 0, 1 - handle.probability, handle.probability).prod()
        mean += chance * model[1](model[0](x) * mask)
    with torch.no_grad():
        handle._settle(handle.probability > 0)
    torch.testing.assert_close(model(x), mean)
    assert not handle.probability.any()


@pytest.mark.parametrize("name", ["increg", "spp"])
def test_columns_of_convolutions_stay_zero_by_a_mask(name):
    model, graph, optimizer, x, y = case()
    handle = HANDLES[name](model, graph, optimizer, keep={"up": 0.5, "back": 0.75}, unit="column")
    train(model, optimizer, handle, x, y, 400)
    train(model, optimizer, handle, x, y, 5)
    assert handle.done
    columns = model.up.weight.detach().abs().sum(0)
    assert int((columns == 0).sum()) == 36
    assert int((model.back.weight.detach().abs().sum(0) == 0).sum()) == 3
    with pytest.raises(SecateurError, match="only channels make a plan"):
        handle.plan()


def test_a_skipped_optimizer_step_is_no_step():
    model, graph, optimizer, *_ = case(lr=0.0, weight_decay=0.0)
    before = copy.deepcopy(model.state_dict())
    handle = SPP(model, graph, optimizer, keep=0.5, every=10**6)
    handle.probability.fill_(0.5)
    optimizer.step()
    for _ in range(5):
        handle.step()  # as under mixed precision, where a step is left out after an overflow
    assert handle.steps == 1
    handle.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(SecateurError, match="is detached"):
        handle.step()


@pytest.mark.parametrize("name", HANDLES)
def test_a_closure_that_computes_gradients_makes_no_difference(name):
    """As Lightning calls an optimizer; the handle's turn comes once the gradients are there."""
    ends = []
    for by_closure in (False, True):
        torch.manual_seed(0)
        model, graph, optimizer, x, y = case()
        handle = HANDLES[name](model, graph, optimizer, keep=0.5, every=2)

        def closure(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(model(x), y)
            value.backward()
            return value

        losses = []
        for _ in range(30):
            if by_closure:
                losses.append(optimizer.step(closure).item())
            else:
                losses.append(closure().item())
                optimizer.step()
            handle.step()
        assert handle.steps > 10
        ends.append((losses, (handle.steps, handle.pruned.tolist()), copy.deepcopy(model.state_dict())))
    assert ends[0][:2] == ends[1][:2]
    assert all(torch.equal(value, ends[1][2][key]) for key, value in ends[0][2].items())


@pytest.mark.parametrize("name", HANDLES)
def test_a_handle_can_be_made_again_and_the_old_one_lets_go(name):
    """As in a notebook cell that is run twice, with a new optimizer."""
    model, graph, optimizer, x, y = case()
    first = HANDLES[name](model, graph, optimizer, keep=0.5)
    train(model, optimizer, first, x, y, 3)
    again = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with pytest.warns(
        sc.SecateurWarning, match=rf"takes the place of {type(first).__name__}, .* of 10 units .* 3 steps"
    ):
        second = HANDLES[name](model, graph, again, keep=0.5)
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(SecateurError, match="is detached"):
        first.step()
    train(model, again, second, x, y, 400)
    assert second.done
    assert sc.check(model, sc.cut(model, second.plan()), second.plan(), x) < 1e-5


def test_a_finished_handle_is_replaced_without_a_word():
    model, graph, optimizer, x, y = case()
    first = HANDLES["increg"](model, graph, optimizer, keep=0.75)
    train(model, optimizer, first, x, y, 400)
    assert first.done
    IncReg(model, graph, optimizer, keep=0.5)  # warnings are errors here


def test_a_handle_that_could_not_be_made_leaves_the_one_before_as_it_was():
    model, graph, optimizer, x, y = case()
    first = SPP(model, graph, optimizer, keep=0.5)
    with pytest.raises(SecateurError, match="unstable"):
        IncReg(model, graph, torch.optim.SGD(model.parameters(), lr=10.0), keep=0.5)
    train(model, optimizer, first, x, y, 2)
    assert first.steps == 2


@pytest.mark.parametrize("name", HANDLES)
def test_who_lets_a_handle_go_has_detached_it(name):
    model, graph, optimizer, x, y = case(lr=0.0, momentum=0.0, weight_decay=0.0)
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    handle = HANDLES[name](model, graph, optimizer, keep=0.5)
    train(model, optimizer, handle, x, y, 3)
    known = weakref.ref(handle)
    del handle
    assert known() is None, "something holds it"
    assert not optimizer._optimizer_step_pre_hooks
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True)), "a mask was left behind"
    again = HANDLES[name](model, graph, optimizer, keep=0.5)  # without a word
    assert again.steps == 0


def test_a_handle_is_not_copied_since_a_copy_would_prune_nothing():
    model, graph, optimizer, *_ = case()
    handle = IncReg(model, graph, optimizer, keep=0.5)
    with pytest.raises(SecateurError, match=r"state_dict\(\)"):
        copy.deepcopy(handle)
    copy.deepcopy(model), copy.deepcopy(optimizer)  # these are the user's, and free


def test_wrappers_and_maximisers_are_refused():
    model, graph, optimizer, *_ = case()
    for options in ({"keep": 0.5}, {"budget": sc.Budget(macs=0.5)}):
        with pytest.raises(SecateurError, match="not a wrapper"):
            IncReg(nn.DataParallel(model), graph, optimizer, **options)
    with pytest.raises(SecateurError, match="maximises"):
        IncReg(model, graph, torch.optim.SGD(model.parameters(), lr=0.1, maximize=True), keep=0.5)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("part", [0.9, 1.1])
def test_the_bound_is_where_training_explodes(nesterov, part):
    bound = 2 * 1.9 / (2.8 if nesterov else 1)
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9, nesterov=nesterov)
    for _ in range(400):
        optimizer.zero_grad()
        (part * bound / 0.1 / 2 * w.square()).sum().backward()
        optimizer.step()
    assert (w.abs().item() > 1) == (part > 1)
    model, graph, optimizer, *_ = case(lr=0.1, weight_decay=0.0, nesterov=nesterov)
    limit = part * bound / 0.1
    if part > 1:
        with pytest.raises(SecateurError, match="must stay below"):
            IncReg(model, graph, optimizer, keep=0.5, limit=limit)
        assert not optimizer._optimizer_step_pre_hooks
    else:
        IncReg(model, graph, optimizer, keep=0.5, limit=limit)


def test_what_adam_knows_of_a_masked_channel_stays():
    model, graph, _, x, y = case()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    handle = SPP(model, graph, optimizer, keep=0.5, every=10**6)
    handle.probability.fill_(0.5)
    train(model, optimizer, handle, x, y, 5)
    hidden = [h.clone() for _, h in handle.units.by_parameter(handle.masked)]
    train(model, optimizer, handle, x, y, 1)
    for (p, _), h in zip(handle.units.owned, hidden, strict=True):
        state, where = optimizer.state[p], h.expand_as(p)
        assert not state["exp_avg"][where].any()
        assert where.sum() == 0 or state["exp_avg_sq"][where].any()


@pytest.mark.parametrize("name", HANDLES)
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_losses_change_nothing(name, fused):
    ends = []
    for scaled in (False, True):
        model, graph, optimizer, x, y = case(fused=fused)
        handle = HANDLES[name](model, graph, optimizer, keep=0.5, rate=0.04)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for _ in range(12):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            handle.step()
        handle.detach()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_half_precision_in_the_forward_prunes_too():
    model, graph, optimizer, x, y = case()
    handle = IncReg(model, graph, optimizer, keep=0.5, rate=0.1, limit=1.0)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = nn.functional.cross_entropy(model(x), y)
        value.backward()
        optimizer.step()
        handle.step()
    assert handle.done
    assert sc.check(model, sc.cut(model, handle.plan()), handle.plan(), x) < 1e-5


def test_masks_leave_no_trace_in_a_channels_running_statistics():
    model, graph, optimizer, x, _ = case(lr=0.0, momentum=0.0, weight_decay=0.0)
    plain = copy.deepcopy(model)
    handle = SPP(model, graph, optimizer, keep=0.5, every=10**6)
    handle.probability[handle.units.group_of == handle.units.names.index("first")] = 0.7
    often = torch.zeros(8)
    for _ in range(30):  # the same images in every step: a channel's statistics go to the same end
        optimizer.step()
        handle.step()
        often += ~handle.masked[handle.units.group_of == handle.units.names.index("first")]
        model(x)
    handle.unmask()
    for _ in range(400):
        plain(x)
    assert often.min() > 0
    share = 1 - 0.9**often  # how far a channel has come that was there so often
    expected = 1 + share * (plain.norm.running_var - 1)
    torch.testing.assert_close(model.norm.running_var, expected, rtol=1e-3, atol=1e-4)


def test_greg2_takes_off_the_weight_decay_that_a_parameter_has_and_no_more():
    model, graph, _, x, _ = case()
    norms = [p for m in (model.norm, model.middle) for p in m.parameters()]
    others = [p for p in model.parameters() if all(p is not n for n in norms)]
    for make, taken in ((torch.optim.SGD, 1e-3), (torch.optim.AdamW, 0.0)):
        optimizer = make([{"params": others, "weight_decay": 1e-3}, {"params": norms, "weight_decay": 0.0}], lr=0.01)
        handle = GReg(model, graph, optimizer, keep=0.5, rule="greg2", rate=0.1, limit=1.0, pick=0.01)
        for _ in range(2):
            optimizer.step()
            handle.step()
        assert handle.selected.any()
        optimizer.zero_grad()
        (0 * model(x).sum()).backward()
        handle.before()
        stays = int((~handle.selected[handle.units.group_of == handle.units.names.index("up")]).nonzero()[0])
        torch.testing.assert_close(model.up.weight.grad[stays], -taken * model.up.weight[stays])
        assert not model.middle.weight.grad[stays].any()
        handle.detach()


@pytest.mark.parametrize(("handle", "word"), [(IncReg, "larger rate"), (SPP, "smaller every")])
def test_what_is_still_to_go_is_told_with_what_to_change(handle, word):
    model, graph, optimizer, x, y = case()
    handle = handle(model, graph, optimizer, keep=0.5)
    train(model, optimizer, handle, x, y, 3)
    assert sum(handle.unfinished().values()) == 10
    with pytest.raises(SecateurError, match=f"after 3 steps these channels are still to go: .*{word}"):
        handle.plan()


@pytest.mark.parametrize("handle", [IncReg, SPP])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either budget="),
        ({"keep": 0.0}, r"a fraction in \(0, 1\]"),
        ({"keep": 1.5}, r"a fraction in \(0, 1\]"),
        ({"keep": 1.0}, "nothing to prune"),
        ({"keep": {"nowhere": 0.5}}, "nowhere"),
        ({"keep": 0.5, "budget": sc.Budget(macs=0.5)}, "either budget="),
        ({"budget": sc.Budget(macs=1.0)}, "within it already"),
        ({"budget": sc.Budget(macs=0.001)}, "cannot be met|feasible"),
        ({"keep": 0.5, "exclude": ["frist"]}, "first"),
        ({"keep": 0.5, "rate": 0.0}, "rate=0.0"),
        ({"keep": 0.5, "every": 0}, "every=0"),
        ({"keep": 1.0, "unit": "column"}, "nothing to prune"),
        ({"keep": 0.5, "unit": "column", "exclude": ["nope"]}, "unknown layer or module"),
        ({"keep": 0.5, "unit": "row"}, "known: channel, column|unknown unit"),
        ({"keep": 0.5, "rank_schedule": "linear"}, "piecewise_linear"),
        ({"keep": 0.5, "increment": 1}, "unknown option of"),
        ({"keep": 0.5, "exclude": 1}, "exclude=1: patterns"),
        ({"keep": 0.5, "strategy": "globl"}, "did you mean 'global'"),
        ({"budget": sc.Budget(macs=0.5), "unit": "column"}, "columns have no budget"),
    ],
)
def test_bad_input_is_told_and_nothing_is_attached(handle, options, message):
    model, graph, optimizer, *_ = case()
    with pytest.raises(SecateurError, match=message):
        handle(model, graph, optimizer, **options)
    assert not optimizer._optimizer_step_pre_hooks


def test_unstable_learning_rates_are_told_before_they_explode():
    model, graph, optimizer, x, y = case(lr=2.0, momentum=0.9)
    with pytest.raises(SecateurError, match=r"must stay below 3.8"):
        IncReg(model, graph, optimizer, keep=0.5)
    model, graph, optimizer, x, y = case(lr=0.1)
    handle = IncReg(model, graph, optimizer, keep=0.5, rate=1.0, limit=10.0)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    with pytest.raises(SecateurError, match="unstable"):
        train(model, optimizer, handle, x, y, 20)
    with pytest.raises(SecateurError, match="does not hold first\\.bias"):
        IncReg(model, graph, torch.optim.SGD([model.first.weight], lr=0.1), keep=0.5)


def test_the_state_of_another_handle_is_refused():
    model, graph, optimizer, *_ = case()
    one = IncReg(model, graph, optimizer, keep=0.5)
    one.detach()
    for other in (
        IncReg(*case()[:3], keep={"up": 0.5}), IncReg(*case()[:3], keep=0.25), SPP(*case()[:3], keep=0.5),
        IncReg(*case()[:3], keep=0.5, rate=1e-3),
    ):  # fmt: skip
        with pytest.raises(SecateurError, match="method, budget or model differ"):
            other.load_state_dict(one.state_dict())
        assert other.steps == 0
