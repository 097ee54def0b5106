"""Refit: against least squares by NumPy, where the answer is exact, and on trained networks."""

from __future__ import annotations

import copy
from collections import UserDict

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from secateur._internal.batches import read_batch
from secateur._internal.errors import SecateurError
from secateur._internal.memory import available
from secateur._internal.workload import Workload
from secateur.curvature.eigenbasis import eigenbasis_of
from secateur.curvature.layers import spread
from secateur.curvature.passes import STRANGE
from secateur.lab.models.registry import build
from secateur.lab.training.loop import fit
from secateur.measure.accuracy import accuracy
from secateur.plan import Plan
from secateur.repair.examples import Examples, Part, _split
from secateur.repair.refit import _by_examples, _done_if_nearer, _Job, least_squares, refitted
from secateur.surgery.low_rank.bottleneck import bottlenecked, three
from secateur.tracing.graph import fingerprint

CPU = torch.device("cpu")


def examples(*shape, n=64, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(n, *shape, dtype=torch.float64), torch.zeros(n, dtype=torch.int64))]


def removing(model, x, group, positions):
    graph = sc.trace(model, x)
    return sc.make_plan(graph, {group: positions})


class Residual(nn.Module):
    """A stream of four channels and a block on it, one convolution of it grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.wide = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.back = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = x + self.back(self.wide(x).relu())
        return self.head(x.mean((2, 3)))


class Sequence(nn.Module):
    """Tokens through a feed-forward of two linears, with a 1-D convolution before."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(3, 6, 3, stride=2, padding=2, dilation=2)
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 2)

    def forward(self, x):
        return self.down(self.up(self.first(x).transpose(1, 2)).tanh())


NETWORKS = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)),
        (5,),
    ),
    "residual": (Residual, (2, 6, 6)),
    "sequence": (Sequence, (3, 12)),
    "normed": (lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), (5,)),
}


@pytest.fixture(params=NETWORKS)
def network(request):
    make, shape = NETWORKS[request.param]
    torch.manual_seed(1)
    return make().double().eval(), examples(*shape)


def test_the_step_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(64, 5)), rng.normal(size=(64, 3)), rng.normal(size=(3, 5))
    step = least_squares(*(torch.tensor(a)[None] for a in (x, y, w)), damping=0.0)[0].numpy()
    seen, held = slice(0, 48), slice(48, 64)
    best = np.linalg.lstsq(x[seen], y[seen], rcond=None)[0].T - w
    missing, moved = y[held] - x[held] @ w.T, x[held] @ best.T
    length = np.clip((moved * missing).sum() / (moved**2).sum(), 0, 1)
    np.testing.assert_allclose(step, length * best, atol=1e-10)


def test_a_step_that_other_images_do_not_bear_out_is_not_taken():
    torch.manual_seed(0)
    x, y = torch.randn(1, 64, 5).double(), torch.randn(1, 64, 3).double()
    y[:, :48] += 5 * x[:, :48, :3]  # what is seen says one thing, what is held out the contrary
    y[:, 48:] -= 5 * x[:, 48:, :3]
    assert least_squares(x, y, torch.zeros(1, 3, 5), 1e-3).abs().max() == 0


def test_inputs_of_zero_leave_a_layer_alone():
    x = torch.zeros(2, 16, 4)
    assert not least_squares(x, torch.ones(2, 16, 2), torch.ones(2, 2, 4), 0.0).any()
    x[1] = torch.randn(16, 4)  # one group alone sees zeros
    step = least_squares(x, torch.ones(2, 16, 2), torch.ones(2, 2, 4), 1e-3)
    assert not step[0].any()
    assert step[1].any()
    x[1, :, 3] = 0
    with pytest.raises(SecateurError, match=r"inputs of 'a.b' are linearly dependent, and damping=0"):
        least_squares(x, torch.ones(2, 16, 2), torch.ones(2, 2, 4), 0.0, "a.b")


def test_what_other_channels_can_say_is_restored_wholly():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():  # channel 6 is twice channel 1; channel 2 is constant
        model[0].weight[6], model[0].bias[6] = 2 * model[0].weight[1], 2 * model[0].bias[1]
        model[0].weight[2], model[0].bias[2] = 0, 3
    data = examples(5)
    plan = removing(model, data[0][0], "0", [2, 6])
    small = sc.cut(model, plan)
    assert (small(data[0][0]) - model(data[0][0])).abs().max() > 0.1
    assert sc.refit(model, small, plan, data, damping=1e-12) == {}
    fresh = torch.randn(100, 5).double()
    torch.testing.assert_close(small(fresh), model(fresh), rtol=1e-7, atol=1e-7)


def test_grouped_and_depthwise_layers_are_restored_too():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        for layer in model[:2]:
            layer.weight[5], layer.bias[5] = layer.weight[0], layer.bias[0]
    data = examples(2, 6, 6, n=200)
    sc.recalibrate(model, data)
    plan = removing(model, data[0][0], "0", [5])
    small = sc.cut(model, plan)
    sc.refit(model, small, plan, data, damping=1e-12)
    torch.testing.assert_close(small(data[0][0]), model(data[0][0]), rtol=1e-5, atol=1e-5)
    assert small[1].groups == 5


