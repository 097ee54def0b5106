"""SDPrun is the equations of 8.3, finds what theory says it finds, and is a well-behaved optimizer."""

import copy
import io
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur._internal.errors import SecateurError
from secateur.methods.sdprun import SDPrun, threshold_increment
from secateur.tracing.api import trace
from secateur.tracing.graph import Axis, ChannelGroup

DOUBLE = torch.float64


def group(channels, *producers, exact=True, name="group"):
    """A group of these ids; a producer is (name, dim), with all ids in order, or (name, dim, ids)."""
    ids = np.asarray(channels, dtype=np.int64)
    axes = tuple(Axis(n, d, np.asarray(own[0] if own else ids, dtype=np.int64)) for n, d, *own in producers)
    return ChannelGroup(name, ids, axes, (), (), exact, "" if exact else "because")


def graph(*groups):
    return SimpleNamespace(groups=groups)


class Rows(nn.Module):
    """Parameters of these values, and no forward."""

    def __init__(self, **values) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.as_tensor(value).clone()))


def rows(value, **options):
    """A model with one parameter ``w`` whose rows are the channels, and its optimizer."""
    model = Rows(w=value)
    return model.w, SDPrun(model, graph(group(range(1, 1 + len(value)), ("w", 0))), **options)


def follow(opt, w, gradient, steps):
    for _ in range(steps):
        w.grad = gradient(w.detach())
        opt.step()


def norms(w):
    return w.detach().norm(dim=1)


def soft(x, t):
    return x.sign() * (x.abs() - t).clamp_min(0)


class Net(nn.Module):
    """A stem, a residual block and a head: filters, norms and biases, one stream tied over two convolutions."""

    def __init__(self, width=4, dtype=DOUBLE) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1, dtype=dtype)
        self.norm = nn.BatchNorm2d(width, dtype=dtype)
        self.conv1 = nn.Conv2d(width, 6, 3, padding=1, bias=False, dtype=dtype)
        self.norm1 = nn.BatchNorm2d(6, dtype=dtype)
        self.conv2 = nn.Conv2d(6, width, 3, padding=1, bias=False, dtype=dtype)
        self.norm2 = nn.BatchNorm2d(width, dtype=dtype)
        self.hidden = nn.Linear(width, 5, dtype=dtype)
        self.head = nn.Linear(5, 3, dtype=dtype)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.head(F.relu(self.hidden(x.mean((2, 3)))))


STREAM = ("stem.weight", "stem.bias", "norm.weight", "norm.bias", "conv2.weight", "norm2.weight", "norm2.bias")
INNER = ("conv1.weight", "norm1.weight", "norm1.bias")
HIDDEN = ("hidden.weight", "hidden.bias")
NET_GROUPS = ((STREAM, 4), (INNER, 6), (HIDDEN, 5))


def net_graph():
    return graph(
        group(range(1, 5), *((name, 0) for name in STREAM), name="stem"),
        group(range(5, 11), *((name, 0) for name in INNER), name="conv1"),
        group(range(11, 16), *((name, 0) for name in HIDDEN), name="hidden"),
    )


def net(seed=0, dtype=DOUBLE):
    """The net, its channels of so different norms that they die one after the other."""
    torch.manual_seed(seed)
    model = Net(dtype=dtype)
    with torch.no_grad():
        for names, width in NET_GROUPS:
            for p in map(model.get_parameter, names):
                p.mul_(torch.linspace(0.1, 2, width, dtype=dtype).reshape(-1, *[1] * (p.dim() - 1)))
    return model


