"""What is wrapped around a model, or in it, and cannot be cut: one message, which says what to give instead."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.ao.nn.qat import Linear as TrainedQuantised
from torch.ao.quantization import get_default_qat_qconfig
from torch.optim.swa_utils import AveragedModel

import secateur as sc
from secateur._internal.errors import SecateurError


def network(second: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8) if second is None else second, nn.ReLU(), nn.Linear(8, 3)
    )


X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet():
    """PyTorch warns of its own deprecated parts, and that there is no accelerator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def alone(tmp_path):
    """A group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def refused(model: nn.Module, *words: str) -> None:
    with pytest.raises(SecateurError) as caught:
        sc.trace(model, X)
    for word in ("trace(model): ", *words):
        assert word in str(caught.value)
    with pytest.raises(SecateurError) as caught:
        sc.cut(model, sc.make_plan(sc.trace(network(), X), {"0": [1]}))
    for word in words:
        assert word in str(caught.value)


def test_one_of_several_devices(alone):
    refused(nn.parallel.DistributedDataParallel(network()), "DistributedDataParallel", "model.module")
    refused(nn.DataParallel(network()), "DataParallel", "model.module")


def test_a_sharded_one(alone):
    from torch.distributed.fsdp import fully_shard  # only here, as it takes a while

    refused(fully_shard(network()), "FSDP", "before it is sharded")


def test_an_averaged_one():
    refused(AveragedModel(network()), "AveragedModel", "model.module")


def test_a_compiled_one():
    refused(torch.compile(network()), "compiled", "model._orig_mod")


def test_a_compiled_part():
    refused(network(torch.compile(nn.Linear(8, 8))), "2 is compiled", "model.2._orig_mod")


def test_compiled_in_place_is_not_wrapped():
    model = network()
    model.compile()
    assert sc.trace(model, X).summary() == sc.trace(network(), X).summary()


def test_a_script():
    refused(torch.jit.script(network()), "TorchScript", "Python module")
    refused(network(torch.jit.trace(nn.Linear(8, 8), torch.zeros(1, 8))), "2 is TorchScript")


def test_one_prepared_for_quantisation():
    part = TrainedQuantised(8, 8, qconfig=get_default_qat_qconfig("x86"))
    refused(network(part), "2 is prepared for quantisation", "before prepare_qat")


def test_a_quantised_one():
    part = torch.ao.nn.quantized.dynamic.Linear(8, 8)
    refused(network(part), "2 is quantised", "floating-point")
