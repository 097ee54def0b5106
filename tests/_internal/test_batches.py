"""One reader of batches: every kind that its table names, and what it refuses."""

from __future__ import annotations

from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn

from secateur._internal.batches import call_model, first_argument, read_batch, read_batches, tensors_in
from secateur._internal.errors import BadBatch, SecateurError
from secateur._internal.workload import Workload

CPU = torch.device("cpu")
X, Y, Z = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 2]), torch.ones(3)
TABLE = {  # the rows of the table: batch -> inputs, targets, whether the model may compute the loss
    "a tensor": (X, X, None, False),
    "a pair": ((X, Y), X, Y, False),
    "a list of two, as loaders give": ([X, Y], X, Y, False),
    "inputs alone in a tuple": ((X,), X, None, False),
    "several targets": ((X, Y, Z), X, (Y, Z), False),
    "several inputs": (((X, Z), Y), (X, Z), Y, False),
    "several inputs in a list": (([X, Z], Y), (X, Z), Y, False),
    "inputs by name": (({"x": X}, Y), {"x": X}, Y, False),
    "a dict with labels": ({"x": X, "labels": Y}, {"x": X}, Y, True),
    "a mapping with labels": (UserDict(x=X, labels=Y), {"x": X}, Y, True),
    "a dict without": ({"x": X, "scale": 2.0}, {"x": X, "scale": 2.0}, None, False),
    "a dict whose labels are None": ({"x": X, "labels": None}, {"x": X}, None, False),
}


def same(one, other):
    if isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(other, tuple):
        return isinstance(one, tuple) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[k], v) for k, v in other.items())
    return one == other


@pytest.mark.parametrize("name", TABLE)
def test_every_kind_of_batch_is_read(name):
    raw, inputs, targets, labelled = TABLE[name]
    batch = read_batch(raw, 5, CPU)
    assert same(batch.inputs, inputs)
    assert same(batch.targets, targets)
    assert (batch.number, batch.labelled, batch.examples) == (5, labelled, 3)
    assert same(batch.with_labels(), {**inputs, "labels": targets} if labelled else inputs)


def test_inputs_are_a_copy_and_everything_is_on_the_models_device():
    batch = read_batch(({"x": X}, (Y, Z)), 0, CPU)
    batch.inputs["x"].zero_()
    assert X.any()
    moved = read_batch(({"x": X}, (Y, Z)), 0, torch.device("meta"))
    assert {t.device.type for t in tensors_in((moved.inputs, moved.targets))} == {"meta"}


def test_what_was_made_in_inference_mode_can_be_differentiated_through():
    with torch.inference_mode():
        raw = (X + 0, Y + 0)
    batch = read_batch(raw, 0, CPU)
    assert not batch.inputs.is_inference()
    assert not batch.targets.is_inference()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ((), "batch 2 is an empty tuple"), (None, "batch 2 is a NoneType"), (np.zeros(3), "batch 2 is a ndarray"),
        ((np.zeros(3), Y), "batch 2 is a tuple of ndarray"), ({"x": 3}, "batch 2 is a dict without a tensor"),
        (((1, 2), Y), "batch 2 is a tuple of tuple without a tensor"),
    ],
)  # fmt: skip
def test_what_is_no_batch_is_told(raw, message):
    with pytest.raises(BadBatch, match=message):
        read_batch(raw, 2, CPU)


@pytest.mark.parametrize("data", [None, 3, "abc", X, {"x": X}])
def test_what_gives_no_batches_is_told(data):
    with pytest.raises(BadBatch, match=r"batches of inputs|something that gives batches is expected"):
        list(Workload(nn.Linear(2, 2), data).batches())


def test_no_more_batches_are_read_than_are_wanted():
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield X

    assert [batch.number for batch in read_batches(endless(), CPU, 3)] == [0, 1, 2]
    assert read == [0, 1, 2]
    with pytest.raises(BadBatch, match="the loader is empty"):
        list(read_batches([], CPU))


def test_what_an_iterator_gave_is_there_for_the_next_as_well():
    work = Workload(nn.Linear(2, 2), (X + i for i in range(10_000_000)))
    assert len(list(work.batches(2))) == 2
    again = [batch.inputs for batch in work.batches(3)]
    assert all(torch.equal(x, X + i) for i, x in enumerate(again))
    assert torch.equal(work.first.inputs, X)
    assert work.forwards == 5


def test_looking_at_the_first_batch_leaves_the_random_state():
    loader = torch.utils.data.DataLoader([{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)], shuffle=True)
    work, state = Workload(nn.Linear(2, 2), loader), torch.get_rng_state()
    assert work.has_loss
    assert torch.equal(torch.get_rng_state(), state)


def test_a_layer_gets_its_input_however_it_is_called():
    assert first_argument((1, 2), {"input": 3}) == 1
    assert first_argument((), {"scale": 2, "input": 3}) == 3
    assert first_argument((), {"x": 2, "y": 3}) == 2
    assert first_argument((), {}) is None


def test_a_model_is_called_with_what_the_inputs_are():
    class Three(nn.Module):
        def forward(self, a, b=2, c=3):
            return a, b, c

    assert call_model(Three(), 5) == (5, 2, 3)
    assert call_model(Three(), (5, 6)) == (5, 6, 3)
    assert call_model(Three(), {"a": 1, "c": 0}) == (1, 2, 0)


def test_tensors_are_found_in_plain_objects_and_slots():
    class Output:
        __slots__ = ("logits", "rest")

    class Holder:
        def __init__(self, inside):
            self.inside, self.again = inside, inside

    output = Output()
    output.logits = X
    assert [t is X for t in tensors_in(Holder(output))] == [True]
    with pytest.raises(SecateurError, match="read only once"):
        tensors_in({"a": iter([X])})
