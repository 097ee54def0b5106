"""Budgets in milliseconds: how long a forward takes at any widths, measured and fitted."""
