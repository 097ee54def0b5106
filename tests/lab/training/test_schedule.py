"""Schedules take their stated values."""

import pytest

from secateur._internal.errors import SecateurError
from secateur.lab.training.schedule import SCHEDULES, named

VALUES = [
    ("constant", {0: 1, 0.5: 1, 0.99: 1}),
    ("one_cycle", {0: 0.04, 0.125: 0.52, 0.25: 1, 0.625: 0.5, 1: 0}),
    ("cosine", {0: 1, 0.5: 0.5, 1: 0}),
    ("steps", {0: 1, 0.49: 1, 0.5: 0.1, 0.74: 0.1, 0.75: 0.01, 0.99: 0.01}),
    ("grda", {0: 1, 0.49: 1, 0.5: 1, 0.7: 0.55, 0.9: 0.1, 0.99: 0.1}),
]


@pytest.mark.parametrize(("name", "values"), VALUES)
def test_values(name, values):
    assert {at: named(name)(at) for at in values} == pytest.approx(values, abs=1e-12)


def test_all_are_tested_and_within_bounds():
    assert {name for name, _ in VALUES} == set(SCHEDULES)
    assert all(0 <= schedule(i / 1000) <= 1 for schedule in SCHEDULES.values() for i in range(1000))


def test_names_and_functions():
    with pytest.raises(SecateurError, match="did you mean 'cosine'"):
        named("cosin")
    assert named(abs) is abs
