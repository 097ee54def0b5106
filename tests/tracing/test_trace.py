"""Small networks of every kind with the groups they must show, and what must hold for each of them."""

from __future__ import annotations

import random
from collections import UserDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_networks import Run, conv
from torch import nn

import secateur as sc
from secateur._internal.errors import NothingToPrune
from secateur.measure.counting import count_macs, count_params


def image(channels=3, size=8):
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def residual(m, x):
    x = F.relu(m.n1(m.a(x)))
    x = x + m.n2(m.b(x))
    return m.head(x.mean((2, 3)))


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def gate(m, x):
    value, opening = m.a(x).chunk(2, -1)
    return m.b(value * torch.sigmoid(opening))


def mixer(m, x):
    x = m.embed(x)
    return m.head((x + m.down(F.gelu(m.up(x.transpose(1, 2)))).transpose(1, 2)).mean(1))


def squeeze_excite(m, x):
    x = m.a(x)
    gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
    return m.head((x * gate).flatten(1))


def feed_forward(m, ids):
    x = m.table(ids) + m.position
    x = x + m.down(F.gelu(m.up(m.norm(x))))
    return m.head(x)


P = nn.Parameter

# name -> (network, inputs, {group: width}, names of approximate groups)
CASES = {
    "perceptron": (nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 5), {"0": 8}, ()),
    "conv, flatten, linear": (
        nn.Sequential(conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 16, 4)),
        image(), {"0": 6}, ()),
    "residual": (
        Run(residual, a=conv(3, 8), n1=nn.BatchNorm2d(8), b=conv(8, 8), n2=nn.BatchNorm2d(8), head=nn.Linear(8, 2)),
        image(), {"a": 8}, ()),
    "concatenation": (
        Run(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)).mean((2, 3)), a=conv(3, 4), b=conv(3, 6), c=conv(10, 2)),
        image(), {"a": 4, "b": 6}, ()),
    "depthwise": (
        nn.Sequential(conv(3, 6), nn.BatchNorm2d(6), conv(6, 6, groups=6), nn.ReLU6(), conv(6, 4, 1)),
        image(), {"0": 6}, ()),
    "depthwise with a multiplier": (
        nn.Sequential(conv(3, 4), conv(4, 8, groups=4), conv(8, 2)), image(), {"0": 4}, ()),
    "grouped": (
        nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 8, groups=2), nn.ReLU(), conv(8, 2)),
        image(), {"0": 6, "2": 4}, ()),
    "channel shuffle by views": (
        Run(lambda m, x: m.b(shuffle(m.a(x), 3)), a=conv(3, 12), b=conv(12, 2)), image(), {"a": 4}, ()),
    "transposed": (
        nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 8, 2, 2), nn.ReLU(), conv(8, 2)),
        image(), {"0": 6, "1": 8}, ()),
    "transposed and depthwise": (
        nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 12, 2, 2, groups=6), conv(12, 2)), image(), {"0": 6}, ()),
    "squeeze-excite": (
        Run(squeeze_excite, a=conv(3, 8), down=conv(8, 4, 1), up=conv(4, 8, 1), head=nn.Linear(8 * 64, 2)),
        image(), {"a": 8, "down": 4}, ()),
    "sigmoid is not zero at zero": (
        nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 3)), torch.randn(4, 5), {"0": 8}, ("0",)),
    "a constant added": (
        Run(lambda m, x: m.b(m.a(x) + 1), a=nn.Linear(5, 8), b=nn.Linear(8, 3)), torch.randn(4, 5), {"a": 8}, ("a",)),
    "layer norm": (
        nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)), torch.randn(4, 5), {"0": 8}, ()),
    "layer norm without a scale": (
        nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 3)), torch.randn(4, 5),
        {"0": 8}, ("0",)),
    "group norm": (
        nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 2)), image(), {"0": 2}, ()),
    "group norm over all": (
        nn.Sequential(conv(3, 8), nn.GroupNorm(1, 8), conv(8, 2)), image(), {"0": 8}, ("0",)),
    "group norm, one group a channel": (
        nn.Sequential(conv(3, 8), nn.GroupNorm(8, 8), conv(8, 2)), image(), {"0": 8}, ()),
    "feed-forward of a transformer": (
        Run(feed_forward, table=nn.Embedding(11, 6), position=P(torch.randn(1, 7, 6)), norm=nn.LayerNorm(6),
            up=nn.Linear(6, 10), down=nn.Linear(10, 6), head=nn.Linear(6, 3)),
        torch.randint(0, 11, (2, 7)), {"position": 6, "up": 10}, ()),
    "tied embedding": (
        Run(lambda m, ids: F.linear(m.f(m.table(ids)), m.table.weight), table=nn.Embedding(11, 6), f=nn.Linear(6, 6)),
        torch.randint(0, 11, (2, 7)), {"table": 6}, ()),
    "functional weights": (
        Run(lambda m, x: F.linear(F.conv2d(x, m.w * m.scale).amax((2, 3)).relu(), m.v),
            w=P(torch.randn(6, 3, 3, 3)), scale=P(torch.randn(6, 1, 1, 1)), v=P(torch.randn(2, 6))),
        image(), {"w": 6}, ()),
    "halves by relative slices": (
        Run(lambda m, x: m.b(m.a(x)[:, : m.a.weight.shape[0] // 2] * m.a(x)[:, m.a.weight.shape[0] // 2 :]),
            a=nn.Linear(5, 8), b=nn.Linear(4, 3)), torch.randn(4, 5), {"a": 4}, ()),
    "gate by chunk": (
        Run(gate, a=nn.Linear(5, 8), b=nn.Linear(4, 3)),
        torch.randn(4, 5), {"a": 4}, ()),
    "one dim": (nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 2, 3)),
                torch.randn(2, 3, 9), {"0": 6}, ()),
    "three dims": (nn.Sequential(nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 2, 3)),
                   torch.randn(2, 3, 6, 6, 6), {"0": 6}, ()),
    "mixer": (
        Run(mixer, embed=nn.Linear(5, 6, bias=False), up=nn.Linear(7, 9, bias=False), down=nn.Linear(9, 7, bias=False),
            head=nn.Linear(6, 2)),
        torch.randn(2, 7, 5), {"embed": 6, "up": 9}, ()),
    "slices at constant places": (
        Run(lambda m, x: m.b(m.a(x)[:, :3]) + m.c(m.a(x)[:, 3:]),
            a=nn.Linear(5, 8), b=nn.Linear(3, 2), c=nn.Linear(5, 2)),
        torch.randn(4, 5), {"a": 5}, ()),
}  # fmt: skip


