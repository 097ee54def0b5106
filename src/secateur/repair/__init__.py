"""How what stays makes up for what goes, before any training."""
