"""A transposed convolution as a table of its weight and samples of its inputs: what it computes is their product."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.curvature.layers import (
    Layer,
    computes_its_weight,
    input_samples,
    layers_of,
    output_samples,
    reads_by,
    spread,
)
from secateur.curvature.layers import input_samples_at as inputs_at
from secateur.curvature.layers import output_samples_at as outputs_at
from secateur.scoring.schur import Schur

KINDS = {
    "1d": (nn.ConvTranspose1d, {"kernel_size": 4, "stride": 3}, (3, 7)),
    "2d": (nn.ConvTranspose2d, {"kernel_size": (2, 3), "stride": 2, "padding": 1, "output_padding": 1}, (3, 5, 4)),
    "wide": (nn.ConvTranspose2d, {"kernel_size": 3, "dilation": 2, "padding": 3, "bias": False}, (3, 5, 6)),
    "cropped": (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2, "padding": 1}, (3, 5, 6)),
    "3d": (nn.ConvTranspose3d, {"kernel_size": 2, "stride": (1, 2, 2)}, (3, 3, 4, 2)),
    "groups": (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "groups": 3}, (3, 5, 4)),
}


@pytest.fixture(params=KINDS)
def layer(request):
    torch.manual_seed(0)
    kind, given, shape = KINDS[request.param]
    return Layer("up", kind(3, 6, **given).double(), "full"), torch.randn(5, *shape, dtype=torch.float64)


def test_table_times_samples_is_what_it_computes(layer):
    layer, x = layer
    y = layer.module(x).detach()
    table, wanted = layer.table().squeeze(2), output_samples(layer, y)
    found = input_samples(layer, x).squeeze(3) @ table[:, None].mT
    torch.testing.assert_close(found, wanted)
    some = inputs_at(layer, x, lambda total: spread(total, 11)) @ table.mT
    torch.testing.assert_close(some, outputs_at(layer, y, lambda total: spread(total, 11)))
    assert computes_its_weight(layer, x, y)
    assert not computes_its_weight(layer, x, y + 1)


def test_a_table_is_turned_back(layer):
    layer, _ = layer
    weight, bias = layer.weights(layer.table())
    assert torch.equal(weight, layer.module.weight)
    assert bias is None or torch.equal(bias, layer.module.bias)


def test_full_form_sees_it_and_channel_form_does_not():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 2), nn.ConvTranspose2d(4, 4, 2, groups=2))
    assert [reads_by(m) for m in model] == [1, 0, None]
    assert [layer.name for layer in layers_of(model, "full")] == ["0"]
    assert [layer.name for layer in layers_of(model, "full", transposed=True)] == ["0", "1"]
    assert [layer.name for layer in layers_of(model, "full", ["1"])] == ["1"]
    with pytest.raises(sc.SecateurError, match="'1' is no linear or convolution"):
        layers_of(model, "channel", ["1"])


class Net(nn.Module):
    """Down and up again, with a skip: a small U."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 2, stride=2)
        self.up, self.last = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        a = self.first(x).relu()
        return self.last(torch.cat([a, self.up(self.down(a).relu()).relu()], 1))


def test_what_other_channels_can_say_is_restored_wholly_through_it():
    torch.manual_seed(0)
    model, x = Net().double().eval(), torch.randn(64, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model.down.weight[5], model.down.bias[5] = model.down.weight[1], model.down.bias[1]
        model.up.weight[:, 4], model.up.bias[4] = model.up.weight[:, 2], model.up.bias[2]
    graph = sc.trace(model, x[:2])
    plan = sc.make_plan(graph, {"down": [5], "up": [4]})
    small = sc.cut(model, plan)
    assert (small(x) - model(x)).abs().max() > 0.01
    assert sc.refit(model, small, plan, [x], damping=1e-12) == {}
    torch.testing.assert_close(small(x), model(x), rtol=1e-6, atol=1e-6)


def test_the_default_judges_what_it_reads_and_is_not_fooled():
    """The group that only the transposed convolution reads has scores; of two equal channels one costs nothing."""
    torch.manual_seed(0)
    model = Net().double().eval()
    with torch.no_grad():
        model.down.weight[5], model.down.bias[5] = model.down.weight[1], model.down.bias[1]
    data = [(torch.randn(16, 2, 8, 8, dtype=torch.float64), torch.randn(16, 2, 8, 8, dtype=torch.float64))] * 2
    graph = sc.trace(model, data[0][0][:2])
    scores = sc.score(model, graph, Schur(damping=1e-9), data=data, loss="mse")
    assert not scores.skipped
    rises = scores.rises["down"]
    assert int(scores["down"].argmin()) in (1, 5) and rises[1] < 1e-6 * rises[-1]
    result = sc.prune(model, data[0][0][:2], sc.Budget(macs=0.5), data=data, loss="mse")
    assert result.facts["chosen"]["criterion"]["name"] == "schur" and result.facts["left whole"] == {}
