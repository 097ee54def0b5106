"""Methods that are more than criterion, strategy and repair: most prune while a network trains."""
