"""The frozen base model and the client bank on it."""
