"""Widths by trying them: a factored bandit on mini-batches."""