@pytest.mark.parametrize("examples", [2, 7, 64])
def test_where_nothing_goes_nothing_changes(network, examples):
    model, data = network
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):  # statistics of other images than those seen
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    plan = removing(model, data[0][0], sc.trace(model, data[0][0]).groups[0].name, [])
    small = sc.cut(model, plan)
    assert sc.refit(model, small, plan, data, examples=examples) == {}
    for (name, one), two in zip(model.state_dict().items(), small.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("samples", [1, 2, 5, 20])
@pytest.mark.parametrize("columns", [3, 40])
def test_few_samples_do_little_harm(samples, columns):
    worse = []
    for seed in range(20):
        torch.manual_seed(seed)
        x, noise = torch.randn(1, samples, columns), torch.randn(1, samples, 4)
        step = least_squares(x, noise, torch.zeros(1, 4, columns), 1e-3)
        worse.append(float((torch.randn(500, columns).double() @ step[0].T).square().mean()))
    assert sum(worse) / 20 < 0.5  # the noise's variance is 1


def test_through_the_samples_products_the_step_is_the_same():
    torch.manual_seed(0)
    x, y, table = torch.randn(2, 60, 50).double(), torch.randn(2, 60, 3).double(), torch.randn(2, 3, 50).double()
    few = least_squares(x, y, table, 1e-2)  # 44 samples are seen, fewer than columns
    missing, seen = y - x @ table.mT, x[:, :44]
    ridge = 1e-2 * seen.square().sum((1, 2)) / 50
    step = torch.linalg.solve(seen.mT @ seen + ridge[:, None, None] * torch.eye(50), seen.mT @ missing[:, :44]).mT
    moved = x[:, 44:] @ step.mT
    length = ((moved * missing[:, 44:]).sum((1, 2)) / moved.square().sum((1, 2))).clamp(0, 1)
    torch.testing.assert_close(few, step * length[:, None, None])


def test_it_comes_closer_and_leaves_everything_else_as_it_was(network):
    model, data = network
    sc.recalibrate(model, data)
    graph = sc.trace(model, data[0][0])
    plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(params=0.6))
    small = sc.cut(model, plan)
    fresh = torch.randn(200, *data[0][0].shape[1:], dtype=torch.float64)
    before_fit, recalibrated = copy.deepcopy(small), copy.deepcopy(small)
    sc.recalibrate(recalibrated, data)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    small.train()
    assert sc.refit(model, small, plan, data) == {}
    assert small.training
    assert all(p.requires_grad and p.grad is None for p in small.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for both in (model, small) for m in both.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    small.eval()
    away = [(s(fresh) - model(fresh)).square().mean() for s in (before_fit, recalibrated, small)]
    assert away[2] < 0.85 * min(away[:2])


def test_in_order_each_layer_sees_what_the_fitted_ones_before_it_give():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    data = examples(4)
    x = data[0][0]
    plan = removing(model, x, "0", [0, 3])
    small = sc.cut(model, plan)
    by_hand = copy.deepcopy(small)
    with torch.no_grad():
        for i in (0, 2, 4):
            inputs, wanted = (torch.cat([by_hand[:i](x), torch.ones(64, 1)], 1), model[: i + 1](x))
            wanted = wanted[:, [1, 2, 4, 5]] if i == 0 else wanted
            table = torch.cat([by_hand[i].weight, by_hand[i].bias[:, None]], 1)
            table = table + least_squares(inputs[None], wanted[None], table[None], 1e-3)[0]
            by_hand[i].weight.copy_(table[:, :-1])
            by_hand[i].bias.copy_(table[:, -1])
    sc.refit(model, small, plan, data)
    for one, two in zip(small.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, two)


class Shared(nn.Module):
    """One linear twice, one tied, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last, self.never = (nn.Linear(6, 6) for _ in range(4))
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.last.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.last(self.tied(self.twice(self.twice(self.first(x).relu()).relu()).relu())))


class Toeplitz(nn.Conv1d):
    """A line of numbers [n, l] along which it slides, as in the pitch tracker PESTO; of its class, inputs are wider."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(1, 1, inputs + outputs - 1, padding=outputs - 1, bias=False)

    def forward(self, x):
        return super().forward(x.unsqueeze(-2)).squeeze(-2)


def test_a_convolution_that_takes_a_line_is_left_as_it_is():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 12), Toeplitz(12, 9)).double()
    data = examples(6, n=400)
    plan = removing(model, data[0][0], "0", [1, 5])
    small = sc.cut(model, plan)
    weight, error = small[3].weight.clone(), (small(data[0][0]) - model(data[0][0])).norm()
    assert sc.refit(model, small, plan, data) == {"3": STRANGE}
    assert torch.equal(small[3].weight, weight)
    assert (small(data[0][0]) - model(data[0][0])).norm() < 0.8 * error


