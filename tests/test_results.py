"""Tables in the documentation are what the results say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_table_of_published_numbers_is_what_its_script_prints():
    done = subprocess.run([sys.executable, ROOT / "bench" / "published.py"], capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "results.md").read_text()
    begin, end = "<!-- published: written by bench/published.py -->\n", "\n<!-- published: end -->"
    written = page.split(begin)[1].split(end)[0]
    assert written == done.stdout.rstrip("\n"), "python bench/published.py --write"
    assert written.count("\n") > 10
