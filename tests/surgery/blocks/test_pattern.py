"""Pivoting: permutations, density, energy between its bounds, planted blocks found again."""

from __future__ import annotations

import importlib
import itertools
import json

import numpy as np
import pytest

from secateur._internal.errors import SecateurError
from secateur.surgery.blocks.pattern import LAYOUTS, Pattern, _alternated, _assigned, blocks_for, find_pattern

KEEPS = (1 / 2, 1 / 4, 1 / 8)


def energy(m, n, seed=0):
    return np.random.default_rng(seed).normal(size=(m, n)) ** 2 * np.random.default_rng(seed + 1).exponential(
        size=(m, 1)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 64), (37, 29)])
@pytest.mark.parametrize("keep", KEEPS)
def test_every_row_is_in_one_block_and_no_more_than_the_budget_stays(layout, shape, keep):
    pattern = find_pattern(energy(*shape), keep, layout=layout, blocks=None if layout == "diagonal" else 4)
    real = pattern.rows[pattern.rows < shape[0]]
    assert sorted(real) == list(range(shape[0]))
    mask = pattern.mask()
    if layout == "diagonal":
        assert len(set(pattern.columns.flatten())) == pattern.columns.size
        assert mask.sum(0).max() <= pattern.rows.shape[1]
    assert (mask.sum(1) == pattern.columns.shape[1]).all()
    assert mask.mean() <= keep + 1e-9
    ghosts = (pattern.rows == shape[0]).sum(1)
    assert not ghosts[:-1].any()
    assert ghosts[-1] < pattern.rows.shape[1]
    assert Pattern.from_dict(pattern.to_dict()).to_dict() == pattern.to_dict()
    if shape[0] % 8 == shape[1] % 8 == 0:
        assert mask.mean() == pytest.approx(keep)
        assert pattern.density == pytest.approx(keep)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", KEEPS)
def test_it_captures_more_than_chance_and_no_more_than_single_entries_could(layout, keep):
    table = energy(64, 64)
    found = find_pattern(table, keep, layout=layout, blocks=None if layout == "diagonal" else 8).captured(table)
    size = int(64 * keep)
    rng = np.random.default_rng(1)
    chance = []
    for p, q in [(np.arange(64), np.arange(64))] + [(rng.permutation(64), rng.permutation(64)) for _ in range(20)]:
        shuffled = table[p][:, q]
        chance.append(sum(shuffled[i : i + size, i : i + size].sum() for i in range(0, 64, size)) / table.sum())
    single = np.sort(table.flatten())[::-1][: int(keep * table.size)].sum() / table.sum()
    assert max(chance) < found < single


def test_freer_layouts_capture_more():
    table = energy(64, 64)
    by = {
        layout: find_pattern(table, 0.25, layout=layout, blocks=None if layout == "diagonal" else 16).captured(table)
        for layout in LAYOUTS
    }
    assert by["bundles"] > by["growth"]
    assert by["bundles"] > by["diagonal"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("noise", [0, 1e-3])
def test_planted_blocks_are_found_again(layout, blocks, noise):
    rng = np.random.default_rng(blocks)
    weight = np.kron(np.eye(blocks), np.ones((16, 12))) * rng.normal(size=(16 * blocks, 12 * blocks))
    weight = weight[rng.permutation(16 * blocks)][:, rng.permutation(12 * blocks)]
    weight += noise * rng.normal(size=weight.shape)
    found = find_pattern(weight**2, 1 / blocks, layout=layout, blocks=blocks, restarts=3).captured(weight**2)
    assert found == pytest.approx(1, abs=1e-12) if noise == 0 else found > 0.99


@pytest.mark.parametrize("layout", ["diagonal", "bundles"])
@pytest.mark.parametrize("size", [24, 26])
def test_alternating_never_loses_energy(layout, size):
    table = energy(size, size)
    of_row = np.repeat(np.arange(4), 7)[:size]
    of_column = np.r_[np.repeat(np.arange(4), 6), np.full(size - 24, -1)]
    values = []
    for rounds in range(1, 8):
        start = np.arange(size), of_row, np.arange(24).reshape(4, 6), of_column
        rows, columns = _alternated(table, *start, layout, rounds, np.random.default_rng(0))
        values.append(sum(table[np.ix_(rows[of_row == b], columns[b])].sum() for b in range(4)))
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))
    assert values[-1] > values[0] or layout == "bundles"