def test_layers_that_run_twice_or_share_a_weight_are_fitted_to_all_they_compute():
    torch.manual_seed(0)
    model = Shared().double()
    data = examples(6, n=400)
    plan = removing(model, data[0][0], "first", [1])
    small = sc.cut(model, plan)
    before = {name: p.clone() for name, p in small.named_parameters()}
    error = (small(data[0][0]) - model(data[0][0])).norm()
    assert sc.refit(model, small, plan, data) == {"never": "its own forward does not run"}
    changed = {name for name, p in small.named_parameters() if not torch.allclose(p, before[name])}
    assert changed == {name for name in before if not name.startswith(("first", "never"))}
    assert small.tied.weight is small.last.weight
    assert (small(data[0][0]) - model(data[0][0])).norm() < 0.8 * error


class Offset(nn.Module):
    """A root-mean-square norm whose weight is learnt as a difference from 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(0.1 * torch.randn(width)), 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class Around(nn.Module):
    """A layer norm over the channels of feature maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width)), 1e-6

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * y + self.bias[:, None, None]


@pytest.mark.parametrize("kind", ["layer norm", "root mean square", "difference", "around"])
def test_the_scale_of_a_norm_over_channels_is_the_least_squares_of_each(kind):
    torch.manual_seed(0)
    make = {"layer norm": nn.LayerNorm, "root mean square": nn.RMSNorm, "difference": Offset, "around": Around}[kind]
    if kind == "around":
        model = nn.Sequential(nn.Conv2d(5, 8, 1), make(8), nn.Conv2d(8, 3, 1)).double()
        x = torch.randn(80, 5, 2, 3, dtype=torch.float64)
    else:
        norm = make(8, eps=1e-6) if kind == "root mean square" else make(8)
        model = nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 3)).double()
        x = torch.randn(80, 6, 5, dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(8))
    plan = removing(model, x[:2], "0", [1, 4])
    small = sc.cut(model, plan)
    cut = copy.deepcopy(small)
    assert sc.refit(model, small, plan, [x], damping=0.0) == {}
    with torch.no_grad():
        y, found = (m[:2](x).movedim(1 if kind == "around" else -1, 0).flatten(1).unsqueeze(2) for m in (model, cut))
        y, offset, bias = y[[0, 2, 3, 5, 6, 7]], float(kind == "difference"), getattr(cut[1], "bias", None)
        start = cut[1].weight[:, None, None] + offset
        columns = (found if bias is None else found - bias[:, None, None]) / start
        if bias is not None:
            columns, start = (
                torch.cat([columns, torch.ones_like(columns)], 2), torch.cat([start, bias[:, None, None]], 2)
            )  # fmt: skip
        expected = (start + least_squares(columns, y, start, 0.0))[:, 0]
        fitted = (small[1].weight + offset, *([] if bias is None else [small[1].bias]))
        torch.testing.assert_close(torch.stack(fitted, 1), expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(small[1].weight, cut[1].weight)


class Siamese(nn.Module):
    """One encoder for two inputs, whose second layer is also a third layer's, which has a bias of its own."""

    def __init__(self, own_bias: bool) -> None:
        super().__init__()
        self.encode, self.second, self.third = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(8, 6, bias=own_bias)
        self.third.weight = self.second.weight
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(12, 2)

    def forward(self, pair):
        a, b = (self.encode(x).relu() for x in pair.unbind(1))
        return self.head(torch.cat([self.norm(self.second(a)), self.norm(self.third(b))], 1))


@pytest.mark.parametrize("together", [None, 7])
@pytest.mark.parametrize("own_bias", [True, False])
def test_what_other_channels_can_say_is_restored_wholly_where_a_weight_is_shared(own_bias, together):
    torch.manual_seed(0)
    model = Siamese(own_bias).double().eval()
    with torch.no_grad():  # channel 6 is twice channel 1
        model.encode.weight[6], model.encode.bias[6] = 2 * model.encode.weight[1], 2 * model.encode.bias[1]
    data = examples(2, 5, n=200)
    plan = removing(model, data[0][0], "encode", [6])
    small = sc.cut(model, plan)
    fresh = torch.randn(100, 2, 5).double()
    assert (small(fresh) - model(fresh)).abs().max() > 0.1
    assert sc.refit(model, small, plan, data, damping=1e-12, together=together) == {}
    torch.testing.assert_close(small(fresh), model(fresh), rtol=1e-6, atol=1e-6)


class Beside(nn.Module):
    """One layer on what is cut, and on what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(6, 8)
        self.t, self.head = nn.Linear(8, 8), nn.Linear(16, 4)

    def forward(self, x):
        a, b = self.a(self.first(x).tanh()).tanh(), self.b(x).tanh()
        return self.head(torch.cat([self.t(a).tanh(), self.t(b).tanh()], 1))


@pytest.mark.parametrize("count", [128, 200, 256])
def test_other_examples_are_held_out_than_those_that_another_run_has_shown(count):
    """Were it the last run alone, of which nothing is missing, no step would be borne out."""
    torch.manual_seed(0)
    model, x = Beside().double(), torch.randn(count, 6, dtype=torch.float64)
    plan = removing(model, x[:2], "first", [0, 1, 2])
    small = sc.cut(model, plan)
    before = small.t.weight.clone()
    assert sc.refit(model, small, plan, [x]) == {}
    assert (small.t.weight - before).norm() > 1e-3 * before.norm()
    ones = [torch.full((1, 16, 1), float(run)) for run in range(3)]
    order = torch.cat(_by_examples({(0, 0, 0): ones[0], (0, 1, 0): ones[1], (1, 0, 0): ones[2]}), 1).flatten().tolist()
    assert order == [0.0, 1.0] * 16 + [2.0] * 16


class TokensFirst(nn.Module):
    """Tokens first, examples second, as PyTorch's own attention has it unless it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(self.norm(self.up(x.transpose(0, 1))).relu()).transpose(0, 1)


@pytest.mark.parametrize("size", [4, 12, 24])
def test_as_many_tokens_as_examples_of_a_batch_make_no_difference(size):
    torch.manual_seed(0)
    model, x = TokensFirst().double(), torch.randn(48, 12, 5, dtype=torch.float64)
    plan = removing(model, x[:2], "up", [1, 5])
    whole, small = sc.cut(model, plan), sc.cut(model, plan)
    sc.refit(model, whole, plan, [x])
    assert sc.refit(model, small, plan, x.split(size)) == {}
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, small.state_dict()[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("width", [6, 8])
def test_as_many_channels_as_examples_are_not_taken_for_them(width):
    """Frames in the batch, a norm over their channels: neither of its widths, 8 and 6, is the examples' dim."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(2, 8, 1), Around(8), nn.Conv2d(8, 3, 1)

        def forward(self, x):
            return self.last(self.norm(self.first(x.flatten(0, 1))).relu()).unflatten(0, x.shape[:2])

    torch.manual_seed(0)
    model, x = Frames().double(), torch.randn(width, 3, 2, 2, 2, dtype=torch.float64)
    plan = removing(model, x[:2], "first", [1, 4])
    assert sc.refit(model, sc.cut(model, plan), plan, [x]) == {}


def test_norms_that_cannot_follow_are_told_and_what_is_constant_stays():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last, self.skips = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2), False

        def forward(self, x):
            x = self.first(x)
            return self.last((x if self.skips else self.norm(x)).relu())

    torch.manual_seed(0)
    model, x = Skips().double().eval(), torch.randn(60, 4, dtype=torch.float64)
    with torch.no_grad():
        model.first.weight[3] = 0
    plan = removing(model, x[:2], "first", [1])
    small = sc.cut(model, plan)
    assert sc.refit(model, small, plan, [x]) == {}
    assert small.norm.running_var[2] == 1
    small = sc.cut(model, plan)
    small.skips = True
    assert sc.refit(model, small, plan, [x]) == {"norm": "the smaller model's forward does not reach it"}
    assert small.norm.running_mean.isfinite().all()


def test_norms_that_share_their_weight_are_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    model[3].weight = model[1].weight
    plan = Plan({}, {}, fingerprint(model))
    why = "its weight or bias is used at several places"
    assert sc.refit(model, copy.deepcopy(model), plan, examples(4)) == {"1": why, "3": why}


def test_autocast_makes_no_difference_to_what_runs_several_times():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), *[nn.Tanh(), twice := nn.Linear(8, 8), nn.Tanh(), twice], nn.Linear(8, 2))
    x = torch.randn(300, 4)
    plan = Plan({}, {}, fingerprint(model))
    found = []
    for on in (False, True):
        small = copy.deepcopy(model)
        with torch.no_grad():
            small[0].weight[:3] = 0
            small[2].weight *= 0.7
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            sc.refit(model, small, plan, [x])
        with torch.no_grad():
            found.append(float((small(x) - model(x)).norm() / model(x).norm()))
    assert abs(found[0] - found[1]) < 0.02


def test_half_of_what_is_shared_is_told():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)).double()
    model[3].bias = model[2].bias  # and the weights are two
    data = examples(4)
    plan = removing(model, data[0][0], "0", [1])
    why = "its weight or bias is used at several places"
    assert sc.refit(model, sc.cut(model, plan), plan, data) == {"2": why, "3": why}


def test_what_gets_its_own_outputs_is_fitted_only_if_that_brings_it_nearer():
    class Task:
        def __init__(self, *distances):
            self.distances = [*distances]

        def distance(self):
            return self.distances.pop(0)

        def look(self, use, x, some):
            seen.append(len(x))

        def take(self):
            nn.init.zeros_(module.weight)

    seen, module = [], nn.Linear(3, 3)
    before, x = module.weight.detach().clone(), torch.randn(5, 3)
    chunks = [Examples([Part(0, 0, 0, 5, x)], 5, 5)]
    work = Workload(module)
    with torch.no_grad():
        why = _done_if_nearer(nn.Sequential(module, module), _Job("0", [module], Task(1.0, 2.0), True), chunks, work)
        assert why is not None
        assert torch.equal(module.weight, before)
        assert seen == [5, 5]
        job = _Job("0", [module], Task(2.0, 1.0), True)
        assert _done_if_nearer(nn.Sequential(module, module), job, chunks, work) is None
        assert not module.weight.any()


def test_all_runs_together_are_looked_at_as_often_as_one_would_be(monkeypatch):
    seen = []
    monkeypatch.setattr("secateur.repair.refit.least_squares", lambda x, *rest: seen.append(x.shape[1]) or 0)
    model = nn.Sequential(nn.Linear(4, 4), *[nn.Linear(4, 4)] * 4, nn.Linear(4, 2)).double()
    x = torch.randn(300, 4, dtype=torch.float64)
    plan = removing(model, x, "0", [])
    sc.refit(model, sc.cut(model, plan), plan, [x], positions=200)
    assert seen == [200, 200, 200]


class Labelled(nn.Module):
    """Its forward cannot do without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, labels):
        logits = self.down(self.up(x).relu())
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def test_a_forward_that_demands_labels_gets_them():
    torch.manual_seed(0)
    model = Labelled().double()
    x, labels = torch.randn(200, 4, dtype=torch.float64), torch.randint(0, 3, (200,))
    data = [{"x": x[:120], "labels": labels[:120]}, {"x": x[120:], "labels": labels[120:]}]
    inputs = {"x": x[:2], "labels": labels[:2]}
    result = sc.prune(model, inputs, sc.Budget(params=0.7), data=data, repair=["refit", sc.Distill(steps=2)])
    assert result.after.params <= 0.7 * result.before.params
    assert not result.facts.get("left whole")

    class Masking(Labelled):
        def forward(self, x, labels):
            labels[labels == 0] = -100
            return super().forward(x, labels)

    before = labels.clone()
    masking = Masking().double()
    sc.score(masking, sc.trace(masking, inputs), sc.CRITERIA.make("schur", {"fisher": "empirical"}), data=data)
    assert torch.equal(labels, before)


class Strange(nn.Module):
    """A norm that runs twice, a linear with a forward of its own, one called by keyword, an input changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(4, 6), Tenth(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        x.mul_(2)
        x = self.norm(5 * self.a(x) + 2).relu()
        return self.head(self.norm(self.c(input=self.b(x).relu())).relu())


class Tenth(nn.Linear):
    """Its weight counts a tenth."""

    def forward(self, x):
        return nn.functional.linear(x, 0.1 * self.weight, self.bias)


def test_what_does_not_compute_what_its_weight_says_stays_and_is_told():
    torch.manual_seed(0)
    model = Strange().double().eval()
    data = examples(4, n=300)
    plan = removing(model, data[0][0].clone(), "a", [1])
    small = sc.cut(model, plan)
    before = [t.clone() for t in (small.b.weight, small.norm.running_mean, small.c.weight)]
    x = data[0][0].clone()
    assert sc.refit(model, small, plan, [x]) == {"b": "its forward is not its weight times its input"}
    after = (small.b.weight, small.norm.running_mean, small.c.weight)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False]


class Several(nn.Module):
    """Two inputs and a mask without examples, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x, y, mask, scale):
        return self.b((self.a((x + y).transpose(0, 1)).relu() * mask) * scale)