def case(name):
    model, inputs, groups, approximate = CASES[name]
    torch.manual_seed(0)
    model = model.double()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor))
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    return model, inputs, groups, approximate


@pytest.mark.parametrize("name", CASES)
def test_groups_are_as_expected(name):
    model, inputs, groups, approximate = case(name)
    graph = sc.trace(model, inputs)
    assert {g.name: len(g) for g in graph.groups} == groups
    assert tuple(g.name for g in graph.groups if not g.exact) == approximate
    assert all(g.reason for g in graph.groups if not g.exact)
    assert (graph.macs(), graph.params()) == (count_macs(model, inputs), count_params(model))


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if set(c[2]) - set(c[3])])
def test_cut_equals_masked(name):
    model, inputs, *_ = case(name)
    graph = sc.trace(model, inputs)
    generator = np.random.default_rng(0)
    removed = {
        g.name: generator.choice(len(g), generator.integers(1, len(g) - g.least + 1), replace=False)
        for g in graph.groups
        if g.exact
    }
    plan = sc.make_plan(graph, removed)
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, inputs) < 1e-10
    assert graph.params(plan) == count_params(small) < graph.params()
    assert graph.macs(plan) == count_macs(small, inputs)


def test_every_operation_of_attention_is_borne_and_heads_are_units():
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation="gelu").double()
    graph = sc.trace(model, torch.randn(2, 5, 8, dtype=torch.float64))
    assert {g.name: len(g) for g in graph.groups if g.exact} == {"self_attn": 2, "linear1": 12}


UNKNOWN = {
    "cumulative sum": lambda x: x.cumsum(1),
    "sort": lambda x: x.sort(1).values,
    "a table of positions": lambda x: x[:, torch.tensor([3, 1, 2, 0, 4, 5, 7, 6])],
    "a picked channel": lambda x: x + x[:, 3:4],
    "a roll": lambda x: x.roll(1, 1) + x,
    "a constant view": lambda x: x.view(-1, 2, 4).flip(1).flatten(1),
    "an index by value": lambda x: x[:, x.sum(0).argsort()],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_understood_freezes_and_says_so(name):
    model = Run(lambda m, x: m.b(UNKNOWN[name](m.a(x))), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    with pytest.raises(NothingToPrune, match="no removable channel"):
        sc.trace(model, torch.randn(4, 5))
    wider = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), model)
    graph = sc.trace(wider, torch.randn(4, 4))
    assert {g.name for g in graph.groups} == {"0", "2"}
    reasons = [f.reason for f in graph.frozen if f.axis == "3.a.weight" and f.dim == 0]
    assert reasons and all(reasons)


