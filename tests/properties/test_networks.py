"""What always holds, on random networks: 500 in the ordinary run, ``SECATEUR_NETWORKS=10000`` for more.

Each network is traced once and everything is checked on it. Half of them come from seeds, evenly over all blocks; half
from hypothesis, which looks for corners. A failure is made small and prints the spec that makes its network again.
"""

from __future__ import annotations

import os
from functools import partial

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from .checks import check_everything
from .networks import Spec, random_spec, reduced, specs

NETWORKS = int(os.environ.get("SECATEUR_NETWORKS", "500"))
CHUNK = 25


def outcome(spec: Spec) -> tuple[str, bool]:
    """What is wrong, if anything, and whether there was anything to remove."""
    try:
        return "", check_everything(spec)
    except Exception as error:
        return f"{type(error).__name__}: {error}", True


def fault(spec: Spec) -> str:
    """What is wrong, if anything."""
    return outcome(spec)[0]


def fails_alike(kind: str, spec: Spec) -> bool:
    """Whether a spec fails with the same kind of error."""
    return fault(spec).startswith(kind)


@pytest.mark.parametrize("first", range(0, NETWORKS // 2, CHUNK))
def test_what_always_holds(first: int):
    able = 0
    for seed in range(first, first + CHUNK):
        wrong, something = outcome(random_spec(seed))
        able += something
        if wrong:
            spec = reduced(random_spec(seed), partial(fails_alike, wrong[:30]))
            pytest.fail(f"seed {seed}: {wrong}\nreduced: {fault(spec)}\n{spec}")
    assert able >= 0.7 * CHUNK, "otherwise the properties would hold of nothing"


@pytest.mark.parametrize("first", range(0, NETWORKS - NETWORKS // 2, 2 * CHUNK))
def test_what_always_holds_in_corners(first: int):
    @settings(
        max_examples=2 * CHUNK,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @hypothesis.seed(first)
    @given(specs())
    def holds(spec: Spec) -> None:
        assert fault(spec) == ""

    holds()