def test_several_inputs_masks_and_mappings_are_taken():
    torch.manual_seed(0)
    model = Several().double()
    x, y, mask = torch.randn(40, 7, 4).double(), torch.randn(40, 7, 4).double(), torch.rand(7, 1, 1).double()
    plan = removing(model, (x[:2], y[:2], mask, torch.tensor(2.0)), "a", [1])
    ways = [
        [((x, y, mask, torch.tensor(2.0)), 0)],
        [((x[:30], y[:30], mask, torch.tensor(2.0)), 0), ((x[30:], y[30:], mask, torch.tensor(2.0)), 0)],
        [UserDict(x=x[:30], y=y[:30], mask=mask, scale=2.0), {"x": x[30:], "y": y[30:], "mask": mask, "scale": 2.0}],
    ]
    found = []
    for data in ways:
        small = sc.cut(model, plan)
        assert sc.refit(model, small, plan, data) == {}
        found.append(small.b.weight)
    assert not torch.equal(found[0], sc.cut(model, plan).b.weight)
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "batches of inputs"), (5, "something that gives batches is expected"), ([None], "batch 0 is a NoneType"),
        ([(np.zeros((3, 5)), 0)], "batch 0 is a tuple of ndarray"), ([{"x": 3}], "batch 0 is a dict without a tensor"),
        ([torch.zeros(3, 4)], "batch 0 .*does not fit the model"), ([torch.zeros(0, 5)], "no example"),
        ([torch.zeros(300, 5), torch.zeros(3, 6)], r"batch 1 \(inputs of shape \[3, 6\]\) does not fit the model"),
    ],
)  # fmt: skip
def test_data_that_does_not_fit_is_told(data, message):
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    plan = removing(model, torch.zeros(2, 5), "0", [0])
    small = sc.cut(model, plan)
    with pytest.raises(SecateurError, match=message):
        sc.refit(model, small, plan, data)


