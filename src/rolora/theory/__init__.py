"""The paper's linear model: the problem, what methods make of it, and sweeps."""
