"""A recipe carried out: train or load, prune, fine-tune, measure, keep; it may be killed at any moment."""

from secateur._internal.extras import extra

with extra("lab", "a run"):
    from secateur.lab.run.api import dry_run, run
    from secateur.lab.run.table import table

__all__ = ["dry_run", "run", "table"]