def test_a_model_that_needs_values_is_traced_with_real_data():
    model = Run(
        lambda m, x: m.b(m.a(x) if m.flag.item() > 0 else x),
        a=nn.Linear(5, 5),
        b=nn.Linear(5, 3),
        flag=P(torch.ones(())),
    )
    small = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5), model)
    graph = sc.trace(small, torch.randn(2, 4))
    assert "0" in {g.name for g in graph.groups}


def test_attributes_of_standard_modules_follow():
    model = nn.Sequential(
        conv(3, 8), nn.BatchNorm2d(8), nn.PReLU(8), conv(8, 8, groups=8), nn.GroupNorm(8, 8), conv(8, 2)
    )
    graph = sc.trace(model, torch.randn(1, 3, 6, 6))
    small = sc.cut(model, sc.make_plan(graph, {"0": [0, 3, 7]}))
    first, norm, slope, depthwise, groups, last = small
    assert (first.out_channels, norm.num_features, slope.num_parameters) == (5, 5, 5)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (5, 5, 5)
    assert (groups.num_channels, groups.num_groups, last.in_channels) == (5, 5, 5)
    assert (model[0].out_channels, model[3].groups) == (8, 8)


def test_dict_inputs_and_outputs():
    model = Run(lambda m, *, x, scale: {"y": m.b(m.a(x) * scale)}, a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    inputs = {"x": torch.randn(2, 5), "scale": torch.tensor(2.0)}
    graph = sc.trace(model, inputs)
    plan = sc.make_plan(graph, {"a": [1, 2]})
    assert sc.check(model, sc.cut(model, plan), plan, inputs) < 1e-5


def test_inputs_in_a_mapping_of_another_kind():
    """As Hugging Face's tokenizers give them."""
    model = Run(lambda m, *, x, scale: m.b(m.a(x) * scale), a=nn.Linear(5, 8), b=nn.Linear(8, 3))
    inputs = UserDict(x=torch.randn(2, 5), scale=torch.tensor(2.0))
    graph = sc.trace(model, inputs)
    assert type(graph.inputs) is dict and [g.name for g in graph.groups] == ["a"]
    assert graph.macs() == count_macs(model, inputs) == 2 * (40 + 24)
    plan = sc.make_plan(graph, {"a": [1]})
    assert sc.cut(model, plan).a.out_features == 7
    with torch.device("meta"):  # so that no real data was needed
        empty = Run(model.function, a=nn.Linear(5, 8), b=nn.Linear(8, 3))
        assert sc.trace(empty, UserDict(x=torch.randn(2, 5), scale=torch.ones(()))).macs() == graph.macs()


def test_no_memory_and_no_touch():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4096, 65536), nn.ReLU(), nn.Linear(65536, 4096))  # 2 GiB that do not exist
        graph = sc.trace(model, torch.empty(1, 4096))
    assert graph.params() == sum(p.numel() for p in model.parameters())
    assert graph.macs() == 2 * 4096 * 65536


def test_inexact_groups_are_cut_on_request_only():
    model, inputs, *_ = case("layer norm without a scale")
    graph = sc.trace(model, inputs)
    with pytest.raises(sc.SecateurError, match="layer norm takes its statistics"):
        sc.make_plan(graph, {"0": [1]})
    small = sc.cut(model, sc.make_plan(graph, {"0": [1]}, approximate=True))
    assert small(inputs).shape == model(inputs).shape
    assert small[1].normalized_shape == (7,)


