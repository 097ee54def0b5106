"""What every room uses and nobody outside should: errors, batches, losses, state, processes, files."""
