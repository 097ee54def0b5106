"""The papers' networks, by name."""

from secateur.lab.models.registry import MODELS, Entry, build, example_input

__all__ = ["MODELS", "Entry", "build", "example_input"]
