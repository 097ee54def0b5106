"""Norms over channels of which some are gone: what stays is normalised as it was beside zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.tracing.norms import NarrowLayerNorm, norm_of


class OfLlama(nn.Module):
    def __init__(self, width, eps=1e-3):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.randn(width)), eps

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


class OfGemma(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width) * 0.3), 1e-2

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class NoNorm(nn.Module):
    """Looks like one, and divides by something else."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(width)), 1e-2

    def forward(self, x):
        return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)


def network(norm, width=10):
    torch.manual_seed(0)
    layers = [nn.Linear(4, width), norm(width), nn.Linear(width, 7), nn.ReLU(), nn.Linear(7, 2)]
    model = nn.Sequential(*layers).double().eval()
    for p in model[1].parameters():
        p.data = torch.randn_like(p)
    return model, torch.randn(3, 5, 4).double()


EXACT = {
    "layer norm": (nn.LayerNorm, "layer norm"),
    "layer norm, no bias": (lambda n: nn.LayerNorm(n, eps=0.1, bias=False), "layer norm"),
    "root-mean-square norm": (lambda n: nn.RMSNorm(n, eps=0.1), "root-mean-square norm"),
    "one of Llama's kind": (OfLlama, "root-mean-square norm"),
    "one of Gemma's kind": (OfGemma, "root-mean-square norm"),
}


@pytest.mark.parametrize("name", EXACT)
def test_a_stream_goes_exactly(name, tmp_path):
    make, kind = EXACT[name]
    model, x = network(make)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = sc.trace(model, x)
    assert [(g.name, len(g), g.exact) for g in graph.groups] == [("0", 10, True), ("2", 7, True)]
    for gone in ([3], [0, 1, 2, 7, 9], list(range(1, 10))):
        plan = sc.make_plan(graph, {"0": gone})
        assert plan.norms["1"].kind == kind and plan.norms["1"].width == 10
        small = sc.cut(model, sc.Plan.from_json(plan.to_json()))
        assert sc.check(model, small, plan, x) < 1e-12
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    small = sc.cut(model, sc.make_plan(graph, {"0": [0, 4, 5]}))
    second = sc.trace(small, x)
    plan = sc.make_plan(second, {"0": [1, 6], "2": [0]})
    smaller = sc.cut(small, plan)
    assert sc.check(small, smaller, plan, x) < 1e-12
    sc.save(smaller, tmp_path)
    loaded = sc.load(tmp_path, build=lambda: network(make)[0])
    assert torch.equal(loaded(x), smaller(x))


def test_a_layer_norm_is_replaced_by_one_that_is_still_one():
    model, x = network(nn.LayerNorm)
    small = sc.cut(model, sc.make_plan(sc.trace(model, x), {"0": [2, 3]}))
    assert isinstance(small[1], NarrowLayerNorm) and isinstance(small[1], nn.LayerNorm)
    assert small[1].normalized_shape == (8,) and small[1].width == 10 and "8 of 10" in repr(small[1])
    exported = torch.export.export(small, (x,)).module()
    assert torch.allclose(exported(x), small(x))
    half = small.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - small.double()(x)).abs().max() < 0.2


def test_an_encoder_layer_does_not_take_its_fused_kernel_then():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    from secateur.tracing.norms import narrow_all

    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        before = layer(x)
        narrow_all(layer, {"norm1": norm_of(layer.norm1), "norm2": norm_of(layer.norm2)})
        assert torch.allclose(layer(x), before, atol=1e-6)


class OneOrTheOther(OfLlama):
    """Of one class, two kinds."""

    def __init__(self, width, offset):
        super().__init__(width)
        self.offset = offset

    def forward(self, x):
        return (self.offset + self.weight) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def test_instances_of_one_class_may_be_of_two_kinds():
    assert [norm_of(OneOrTheOther(10, offset)).offset for offset in (0, 1, 0)] == [0.0, 1.0, 0.0]
    assert norm_of(OneOrTheOther(10, 2)) is None


@pytest.mark.parametrize("make", [nn.LayerNorm, OfLlama])
def test_a_norm_that_is_there_twice_is_one(make):
    model, x = network(make)
    again = nn.Sequential(*model[:2], nn.Linear(10, 10).double(), model[1], *model[2:]).double().eval()
    graph = sc.trace(again, x)
    plan = sc.make_plan(graph, {"0": [1, 8]})
    small = sc.cut(again, plan)
    assert small[1] is small[3] and sc.check(again, small, plan, x) < 1e-12


def test_a_hook_stays_with_the_norm():
    model, x = network(nn.LayerNorm)
    model[1].register_forward_hook(lambda module, given, out: out * 3)
    plan = sc.make_plan(sc.trace(model, x), {"0": [1, 8]})
    assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12


def test_where_a_weight_that_changes_is_used_elsewhere_too_nothing_is_exact():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.one, self.two, self.b = nn.Linear(4, 10), OfLlama(10), OfLlama(10), nn.Linear(10, 2)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.b(self.two(self.one(self.a(x))))

    graph = sc.trace(Twice().eval(), torch.randn(3, 4))
    (group,) = graph.groups
    assert not group.exact and "is used elsewhere too" in group.reason


@pytest.mark.parametrize("make", [NoNorm, lambda n: nn.LayerNorm(n, elementwise_affine=False)])
def test_what_is_no_such_norm_is_not_exact(make):
    model, x = network(make)
    assert norm_of(model[1]) is None
    graph = sc.trace(model, x)
    assert [g.exact for g in graph.groups] == [False, True]


