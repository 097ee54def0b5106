"""Which channels live and die together: one look at a model's forward labels every position of every tensor."""
