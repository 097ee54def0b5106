"""The table: ATen operation -> rule.

A rule gets a :class:`~secateur.tracing.call.Call`. It adds to the labels what must be equal, frozen or approximate,
and returns the labels of the results. An operation without a rule freezes every label that it meets.
"""

from __future__ import annotations

from collections.abc import Callable

from secateur.tracing.call import Call, Result, Rule

RULES: dict[str, Rule] = {}


def rule(operations: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations (their out-of-place names, separated by blanks)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operations.split(), function))
        return function

    return register


def unknown_operation(call: Call) -> Result:
    """Freeze every label on the inputs, and give the results none."""
    call.freeze_all(f"no rule knows the operation {call.op}")
    return None
