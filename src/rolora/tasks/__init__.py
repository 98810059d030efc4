"""Tasks: each turns rows into tokens, outputs into a loss, and answers into metrics."""
