"""Strategies: how many channels every group keeps, under a budget."""
