"""Any state comes back as it was; damage is noticed; nothing is unpickled."""

import errno
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur._internal import serial
from secateur._internal.errors import BadFile, SecateurError
from secateur.lab.training import checkpoint

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
TENSORS = st.builds(
    lambda shape, dtype, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | TENSORS
KEYS = st.text(max_size=4) | st.integers() | st.sampled_from(["$tensor", "$tuple", "$dict", "a.b"])
STATES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@settings(deadline=None, max_examples=40)
@given(state=STATES)
def test_any_state_comes_back(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("state") / "a.safetensors"
    checkpoint.write(path, state)
    assert equal(checkpoint.read(path), state)
    assert list(path.parent.iterdir()) == [path]


def test_special_numbers_shared_tensors_and_layouts(tmp_path):
    shared = torch.randn(6)
    grid = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    state = {"inf": float("-inf"), "a": shared, "b": shared, "view": shared[::2], "grid": grid}
    checkpoint.write(tmp_path / "a", state)
    back = checkpoint.read(tmp_path / "a")
    assert back["inf"] == float("-inf")
    assert all(torch.equal(back[key], state[key]) for key in ("a", "b", "view", "grid"))
    assert back["grid"].stride() == grid.stride()


def test_what_cannot_be_saved_is_named():
    with pytest.raises(SecateurError, match=r"state.a.1: a set cannot be saved"):
        serial.pack({"a": [1, {2}]})


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:4],
        lambda b: b[: len(b) // 2],
        lambda b: b[:-1],
        lambda b: b + b"x",
        lambda b: flip(b, len(b) - 1),
        lambda b: flip(b, b.index(b"17")),
        lambda b: b"PK\x03\x04" + b,
    ],
)
def test_damage_is_noticed_and_the_one_before_is_taken(tmp_path, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"n": 17, "step": step, "w": torch.ones(100)})
    latest = max(tmp_path.iterdir())
    latest.write_bytes(damage(latest.read_bytes()))
    with pytest.raises(SecateurError, match=r"step-0000000002"):
        checkpoint.read(latest)
    assert checkpoint.newest(tmp_path)["step"] == 1
    first = min(tmp_path.iterdir())
    first.write_bytes(damage(first.read_bytes()))
    with pytest.raises(SecateurError, match="delete them to begin anew"):
        checkpoint.newest(tmp_path)


def test_the_last_two_are_kept(tmp_path):
    assert checkpoint.newest(tmp_path / "none") is None
    for step in (1, 9, 10, 11):
        checkpoint.save(tmp_path / "a", step, step)
        (tmp_path / "a" / f"step-{step}.safetensors.17.tmp").touch()  # of a run that was killed
    checkpoint.save(tmp_path / "a", 11, 11)
    assert [int(path.stem[5:]) for path in sorted((tmp_path / "a").iterdir())] == [10, 11]
    assert checkpoint.newest(tmp_path / "a") == 11


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    checkpoint.write(path, 1)

    def fail(_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(BadFile, match=r"disk full \(.* bytes are to be written, .* are free\).*run the same again"):
        checkpoint.write(path, 2)
    assert checkpoint.read(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_random_states_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    checkpoint.write(tmp_path / "a", checkpoint.random_states())
    first = draw()
    assert draw() != first
    checkpoint.set_random_states(checkpoint.read(tmp_path / "a"))
    assert draw() == first
