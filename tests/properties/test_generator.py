"""The random networks are worth testing on: they run, they hold every feature, and most have something to remove."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .blocks import BLOCKS
from .checks import fresh, run, set_mode
from .networks import Spec, names, network, random_spec

DRAWS = 600
# every feature that the networks must hold, as something visible in the operations or modules of many of them
OPERATIONS = {
    "convolution": 300, "addmm": 300, "mm": 150, "bmm": 50, "native_batch_norm": 200, "native_layer_norm": 60,
    "native_group_norm": 50, "_weight_norm_interface": 2, "add": 300, "add_": 40, "mul": 200, "mul_": 8, "relu_": 15,
    "cat": 150, "slice": 80, "select": 80, "split": 40, "split_with_sizes": 1, "unbind": 20, "stack": 25,
    "repeat": 50, "expand": 80, "transpose": 200, "permute": 80, "channel_shuffle": 4, "pixel_shuffle": 7,
    "pixel_unshuffle": 5, "im2col": 8, "constant_pad_nd": 35, "replication_pad2d": 3, "copy_": 9, "fill_": 2,
    "new_zeros": 4, "zeros_like": 1, "ones_like": 5, "sigmoid": 50, "softplus": 6, "exp": 10, "cos": 3, "clamp": 6,
    "clamp_min": 5, "_prelu_kernel": 4, "hardswish": 9, "masked_fill": 2, "where": 9, "gt": 10, "maximum": 3,
    "minimum": 2, "_softmax": 80, "mean": 200, "sum": 70, "amax": 60, "var": 40, "glu": 10, "embedding": 45,
    "max_pool2d_with_indices": 20, "avg_pool2d": 3, "upsample_nearest2d": 10, "cumsum": 3, "sort": 1, "topk": 2,
    "argmax": 2, "index": 2, "index_select": 3, "gather": 5, "index_add": 5,
    "scatter_add": 5, "_scaled_dot_product_flash_attention_for_cpu": 20, "_local_scalar_dense": 15,
    "roll": 2, "flip": 3, "unfold": 3, "_fft_r2c": 2,
    "_cdist_forward": 2, "linalg_vector_norm": 9, "prod": 3, "arange": 8,
}  # fmt: skip


class Seen(TorchDispatchMode):
    """The names of all operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def drawn():
    """Features of each of many random networks, all of which must run in both modes."""
    found = []
    for seed in range(DRAWS):
        spec = random_spec(seed)
        model, inputs = network(spec)
        with Seen() as seen, torch.no_grad():
            outputs = run(model, inputs)
        assert all(y.isfinite().all() for y in outputs), spec
        set_mode(model, training=True)
        assert all(y.isfinite().all() for y in run(model, fresh(inputs))), spec
        found.append((spec, model, seen.names))
    return found


def test_every_block_is_drawn_often(drawn):
    counts = Counter(name for spec, *_ in drawn for name, _ in spec.records)
    rare = {name: counts[name] for name in names() if counts[name] < 20}
    assert not rare


def test_every_operation_is_met(drawn):
    counts = Counter(name for *_, seen in drawn for name in seen)
    rare = {name: counts[name] for name, least in OPERATIONS.items() if counts[name] < least}
    assert not rare


FEATURES = {
    "grouped": (lambda m: isinstance(m, nn.modules.conv._ConvNd) and 1 < m.groups < m.in_channels, 15),
    "depthwise": (lambda m: isinstance(m, nn.modules.conv._ConvNd) and 1 < m.groups == m.in_channels, 50),
    "channel multiplier": (lambda m: _convolution(m) and 1 < m.groups == m.in_channels < m.out_channels, 20),
    "transposed": (lambda m: isinstance(m, nn.modules.conv._ConvTransposeNd), 30),
    "grouped transposed": (lambda m: isinstance(m, nn.modules.conv._ConvTransposeNd) and m.groups > 1, 10),
    "1-D": (lambda m: isinstance(m, (nn.Conv1d, nn.ConvTranspose1d)), 50),
    "2-D": (lambda m: isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)), 50),
    "3-D": (lambda m: isinstance(m, (nn.Conv3d, nn.ConvTranspose3d)), 50),
    "dilated": (lambda m: _convolution(m) and max(m.dilation) > 1, 10),
    "padding mode": (lambda m: _convolution(m) and m.padding_mode != "zeros", 5),
    "batch norm without scale": (lambda m: isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.affine, 10),
    "batch norm without statistics": (
        lambda m: isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.track_running_stats, 10,
    ),
    "instance norm": (lambda m: isinstance(m, nn.modules.instancenorm._InstanceNorm), 20),
    "group norm": (lambda m: isinstance(m, nn.GroupNorm) and 1 < m.num_groups < m.num_channels, 10),
    "layer norm": (lambda m: isinstance(m, nn.LayerNorm), 50),
    "root-mean-square norm": (lambda m: isinstance(m, nn.RMSNorm), 20),
    "slopes per channel": (lambda m: isinstance(m, nn.PReLU) and m.num_parameters > 1, 3),
    "bilinear": (lambda m: isinstance(m, nn.Bilinear), 2),
    "recurrent": (lambda m: isinstance(m, nn.RNNBase), 20),
    "attention": (lambda m: isinstance(m, nn.MultiheadAttention), 10),
    "dropout": (lambda m: isinstance(m, nn.modules.dropout._DropoutNd), 20),
}  # fmt: skip


def _convolution(m):
    return isinstance(m, nn.modules.conv._ConvNd)


@pytest.mark.parametrize("feature", FEATURES)
def test_every_kind_of_layer_is_met(feature, drawn):
    has, least = FEATURES[feature]
    assert sum(any(has(m) for m in model.modules()) for _, model, _ in drawn) >= least


def test_tied_weights_are_met(drawn):
    def shared(model):
        every = [p for m in model.modules() for p in m._parameters.values() if p is not None]
        return len(every) > len({id(p) for p in every})

    assert sum(shared(model) for _, model, _ in drawn) >= 20


@pytest.mark.parametrize("field", ["inputs", "outputs", "style", "space"])
def test_every_form_is_met(field, drawn):
    counts = Counter(getattr(spec, field) for spec, *_ in drawn)
    assert min(counts.values()) >= 20 and len(counts) >= 3


def test_a_spec_says_everything():
    """What is printed makes the same network again."""
    spec = random_spec(3)
    again = eval(repr(spec), {"Spec": Spec})
    one, two = network(spec)[0].state_dict(), network(again)[0].state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_every_choice_of_every_block_runs(name):
    """A hundred networks of one block each, with numbers that reach every option."""
    for seed in range(100):
        record = (name, tuple((seed * 7919 + 31 * i * i + seed // 7 * i) % 840 for i in range(8)))
        if name in {"classifier", "embedding"}:
            record = ("linear", record[1])
        model, inputs = network(Spec((record,), 1 + seed % 3, outputs="raw", seed=seed))
        assert all(y.numel() for y in run(model, inputs))


def test_what_memory_held_before_makes_no_difference(monkeypatch):
    empty = torch.empty

    def states(value):
        monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(value))
        return [
            network(Spec(((name, (0, *(choice,) * 7)),), 2, (reads,)))[0].state_dict()
            for name, (reads, _, _) in BLOCKS.items()
            if reads in {"map", "seq", "vec", "tokens"}
            for choice in range(4)
        ]

    for one, two in zip(states(0), states(3), strict=True):
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[key]) for key, value in one.items())
