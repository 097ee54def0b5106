"""How the loss bends: Kronecker factors of the Fisher, their eigenbases, and which directions are flat."""
