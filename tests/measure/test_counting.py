"""One counter: what it sees of a forward is what the channel graph says without running it.

The random networks of ``tests/properties`` and the small ones of ``tests/tracing`` are counted there.
"""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur as sc
from secateur.lab.models.registry import MODELS, build, example_input
from secateur.measure.counting import count_macs, count_params, counted


class Net(nn.Module):
    """A network whose forward is a function of its parts."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.function(self, *args)


def attention(mask=None, **options):
    """Heads of queries, keys and wider values, then a hidden layer that can be cut."""

    def forward(m, x):
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        given = {} if mask is None else {"attn_mask": mask(x)}
        y = F.scaled_dot_product_attention(q, k, v, **given, **options)
        return m.out(m.hidden(y.transpose(1, 2).flatten(2)).relu())

    parts = {"q": nn.Linear(8, 16), "k": nn.Linear(8, 16), "v": nn.Linear(8, 24)}
    return Net(forward, **parts, hidden=nn.Linear(24, 10), out=nn.Linear(10, 3))


def bilinear():
    def forward(m, x, y):
        return m.out(m.both(m.left(x).relu(), m.right(y).relu()).relu())

    return Net(forward, left=nn.Linear(8, 6), right=nn.Linear(8, 5), both=nn.Bilinear(6, 5, 7), out=nn.Linear(7, 3))


def grouped_queries():
    def forward(m, x):
        q = m.q(x).unflatten(-1, (4, -1)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (m.k, m.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return m.out(m.hidden(y.transpose(1, 2).flatten(2)).relu())

    parts = {"q": nn.Linear(8, 16), "k": nn.Linear(8, 8), "v": nn.Linear(8, 8)}
    return Net(forward, **parts, hidden=nn.Linear(16, 10), out=nn.Linear(10, 3))


def self_attention(**options):
    def forward(m, x):
        x = m.stem(x)
        return m.out(m.hidden(m.attention(x, x, x, **options)[0]).relu())

    own = nn.MultiheadAttention(16, 4, dropout=0.1, batch_first=True)
    return Net(forward, stem=nn.Linear(8, 16), attention=own, hidden=nn.Linear(16, 10), out=nn.Linear(10, 3))


def recurrent(kind, **options):
    width = 8 * (2 if options.get("bidirectional") else 1)
    return Net(
        lambda m, x: m.last(m.rnn(m.embed(x).relu())[0]),
        embed=nn.Linear(8, 16), rnn=kind(16, 8, **options), last=nn.Linear(width, 3),
    )  # fmt: skip


def by_value():
    """Its Python looks at a value, so it is traced with data, on which a recurrent layer is one kernel."""
    return Net(
        lambda m, x: m.last(m.rnn(m.embed(x) * m.flag.item())[0]),
        embed=nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16)), rnn=nn.LSTM(16, 8), last=nn.Linear(8, 3),
        flag=nn.Parameter(torch.ones(())),
    )  # fmt: skip


def vectors():
    parts = {"w": nn.Parameter(torch.randn(9, 8)), "v": nn.Parameter(torch.randn(6, 9))}
    ends = {"b": nn.Parameter(torch.randn(6)), "u": nn.Parameter(torch.randn(6))}
    return Net(lambda m, x: m.u.dot(torch.addmv(m.b, m.v, torch.mv(m.w, x).relu()).relu()), **parts, **ends)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(16, 4, 24, **options)


X = torch.randn(2, 5, 8)
WIDE = torch.randn(2, 5, 16)
NETWORKS = {
    "encoder layer": lambda: (encoder_layer(), WIDE),
    "encoder layer, batch first": lambda: (encoder_layer(batch_first=True), WIDE),
    "encoder layer, norm first": lambda: (encoder_layer(batch_first=True, norm_first=True), WIDE),
    "encoder": lambda: (nn.TransformerEncoder(encoder_layer(batch_first=True), 3), WIDE),
    "decoder layer": lambda: (nn.TransformerDecoderLayer(16, 4, 24), (WIDE, torch.randn(7, 5, 16))),
    "attention": lambda: (attention(), X),
    "attention, causal": lambda: (attention(is_causal=True), X),
    "attention, dropout": lambda: (attention(dropout_p=0.5), X),
    "attention, scale": lambda: (attention(scale=0.3), X),
    "attention, mask of flags": lambda: (attention(lambda x: x.new_ones(5, 5).tril() > 0), X),
    "attention, mask of numbers": lambda: (attention(lambda x: x.new_zeros(5, 5)), X),
    "attention, mask and dropout": lambda: (attention(lambda x: x.new_zeros(5, 5), dropout_p=0.5), X),
    "attention, grouped queries": lambda: (grouped_queries(), X),
    "self-attention": lambda: (self_attention(need_weights=False), X),
    "self-attention with its weights": lambda: (self_attention(), X),
    "a padding mask": lambda: (self_attention(key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)), X),
    "LSTM": lambda: (recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=True), X),
    "GRU": lambda: (recurrent(nn.GRU, num_layers=2), X),
    "RNN": lambda: (recurrent(nn.RNN, bidirectional=True), X),
    "LSTM as one kernel": lambda: (by_value(), X),
    "bilinear": lambda: (bilinear(), (torch.randn(3, 8), torch.randn(3, 8))),
    "bilinear, two leading dims": lambda: (bilinear(), (X, X)),
    "products with vectors": lambda: (vectors(), torch.randn(8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_counter_and_the_graph_agree(name, training, dtype):
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    model.to(dtype).train(training)
    inputs = tuple(t.to(dtype) for t in inputs) if isinstance(inputs, tuple) else inputs.to(dtype)
    graph = sc.trace(model, inputs)
    assert graph.macs() == count_macs(model, inputs) > 0
    assert graph.params() == count_params(model)
    plan = sc.make_plan(graph, {g.name: [0] for g in graph.groups if g.exact})
    small = sc.cut(model, plan)
    assert plan.removed and graph.macs(plan) == count_macs(small, inputs) < graph.macs()
    assert counted(small, inputs) == {"macs": graph.macs(plan), "params": graph.params(plan)}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "wrn_28_10"])
def test_on_the_networks_of_the_lab(name):
    model, x = build(name), torch.randn(example_input(name))
    graph = sc.trace(model, x)
    assert (graph.macs(), graph.params()) == (count_macs(model, x), count_params(model))


def test_on_the_widest_network_of_the_lab():
    """A billion MACs, which nobody needs to compute."""
    with torch.device("meta"):
        model, x = build("wrn_28_10"), torch.randn(example_input("wrn_28_10"))
    graph = sc.trace(model, x)
    assert graph.macs() == count_macs(model, x) > 5e9


def test_the_numbers_are_those_of_the_formulas():
    n, length, width, hidden = 2, 5, 16, 24
    model = encoder_layer(batch_first=True).eval()
    attend = 4 * width * width + 2 * length * width
    assert count_macs(model, WIDE) == n * length * (attend + 2 * width * hidden)
    assert count_macs(vectors(), torch.randn(8)) == 9 * 8 + 6 * 9 + 6
    assert count_macs(recurrent(nn.LSTM), X) == 10 * (8 * 16 + 4 * 8 * (16 + 8) + 8 * 3)
    both = 3 * (6 * 8 + 5 * 8 + 7 * 6 * 5 + 3 * 7)
    assert count_macs(bilinear(), (torch.randn(3, 8), torch.randn(3, 8))) == both
    assert count_macs(nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 6, 6)) == 2 * 36 * 3 * 8 * 9


class Restless(nn.Module):
    """Counts its forwards, writes into its input, draws."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps += 1
        x.mul_(2)
        return self.drop(self.norm(self.layer(x))) + torch.rand(())


