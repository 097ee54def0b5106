"""Latency counts the forwards it is told to, orders slow after fast, and leaves no trace."""

import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from secateur._internal.errors import SecateurError
from secateur.measure.latency import file_size, in_turn, latency


class Sleeper(nn.Module):
    """Waits in the forward, and counts."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.calls, self.seen = seconds, 0, None

    def forward(self, x, y=None):
        self.calls += 1
        self.seen = (self.training, torch.is_grad_enabled(), torch.get_num_threads(), y)
        time.sleep(self.seconds)
        return x


def test_measures_the_time_of_a_forward():
    model = Sleeper(0.01)
    result = latency(model, torch.zeros(1), repeats=5, warm_up=2)
    assert model.calls == 7
    assert 10 <= result["min_ms"] <= result["median_ms"] < 100
    assert result["iqr_ms"] >= 0
    assert result["repeats"] == 5
    assert result["device"] == "cpu"


def test_eval_mode_without_gradients_and_the_threads_asked_for():
    model, before = Sleeper(0).train(), torch.get_num_threads()
    assert latency(model, (torch.zeros(1), 3), repeats=1, threads=before + 1)["threads"] == before + 1
    assert model.seen == (False, False, before + 1, 3)
    assert torch.get_num_threads() == before
    assert model.training
    latency(model, {"x": torch.zeros(1), "y": 4}, repeats=1)
    assert model.seen == (False, False, before, 4)


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"repeats": 2.0}, {"threads": 0}, {"warm_up": -1}])
def test_bad_numbers(bad):
    with pytest.raises(SecateurError, match=next(iter(bad))):
        latency(Sleeper(0), torch.zeros(1), **bad)


def test_file_size_is_the_size_of_the_file(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert file_size(model) == (tmp_path / "model.safetensors").stat().st_size
    tied = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))
    tied[1].weight = tied[0].weight
    assert 10_000 < file_size(tied) < 10_200


def test_a_network_in_onnx_runtime():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).train()
    result = latency(model, torch.randn(2, 3, 8, 8), repeats=3, backend="onnxruntime", threads=1)
    assert (result["backend"], result["threads"], result["device"]) == ("onnxruntime", 1, "cpu")
    assert 0 < result["min_ms"] <= result["median_ms"]
    assert model.training
    times = in_turn([model, model], torch.randn(2, 3, 8, 8), 2, 1, 3, "onnxruntime")
    assert times.shape == (2, 3, 2)
    assert (times > 0).all()


def test_what_runs_nothing_is_told():
    with pytest.raises(SecateurError, match="unknown backend 'onxruntime': did you mean 'onnxruntime'"):
        latency(Sleeper(0), torch.zeros(1), backend="onxruntime")
    with pytest.raises(SecateurError, match=r"torch\.export cannot follow"):
        latency(Branch(), torch.randn(2, 3), backend="onnxruntime")


class Branch(nn.Module):
    """A branch on a value."""

    def forward(self, x):
        return x if bool(x.sum() > 0) else -x