BAD = {
    "not a module": (lambda: sc.trace("resnet", torch.randn(1, 3)), "Module is expected"),
    "no parameters": (lambda: sc.trace(nn.ReLU(), torch.randn(1, 3)), "no parameters"),
    "lazy": (lambda: sc.trace(nn.LazyLinear(3), torch.randn(1, 3)), "lazy"),
    "a text": (lambda: sc.trace(nn.Linear(3, 3), "x"), "a tensor, a tuple or a dict"),
    "a list of a list": (lambda: sc.trace(nn.Linear(3, 3), [[torch.randn(1, 3)]]), "a tensor, a tuple or a dict"),
    "wrong shape": (lambda: sc.trace(nn.Linear(3, 3), torch.randn(1, 4)), r"fails on the example inputs \(\[1, 4\]"),
    "nothing removable": (lambda: sc.trace(nn.Linear(3, 3), torch.randn(1, 3)), "no removable channel"),
    "no examples": (lambda: sc.trace(nn.Linear(3, 3), torch.randn(0, 3)), r"shape \[0, 3\] is empty, .*at least one"),
    "an empty second input": (
        lambda: sc.trace(nn.Linear(3, 3), (torch.randn(1, 3), {"y": torch.ones(2, 0)})), r"of shape \[2, 0\] is empty"),
    "another device": (
        lambda: sc.trace(nn.Linear(3, 3, device="meta"), torch.randn(1, 3)),
        "the model is on meta, the example inputs"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_bad_input_is_told_at_the_door(name):
    call, message = BAD[name]
    with pytest.raises(sc.SecateurError, match=message):
        call()


def test_nothing_to_prune_is_an_error_of_its_own():
    for model in (nn.Linear(3, 3), nn.ReLU()):
        with pytest.raises(NothingToPrune):
            sc.trace(model, torch.randn(1, 3))
    with pytest.raises(sc.SecateurError) as caught:  # a forward that fails is no model without channels
        sc.trace(Run(lambda m, x: m.a(x).no_removable_channel, a=nn.Linear(3, 3)), torch.randn(1, 3))
    assert not isinstance(caught.value, NothingToPrune)


def test_the_table_names_everything():
    model, inputs, *_ = case("residual")
    text = sc.trace(model, inputs).summary()
    for word in ("a.weight:0", "b.weight:1", "head.weight:1", "MACs", "belongs to the model's output"):
        assert word in text


class Kept(nn.Module):
    """Returns what a hook's closure has put into a dictionary."""

    def __init__(self, seen):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        self.seen = seen
        self.net[2].register_forward_hook(lambda module, given, out: seen.__setitem__("features", out))

    def forward(self, x):
        self.net(x)
        return self.seen["features"]


def test_a_hook_whose_closure_holds_a_part_of_the_model_holds_that_of_the_copy():
    model, x = Kept({}).eval(), torch.randn(3, 4)
    graph = sc.trace(model, x)
    assert model.seen == {} and "net.0" in {group.name for group in graph.groups}
    plan = sc.make_plan(graph, {"net.0": [0, 5]})
    small = sc.cut(model, plan)
    assert sc.check(model, small, plan, x) < 1e-6
    small(x)
    assert model.seen == {} and small.seen["features"].shape == (3, 6)


SEEN = {}


def test_a_tensor_that_the_copys_forward_has_not_computed_is_no_output():
    class Global(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last, self.of = nn.Linear(4, 8), nn.Linear(8, 2), [self]

        def forward(self, x):
            SEEN.setdefault("features", self.first(x))
            return SEEN["features"]

    for before in ({}, {"features": torch.zeros(1, 8)}):
        SEEN.clear()
        SEEN.update(before)
        if before:
            with pytest.raises(sc.SecateurError, match="Global: a copy's forward returns a tensor that it has not"):
                sc.trace(Global(), torch.zeros(1, 4))
        else:
            with pytest.raises(NothingToPrune):
                sc.trace(Global(), torch.zeros(1, 4))
        assert before == SEEN
    SEEN.clear()


def test_the_random_states_of_python_and_numpy_stay_and_every_run_begins_alike():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            x = self.first(x).relu()
            if random.random() + np.random.rand() < 1:
                x = x + self.second(x).relu()
            return self.last(x)

    found = set()
    for seed in range(8):
        random.seed(seed)
        np.random.seed(seed)
        state = random.getstate(), np.random.get_state()[1].tolist()
        try:
            found.add(tuple(group.name for group in sc.trace(Dropped().eval(), torch.zeros(1, 4)).groups))
        finally:
            assert (random.getstate(), np.random.get_state()[1].tolist()) == state
    assert found == {("first",)}, found  # in either case all of it, and never "takes another path"


@pytest.mark.parametrize("choose", ["max", "min", "median"])
def test_the_extreme_of_zeros_is_zero_but_where_it_stands_is_not(choose):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Conv1d(4, 6, k, padding=1) for k in (2, 3)])
            self.last = nn.Linear(12, 3)

        def forward(self, x):
            return self.last(torch.cat([getattr(conv(x), choose)(2)[0] for conv in self.convs], 1))

    model, x = Text().double().eval(), torch.randn(2, 4, 9, dtype=torch.float64)
    graph = sc.trace(model, x)
    assert len(graph.groups) == 2 and all(group.exact for group in graph.groups)
    plan = sc.make_plan(graph, {group.name: [0, 3] for group in graph.groups})
    assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12


def test_a_recurrent_layer_after_a_narrower_embedding():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.last = nn.Embedding(20, 16), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.rnn(self.embed(x))[0])

    model, x = Tagger().double().eval(), torch.randint(0, 20, (2, 5))
    graph = sc.trace(model, x)
    assert [len(group) for group in graph.groups] == [16, 8]
    plan = sc.make_plan(graph, {graph.groups[0].name: [0, 7], graph.groups[1].name: [3]})
    small = sc.cut(model, plan)
    assert (small.rnn.input_size, small.rnn.hidden_size) == (14, 7) and sc.check(model, small, plan, x) < 1e-12


