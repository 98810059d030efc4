"""Real models and rows out of the packages of registries."""