def test_counting_leaves_model_inputs_and_random_state_as_they_were():
    model, x = Restless().train(), torch.randn(3, 4)
    model.norm.eval()
    before, given, random = copy.deepcopy(model.state_dict()), x.clone(), torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    assert count_macs(model, x) == 3 * 16
    assert model.training and not model.norm.training and torch.equal(x, given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and torch.backends.mha.get_fastpath_enabled() == fast


def test_inputs_that_do_not_fit_are_told():
    with pytest.raises(sc.SecateurError, match=r"Linear fails on the example inputs \(\[1, 4\]\): RuntimeError"):
        count_macs(nn.Linear(3, 3), torch.randn(1, 4))


def test_what_was_made_in_inference_mode_is_counted_too():
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 3, 5)
        assert count_macs(model, x) == 6 * (40 + 16)
    assert count_macs(model, x) == 6 * (40 + 16)


def test_shared_parameters_count_once_and_their_products_twice():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert counted(model, torch.randn(3, 4)) == {"macs": 2 * 3 * 16, "params": 20}


def test_what_other_threads_run_is_theirs():
    inside, counted_by_now = threading.Event(), threading.Event()

    def wait(module, args):
        inside.set()
        assert counted_by_now.wait(60)

    slow, x = nn.Linear(4, 4), torch.randn(3, 4)
    slow.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(count_macs, slow, x)
        assert inside.wait(60)
        hooks = dict(torch.nn.modules.module._global_forward_hooks)
        assert not hooks
        assert count_macs(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), x) == 3 * (32 + 16)
        counted_by_now.set()
        assert other.result() == 3 * 16
