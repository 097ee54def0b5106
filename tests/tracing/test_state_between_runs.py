"""Every run begins with the same state of the model's Python, and nothing that a run makes is left anywhere."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from small_networks import Run
from torch import nn
from torch.nn.utils import prune

import secateur as sc
from secateur._internal.errors import NothingToPrune

X = torch.randn(2, 3, 8, 8)


class Small(nn.Module):
    """Two convolutions; a cache of some kind is used between them, and a constant on the CPU calls for fake tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 4, 1)

    def grid(self, x):
        raise NotImplementedError

    def forward(self, x):
        x = x * torch.linspace(0, 1, 8) + self.grid(x)
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


def ramp(h, w):
    return torch.linspace(0, 1, h * w).view(1, 1, h, w)


@functools.lru_cache(None)
def unbounded(h, w):
    return ramp(h, w)


@functools.lru_cache(maxsize=4)
def bounded(h, w):
    return [ramp(h, w), {"twice": ramp(h, w) * 2}]


TABLE, NAME = {}, None


class OfFunctions(Small):
    def grid(self, x):
        return unbounded(*x.shape[2:]) + bounded(*x.shape[2:])[1]["twice"]


class OfTheFile(Small):
    def grid(self, x):
        global NAME  # noqa: PLW0603
        if x.shape not in TABLE:
            TABLE[x.shape] = (ramp(*x.shape[2:]),)
        if NAME is None:
            NAME = ramp(*x.shape[2:])
        return TABLE[x.shape][0] + NAME


class OfTheClass(Small):
    kept = None
    tables: dict = {}  # noqa: RUF012

    def grid(self, x):
        if OfTheClass.kept is None:
            OfTheClass.kept = ramp(*x.shape[2:])
        return self.tables.setdefault(x.shape[2:], ramp(*x.shape[2:])) + OfTheClass.kept


class OfTheModule(Small):
    def __init__(self):
        super().__init__()
        self.kept, self.table, self.shape = None, {}, None
        self.register_buffer("ramp", torch.zeros(1, 1, 1, 1), persistent=False)

    def grid(self, x):
        if self.shape != x.shape[2:]:  # anchors of a detector
            self.shape, self.kept = x.shape[2:], ramp(*x.shape[2:])
        if self.ramp.shape[2:] != x.shape[2:]:  # a buffer that takes its shape in the first forward
            self.ramp = ramp(*x.shape[2:])
        if str(x.device) not in self.table:  # biases of attention
            self.table[str(x.device)] = self.c.bias * 0.5
        return self.kept + self.ramp + self.table[str(x.device)].mean()


KINDS = [OfFunctions, OfTheFile, OfTheClass, OfTheModule]


def clear():
    global NAME  # noqa: PLW0603
    unbounded.cache_clear(), bounded.cache_clear(), TABLE.clear(), OfTheClass.tables.clear()
    OfTheClass.kept = NAME = None


def state():
    return (
        unbounded.cache_info().currsize, bounded.cache_info().currsize, dict(TABLE), NAME, OfTheClass.kept,
        dict(OfTheClass.tables),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_run_made_is_left(kind):
    clear()
    before = state()
    model = kind().eval()
    sc.trace(model, X)
    assert state() == before
    with torch.no_grad():
        assert type(model(X)) is torch.Tensor
    clear()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_traced_once_is_traced_the_same(kind):
    clear()
    found = []
    for before in (False, True):
        model = kind().eval()
        if before:
            with torch.no_grad():
                model(X)
        found += [sc.trace(model, X).feasible() for _ in range(2)]
    assert all(one == found[0] for one in found)
    assert found[0]["params"][0] < 0.2 * found[0]["params"][1]
    clear()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_feasible_is_allocated(kind):
    model = kind().eval()
    graph = sc.trace(model, X)
    least, most = graph.feasible()["macs"]
    plan = sc.allocate(graph, sc.score(model, graph, "magnitude"), sc.Budget(macs=least / most))
    assert graph.macs(plan) == least
    assert sc.check(model, sc.cut(model, plan), plan, X) < 1e-5
    clear()


def test_a_buffer_that_took_its_shape_is_no_other_model(tmp_path):
    model = OfTheModule().eval()
    with torch.no_grad():
        model(X)
    graph = sc.trace(model, X)
    small = sc.cut(model, sc.make_plan(graph, {"a": [0, 13], "b": [2]}))
    sc.save(small, tmp_path)
    loaded = sc.load(tmp_path, build=lambda: OfTheModule().eval())
    with torch.no_grad():
        assert torch.equal(loaded(X), small(X))


# ------------------------------------------------------------------------------------------------ what a forward keeps


class Keeps(nn.Module):
    """Keeps features of its last forward, by themselves and in containers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        self.features = F.relu(self.a(x))
        self.pyramid = [self.features, {"half": (F.avg_pool2d(self.features, 2),)}]
        return self.b(self.features)


def test_a_model_that_keeps_features_is_copied():
    model = Keeps()
    fresh = sc.trace(model, X).feasible()
    model(X).sum().backward()
    assert sc.trace(model, X).feasible() == fresh
    assert model.features.requires_grad and model.a.weight.grad is not None
    result = sc.prune(model, X, sc.Budget(macs=0.5), criterion="magnitude")
    assert not result.model.pyramid[0].requires_grad
    result.model(X).sum().backward()
    again = sc.prune(result.model, X, sc.Budget(macs=0.5), criterion="magnitude")
    assert again.model(X).shape == (2, 4, 6, 6)


def test_a_mask_of_torch_is_copied():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1))
    prune.ln_structured(model[0], "weight", 0.5, 2, 0)
    graph = sc.trace(model, X)
    plan = sc.make_plan(graph, {"0": [1, 4, 5]})
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, X) < 1e-6 and small[0].weight.shape[0] == 13
    small(X).sum().backward()


def test_a_forward_that_fails_leaves_nothing_either():
    clear()

    def forward(m, x):
        return m.a(x + unbounded(8, 8)).missing

    with pytest.raises(sc.SecateurError, match="missing"):
        sc.trace(Run(forward, a=nn.Conv2d(3, 4, 1)), X)
    assert unbounded.cache_info().currsize == 0
    with pytest.raises(NothingToPrune):
        sc.trace(Run(lambda m, x: m.a(x + unbounded(8, 8)), a=nn.Conv2d(3, 4, 1)), X)
    assert unbounded.cache_info().currsize == 0


def test_handles_of_hooks_are_those_of_the_copy():
    """As models have that keep them (adapters, checkpointing): removed from a copy, the hook of the model stays."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    model.handles = [
        model[0].register_forward_hook(lambda m, x, y: y * 2),
        model.register_forward_pre_hook(lambda m, x: None),
    ]
    x = torch.randn(3, 4)
    for _ in range(2):
        plan = sc.make_plan(sc.trace(model, x), {"0": [1]})
        small = sc.cut(model, plan)
        assert sc.check(model, small, plan, x) < 1e-6
    before = small(x)
    for handle in small.handles:
        handle.remove()
    assert not torch.allclose(small(x), before)
    assert len(model[0]._forward_hooks) == len(model._forward_pre_hooks) == 1
    again = sc.cut(small, sc.make_plan(sc.trace(small, x), {"0": [0]}))
    assert again(x).shape == (3, 2)
