"""Heads are units, however attention is written: masked and cut network agree, and counts are the cut one's."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from small_networks import Run
from torch import nn

import secateur as sc
from secateur.measure.counting import count_macs, count_params
from secateur.tracing.proof import verify

H, D, E = 4, 3, 12  # heads, their size, the width


def linear(rows, columns=E, *, bias=True):
    return nn.Linear(columns, rows, bias=bias)


def split(x, size=D):
    return x.view(*x.shape[:2], -1, size).transpose(1, 2)


def merged(y):
    return y.transpose(1, 2).flatten(2)


def softmax(q, k, v, extra=None):
    scores = q @ k.transpose(-1, -2) * 0.5
    return torch.softmax(scores if extra is None else scores + extra, -1) @ v


def network(attend, **parts):
    """Attention by ``attend(m, x)`` between a stem and a head, with a residual around it."""

    def forward(m, x):
        x = m.stem(x)
        return m.last(x + m.o(attend(m, x)))

    return Run(forward, stem=linear(E, 5), o=linear(E, parts.pop("inner", E)), last=linear(2), **parts)


def separate(**more):
    return {"q": linear(E), "k": linear(E), "v": linear(E), **more}


def fused(m, x):
    q, k, v = m.qkv(x).view(*x.shape[:2], 3, -1, D).permute(2, 0, 3, 1, 4)
    return merged(softmax(q, k, v))


def fused_by_unbind(m, x):
    q, k, v = m.qkv(x).unflatten(-1, (3, -1, D)).unbind(2)
    return merged(F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=0.5))


def fused_by_head(m, x):
    q, k, v = m.qkv(x).view(*x.shape[:2], -1, 3 * D).transpose(1, 2).chunk(3, -1)
    return merged(F.scaled_dot_product_attention(q, k, v))


def fused_by_index(m, x):
    qkv = m.qkv(x).view(*x.shape[:2], -1, 3, D)
    return merged(softmax(*(qkv[:, :, :, i].transpose(1, 2) for i in range(3))))


def chunked(m, x):
    return merged(softmax(*map(split, m.qkv(x).chunk(3, -1))))


def plain(m, x):
    return merged(softmax(split(m.q(x)), split(m.k(x)), split(m.v(x))))


def by_kernel(**options):
    return lambda m, x: merged(F.scaled_dot_product_attention(split(m.q(x)), split(m.k(x)), split(m.v(x)), **options))


def einsum(m, x):
    q, k, v = (layer(x).view(*x.shape[:2], -1, D) for layer in (m.q, m.k, m.v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)


def batched(m, x):
    """As ``nn.MultiheadAttention`` does: heads and batch are one dim."""
    x = x.transpose(0, 1)
    q, k, v = (layer(x).reshape(len(x), -1, D).transpose(0, 1) for layer in (m.q, m.k, m.v))
    y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
    return y.transpose(0, 1).reshape(x.shape[0], x.shape[1], -1).transpose(0, 1)


def rotary(m, x):
    angle = torch.arange(x.shape[1]).to(x)[:, None] * torch.tensor([0.3, 0.7]).to(x)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)

    def turned(y):
        one, two = y.chunk(2, -1)
        return y * cos + torch.cat([-two, one], -1) * sin

    q, k = (turned(split(layer(x), 4)) for layer in (m.q, m.k))
    return merged(softmax(q, k, split(m.v(x))))


def with_table(m, x):
    steps = torch.arange(x.shape[1])
    bias = m.table((steps[:, None] - steps).abs()).permute(2, 0, 1)
    return merged(softmax(split(m.q(x)), split(m.k(x)), split(m.v(x)), bias))


def with_index(m, x):
    steps = torch.arange(x.shape[1])
    bias = m.table[(steps[:, None] - steps).abs().flatten()].view(x.shape[1], x.shape[1], -1).permute(2, 0, 1)
    return merged(F.scaled_dot_product_attention(split(m.q(x)), split(m.k(x)), split(m.v(x)), attn_mask=bias))


def alibi(m, x):
    steps = torch.arange(x.shape[1]).to(x)
    extra = m.slopes[:, None, None] * (steps[None, :] - steps[:, None])
    return merged(softmax(split(m.q(x)), split(m.k(x)), split(m.v(x)), extra))


def scaled(m, x):
    q, k = F.normalize(split(m.q(x)), dim=-1), F.normalize(split(m.k(x)), dim=-1)
    return merged((q @ k.transpose(-1, -2) * m.scale.exp()).softmax(-1) @ split(m.v(x)))


def normed(m, x):
    return merged(softmax(m.one(split(m.q(x))), m.two(split(m.k(x))), split(m.v(x))))


def sinks(m, x):
    q, k, v = (split(layer(x)) for layer in (m.q, m.k, m.v))
    scores = q @ k.transpose(-1, -2)
    scores = torch.cat([scores, m.sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return merged(scores.softmax(-1)[..., :-1] @ v)


def expanded(m, x):
    q, k, v = (split(layer(x)) for layer in (m.q, m.k, m.v))
    k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(x), -1, x.shape[1], D) for t in (k, v))
    return merged(softmax(q, k, v))


def repeated(m, x):
    q, k, v = (split(layer(x)) for layer in (m.q, m.k, m.v))
    return merged(softmax(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))


def by_the_kernel(m, x):
    q, k, v = (split(layer(x)) for layer in (m.q, m.k, m.v))
    return merged(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def one_for_all(m, x):
    q, k, v = split(m.q(x)), m.k(x)[:, None], m.v(x)[:, None]
    return merged(softmax(q, k, v))


def maps(m, x):
    """On feature maps, as in convolutional transformers."""
    x = x.transpose(1, 2).unflatten(-1, (2, 3))
    q, k, v = m.qkv(x).reshape(len(x), 3, -1, D, 6).unbind(1)
    y = v @ (q.transpose(-1, -2) @ k).softmax(-1).transpose(-1, -2)
    return y.reshape(len(x), -1, 2, 3).flatten(2).transpose(1, 2)


P = nn.Parameter
CASES = {
    "fused, three first": (fused, {"qkv": linear(3 * E)}, H),
    "fused, without biases": (fused, {"qkv": linear(3 * E, bias=False)}, H),
    "fused, unbound": (fused_by_unbind, {"qkv": linear(3 * E)}, H),
    "fused, heads first": (fused_by_head, {"qkv": linear(3 * E)}, H),
    "fused, heads first, by index": (fused_by_index, {"qkv": linear(3 * E)}, H),
    "fused, in chunks": (chunked, {"qkv": linear(3 * E)}, H),
    "separate": (plain, separate(), H),
    "one kernel": (by_kernel(), separate(), H),
    "one kernel, causal": (by_kernel(is_causal=True), separate(), H),
    "one kernel, scaled": (by_kernel(scale=0.3), separate(), H),
    "einsum": (einsum, separate(), H),
    "heads and batch are one": (batched, separate(), H),
    "rotary positions": (rotary, {"q": linear(16), "k": linear(16), "v": linear(E)}, H),
    "a table of relative positions": (with_table, separate(table=nn.Embedding(6, H)), H),
    "a parameter of relative positions": (with_index, separate(table=P(torch.randn(6, H))), H),
    "slopes": (alibi, separate(slopes=P(torch.rand(H))), H),
    "a scale by head": (scaled, separate(scale=P(torch.randn(H, 1, 1))), H),
    "norms of queries and keys": (normed, separate(one=nn.LayerNorm(D), two=nn.RMSNorm(D, 1e-6)), H),
    "sinks": (sinks, separate(sink=P(torch.randn(H))), H),
    "grouped, expanded": (expanded, {"q": linear(E), "k": linear(6), "v": linear(6)}, 2),
    "grouped, repeated": (repeated, {"q": linear(E), "k": linear(6), "v": linear(6)}, 2),
    "grouped, one kernel": (by_the_kernel, {"q": linear(E), "k": linear(6), "v": linear(6)}, 2),
    "feature maps": (maps, {"qkv": nn.Conv2d(E, 3 * E, 1)}, H),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_heads_go_exactly(name, training):
    attend, parts, units = CASES[name]
    torch.manual_seed(0)
    model = network(attend, **parts).double().train(training)
    x = torch.randn(2, 6, 5).double()
    graph = sc.trace(model, x)
    (group,) = [g for g in graph.groups if any(a.name in {"q.weight", "qkv.weight"} for a in g.producers)]
    assert len(group) == units and group.exact
    source = random.Random(0)
    for number in range(1, units - group.least + 1):
        gone = {group.name: source.sample(range(units), number), "stem": source.sample(range(E), number)}
        plan = sc.make_plan(graph, gone)
        small = sc.cut(model, plan)
        assert sc.check(model, small, plan, x) < 1e-12
        assert count_macs(small, x) == graph.macs(plan)
        assert count_params(small) == graph.params(plan)
    assert sc.check(model, sc.cut(model, sc.make_plan(graph, {})), plan, x) > 1e-6  # so the masks do something


def test_where_all_heads_share_one_key_none_is_a_unit():
    """Zero queries look everywhere alike, and what they see is not zero. The size of what they see can change."""
    model = network(one_for_all, q=linear(E), k=linear(D), v=linear(D)).eval()
    graph = sc.trace(model, torch.randn(2, 6, 5))
    assert [(g.name, len(g)) for g in graph.groups if g.exact] == [("stem", E), ("v", D)]


def test_scores_are_one_a_head():
    attend, parts, _ = CASES["separate"]
    model = network(attend, **parts).eval()
    graph = sc.trace(model, torch.randn(2, 6, 5))
    scores = sc.score(model, graph, "magnitude")
    assert scores["q"].shape == (H,)
    plan = sc.allocate(graph, scores, sc.Budget(macs=0.5))
    assert graph.macs(plan) <= 0.5 * graph.macs()


def test_channels_of_maps_are_shuffled_as_before():
    def shuffled(m, x):
        y = m.a(x).view(len(x), 2, 6, 4, 4).transpose(1, 2).reshape(len(x), 12, 4, 4)
        return m.c(F.relu(m.b(y)))

    model = Run(shuffled, a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(12, 12, 3, padding=1, groups=2), c=nn.Conv2d(12, 2, 1))
    graph = sc.trace(model.eval(), torch.randn(1, 3, 4, 4))
    assert {g.name: len(g) for g in graph.groups if g.exact}["b"] == 6


def sized(y):
    """Heads of any size, so many of them."""
    return y.unflatten(-1, (H, -1)).transpose(1, 2)


def free_sizes(m, x):
    return merged(softmax(sized(m.q(x)), sized(m.k(x)), sized(m.v(x))))


def free_values(m, x):
    """The kernel scales by the size of the queries, which stays therefore."""
    return merged(F.scaled_dot_product_attention(sized(m.q(x)), sized(m.k(x)), sized(m.v(x))))


def free_fused(m, x):
    return merged(softmax(*(sized(t) for t in m.qkv(x).chunk(3, -1))))


@pytest.mark.parametrize(
    ("attend", "parts", "groups"),
    [
        (free_sizes, separate(), {"q": D, "v": D}),
        (free_values, separate(), {"v": D}),
        (free_fused, {"qkv": linear(3 * E)}, {"qkv": D}),
        (plain, separate(), {}),  # it fixes the size of all three
    ],
)
def test_sizes_of_heads_go_exactly_where_the_forward_does_not_fix_them(attend, parts, groups):
    torch.manual_seed(0)
    model, x = network(attend, **parts).double().eval(), torch.randn(2, 6, 5).double()
    graph = sc.trace(model, x, attention="sizes")
    assert {g.name: len(g) for g in graph.groups if g.exact} == {"stem": E, **groups}
    plan = sc.make_plan(graph, {"stem": [2, 5], **{name: [1] for name in groups}})
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, x) < 1e-12
    assert (count_macs(small, x), count_params(small)) == (graph.macs(plan), graph.params(plan))
    copied = copy.deepcopy(graph)  # it has no skeleton, and finds the same by itself
    assert verify(model, copied, plan) == ""


def test_what_goes_of_attention_is_one_of_two():
    with pytest.raises(
        sc.SecateurError, match=r"trace\(attention=\): 'heads' or 'sizes' is expected, 'size' was given"
    ):
        sc.trace(nn.Linear(2, 2), torch.zeros(1, 2), attention="size")


def one_value_for_all(m, x):
    assert float(x.detach().abs().amax()) > 0  # it is looked at, so that the kernel of the CPU runs in the trace
    return merged(F.scaled_dot_product_attention(split(m.q(x)), split(m.k(x)), split(m.v(x)), enable_gqa=True))


@pytest.mark.parametrize("attend", [one_value_for_all, one_for_all])
def test_a_head_of_queries_alone_is_not_exact(attend):
    """Nothing of the keys and values that serve all heads can go: they are frozen by their size, or by the sequence."""
    parts = separate(k=linear(D), v=linear(D))
    model, x = network(attend, **parts).double().eval(), torch.randn(2, 6, 5).double()
    graph = sc.trace(model, x)
    assert not any(g.exact for g in graph.groups if any(a.name == "q.weight" for a in g.producers))
    plans = [sc.make_plan(graph, {g.name: [0]}) for g in graph.groups if g.exact and len(g) > g.least]
    assert all(sc.check(model, sc.cut(model, plan), plan, x) < 1e-12 for plan in plans)
