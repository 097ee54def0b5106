"""Changing a model: cutting channels, handing an optimizer over, and the record of what was done."""
