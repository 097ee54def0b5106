"""A group of processes that was destroyed is gone: its threads do not outlive it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LEAVES = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import secateur as sc

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
dist.barrier()  # by now all threads run, and have their names
threads = lambda: [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
before = sum("gloo" in name for name in threads())
sc.trace(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), torch.zeros(1, 2))
dist.destroy_process_group()
print(before, sum("gloo" in name for name in threads()))
"""


EARLY = LEAVES.replace("import secateur as sc\n", "import secateur as sc\nsc.trace\n")  # all is imported by then


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
@pytest.mark.parametrize("program", [EARLY, LEAVES], ids=["imported before the group", "imported while there is one"])
def test_tracing_keeps_no_group(tmp_path, program):
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    before, after = (int(number) for number in done.stdout.split())
    assert before > 0
    assert after == 0
