"""The rules: how labels flow through each ATen operation. Importing this room fills the table."""

from __future__ import annotations

from secateur.tracing.rules import constants, contractions, layout, norms, pointwise, reductions
from secateur.tracing.rules.table import RULES, unknown_operation

__all__ = ["RULES", "constants", "contractions", "layout", "norms", "pointwise", "reductions", "unknown_operation"]