def batches(n, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        yield torch.randn(8, 2, 4, 4, generator=generator, dtype=dtype), torch.randint(3, (8,), generator=generator)


def backward(model, batch):
    model.zero_grad()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return loss


def train(model, opt, data, after=lambda: None):
    for batch in data:
        backward(model, batch)
        opt.step()
        after()


def same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def by_the_book(model, data, c, sqrt, every, lr=0.2, mu=0.7):
    """Section 8.3, channel by channel and parameter by parameter, with nothing clever."""
    parameters = dict(model.named_parameters())
    v = {name: p.detach().clone() for name, p in parameters.items()}
    g = 0.0
    for n, batch in enumerate(data, start=1):
        backward(model, batch)
        g += c * lr ** (0.5 + mu) * (n**mu - (n - 1) ** mu)
        with torch.no_grad():
            for name, p in parameters.items():
                v[name] -= lr * p.grad
                p.sub_(lr * p.grad)
            if n % every:
                continue
            for p, value in zip(parameters.values(), v.values(), strict=True):
                p.copy_(value)
            for names, width in NET_GROUPS:
                for i in range(width):
                    members = torch.cat([v[name][i].flatten() for name in names])
                    weight = math.sqrt(len(members)) if sqrt else 1.0
                    factor = max(0.0, 1 - weight * g / float(members.norm()))
                    for name in names:
                        parameters[name][i] = factor * v[name][i]


# --- the equations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weights": "sqrt"}, {"prox_every": 3}], ids=str)
def test_equals_the_equations_channel_by_channel(options):
    c = 0.15 if "weights" in options else 0.8
    model, book = net(), net()
    train(model, SDPrun(model, net_graph(), lr=0.2, c=c, mu=0.7, **options), batches(30))
    by_the_book(book, batches(30), c, "weights" in options, options.get("prox_every", 1))
    for (name, p), q in zip(model.named_parameters(), book.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)
    dead = [int((norms(model.get_parameter(names[0]).flatten(1)) == 0).sum()) for names, _ in NET_GROUPS]
    assert 0 < sum(dead) < 15


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE], ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_c_zero_is_sgd_bit_for_bit(dtype, foreach):
    model, plain = net(dtype=dtype), net(dtype=dtype)
    opt, sgd = SDPrun(model, net_graph(), lr=0.3, c=0.0), torch.optim.SGD(plain.parameters(), lr=0.3, foreach=foreach)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in (opt, sgd)]
    train(model, opt, batches(10, dtype), schedules[0].step)
    train(plain, sgd, batches(10, dtype), schedules[1].step)
    same(model, plain)


def test_what_no_group_produces_is_sgd_and_keeps_no_state():
    model = net()
    opt = SDPrun(model, net_graph(), lr=0.2, c=0.5)
    before = model.head.weight.detach().clone()
    backward(model, next(batches(1)))
    opt.step()
    assert torch.equal(model.head.weight, before.add(model.head.weight.grad, alpha=-0.2))
    held = {name for name, p in model.named_parameters() if p in opt.state}
    assert held == {*STREAM, *INNER, *HIDDEN}
    assert all(set(s) == {"v"} and s["v"].shape == p.shape for p, s in opt.state.items())


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 1, 1, 1)], ids=str)
def test_channels_of_one_element_are_grda(shape):
    torch.manual_seed(0)
    start, target = torch.randn(shape, dtype=DOUBLE), torch.randn(shape, dtype=DOUBLE)
    w, opt = rows(start, lr=0.1, c=0.5, mu=0.6)
    reference, v, g = start.clone(), start.clone(), 0.0
    for n in range(1, 101):
        follow(opt, w, lambda x: x - target, 1)
        v -= 0.1 * (reference - target)
        g += 0.5 * 0.1**1.1 * (n**0.6 - (n - 1) ** 0.6)
        reference = soft(v, g)
        torch.testing.assert_close(w.detach(), reference, rtol=0, atol=1e-12)
    assert (w == 0).any()


def test_after_every_step_dead_channels_are_below_and_others_above_the_threshold():
    model = net()
    opt = SDPrun(model, net_graph(), lr=0.2, c=0.6, mu=0.7)

    def check():
        g = opt.param_groups[0]["g"]
        for names, width in NET_GROUPS:
            members = [model.get_parameter(name) for name in names]
            theta, v = (
                torch.cat([t.detach().reshape(width, -1) for t in ts], 1)
                for ts in (members, [opt.state[p]["v"] for p in members])
            )
            dead = norms(theta) == 0
            assert (norms(v)[dead] <= g).all()
            alive, radius = theta[~dead], norms(theta)[~dead, None]
            torch.testing.assert_close(v[~dead], alive * (1 + g / radius), rtol=1e-11, atol=1e-14)

    train(model, opt, batches(20), check)
    assert any((norms(model.get_parameter(names[0]).flatten(1)) == 0).any() for names, _ in NET_GROUPS)


def test_rotating_a_channel_with_its_gradient_commutes_with_the_step():
    torch.manual_seed(0)
    start, pull = torch.randn(6, 5, dtype=DOUBLE), torch.randn(6, 5, dtype=DOUBLE)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=DOUBLE)).Q
    w, opt = rows(start, c=0.8)
    u, turned = rows(start @ turn, c=0.8)
    follow(opt, w, lambda x: x - pull, 30)
    follow(turned, u, lambda x: x - pull @ turn, 30)
    torch.testing.assert_close(w @ turn, u, rtol=0, atol=1e-12)


