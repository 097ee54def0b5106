"""Shapes written in annotations are checked while tests run; one thread a process, since processes run side by side."""

from __future__ import annotations

from jaxtyping import install_import_hook

with install_import_hook(["secateur.score", "secateur.train.sdprun", "secateur.rows"], "beartype.beartype"):
    import secateur  # noqa: F401

import torch

torch.set_num_threads(1)
