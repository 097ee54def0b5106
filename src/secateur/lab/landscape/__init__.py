"""The landscape of the loss between trained networks."""