def test_whole_groups_of_a_group_norm_go():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 5, 1)]
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(2, 3, 8, 8).double()
    model[1].bias.data.normal_()
    graph = sc.trace(model, x)
    assert [(g.name, len(g), g.exact) for g in graph.groups] == [("0", 8, True)]
    plan = sc.make_plan(graph, {"0": [2, 3]})
    small = sc.cut(model, plan)
    assert plan.patched["1.num_groups"] == (8, 6) and small[1].num_groups == 6 and small[1].num_channels == 24
    assert sc.check(model, small, plan, x) < 1e-12
    least = graph.feasible()["params"]
    assert least[0] / least[1] < 0.15


def test_a_group_norm_with_a_number_of_its_own_is_patched_too():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.many, self.a, self.b = 4, nn.Conv2d(3, 12, 1), nn.Conv2d(12, 2, 1)
            self.w, self.c = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(12))

        def forward(self, x):
            return self.b(F.group_norm(self.a(x), self.many, self.w, self.c).relu())

    model, x = Own().double().eval(), torch.randn(2, 3, 4, 4).double()
    plan = sc.make_plan(sc.trace(model, x), {"a": [1]})
    assert plan.patched["many"] == (4, 3)
    assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12


def test_instance_norms_without_tensors_remember_how_many_channels_there_are():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    plan = sc.make_plan(sc.trace(model, x), {"0": [0, 5]})
    small = sc.cut(model, plan)
    assert plan.patched["1.num_features"] == (16, 14) and small[1].num_features == 14
    small(x)  # PyTorch would warn
    assert sc.check(model, small, plan, x) < 1e-5


class OfMaps(nn.LayerNorm):
    """A layer norm of feature maps, as in ConvNeXt."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class ByHand(nn.Module):
    """The same, as in SAM."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), 1e-2

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class Casting(nn.LayerNorm):
    """In single precision whatever comes, as in CLIP."""

    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class Constant(nn.Module):
    """A shape that is written down, in a module of one's own."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias, self.size = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), width
        self.epsilon = 1e-3

    def forward(self, x):
        return F.layer_norm(x, (self.size,), self.weight, self.bias, self.epsilon)


class BatchLike(nn.Module):
    """Looks like a layer norm, and takes its statistics over the examples."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), 1e-2

    def forward(self, x):
        x = (x - x.mean(0, keepdim=True)) / torch.sqrt(x.var(0, keepdim=True) + self.eps)
        return x * self.weight + self.bias


@pytest.mark.parametrize("norm", [OfMaps, ByHand])
def test_layer_norms_of_maps(norm):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 10, 3), norm(10), nn.GELU(), nn.Conv2d(10, 6, 1), norm(6), nn.Conv2d(6, 2, 1)
    model, x = nn.Sequential(*layers).double().eval(), torch.randn(2, 3, 6, 6).double()
    for p in model.parameters():
        p.data = torch.randn_like(p)
    graph = sc.trace(model, x)
    assert all(g.exact for g in graph.groups) and norm_of(model[1]).dim == 1
    plan = sc.make_plan(graph, {"0": [1, 4, 5], "3": [0, 2]})
    small = sc.cut(model, sc.Plan.from_json(plan.to_json()))
    assert isinstance(small[1], NarrowLayerNorm) and list(small[1].state_dict()) == ["weight", "bias"]
    assert sc.check(model, small, plan, x) < 1e-12
    again = sc.trace(small, x)
    more = sc.make_plan(again, {"0": [0], "3": [1]})
    assert sc.check(small, sc.cut(small, more), more, x) < 1e-12


@pytest.mark.parametrize(("norm", "allowed"), [(Casting, 1e-5), (Constant, 1e-12)])
def test_layer_norms_in_other_forwards(norm, allowed):
    model, x = network(norm)
    if norm is Casting:  # PyTorch's own wants weights of the inputs' type
        model, x = model.float(), x.float()
    graph = sc.trace(model, x)
    assert all(g.exact for g in graph.groups)
    plan = sc.make_plan(graph, {"0": [0, 3, 9]})
    assert sc.check(model, sc.cut(model, plan), plan, x) < allowed


def test_what_only_looks_like_a_layer_norm():
    assert norm_of(BatchLike(6).double()) is None
    assert norm_of(nn.GroupNorm(1, 6)) is None and norm_of(nn.InstanceNorm2d(6, affine=True)) is None
    assert norm_of(nn.BatchNorm2d(6, track_running_stats=False)) is None


class Onwards(nn.Module):
    """A norm of what is not zero where its producers are: after a sigmoid, or once something has been added."""

    def __init__(self, norm, before):
        super().__init__()
        self.stem, self.before, self.norm, self.last = nn.Linear(4, 10), before, norm, nn.Linear(10, 2)

    def forward(self, x):
        return self.last(self.norm(self.before(self.stem(x))))


class Mixed(nn.Module):
    """A bias for each token: what was zero is so no more."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(3, 5)

    def forward(self, x):
        return x + self.b(F.gelu(self.a(x.transpose(1, 2)))).transpose(1, 2)


class ByHandAfterACast(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), 1e-2

    def forward(self, x):
        x = x.double()
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) + self.bias


@pytest.mark.parametrize("before", [nn.Sigmoid, nn.Softplus, Mixed])
@pytest.mark.parametrize("make", [*(make for make, _ in EXACT.values()), Constant, ByHandAfterACast])
def test_a_norm_of_what_does_not_vanish_is_not_exact(make, before):
    torch.manual_seed(0)
    model, x = Onwards(make(10), before()).double().eval(), torch.randn(3, 5, 4).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    assert norm_of(model.norm) is not None
    graph = sc.trace(model, x)
    assert {g.name: g.exact for g in graph.groups}["stem"] is False
    plan = sc.make_plan(graph, {"stem": [3]}, approximate=True)
    assert sc.check(model, sc.cut(model, plan), plan, x) > 1e-6
