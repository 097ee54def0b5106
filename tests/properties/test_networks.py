"""What always holds, on random networks: 500 in the ordinary run, ``SECATEUR_NETWORKS=10000`` for more.

Each network is traced once and everything is checked on it. A failure prints the spec that makes the network again.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, Phase, given, settings

from .checks import check_everything
from .networks import Spec, specs

NETWORKS = int(os.environ.get("SECATEUR_NETWORKS", "500"))


@settings(
    max_examples=NETWORKS,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(specs())
def test_what_always_holds(spec: Spec):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny
    try:
        check_everything(spec)
    finally:
        torch.set_num_threads(threads)
