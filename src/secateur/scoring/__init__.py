"""Criteria: how much each channel matters."""
