"""The bench that wants a GPU: two steps of everything on a CPU, so that no minute of a card is lost to a mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[1] / "bench" / "gpu.py"
ROWS = {"checks": 11, "epochs": 5, "sdprun": 2, "eigendamage": 1, "one pass": 10, "wide": 2}


def run(*options):
    return subprocess.run([sys.executable, str(BENCH), *map(str, options)], capture_output=True, text=True, check=False)


def test_a_dry_run_does_two_steps_of_everything_and_goes_on_where_it_was(tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    done = run("--dry", "--out", first)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("nothing is left")
    found = json.loads(first.read_text())
    assert {piece: sum(row["piece"] == piece for row in found["rows"]) for piece in ROWS} == ROWS
    checks = {row["name"]: row for row in found["rows"] if row["piece"] == "checks"}
    assert all(row["ok"] for name, row in checks.items() if "cut against masked" in name or "compiled" in name)
    assert all(abs(row["macs"] - 1) > 0.05 for row in found["rows"] if row["piece"] in ("eigendamage", "one pass"))
    cut = found | {"rows": [row for row in found["rows"] if row["piece"] != "epochs"]}
    first.write_text(json.dumps(cut))  # what is missing alone is run again
    again = run("--dry", "--out", second, "--before", first, "--minutes", 0)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("{") == ROWS["epochs"]
    assert len(json.loads(second.read_text())["rows"]) == sum(ROWS.values())


def test_what_does_not_fit_into_the_time_is_told(tmp_path):
    done = run("--dry", "--out", tmp_path / "rows.json", "--minutes", 0, "--pieces", "sdprun")
    assert done.returncode == 0, done.stderr
    assert "sdprun: vgg16_bn, c = 0, seed 0 takes about" in done.stdout
    assert json.loads((tmp_path / "rows.json").read_text())["left"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path / "rows.json")
    assert done.returncode == 2
    assert "there is no GPU here" in done.stderr
    assert not (tmp_path / "rows.json").exists()
    assert run("--before", tmp_path / "none.json", "--out", tmp_path / "rows.json").returncode == 2