# --- the threshold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "mu"), [(0.1, 0.6), (0.5, 0.501), (0.01, 1.0)])
def test_threshold_is_the_closed_form_at_a_constant_rate(lr, mu):
    g = 0.0
    for n in range(1, 20001):
        g += threshold_increment(n, lr, 5e-3, mu)
        if n in (1, 2, 10, 1000, 20000):
            assert g == pytest.approx(5e-3 * lr**0.5 * (n * lr) ** mu, rel=1e-12, abs=0)


@pytest.mark.parametrize("n", [10**6, 10**9])
def test_increments_keep_their_digits_at_large_n(n):
    series = 0.6 * n**-0.4 * (1 + 0.2 / n)  # n^mu - (n-1)^mu = mu n^(mu-1) (1 + (1-mu)/(2n) + O(n^-2))
    assert threshold_increment(n, 1.0, 1.0, 0.6) == pytest.approx(series, rel=1e-11)


def test_threshold_never_falls_and_a_lower_rate_only_slows_it():
    w, opt = rows(torch.ones(3, 2, dtype=DOUBLE), lr=0.4, c=1e-3, mu=0.7)
    seen = [0.0]
    for n in range(1, 21):
        opt.param_groups[0]["lr"] = 0.4 if n <= 10 else 0.1
        follow(opt, w, torch.zeros_like, 1)
        seen.append(opt.param_groups[0]["g"])
    steps = np.diff(seen)
    assert (steps > 0).all()
    assert steps[10] == pytest.approx(0.25**1.2 * 1e-3 * 0.4**1.2 * (11**0.7 - 10**0.7), rel=1e-10)


def test_a_rate_of_zero_stands_still():
    w, opt = rows(torch.ones(2, 2), lr=0.0, c=1.0)
    follow(opt, w, torch.ones_like, 3)
    assert torch.equal(w, torch.ones(2, 2))
    assert opt.param_groups[0]["g"] == 0


# --- what it converges to --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.6, 1.0])
def test_lag_on_a_quadratic(mu):
    lr, c, h, n = 0.1, 0.02, 2.0, 400
    w, opt = rows(torch.tensor([[1.5]], dtype=DOUBLE), lr=lr, c=c, mu=mu)
    follow(opt, w, lambda x: h * (x - 2), n)
    lag = threshold_increment(n, lr, c, mu) / (lr * h)
    assert 2 - w.item() == pytest.approx(lag, rel=1e-6 if mu == 1 else 1e-2)
    if mu == 1:  # the lasso with lambda = c * sqrt(lr)
        assert 2 - w.item() == pytest.approx(c * lr**0.5 / h, rel=1e-6)


def test_isotropic_quadratic_lags_along_each_channel():
    torch.manual_seed(0)
    target, lr, h, n = torch.randn(4, 3, dtype=DOUBLE) + 2, 0.1, 2.0, 400
    w, opt = rows(torch.randn(4, 3, dtype=DOUBLE), lr=lr, c=0.02, mu=0.6)
    follow(opt, w, lambda x: h * (x - target), n)
    lag = threshold_increment(n, lr, 0.02, 0.6) / (lr * h)
    torch.testing.assert_close(target - w.detach(), lag * target / norms(target)[:, None], rtol=1e-2, atol=1e-6)


def test_without_a_gradient_each_channel_goes_when_the_threshold_reaches_its_norm():
    torch.manual_seed(0)
    start = torch.randn(8, 3, dtype=DOUBLE) * 0.5
    w, opt = rows(start, lr=0.1, c=1.5, mu=0.6)
    seen = set()
    for _ in range(60):
        follow(opt, w, torch.zeros_like, 1)
        g = opt.param_groups[0]["g"]
        expected = (1 - g / norms(start)).clamp_min(0)[:, None] * start
        torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-15)
        assert torch.equal(norms(w) == 0, norms(start) <= g)
        seen.add(int((norms(w) == 0).sum()))
    assert len(seen) > 2


