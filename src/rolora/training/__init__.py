"""Local training, the engines that run a cohort, and the round loop."""