def test_models_that_do_not_go_together_are_told():
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    plan, nothing = (removing(model, torch.zeros(2, 5), "0", gone) for gone in ([0], []))
    data = [torch.randn(20, 5)]
    with pytest.raises(SecateurError, match="share parameters"):
        sc.refit(model, model, nothing, data)
    with pytest.raises(SecateurError, match="a module is expected"):
        sc.refit(model, "small", plan, data)
    with pytest.raises(SecateurError, match=r"dtype torch\.float32 in the original and torch\.float64"):
        sc.refit(model, sc.cut(model, plan).double(), plan, data)
    with pytest.raises(SecateurError, match="examples=None"):
        sc.refit(model, sc.cut(model, plan), plan, data, examples=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_is_fitted_too(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 3))
    x = torch.randn(400, 5)
    plan = removing(model, x[:2], "0", list(range(8)))
    model.to(dtype)
    small = sc.cut(model, sc.Plan.from_json(plan.to_json()))
    before = (small(x.to(dtype)) - model(x.to(dtype))).float().square().mean()
    assert sc.refit(model, small, plan, [x.to(dtype)]) == {}
    assert (small(x.to(dtype)) - model(x.to(dtype))).float().square().mean() < 0.5 * before


def test_a_failure_leaves_the_smaller_model_as_it_was(network):
    model, data = network
    plan = removing(model, data[0][0], sc.trace(model, data[0][0]).groups[0].name, [0])
    small = sc.cut(model, plan)
    before = copy.deepcopy(small.state_dict())
    with torch.no_grad():
        list(model.parameters())[-1].fill_(torch.nan)
    with pytest.raises(SecateurError, match="not finite"):
        sc.refit(model, small, plan, data)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"examples": 0}, "examples=0"), ({"positions": -1}, "positions=-1"), ({"damping": -1}, "damping=-1"),
        ({"data": []}, "empty"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(network, given, message):
    model, data = network
    plan = removing(model, data[0][0], sc.trace(model, data[0][0]).groups[0].name, [0])
    small = sc.cut(model, plan)
    with pytest.raises(SecateurError, match=message):
        sc.refit(model, small, plan, **({"data": data} | given))
    with pytest.raises(SecateurError, match="the smaller model has shape"):
        sc.refit(model, copy.deepcopy(model), plan, data)


def test_so_many_examples_are_used(network):
    model, data = network
    x = data[0][0]
    plan = removing(model, x, sc.trace(model, x).groups[0].name, [0])
    one, other = sc.cut(model, plan), sc.cut(model, plan)
    sc.refit(model, one, plan, [(x[:20],), x[20:50], (x[50:], None)], examples=40)
    sc.refit(model, other, plan, [x[:40]])
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("total", "wanted"), [(10, 20), (10, 9), (12000, 8192), (25000, 8192), (1000, 100), (2**20, 8192)]
)
def test_positions_are_spread_over_images_and_within_them(total, wanted):
    at = spread(total, wanted)
    assert len(at) == min(total, wanted)
    assert at.min() >= 0
    assert at.max() < total
    assert at.diff().min() > 0
    if 3 * wanted < total:
        assert at.diff().min() > 0.3 * total / wanted
        columns = torch.bincount(at % 32, minlength=32)  # of an image 32 wide: even distances of 128 see just one
        assert columns.max() < 2 * columns.float().mean() + 1


