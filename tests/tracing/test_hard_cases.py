"""Networks that once fooled the tracer: whatever it offers can be cut, in any combination, and computes the same."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from small_networks import Run, conv
from torch import nn

import secateur as sc
from secateur._internal.errors import NothingToPrune
from secateur.measure.counting import count_macs, count_params

P = nn.Parameter


def aux_head(m, x):
    x = m.a(x).relu()
    y = m.b(x.mean((2, 3)))
    return (y, m.aux(x)) if m.training else y


def branch_on_a_width(m, x):
    x = m.a(x)
    return m.b(x * 2 if x.shape[1] > 6 else x)


def computed_halves(m, x):
    x = m.a(x)
    half = x.shape[1] // 2
    return m.b(x[:, half:]) + m.c(x[:, :half])


def like_a_sibling(m, x):
    x = m.a(x)
    return m.b((x.flatten(2).transpose(1, 2) @ m.w).transpose(1, 2).reshape_as(x)).mean((2, 3))


def first_rows(m, x):
    rows = m.a(x)
    return m.b(rows[rows.sum(1) > 0].relu()).sum(0)


def with_alpha(m, x):
    x = m.a(x)
    return m.b(torch.add(x, x, alpha=x.shape[1]))


def twice_and_sliced(m, x):
    y, z = m.a(x), m.c(x)
    return m.b(torch.cat([y, torch.stack([z, 2 * z], 2).flatten(1)], 1)[:, 3:4])


def shuffled_and_rolled(m, x):
    x = F.channel_shuffle(m.a(x), 2).roll(1, 1)
    return m.b(x)


def half_through_a_norm(m, x):
    a, b = m.a(x).chunk(2, 1)
    b = F.batch_norm(m.c(b), m.mean, m.var)  # zero becomes a constant
    return m.b(torch.cat([a, b], 1).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


def squares_of_two_kinds(m, x):
    return m.b(F.pixel_shuffle(F.channel_shuffle(torch.cat([m.a(x), m.c(x).sigmoid()], 1), 2), 2))


# name -> (network, inputs, exact groups that must be offered, exact groups that must not)
CASES = {
    "a weight divided by its norm, on the consumer's side": (
        Run(lambda m, x: F.linear(m.a(x).relu(), m.w / m.w.norm()), a=nn.Linear(5, 8), w=P(torch.empty(3, 8))),
        (4, 5), (), ("a",)),
    "a weight minus its mean, on the consumer's side": (
        Run(lambda m, x: F.linear(m.a(x).relu(), m.w - m.w.sum()), a=nn.Linear(5, 8), w=P(torch.empty(3, 8))),
        (4, 5), (), ("a",)),
    "slices at half the width": (
        Run(computed_halves, a=nn.Linear(5, 9), b=nn.Linear(5, 3), c=nn.Linear(4, 3)), (4, 5), (), ()),
    "a slice at half the width, of which two channels stay": (
        Run(lambda m, x: m.b((y := m.a(x))[:, : y.shape[1] // 2]), a=nn.Linear(5, 5), b=nn.Linear(2, 3)),
        (4, 5), (), ()),
    "as many channels as examples": (  # an instance norm views both as one dim
        nn.Sequential(
            nn.Conv2d(3, 4, 1, padding_mode="circular"), nn.Conv2d(4, 6, 1), nn.InstanceNorm2d(6, affine=True),
            conv(6, 2), nn.Flatten(), nn.Linear(40, 2)),
        (3, 3, 5, 4), ("1",), ()),
    "a slice from the middle, next to its twin": (
        Run(twice_and_sliced, a=nn.Linear(5, 3), c=nn.Linear(5, 2), b=nn.Linear(1, 3)), (4, 5), (), ("c",)),
    "rolled, next to a twin": (
        Run(shuffled_and_rolled, a=conv(3, 6), b=conv(6, 2)), (2, 3, 4, 4), (), ("a",)),
    "shuffled with a twin that does not vanish": (
        Run(half_through_a_norm, a=conv(3, 4), c=conv(2, 2), b=conv(4, 2), mean=nn.Buffer(torch.ones(2)),
            var=nn.Buffer(torch.ones(2))),
        (2, 3, 4, 4), (), ("a", "c")),
    "pixels shuffled with twins that do not vanish": (
        Run(squares_of_two_kinds, a=conv(3, 4), c=conv(3, 4), b=conv(2, 2)), (2, 3, 4, 4), (), ("a", "c")),
    "a crop of channels": (
        Run(lambda m, x: m.b(m.a(x)[:, 2:-2]), a=conv(3, 8), b=conv(4, 2)), (2, 3, 4, 4), ("a",), ()),
    "a view with the width of a sibling": (
        Run(like_a_sibling, a=conv(3, 5), b=conv(5, 2), w=P(torch.empty(5, 5))), (2, 3, 4, 4), (), ()),
    "a view with the width of another tensor, whose channels it does not hold": (
        Run(lambda m, x: m.b(F.conv1d(y := m.a(x), m.w.unsqueeze(-1)).view_as(y)).mean(2),
            a=nn.Conv1d(3, 5, 3), b=nn.Conv1d(5, 2, 1), w=P(torch.empty(5, 5))), (2, 3, 7), (), ("a", "w")),
    "a branch on a width": (
        Run(branch_on_a_width, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), (4, 5), (), ("a",)),
    "a number from a width": (Run(with_alpha, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), (4, 5), (), ("a",)),
    "an in-place squeeze": (
        Run(lambda m, x: m.b(m.a(x).unsqueeze(1).relu().squeeze_(1)), a=nn.Linear(5, 8), b=nn.Linear(8, 3)),
        (4, 5), (), ()),
    "one example without a batch": (
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), (5,), ("0",), ()),
    "weight norm": (
        nn.Sequential(conv(3, 6), nn.utils.parametrizations.weight_norm(conv(6, 4)), nn.ReLU(), conv(4, 2)),
        (2, 3, 4, 4), (), ()),
    "a shift that nothing zeroes": (
        Run(lambda m, x: m.b(F.batch_norm(m.a(x), m.mean, m.var, m.scale, m.shift)),
            a=nn.Linear(5, 8), b=nn.Linear(8, 3), scale=P(torch.empty(8)), mean=nn.Buffer(torch.randn(8)),
            var=nn.Buffer(torch.rand(8) + 1), shift=nn.Buffer(torch.randn(8))),
        (4, 5), (), ("a",)),
    "a mask that fills in": (
        Run(lambda m, x: m.b((y := m.a(x)).masked_fill(y == 0, 1.0)), a=nn.Linear(5, 8), b=nn.Linear(8, 3)),
        (4, 5), (), ("a",)),
    "a logarithm": (
        Run(lambda m, x: m.b((m.a(x).relu() + 0).log().clamp(-9, 9)), a=nn.Linear(5, 8), b=nn.Linear(8, 3)),
        (4, 5), (), ("a",)),
    "a reciprocal root": (
        Run(lambda m, x: m.b(m.a(x).relu().rsqrt().clamp(max=9)), a=nn.Linear(5, 8), b=nn.Linear(8, 3)),
        (4, 5), (), ("a",)),
    "a matrix times a vector": (
        Run(lambda m, x: torch.mv(m.v, torch.mv(m.w, x).relu()), w=P(torch.empty(8, 5)), v=P(torch.empty(3, 8))),
        (5,), ("w",), ()),
    "rows by value": (Run(first_rows, a=nn.Linear(5, 8), b=nn.Linear(8, 3)), (9, 5), (), ()),
    "seen as whole numbers": (
        Run(lambda m, x: m.b(m.a(x).float().view(torch.int32).double()), a=nn.Linear(5, 8), b=nn.Linear(8, 3)),
        (4, 5), (), ("a",)),
    "a head for training only": (
        Run(aux_head, a=conv(3, 8), b=nn.Linear(8, 2), aux=conv(8, 2)), (2, 3, 4, 4), ("a",), ()),
}  # fmt: skip


def case(name):
    model, shape, *_ = CASES[name]
    torch.manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor))
    return model, torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_what_is_offered_can_be_cut(name):
    model, inputs = case(name)
    *_, offered, refused = CASES[name]
    try:
        graph = sc.trace(model, inputs)
    except NothingToPrune:
        assert not offered
        return
    exact = [g for g in graph.groups if g.exact]
    assert set(offered) <= {g.name for g in exact} and not set(refused) & {g.name for g in exact}
    source = random.Random(0)
    for _ in range(12):
        removed = {
            g.name: source.sample(range(len(g)), source.randint(0, len(g) - g.least)) for g in exact if len(g) > g.least
        }
        plan = sc.make_plan(graph, removed)
        small = sc.cut(model, plan)
        assert sc.check(model, small, plan, inputs) < 1e-10
        assert graph.params(plan) == count_params(small)
        if name != "rows by value":  # of which there are more or fewer when channels are missing
            assert graph.macs(plan) == count_macs(small, inputs)


def test_a_head_for_training_only_is_cut_along():
    model, inputs = case("a head for training only")
    graph = sc.trace(model, inputs)
    plan = sc.make_plan(graph, {"a": [0, 2, 5]})
    big, small = sc.masked(model, plan).train(), sc.cut(model, plan).train()
    assert small.aux.in_channels == 5
    for one, other in zip(big(inputs), small(inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert graph.macs() == 2 * 16 * 8 * 27 + 2 * 8 * 2  # what inference costs, without the head


def test_a_head_that_wants_targets_stays_as_it_is():
    def forward(m, x, target=None):
        x = m.a(x)
        return F.mse_loss(m.aux(m.c(x)), target) if m.training else m.b(x)

    parts = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 3), "c": nn.Linear(8, 6), "aux": nn.Linear(6, 3)}
    model = Run(forward, **parts)
    graph = sc.trace(model, torch.randn(2, 5))
    assert [g.name for g in graph.groups] == ["a"]


class Slots:
    __slots__ = ("y",)

    def __init__(self, y):
        self.y = y


@dataclass
class Plain:
    y: object
    itself: object = None


class Pair(NamedTuple):
    y: object
    note: str = "a note"


def circle(y):
    answer = Plain(y)
    answer.itself = [answer]
    return answer


OUTPUTS = {
    "slots": Slots, "dataclass": Plain, "named tuple": Pair, "a circle": circle,
    "nested": lambda y: [{"y": Plain((y,))}],
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_found_where_they_hide(name):
    model = Run(lambda m, x: OUTPUTS[name](m.b(m.a(x))), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    graph = sc.trace(model, torch.randn(2, 5))
    assert [g.name for g in graph.groups] == ["a"]
    plan = sc.make_plan(graph, {"a": [1]})
    assert sc.check(model, sc.cut(model, plan), plan, torch.randn(2, 5)) < 1e-5


@pytest.mark.parametrize("give", [lambda y: iter([y]), lambda y: None, lambda y: 3.0])
def test_an_output_without_tensors_is_told(give):
    model = Run(lambda m, x: give(m.b(m.a(x))), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    with pytest.raises(sc.SecateurError, match="tensor"):
        sc.trace(model, torch.randn(2, 5))


@pytest.mark.parametrize(
    ("layer", "shape", "layout"),
    [
        (conv, (1, 3, 6, 6), torch.channels_last),
        (lambda i, o: nn.Conv3d(i, o, 3), (1, 3, 5, 5, 5), torch.channels_last_3d),
    ],
)
def test_the_memory_format_stays(layer, shape, layout):
    model = nn.Sequential(layer(3, 8), nn.ReLU(), layer(8, 4)).to(memory_format=layout)
    graph = sc.trace(model, torch.randn(shape))
    small = sc.cut(model, sc.make_plan(graph, {"0": [1, 4]}))
    for part in (small[0], small[2]):
        assert part.weight.is_contiguous(memory_format=layout) and not part.weight.is_contiguous()


def test_a_single_channel_may_be_too_few_and_the_graph_says_so():
    model = Run(
        lambda m, x: torch.tensordot(m.a(x).movedim(1, -1).relu(), m.w, 1), a=conv(3, 6), w=P(torch.randn(6, 2))
    )
    graph = sc.trace(model, torch.randn(2, 3, 4, 4))
    (group,) = graph.groups
    assert group.least == 2
    with pytest.raises(sc.SecateurError, match="2 must stay"):
        sc.make_plan(graph, {"a": range(5)})
    plan = sc.make_plan(graph, {"a": range(6 - group.least)})
    assert sc.check(model, sc.cut(model, plan), plan, torch.randn(2, 3, 4, 4)) < 1e-5
