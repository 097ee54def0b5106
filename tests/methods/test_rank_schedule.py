"""The rank rules: their values, zeros and symmetries."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from secateur.methods.rank_schedule import FLATNESS, RANK_SCHEDULES, centre_symmetric, piecewise_linear


def at(rule, rank, wanted, left):
    return float(rule(*(torch.tensor([float(v)], dtype=torch.float64) for v in (rank, wanted, left))))


@pytest.mark.parametrize("name", RANK_SCHEDULES)
@pytest.mark.parametrize("wanted", [1, 3, 9, 30])
def test_it_is_one_at_rank_zero_and_crosses_zero_exactly_at_the_target(name, wanted):
    rule = RANK_SCHEDULES[name]
    assert at(rule, 0, wanted, 64) == pytest.approx(1, abs=1e-12)
    assert at(rule, wanted, wanted, 64) == pytest.approx(0, abs=1e-12)
    values = [at(rule, r, wanted, 64) for r in range(64)]
    assert all(v > 0 for v in values[:wanted])
    assert all(v < 0 for v in values[wanted + 1 :])
    assert all(a >= b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize("x", [0.0, 0.3, 1.0, 2.9, 6.0])
def test_the_exponentials_are_symmetric_about_their_centre(x):
    wanted = 9
    centre = -math.log(FLATNESS) / (math.log(2 / FLATNESS) / wanted)
    assert centre == pytest.approx(2 / 3 * wanted)  # for u = 1/4
    both = at(centre_symmetric, centre + x, wanted, 99) + at(centre_symmetric, centre - x, wanted, 99)
    assert both == pytest.approx(2 * FLATNESS, abs=1e-12)


def test_the_values_of_the_papers():
    assert at(centre_symmetric, 18, 9, 99) == pytest.approx(-3.5)
    assert at(centre_symmetric, 6 - 1e-9, 9, 99) == pytest.approx(at(centre_symmetric, 6 + 1e-9, 9, 99), abs=1e-8)
    assert at(piecewise_linear, 63, 9, 64) == pytest.approx(-1)
    assert at(piecewise_linear, 3, 9, 64) == pytest.approx(1 - 1 / 3)


@pytest.mark.parametrize("name", RANK_SCHEDULES)
def test_far_ranks_and_groups_that_are_through_stay_finite(name):
    for rank, wanted, left in ((100_000, 1, 100_001), (5, 0, 6), (0, 1, 1), (3, 3, 4)):
        assert math.isfinite(at(RANK_SCHEDULES[name], rank, wanted, left))
