"""The table of operations in the documentation is what the rules are."""

from __future__ import annotations

import pytest
import torch
from operations import TABLE, operations, sorted_operations, written

from secateur.tracing.rules import RULES


def test_every_operation_of_pytorch_is_in_a_list():
    assert sorted_operations()["undecided"] == {"": []}


def test_every_rule_is_for_an_operation_of_pytorch():
    assert set(RULES) <= set(operations())


def test_the_page_says_so():
    page = TABLE.read_text(encoding="utf-8")
    version = torch.__version__.split("+")[0]
    if f"of PyTorch {version}" not in page:
        pytest.skip(f"docs/operations.md is of another PyTorch than {version}")
    assert page == written(), "write it again: python tests/tracing/operations.py"
