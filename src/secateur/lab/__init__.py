"""Experiments: recipes, runs, data sets, networks and training.

An extra: ``pip install 'secateur[lab]'``. The networks (``lab.models``) need no more than the library itself.
"""
