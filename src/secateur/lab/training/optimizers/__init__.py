"""The optimizers that a recipe can name, one a file or family; each is a dataclass of its own settings."""
