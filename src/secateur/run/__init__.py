"""A recipe carried out: train or load, prune, fine-tune, measure, keep; it may be killed at any moment."""

from secateur.run.api import run
from secateur.run.table import table

__all__ = ["run", "table"]
