"""The table: ATen operation -> rule.

Each rule gets a :class:`~secateur.tracing.call.Call`, adds what must be equal, frozen or approximate to the names so
far and
returns the names of the results. An operation without a rule freezes every name it meets.
"""

from __future__ import annotations

from collections.abc import Callable

from secateur.tracing.call import Call, Result, Rule

RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations (their out-of-place names, separated by blanks)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def unknown_operation(call: Call) -> Result:
    """Freeze every name on the inputs and name nothing."""
    call.freeze_all(f"no rule knows the operation {call.op}")
    return None
