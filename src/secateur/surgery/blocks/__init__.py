"""Dense blocks in a layer's weight, and packed layers that compute only these."""