def test_the_assignment_is_the_best_one_and_of_parts_never_worse(monkeypatch):
    rng = np.random.default_rng(0)
    gain, blocks = rng.random((6, 3)), np.array([0, 0, 1, 1, 2, -1])  # one place is outside of all blocks
    worth = lambda items, gain, blocks: sum(gain[i, b] for i, b in zip(items, blocks, strict=True) if b >= 0)  # noqa: E731
    best = max(worth(order, gain, blocks) for order in itertools.permutations(range(6)))
    found = _assigned(gain, np.arange(6), blocks, rng)
    assert sorted(found) == list(range(6))
    assert worth(found, gain, blocks) == pytest.approx(best)
    monkeypatch.setattr(importlib.import_module("secateur.surgery.blocks.pattern"), "ASSIGNED_AT_ONCE", 3)
    gain, blocks = rng.random((20, 4)), np.repeat(np.arange(4), 5)
    found = _assigned(gain, np.arange(20), blocks, rng)
    assert sorted(found) == list(range(20))
    assert worth(found, gain, blocks) > worth(np.arange(20), gain, blocks)


def test_the_same_seed_gives_the_same_pattern():
    one, other = (find_pattern(energy(40, 40), 0.25, seed=3) for _ in range(2))
    assert (one.rows == other.rows).all()
    assert (one.columns == other.columns).all()


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (energy(4, 4), {"keep": 0.1, "layout": "diagonal"}, "less than one block"),
        (energy(4, 4), {"keep": 0.0}, r"keep=0.0: a fraction in \(0, 1\]"),
        (energy(4, 4), {"keep": 1.5}, r"a fraction in \(0, 1\]"),
        (energy(4, 4), {"keep": 0.5, "layout": "diagnal"}, "did you mean 'diagonal'"),
        (energy(4, 4), {"keep": 0.5, "blocks": 9}, "4 rows"),
        (energy(4, 4), {"keep": 0.5, "blocks": 3, "layout": "diagonal"}, "there are 2"),
        (-energy(4, 4), {"keep": 0.5}, "from 0 on"),
        (np.full((2, 2), np.nan), {"keep": 0.5}, "finite"),
    ],
)
def test_bad_input_is_told(table, options, message):
    with pytest.raises(SecateurError, match=message):
        find_pattern(table, **options)


def test_one_row_and_whole_layers_are_fine():
    assert find_pattern(energy(1, 8), 0.5).mask().sum() == 4
    assert find_pattern(energy(8, 8), 1.0, layout="diagonal").mask().all()
    assert find_pattern(np.zeros((8, 8)), 0.5).captured(np.zeros((8, 8))) == 1


def test_as_data_it_is_the_same():
    pattern = find_pattern(energy(10, 12), 0.5, blocks=3)
    again = Pattern.from_dict(json.loads(json.dumps(pattern.to_dict())))
    assert (again.mask() == pattern.mask()).all()
    assert again.layout == pattern.layout
    twice = pattern.columns.copy()
    twice[0, 1] = twice[0, 0]
    for damage in (
        {"shape": [9, 12]}, {"layout": "round"}, {"rows": [[0]]}, {"columns": None}, {"columns": twice.tolist()},
        {"columns": (pattern.columns + 0.5).tolist()}, {"rows": [*pattern.rows.tolist(), [10, 10, 10, 10]]},
        {"layout": "diagonal"},
    ):  # fmt: skip
        with pytest.raises(SecateurError, match="the pattern is damaged"):
            Pattern.from_dict(pattern.to_dict() | damage)


@pytest.mark.parametrize(
    ("keep", "rows", "expected"),
    [
        (0.5, 64, 2),
        (0.5, 63, 1),
        (0.25, 128, 4),
        (0.25, 96, 3),
        (0.125, 4096, 8),
        (0.28, 1024, 3),
        (0.6, 320, 1),
        (1, 9, 1),
    ],
)
def test_by_default_blocks_gather_no_more_than_is_there_and_are_tall(keep, rows, expected):
    assert blocks_for(keep, rows) == expected
    pattern = find_pattern(energy(rows, 40), keep)
    assert len(pattern.rows) == expected
    assert pattern.columns.size <= 40
