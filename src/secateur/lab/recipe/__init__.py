"""A recipe: one validated description of a run, from a YAML file and ``key=value`` overrides.

::

    name: digits-taylor
    seeds: [0]
    data: {name: digits, batch_size: 64, validation: 0.1}
    model: {name: digits_cnn}
    train: {optimizer: {name: sgd, momentum: 0.9}, epochs: 20, lr: 0.1}
    prune: {budget: {macs: 0.5}, criterion: taylor, repair: refit, batches: 8}
    finetune: {epochs: 5, lr: 0.01}
    measure: {batch_sizes: [1, 32], repeats: 50, threads: 1}

Unknown keys, keys given twice and settings that contradict each other are refused, each with one message.
"""

from __future__ import annotations

from secateur._internal.extras import extra

with extra("lab", "a recipe"):
    from secateur.lab.recipe.reading import read, validate
    from secateur.lab.recipe.sections import Recipe, Train, Tune

__all__ = ["Recipe", "Train", "Tune", "read", "validate"]
