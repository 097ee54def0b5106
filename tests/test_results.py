"""Tables in the documentation are what the results say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_table_is_made_of_the_results() -> None:
    command = [sys.executable, ROOT / "bench" / "pages.py", "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs" / "results.md").read_text().count("<!-- table: ") > 25


@pytest.mark.parametrize(("script", "options"), [("published", ()), ("real", ("--table",))])
def test_a_table_is_what_its_script_prints(script, options):
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / f"{script}.py", *options], capture_output=True, text=True, check=True
    )
    page = (ROOT / "docs" / "results.md").read_text()
    begin, end = f"<!-- {script}: written by bench/{script}.py -->\n", f"<!-- {script}: end -->"
    written = page.split(begin)[1].split(end)[0]
    assert written.strip() == done.stdout.strip(), f"python bench/{script}.py --write"
    assert written.count("\n") > 5


def test_the_list_of_benches_names_scripts_that_are_there() -> None:
    command = [sys.executable, ROOT / "bench" / "run.py", "--full", "--list"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    scripts = [line.split()[1] for line in done.stdout.splitlines()]
    assert len(scripts) > 20 and all((ROOT / script).is_file() for script in scripts)
