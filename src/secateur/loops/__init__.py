"""Pruning inside training loops of others: of ``transformers`` and of Lightning, and what both are made of."""
