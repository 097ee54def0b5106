"""The hidden width of recurrent layers is a unit: its gates are tied, and what the module remembers follows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import Run
from torch import nn

import secateur as sc
from secateur.measure.counting import count_macs, count_params


def layer(kind, **options):
    width = options.get("proj_size", 8) * (2 if options.get("bidirectional") else 1)
    return Run(lambda m, x: m.last(m.rnn(m.embed(x))[0]), embed=nn.Linear(4, 12), rnn=kind(12, 8, **options),
               last=nn.Linear(width, 3))  # fmt: skip


def cell(kind):
    def forward(m, x):
        h = x.new_zeros(x.shape[1], m.cell.hidden_size)
        state = (h, h) if kind is nn.LSTMCell else h
        for step in x:
            state = m.cell(m.embed(step), state)
        return m.last(state[0] if kind is nn.LSTMCell else state)

    return Run(forward, embed=nn.Linear(4, 12), cell=kind(12, 8), last=nn.Linear(8, 3))


class OwnCell(nn.Module):
    """A convolutional cell that remembers its width."""

    def __init__(self):
        super().__init__()
        self.hidden = 8
        self.enter, self.gates, self.last = nn.Conv2d(1, 6, 1), nn.Conv2d(14, 32, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = F.relu(self.enter(x[:, :, None, None]))
        h = c = x.new_zeros(len(x), self.hidden, *x.shape[2:])
        for _ in range(2):
            i, f, o, g = torch.split(self.gates(torch.cat([x, h], 1)), self.hidden, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.last(h)


KINDS = (nn.LSTM, nn.GRU, nn.RNN)
NETWORKS = {
    **{kind.__name__: (lambda kind=kind: layer(kind)) for kind in KINDS},
    **{f"{kind.__name__}, stacked": (lambda kind=kind: layer(kind, num_layers=3)) for kind in KINDS},
    **{
        f"{kind.__name__}, both ways": (lambda kind=kind: layer(kind, bidirectional=True, batch_first=True))
        for kind in KINDS
    },
    **{kind.__name__: (lambda kind=kind: cell(kind)) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)},
    "LSTM without biases": lambda: layer(nn.LSTM, bias=False),
    "LSTM with a projection": lambda: layer(nn.LSTM, proj_size=5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_hidden_width_goes_exactly(name):
    torch.manual_seed(0)
    model, x = NETWORKS[name]().double().eval(), torch.randn(5, 2, 4).double()
    graph = sc.trace(model, x)
    hidden = graph.group("cell" if "Cell" in name else "rnn.weight_hh_l0")
    assert len(hidden) == 8 and hidden.exact
    for gone in ([2], [0, 7], [1, 2, 3, 4, 5, 6])[: 2 if "projection" in name else 3]:  # it must stay the narrower one
        plan = sc.make_plan(graph, {hidden.name: gone, "embed": [5]})
        small = sc.cut(model, plan)
        part = small.cell if "Cell" in name else small.rnn
        assert (part.hidden_size, part.input_size) == (8 - len(gone), 11)
        assert sc.check(model, small, plan, x) < 1e-12
        assert (count_macs(small, x), count_params(small)) == (graph.macs(plan), graph.params(plan))
        small(x).sum().backward()


def test_a_cell_of_ones_own():
    torch.manual_seed(0)
    model, x = OwnCell().double().eval(), torch.randn(3, 1).double()
    graph = sc.trace(model, x)
    plan = sc.make_plan(graph, {"gates": [0, 5, 6], "enter": [1]})
    assert plan.patched["hidden"] == (8, 5)
    assert sc.check(model, sc.cut(model, plan), plan, x) < 1e-12
