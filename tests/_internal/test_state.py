"""Running a model for a while leaves no trace: modes, buffers, and the random state are as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur._internal.state import eval_mode, preserved

MODES = ["eval", "batch_statistics"]


class Restless(nn.Module):
    """Counts its calls in place and anew, and draws at random even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.full((1,), torch.nan))

    def forward(self, x):
        self.written += 1
        self.replaced = self.replaced + 1
        return F.dropout(self.norm(self.layer(x)), 0.5, training=True)


@pytest.mark.parametrize("mode", MODES)
def test_everything_comes_back(mode):
    model, x = Restless(), torch.randn(8, 4)
    model.norm.eval()
    held = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in held.items()}
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), preserved(model, mode):
        assert model.norm.training == (mode == "batch_statistics")
        model(x)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.norm.training
    for name, buffer in model.named_buffers():
        assert buffer is held[name]
        assert torch.equal(buffer.nan_to_num(-1), before[name].nan_to_num(-1))


@pytest.mark.parametrize("mode", MODES)
def test_models_without_data_can_be_run(mode):
    model = nn.BatchNorm1d(4).to("meta")
    with preserved(model, mode):
        assert model(torch.randn(2, 4, device="meta")).shape == (2, 4)


def test_what_is_not_touched_is_not_written_so_a_graph_may_still_need_it():
    model, x = nn.BatchNorm1d(4).eval(), torch.randn(8, 4, requires_grad=True)
    output = model(x).square().sum()
    with eval_mode(model):
        model(x)
    output.backward()
    assert x.grad is not None