class Sorted(nn.Module):
    def forward(self, weight):
        return weight.sort(1).values.sort(0).values


def test_parametrized_weights_are_named_where_nothing_can_go():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for index in (0, 2):
        torch.nn.utils.parametrize.register_parametrization(model[index], "weight", Sorted())
    with pytest.raises(sc.SecateurError, match=r"weights of 0, 2 are computed .*remove_parametrizations"):
        sc.trace(model, torch.zeros(1, 4))
    for index in (0, 2):
        torch.nn.utils.parametrize.remove_parametrizations(model[index], "weight")
    assert len(sc.trace(model, torch.zeros(1, 4)).groups) == 1


def blocks():
    """Two blocks on one stream, each with a layer of its own between; the stream ends in a head."""

    def forward(m, x):
        x = m.stem(x)
        for up, down in zip(m.ups, m.downs, strict=True):
            x = x + down(F.relu(up(x)))
        return m.head(torch.cat([x, m.side(x)], 1))

    ups, downs = nn.ModuleList([nn.Linear(6, 9), nn.Linear(6, 10)]), nn.ModuleList([nn.Linear(9, 6), nn.Linear(10, 6)])
    return Run(forward, stem=nn.Linear(5, 6), ups=ups, downs=downs, side=nn.Linear(6, 3), head=nn.Linear(9, 2))


def test_a_group_is_found_by_any_layer_whose_output_it_is():
    graph = sc.trace(blocks(), torch.randn(2, 5))
    assert [g.name for g in graph.groups] == ["stem", "ups.0", "ups.1", "side"]
    for path in ("stem", "stem.weight", "stem.bias", "downs.0", "downs.1.bias", "downs"):
        assert graph.group(path).name == "stem"
    assert [g.name for g in graph.groups_of("ups")] == ["ups.0", "ups.1"]
    assert [g.name for g in graph.groups_of("")] == [g.name for g in graph.groups]
    assert graph.groups_of("head") == graph.groups_of("up") == ()  # a path is no prefix of a name
    with pytest.raises(
        sc.SecateurError, match=r"group 'ups': this layer writes channels of 2 groups, 'ups.0', 'ups.1'"
    ):
        graph.group("ups")
    with pytest.raises(
        sc.SecateurError, match=r"group 'head': .* no channel that can be removed \(head.bias:0 belongs"
    ):
        graph.group("head")
    with pytest.raises(sc.SecateurError, match=r"unknown group 'downs.2': did you mean 'downs.[01]'"):
        graph.group("downs.2")
    with pytest.raises(sc.SecateurError, match="unknown group ''"):
        graph.group("")


def test_a_layers_path_means_its_group_wherever_groups_are_named():
    model = blocks()
    graph = sc.trace(model, torch.randn(2, 5))
    plan = sc.make_plan(graph, {"downs.0": [1, 2]})
    assert plan == sc.make_plan(graph, {"stem": [1, 2]}) and set(plan.removed) == {"stem"}
    with pytest.raises(sc.SecateurError, match=r"group 'stem' is named twice, once as 'downs.1'"):
        sc.make_plan(graph, {"stem": [1], "downs.1": [2]})
    scores = {g.name: torch.arange(float(len(g))) for g in graph.groups}
    by_layer = {("downs.0" if name == "stem" else name): values for name, values in scores.items()}
    budget = sc.Budget(params=0.6)
    assert sc.allocate(graph, by_layer, budget) == sc.allocate(graph, scores, budget)
    floors = sc.Budget(params=0.6, at_least={"downs.0": 5}).floors(graph)
    assert floors.tolist() == [5, 1, 1, 1]