def test_singular_quadratic_moves_in_the_valley_only():
    """Linear prediction of 8.4: theta = theta_S - g P_0 u, at no loss; norms fall as those of the radial solution."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE)).Q
    steep = basis[:, :3]
    H = steep @ torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=DOUBLE)) @ steep.T
    flat = torch.eye(6, dtype=DOUBLE) - steep @ steep.T
    theta_s = torch.randn(3, 2, dtype=DOUBLE)
    theta_s += theta_s / norms(theta_s)[:, None]
    u = theta_s / norms(theta_s)[:, None]
    eta = (flat @ u.flatten()).view(3, 2)
    for c in (0.005, 0.05):
        w, opt = rows(theta_s, lr=0.2, c=c, mu=0.55)
        follow(opt, w, lambda x: (H @ (x - theta_s).flatten()).view(3, 2), 500)
        g = opt.param_groups[0]["g"]
        lag = 2 * threshold_increment(500, 0.2, c, 0.55) / 0.2
        moved = w.detach() - theta_s
        assert moved.norm() > 0.5 * g
        assert (moved + g * eta).norm() < lag + 0.3 * g**2
        torch.testing.assert_close(norms(w), norms(theta_s) - g * (u * eta).sum(1), rtol=0, atol=lag + 0.3 * g**2)
        assert 0.5 * moved.flatten() @ H @ moved.flatten() < lag**2


def test_a_steep_channel_keeps_its_norm_and_a_flat_one_goes():
    theta_s = torch.tensor([[0.3, 0.4], [0.3, 0.4]], dtype=DOUBLE)
    w, opt = rows(theta_s, lr=0.1, c=0.3, mu=0.6)

    def gradient(x):
        return torch.stack([x[0] - theta_s[0], torch.zeros(2, dtype=DOUBLE)])

    n = 0
    while opt.param_groups[0]["g"] < 0.5:
        assert norms(w)[1] == pytest.approx(0.5 - opt.param_groups[0]["g"], abs=1e-12)
        follow(opt, w, gradient, 1)
        n += 1
    assert norms(w)[1] == 0
    assert norms(w)[0] == pytest.approx(0.5, abs=2 * threshold_increment(n, 0.1, 0.3, 0.6) / 0.1)


# --- which elements make a channel -----------------------------------------------------------------------------------


def test_axes_may_mix_frozen_positions_groups_dims_and_repeated_ids():
    torch.manual_seed(0)
    values = {"a": torch.randn(5, 3, 2), "b": torch.randn(2, 4), "c": torch.randn(6), "d": torch.randn(4)}
    values = {name: value.double() for name, value in values.items()}
    model = Rows(**values)
    groups = [
        group([7, 9], ("a", 0, [0, 7, 9, 20, 30]), ("b", 1, [9, 7, 0, 7]), name="first"),
        group([20], ("a", 0, [0, 7, 9, 20, 30]), ("c", 0, [20, 0, 20, 0, 0, 20]), name="second"),
        group([30, 31, 32, 33], ("d", 0), exact=False, name="approximate"),
    ]
    opt = SDPrun(model, graph(*groups), lr=0.1, c=2.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    g = opt.param_groups[0]["g"]
    a, b, c = values["a"], values["b"], values["c"]
    total = {
        7: a[1].square().sum() + b[:, 1].square().sum() + b[:, 3].square().sum(),
        9: a[2].square().sum() + b[:, 0].square().sum(),
        20: a[3].square().sum() + c[[0, 2, 5]].square().sum(),
        0: torch.tensor(math.inf),
    }
    f = {i: (1 - g / e.sqrt()).clamp_min(0).double() for i, e in total.items()}
    assert 0 < f[20] < 1
    expect = {
        "a": a * torch.stack([f[i] for i in (0, 7, 9, 20, 0)])[:, None, None],
        "b": b * torch.stack([f[i] for i in (9, 7, 0, 7)]),
        "c": c * torch.stack([f[i] for i in (20, 0, 20, 0, 0, 20)]),
        "d": values["d"],
    }
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expect[name], rtol=1e-12, atol=0)
    assert model.d not in opt.state


def test_a_parameter_that_produces_on_two_dims_counts_by_its_first():
    model = Rows(w=torch.ones(2, 3), b=torch.ones(3))
    opt = SDPrun(model, graph(group([1, 2], ("w", 0)), group([3, 4, 5], ("w", 1), ("b", 0))), lr=0.1, c=2.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    factor = 1 - opt.param_groups[0]["g"] / math.sqrt(3)
    torch.testing.assert_close(model.w.detach(), torch.full((2, 3), factor))
    assert torch.equal(model.b, torch.ones(3))


def test_param_groups_without_c_and_frozen_parameters_are_no_part_of_the_norm():
    torch.manual_seed(0)
    start = {name: torch.randn(3, 2, dtype=DOUBLE) for name in "abd"}
    model = Rows(**start)
    model.d.requires_grad_(False)
    groups = [{"params": [model.a]}, {"params": [model.b, model.d], "c": 0.0, "lr": 0.5}]
    opt = SDPrun(model, graph(group([1, 2, 3], *((n, 0) for n in "abd"))), lr=0.1, c=0.5, param_groups=groups)
    model.a.grad, model.b.grad = torch.zeros_like(model.a), torch.ones_like(model.b)
    opt.step()
    g = opt.param_groups[0]["g"]
    torch.testing.assert_close(norms(model.a), norms(start["a"]) - g, rtol=1e-12, atol=0)
    assert torch.equal(model.b, start["b"] - 0.5)
    assert torch.equal(model.d, start["d"])
    assert set(opt.state) == {model.a}


def test_param_groups_have_their_own_settings():
    torch.manual_seed(0)
    start = {"a": torch.randn(3, 2, dtype=DOUBLE), "b": torch.randn(4, dtype=DOUBLE)}
    own = {"a": {"lr": 0.3, "c": 0.5, "mu": 0.7}, "b": {"lr": 0.05, "c": 1.0, "mu": 0.5}}
    axes = {"a": group([1, 2, 3], ("a", 0)), "b": group([4, 5, 6, 7], ("b", 0))}
    model = Rows(**start)
    opt = SDPrun(
        model, graph(*axes.values()), param_groups=[{"params": [model.get_parameter(n)], **own[n]} for n in "ab"]
    )
    alone = {n: Rows(**{n: start[n]}) for n in "ab"}
    opts = [SDPrun(alone[n], graph(axes[n]), **own[n]) for n in "ab"]
    for _ in range(5):
        for n in "ab":
            for p in (model.get_parameter(n), alone[n].get_parameter(n)):
                p.grad = p.detach() - 1
        for optimizer in (opt, *opts):
            optimizer.step()
    for n in "ab":
        assert torch.equal(model.get_parameter(n), alone[n].get_parameter(n))


@pytest.mark.parametrize("own", [{"c": 0.1}, {"mu": 0.7}, {"lr": 0.2}])
def test_a_channel_cannot_span_param_groups_that_differ(own):
    model = Rows(a=torch.ones(3, 2), b=torch.ones(3))
    groups = [{"params": [model.a]}, {"params": [model.b], **own}]
    with pytest.raises(SecateurError, match=r"span param groups 0 and 1.*give both the same"):
        SDPrun(model, graph(group([1, 2, 3], ("a", 0), ("b", 0))), param_groups=groups)


def test_a_channel_may_span_param_groups_that_agree_as_long_as_they_do():
    torch.manual_seed(0)
    start = {"a": torch.randn(3, 2), "b": torch.randn(3)}
    split, joint = Rows(**start), Rows(**start)
    shape = graph(group([1, 2, 3], ("a", 0), ("b", 0)))
    opt = SDPrun(split, shape, c=1.0, param_groups=[{"params": [split.a]}, {"params": [split.b]}])
    whole = SDPrun(joint, shape, c=1.0)
    for model, optimizer in ((split, opt), (joint, whole)):
        for _ in range(3):
            model.a.grad, model.b.grad = model.a.detach() - 1, model.b.detach() - 1
            optimizer.step()
    same(split, joint)
    opt.param_groups[1]["lr"] = 0.3
    with pytest.raises(SecateurError, match=r"lr = 0\.1 and 0\.3"):
        opt.step()


def test_a_zero_channel_stays_zero_without_nan():
    start = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    for lr, c in ((0.1, 0.0), (0.1, 1e-3), (0.1, 5.0), (0.0, 5.0)):
        w, opt = rows(start, lr=lr, c=c)
        follow(opt, w, torch.zeros_like, 3)
        assert torch.equal(w[0], start[0])
        assert w.isfinite().all()


def test_nan_gradients_are_not_hidden():
    w, opt = rows(torch.ones(2, 2))
    follow(opt, w, lambda x: torch.tensor([[math.nan, 0], [0, 0]]), 1)
    assert w[0].isnan().all()
    assert w[1].isfinite().all()


def test_half_precision_norms_are_summed_in_single():
    start = torch.full((2, 1000), 200.0)
    w, opt = rows(start.half(), c=10.0)  # the squares do not fit into half
    follow(opt, w, torch.zeros_like, 1)
    expected = start * (1 - opt.param_groups[0]["g"] / (200 * math.sqrt(1000)))
    torch.testing.assert_close(w.detach().float(), expected, rtol=1e-3, atol=0)


def test_memory_format_and_dtypes_may_differ():
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 2, 2), torch.randn(4)
    model = Rows(a=a.to(memory_format=torch.channels_last), b=b.double())
    opt = SDPrun(model, graph(group(range(1, 5), ("a", 0), ("b", 0))), c=3.0)
    model.a.grad, model.b.grad = torch.zeros_like(model.a), torch.zeros_like(model.b)
    opt.step()
    energy = a.double().flatten(1).square().sum(1) + b.double().square()
    factor = (1 - opt.param_groups[0]["g"] / energy.sqrt()).clamp_min(0)
    torch.testing.assert_close(model.a.detach(), (a * factor[:, None, None, None]).float())
    torch.testing.assert_close(model.b.detach(), b * factor)
    assert model.a.is_contiguous(memory_format=torch.channels_last)


# --- an optimizer like others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prox_every": 4, "weights": "sqrt"}], ids=str)
def test_state_dict_continues_bit_for_bit(options):
    data = list(batches(21, torch.float32))
    model = net(dtype=torch.float32)
    opt = SDPrun(model, net_graph(), lr=0.2, c=0.1, **options)
    train(model, opt, data[:10])
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh = net(5, torch.float32)
    fresh.load_state_dict(weights)
    again = SDPrun(fresh, net_graph(), lr=0.9, c=0.3, mu=0.9)
    again.load_state_dict(state)
    assert again.param_groups[0]["n"] == 10
    assert again.param_groups[0]["g"] == opt.param_groups[0]["g"] > 0
    train(model, opt, data[10:])
    train(fresh, again, data[10:])
    same(model, fresh)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_copies_go_their_own_way(way):
    data = list(batches(12))
    model = net()
    opt = SDPrun(model, net_graph(), lr=0.2, c=0.3)
    train(model, opt, data[:6])
    other, its = way((model, opt))
    train(model, opt, data[6:])
    assert its.param_groups[0]["n"] == 6
    train(other, its, data[6:])
    same(model, other)


def test_closure_is_called_once_with_gradients_and_its_loss_returned():
    model, other = net(), net()
    opt, plain = SDPrun(model, net_graph(), c=0.3), SDPrun(other, net_graph(), c=0.3)
    calls = []
    for batch in batches(3):
        loss = opt.step(lambda batch=batch: calls.append(torch.is_grad_enabled()) or backward(model, batch))
        assert loss == backward(other, batch)
        plain.step()
    assert calls == [True] * 3
    same(model, other)


def test_schedulers_drive_the_rate():
    w, opt = rows(torch.ones(2, 2, dtype=DOUBLE), lr=0.1, c=0.01, mu=0.6)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.4, total_steps=10, cycle_momentum=False)
    g = 0.0
    for n in range(1, 10):
        g += threshold_increment(n, schedule.get_last_lr()[0], 0.01, 0.6)
        follow(opt, w, torch.zeros_like, 1)
        schedule.step()
    assert opt.param_groups[0]["g"] == g


def test_accelerate_wraps_it():
    from accelerate import Accelerator

    model, other = net(), net()
    opt, plain = SDPrun(model, net_graph(), c=0.5), SDPrun(other, net_graph(), c=0.5)
    accelerator = Accelerator(cpu=True)
    wrapped, opt = accelerator.prepare(model, opt)
    for batch in batches(5):
        opt.zero_grad()
        accelerator.backward(F.cross_entropy(wrapped(batch[0]), batch[1]))
        opt.step()
    train(other, plain, batches(5))
    same(model, other)


def test_c_may_warm_up_from_zero_and_pause():
    model, plain = net(), net()
    opt = SDPrun(model, net_graph(), lr=0.2, c=0.0)
    data = list(batches(15))
    train(model, opt, data[:5])
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.2), data[:5])
    same(model, plain)
    opt.param_groups[0]["c"] = 0.5
    train(model, opt, data[5:10])
    g = opt.param_groups[0]["g"]
    assert g == pytest.approx(0.5 * 0.2**1.1 * (10**0.6 - 5**0.6))
    opt.param_groups[0]["c"] = 0.0
    train(model, opt, data[10:])
    assert opt.param_groups[0]["g"] == g
    row = torch.cat([opt.state[model.get_parameter(n)]["v"][0].flatten() for n in HIDDEN]).norm()
    kept = torch.cat([model.get_parameter(n)[0].flatten() for n in HIDDEN]).norm()
    assert kept.item() == pytest.approx(max(0.0, row.item() - g), abs=1e-12)


def test_a_param_group_may_come_later():
    torch.manual_seed(0)
    start = torch.randn(3, 2, dtype=DOUBLE)
    model = Rows(a=start, b=start)
    shape = graph(group([1, 2, 3], ("a", 0)), group([4, 5, 6], ("b", 0)))
    opt = SDPrun(model, shape, c=0.5, param_groups=[model.a])
    follow(opt, model.a, torch.zeros_like, 4)
    opt.add_param_group({"params": [model.b], "c": 1.0})
    model.b.grad = torch.zeros_like(model.b)
    opt.step()
    for p, n, c in ((model.a, 5, 0.5), (model.b, 1, 1.0)):
        torch.testing.assert_close(norms(p), (norms(start) - c * 0.1**1.1 * n**0.6).clamp_min(0))


def test_a_parameter_without_gradient_keeps_its_v_but_feels_the_threshold():
    w, opt = rows(torch.tensor([[3.0, 4.0]], dtype=DOUBLE), c=1.0)
    opt.step()
    assert torch.equal(opt.state[w]["v"], torch.tensor([[3.0, 4.0]], dtype=DOUBLE))
    assert norms(w).item() == pytest.approx(5 - opt.param_groups[0]["g"], abs=1e-12)


@pytest.mark.parametrize("missing", [(), ("_foreach_add_", "_foreach_copy_")], ids=["foreach", "without foreach"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_order_of_an_accelerator_gives_the_same_bits(monkeypatch, missing, every):
    model, other = net(), net()
    opt, there = (SDPrun(m, net_graph(), lr=0.2, c=0.6, mu=0.7, prox_every=every) for m in (model, other))
    train(model, opt, batches(6))
    for name in missing:
        monkeypatch.delattr(torch, name)
    there._pruned.channels.on_cpu = False  # all of v first, all the norms then
    train(other, there, batches(6))
    same(model, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_does_the_same():
    model, other = net(), net().cuda()
    opt, there = (SDPrun(m, net_graph(), lr=0.2, c=0.6, mu=0.7) for m in (model, other))
    train(model, opt, batches(20))
    train(other, there, [(x.cuda(), y.cuda()) for x, y in batches(20)])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-8, atol=1e-10)


# --- after a cut -----------------------------------------------------------------------------------------------------


def cut_by_hand(model, dead):
    """The net without dead channels, ``{group: positions}``, and what ``follow_cut`` is told."""
    stay = {
        name: torch.tensor([i for i in range(width) if i not in dead.get(name, ())])
        for name, width in (("stream", model.stem.out_channels), ("inner", 6), ("hidden", 5))
    }
    axes = {
        **{name: {0: "stream"} for name in (*STREAM, "norm.running_mean", "norm.running_var")},
        **{name: {0: "stream"} for name in ("norm2.running_mean", "norm2.running_var")},
        **{name: {0: "inner"} for name in (*INNER, "norm1.running_mean", "norm1.running_var")},
        **{name: {0: "hidden"} for name in HIDDEN},
    }
    axes["conv1.weight"] = {0: "inner", 1: "stream"}
    axes["conv2.weight"] = {0: "stream", 1: "inner"}
    axes["hidden.weight"] = {0: "hidden", 1: "stream"}
    axes["head.weight"] = {1: "hidden"}
    small = copy.deepcopy(model)
    kept, replaced = {}, {}
    for name, axis in axes.items():
        tensor = model.state_dict()[name]
        for dim, of in axis.items():
            tensor = tensor.index_select(dim, stay[of])
        place, _, leaf = name.rpartition(".")
        if leaf.startswith("running"):
            setattr(small.get_submodule(place), leaf, tensor.clone())
            continue
        setattr(small.get_submodule(place), leaf, nn.Parameter(tensor.clone()))
        kept[model.get_parameter(name)] = {dim: stay[of] for dim, of in axis.items()}
    for name, p in model.named_parameters():
        replaced[p] = small.get_parameter(name)
    return small, replaced, kept, stay


def zero_channels(model):
    members = {"stream": STREAM, "inner": INNER, "hidden": HIDDEN}
    return {
        key: [i for i in range(width) if all((model.get_parameter(n)[i] == 0).all() for n in names)]
        for (key, names), width in zip(members.items(), (4, 6, 5), strict=True)
    }


@pytest.mark.parametrize("options", [{}, {"weights": "sqrt"}, {"prox_every": 2}], ids=str)
def test_training_goes_on_after_a_cut_as_if_nothing_had_been_cut(options):
    c, data = (0.15 if "weights" in options else 0.8), list(batches(36))
    model = net(2)
    opt = SDPrun(model, net_graph(), lr=0.2, c=c, mu=0.7, **options)
    train(model, opt, data[:16])
    first = zero_channels(model)
    assert sum(map(len, first.values())) > 0
    small, replaced, kept, _ = cut_by_hand(model, first)
    whole, its = copy.deepcopy((model, opt))
    opt.follow_cut(replaced, kept)
    assert {p for g in opt.param_groups for p in g["params"]} == set(small.parameters())
    assert set(opt.state) <= set(small.parameters())
    train(small, opt, data[16:])
    train(whole, its, data[16:])
    reference, *_ = cut_by_hand(whole, first)
    for (name, p), q in zip(small.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)
    assert sum(map(len, zero_channels(whole).values())) > sum(map(len, first.values()))


def test_two_cuts_and_a_resume_go_on_too():
    data = list(batches(40))
    model = net(2)
    opt = SDPrun(model, net_graph(), lr=0.2, c=0.8, mu=0.7)
    train(model, opt, data[:16])
    whole, its = copy.deepcopy((model, opt))
    train(whole, its, data[16:])
    dead = zero_channels(model)
    small, replaced, kept, _ = cut_by_hand(model, dead)
    opt.follow_cut(replaced, kept)
    energy = [float(s["cut_energy"].sum()) for s in opt.state.values() if "cut_energy" in s]
    assert energy
    assert min(energy) > 0
    train(small, opt, data[16:20])
    opt.follow_cut({}, {})
    again = copy.deepcopy(small)
    opt.follow_cut(dict(zip(small.parameters(), again.parameters(), strict=True)), {})
    train(again, opt, data[20:30])
    fresh, resumed = copy.deepcopy((again, opt))
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(fresh, resumed, data[30:])
    train(again, opt, data[30:])
    same(fresh, again)
    reference, *_ = cut_by_hand(whole, dead)
    for (name, p), q in zip(again.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9, msg=name)


def test_after_parameters_were_replaced_a_cut_cannot_be_followed():
    model = net()
    opt = SDPrun(model, net_graph())
    other = net()
    for g in opt.param_groups:
        g["params"] = list(other.parameters())
    with pytest.raises(SecateurError, match="holds new parameters already"):
        opt.follow_cut(dict(zip(model.parameters(), other.parameters(), strict=True)), {})


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr=-0.1.*>= 0"),
        ({"lr": math.nan}, r"lr=nan.*>= 0"),
        ({"c": -1e-9}, r"c=-1e-09.*>= 0"),
        ({"c": math.inf}, r"c=inf.*>= 0"),
        ({"mu": 0.0}, r"mu=0.0.*\(0, 1\]"),
        ({"mu": 1.5}, r"mu=1.5.*\(0, 1\]"),
        ({"mu": math.nan}, r"mu=nan.*\(0, 1\]"),
        ({"weights": "sqr"}, r"unknown weights 'sqr': did you mean 'sqrt'"),
        ({"prox_every": 0}, r"prox_every=0.*1 or more"),
        ({"prox_every": True}, r"prox_every=True.*1 or more"),
    ],
    ids=str,
)
def test_bad_values_are_told(options, message):
    with pytest.raises(SecateurError, match=message):
        rows(torch.ones(2, 2), **options)


def test_bad_values_in_a_param_group_are_told():
    model = Rows(w=torch.ones(2, 2))
    shape = graph(group([1, 2], ("w", 0)))
    with pytest.raises(SecateurError, match=r"mu=2"):
        SDPrun(model, shape, param_groups=[{"params": [model.w], "mu": 2}])
    with pytest.raises(SecateurError, match="prox_every is one for all"):
        SDPrun(model, shape, param_groups=[{"params": [model.w], "prox_every": 2}])
    with pytest.raises(TypeError, match="momentum"):
        SDPrun(model, shape, momentum=0.9)


def test_a_graph_of_another_model_is_told():
    inputs = torch.randn(1, 2, 4, 4, dtype=DOUBLE)
    traced = trace(Net(width=8).eval(), inputs)
    with pytest.raises(SecateurError, match="another model"):
        SDPrun(net(), traced)
    with pytest.raises(SecateurError, match=r"w:0 has 3 positions.*\[2, 2\]"):
        SDPrun(Rows(w=torch.ones(2, 2)), graph(group([1, 2, 3], ("w", 0))))


def test_nothing_to_prune_is_told():
    with pytest.raises(SecateurError, match="nothing to prune"):
        SDPrun(Rows(w=torch.ones(2, 2)), graph(group([1, 2], ("w", 0), exact=False)))


def test_sparse_gradients_are_told_before_anything_moves():
    model = nn.Sequential(nn.Embedding(3, 2, sparse=True), nn.Linear(2, 2))
    opt = SDPrun(model, graph(group([1, 2], ("1.weight", 0), ("1.bias", 0))))
    before = copy.deepcopy(model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(SecateurError, match=r"\[3, 2\] is sparse.*sparse=False"):
        opt.step()
    same(model, before)
    assert opt.param_groups[0]["n"] == 0


def test_the_tracer_gives_the_groups_written_here_by_hand():
    model, other = net(), net()
    traced = trace(model, torch.randn(1, 2, 4, 4, dtype=DOUBLE))
    train(model, SDPrun(model, traced, lr=0.2, c=0.6, mu=0.7), batches(20))
    train(other, SDPrun(other, net_graph(), lr=0.2, c=0.6, mu=0.7), batches(20))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
