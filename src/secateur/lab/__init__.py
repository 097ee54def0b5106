"""Experiments: recipes, runs, data sets, networks and training. An extra: `pip install secateur[lab]`."""
