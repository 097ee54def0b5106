"""Networks that another tool has driven to exact zeros: a group lasso, and a mask on filters, of the test's own."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import secateur as sc

DIGITS = load_digits()
X = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16
Y = torch.tensor(DIGITS.target)


def trained(after_step):
    """A small network; ``after_step(number, convolution, norm)`` is the other tool."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, 16, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(16)
    model = nn.Sequential(conv, norm, nn.Tanh(), nn.Flatten(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    number = 0
    for _ in range(8):
        for part in torch.randperm(1400).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X[part]), Y[part]).backward()
            optimizer.step()
            with torch.no_grad():
                after_step(number, conv, norm)
            number += 1
    return model.eval()


def group_lasso(_, conv, norm):
    """All that writes a channel shrinks as one group."""
    writers = [conv.weight, norm.weight, norm.bias]
    size = sum(w.flatten(1).square().sum(1) if w.ndim > 1 else w.square() for w in writers).sqrt()
    share = (1 - 0.05 / size.clamp(min=1e-12)).clamp(min=0)
    for w in writers:
        w.mul_(share.view(-1, *[1] * (w.ndim - 1)))


def filter_mask(number, conv, _):
    """From the 100th step on, the six smallest filters are held at zero; their norms' biases train on."""
    if number >= 100:
        conv.weight[conv.weight.flatten(1).norm(dim=1).argsort()[:6]] = 0


def right(model):
    with torch.no_grad():
        return float((model(X[1400:]).argmax(1) == Y[1400:]).double().mean())


def test_exact_zeros_are_cut_off_exactly():
    model = trained(group_lasso)
    plan = sc.zero_channels(model, sc.trace(model, X[:1]))
    assert 3 <= len(plan) < 16
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, X[:200]) < 1e-5
    assert right(small) == right(model) > 0.85


def test_filters_alone_leave_a_constant_that_the_next_layer_takes_up():
    model = trained(filter_mask)
    graph = sc.trace(model, X[:1])
    assert len(sc.zero_channels(model, graph)) == 0
    empty = {"0": [i for i, f in enumerate(model[0].weight) if not f.any()]}
    assert len(empty["0"]) == 6
    assert any(abs(model[1].bias[i].item()) > 0.05 for i in empty["0"])  # it would be missing
    plan = sc.make_plan(graph, empty)
    small = sc.cut(model, plan)
    before = (small(X[1400:]) - model(X[1400:])).norm()
    sc.refit(model, small, plan, [X[:1400]], damping=1e-9)
    with torch.no_grad():
        assert (small(X[1400:]) - model(X[1400:])).norm() < 1e-3 * before
    assert right(small) == pytest.approx(right(model), abs=0.003)