def test_on_digits_it_brings_back_most_of_what_is_lost():
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    model = build("digits_cnn")
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, 1280, 64)]
    fit(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), batches, epochs=8, progress=False)
    test = (x[1280:], y[1280:])
    lost = []
    for refit in (False, True):
        result = sc.prune(
            model.eval(), x[:1], sc.Budget(macs=0.3), criterion="magnitude", strategy="global", data=batches,
            repair="refit" if refit else "recalibrate",
        )  # fmt: skip
        lost.append(accuracy(model, test) - accuracy(result.model, test))
    assert lost[0] > 0.1
    assert lost[1] < 0.35 * lost[0]


class Sizes(TorchDispatchMode):
    """How many examples convolutions and products see, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default:
            self.most = max(self.most, len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("data", ["one batch", "batches"])
def test_examples_go_through_the_original_in_parts_and_convolutions_too(data, monkeypatch):
    torch.manual_seed(1)
    model, x = Residual().double().eval(), torch.randn(50, 2, 6, 6, dtype=torch.float64)
    plan = removing(model, x[:2], "first", [0])
    found = []
    for size in (1000, 8):
        monkeypatch.setattr("secateur.repair.refit.PART", size)
        small, seen = sc.cut(model, plan), []
        handle = model.norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        with Sizes() as sizes:
            sc.refit(model, small, plan, [x] if data == "one batch" else x.split(20), positions=300)
        handle.remove()
        found.append(small.state_dict())
        assert sum(seen) == 50  # once each
        assert sizes.most <= 8 or size > 8
        assert max(seen) <= size
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("many", [10, 90, 300, 5000])
def test_positions_of_the_parts_are_those_of_all_examples(many):
    counts, each = [7, 3, 9, 1], 12
    parts = [Part(i, i, sum(counts[:i]), n, None) for i, n in enumerate(counts)]
    examples = Examples(parts, 20, 20)
    chosen = [examples.choice(part, many)(part.count * each) + part.first * each for part in parts]
    assert torch.equal(torch.cat(chosen), spread(20 * each, many))


def test_inputs_that_are_not_as_long_as_the_examples_keep_a_batch_whole():
    """Nodes and edges, say: no part of one goes with a part of the other."""
    batch = read_batch(((torch.zeros(20, 3), torch.zeros(2, 50)), None), 4, CPU)
    assert [count for *_, count in _split(batch, 100, 8)] == [20]
    alike = read_batch({"x": torch.arange(20.0), "y": torch.zeros(20, 5), "scale": torch.tensor(2.0)}, 4, CPU)
    parts = list(_split(alike, 18, 8))
    assert [(number, count) for number, _, count in parts] == [(4, 8), (4, 8), (4, 2)]
    assert torch.equal(torch.cat([inputs["x"] for _, inputs, _ in parts]), torch.arange(18.0))


@pytest.mark.parametrize("together", [1, 7, 50])
def test_with_little_memory_no_forward_sees_many_examples_and_the_result_is_the_same(together, untouched):
    torch.manual_seed(1)
    model, x = Residual().double().eval(), torch.randn(50, 2, 6, 6, dtype=torch.float64)
    plan = removing(model, x[:2], "first", [0])
    whole, small, seen = sc.cut(model, plan), sc.cut(model, plan), []
    sc.refit(model, whole, plan, x.split(20), positions=300)
    for module in small.modules():
        module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    with untouched(model):
        assert sc.refit(model, small, plan, x.split(20), positions=300, together=together) == {}
    assert max(seen) <= together
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, small.state_dict()[name], rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:refit. 50 examples at a time")
def test_examples_that_would_not_fit_go_in_parts_and_it_is_told(monkeypatch):
    """An example is 12 x 6 x 6 numbers of eight bytes into and out of its largest layer, twice held: 6,912 bytes."""
    torch.manual_seed(1)
    model, x = Residual().double().eval(), torch.randn(50, 2, 6, 6, dtype=torch.float64)
    plan = removing(model, x[:2], "first", [0])
    found, notices, seen = [], [], []
    for free, size in ((None, 10), (10**9, 10), (2 * 20 * 6912, 10), (2 * 20 * 6912, 25), (0, 50)):
        small = sc.cut(model, plan)
        small.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        work = Workload(model, x.split(size))
        monkeypatch.setattr("secateur.repair.refit.available", lambda _, free=free: free)
        refitted(sc.Refit(positions=300), model, small, plan, work)
        found.append(small.state_dict())
        notices.append(work.notices)
        assert max(seen) == (max(20, size) if work.notices else 50)
        seen.clear()
    assert [len(some) for some in notices] == [0, 0, 1, 1, 0]  # a single batch is as it was in the original
    assert "they go 25 at a" in notices[3][0]
    assert "50 examples at a time would need about 0.000322 GiB" in notices[2][0] and "they go 20 at a" in notices[2][0]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[2][name], rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:refit. 600 examples at a time")
@pytest.mark.parametrize(
    ("free", "size", "taken"), [(2 * 300 * 6912, 50, 300), (2 * 300 * 6912, 128, 256), (10**12, 50, 600)]
)
def test_as_many_examples_are_taken_as_fit_where_these_are_enough(monkeypatch, free, size, taken):
    """One way through the smaller model: a forward for each layer would take many times as long."""
    torch.manual_seed(1)
    model, x = Residual().double().eval(), torch.randn(600, 2, 6, 6, dtype=torch.float64)
    plan = removing(model, x[:2], "first", [0])
    monkeypatch.setattr("secateur.repair.refit.available", lambda _: free)
    seen: list[int] = []
    small = sc.cut(model, plan)
    small.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    work = Workload(model, x.split(size))
    refitted(sc.Refit(positions=300), model, small, plan, work)
    assert seen == [taken]
    assert [f"the first {taken} are taken: Refit(together=300)" in note for note in work.notices] == [True] * (
        taken < 600
    )
    monkeypatch.undo()
    other = sc.cut(model, plan)  # the same as if no more had been asked for
    sc.refit(model, other, plan, x.split(size), examples=taken, positions=300)
    for name, tensor in small.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_what_is_free_is_the_machines_or_the_containers(monkeypatch, tmp_path):
    monkeypatch.setattr("secateur._internal.memory.GROUP", tmp_path)
    monkeypatch.setattr("secateur._internal.memory.MEMORY", tmp_path / "meminfo")
    cpu = torch.device("cpu")
    assert available(cpu) is None and available(torch.device("meta")) is None
    (tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemAvailable:  8 kB\n")
    assert available(cpu) == 8192
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.stat").write_text("anon 5\n")
    for limit, expected in (("max\n", 8192), ("1000\n", 900), ("50\n", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert available(cpu) == expected
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 60\n")
    assert available(cpu) == 10


def test_examples_of_several_shapes_are_fitted_together():
    """Images of two sizes: what other channels can say is restored wholly on both, so each input met its own output."""
    torch.manual_seed(0)
    model = Residual().double().eval()
    with torch.no_grad():
        for tensor in (model.wide.weight, model.wide.bias):
            tensor[0::2] = tensor[1::2]
    sizes = [torch.randn(n, 2, size, size, dtype=torch.float64) for n, size in ((20, 6), (12, 9), (20, 6))]
    plan = removing(model, sizes[0][:2], "wide", [0])
    small = sc.cut(model, plan)
    assert sc.refit(model, small, plan, sizes, positions=10_000, damping=1e-12) == {}
    for x in sizes:
        with torch.no_grad():
            assert not torch.allclose(model(x), sc.cut(model, plan)(x), rtol=1e-3)
            torch.testing.assert_close(model(x), small(x), rtol=1e-6, atol=1e-8)


def test_a_forward_that_fails_late_changes_nothing(network, untouched):
    model, data = network
    plan = removing(model, data[0][0], sc.trace(model, data[0][0]).groups[0].name, [0])
    small = sc.cut(model, plan)

    def fail(*_):
        raise KeyError

    list(small.children())[-1].register_forward_pre_hook(fail)
    with untouched(small), untouched(model), pytest.raises(SecateurError, match="does not fit the model"):
        sc.refit(model, small, plan, data)


def test_statistics_of_norms_are_those_of_all_examples_in_both_models():
    """``mean + m(x') - m(x)`` and ``var * v(x') / v(x)``, over all examples, however they are batched."""
    torch.manual_seed(1)
    model, x = Residual().double().eval(), torch.randn(50, 2, 6, 6, dtype=torch.float64)
    plan = removing(model, x[:2], "first", [0])
    small = sc.cut(model, plan)
    before = small.norm.running_mean.clone(), small.norm.running_var.clone()
    seen = []
    for one in (model, small):
        one.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().transpose(0, 1).flatten(1)))
    sc.refit(model, small, plan, x.split(15))
    stays = [i for i in range(4) if i not in plan.slices["norm.running_mean"][0]]
    then, now = torch.cat(seen[:-1], 1)[stays], seen[-1]
    torch.testing.assert_close(small.norm.running_mean, before[0] + now.mean(1) - then.mean(1))
    torch.testing.assert_close(small.norm.running_var, before[1] * now.var(1) / then.var(1))


# ---------------------------------------------------------------------------------------------------------- bottlenecks


def rotated(model, x, fraction, **settings):
    data = [(part, torch.randint(0, 4, (len(part),))) for part in x.split(64)]
    return sc.eigendamage(
        model, x[:2], sc.Budget(params=fraction), data=data, loss="cross_entropy", **{"repair": "none", **settings}
    ), data


def test_bottlenecks_are_fitted_to_what_the_original_computes():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, bias=False), nn.BatchNorm2d(16),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 9, 20), nn.ReLU(), nn.Linear(20, 4),
    ).eval()  # fmt: skip
    x = torch.randn(256, 3, 10, 10)
    sc.recalibrate(model, [x])
    plain, data = rotated(model, x, 0.5)
    fitted, _ = rotated(model, x, 0.5, repair=sc.Refit(examples=256))
    assert plain.facts["bottlenecks"] == fitted.facts["bottlenecks"]
    with torch.no_grad():
        before, after = ((model(x) - r.model(x)).square().mean() for r in (plain, fitted))
    assert after < 0.9 * before
    again = sc.eigendamage(fitted.model, x[:2], sc.Budget(params=0.7), data=data, loss="cross_entropy", repair="none")
    better = sc.eigendamage(
        fitted.model, x[:2], sc.Budget(params=0.7), data=data, loss="cross_entropy", repair=sc.Refit(examples=256)
    )
    with torch.no_grad():
        before, after = ((fitted.model(x) - r.model(x)).square().mean() for r in (again, better))
    assert after < 0.9 * before


@pytest.mark.parametrize("kept", [(8, 7), (8, 10), (12, 7)], ids=["both", "rotation out", "rotation in"])
def test_the_parts_of_a_bottleneck_are_the_least_squares(kept):
    """A linear network: the core is the best for its last rotation, and that and the bias the best for the core."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 4)).double().eval()
    x = torch.randn(512, 10, dtype=torch.float64)
    bases = {"0": eigenbasis_of(sc.kronecker_factors(model, [x], "mse", bias=False)["0"])}
    small = bottlenecked(model, bases, {"0": (torch.arange(kept[0]), torch.arange(kept[1]))})
    first, core, last = three(small[0])
    with torch.no_grad():  # in the eigenbasis of these inputs all would be the least squares already
        for part in small[0]:
            part.weight.add_(0.3 * torch.randn_like(part.weight))
    target = model[0](x).detach()
    seen = (x if first is core else first(x)).detach()
    before = [part.weight.detach().clone() for part in (first, core, last)]
    bias = last.bias.detach().clone()
    ones = torch.ones(512, 1, dtype=torch.float64)
    sc.refit(model, small, Plan({}, {}, fingerprint(model)), [x], examples=512, damping=1e-9, positions=512)
    if last is core:
        inner, table = torch.cat([seen, ones], 1), torch.cat([before[1], bias[:, None]], 1)
    else:
        wanted = (target - model[0].bias.detach()) @ torch.linalg.pinv(before[2]).mT
        fitted = before[1] + least_squares(seen[None], wanted[None], before[1][None], 1e-9)[0]
        torch.testing.assert_close(core.weight.detach(), fitted, rtol=1e-6, atol=1e-8)
        inner, table = torch.cat([core(seen), ones], 1).detach(), torch.cat([before[2], bias[:, None]], 1)
    wanted = table + least_squares(inner[None], target[None], table[None], 1e-9)[0]
    torch.testing.assert_close(last.weight.detach(), wanted[:, :-1], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(last.bias.detach(), wanted[:, -1], rtol=1e-6, atol=1e-8)
    assert first is core or torch.equal(first.weight, before[0])
    assert not torch.allclose(core.weight, before[1], rtol=1e-3)
