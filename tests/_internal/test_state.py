"""Running a model for a while leaves no trace: modes, buffers, and the random state are as they were."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur._internal.errors import SecateurError
from secateur._internal.state import check_differentiable, eval_mode, preserved

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


@pytest.mark.parametrize("mode", [*MODES, "as_is"])
@pytest.mark.parametrize("gradients", [True, False])
def test_gradients_flags_and_hooks_come_back_too(restless, untouched, mode, gradients):
    before = random.getstate()
    with untouched(restless), pytest.raises(KeyError), preserved(restless, mode, gradients=gradients, fast_path=False):
        assert restless.head.weight.grad is None
        assert restless.head.weight.requires_grad == gradients
        assert not torch.backends.mha.get_fastpath_enabled()
        restless.head.register_forward_hook(lambda *_: None)
        restless.second._forward_hooks.clear()
        restless.first.weight.requires_grad_(True)
        restless(torch.randn(4, 3, 6, 6)).sum().backward()
        raise KeyError
    assert random.getstate() == before


def test_a_model_made_in_inference_mode_is_refused_where_gradients_are_due_and_its_copy_is_not():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    with pytest.raises(SecateurError, match=r"Sequential: '0.weight' was made in torch.inference_mode.*copy the model"):
        check_differentiable(model)
    check_differentiable(copy.deepcopy(model))
