"""Layers as bottlenecks in another basis."""
