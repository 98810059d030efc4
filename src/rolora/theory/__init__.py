"""The paper's linear model: the problem, the methods on it, and sweeps."""
