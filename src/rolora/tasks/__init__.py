"""What is learned: a task turns rows into tokens, outputs into a loss, and answers into metrics."""
