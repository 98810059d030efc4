"""Finished runs as numbers: curves, rankings, paired differences, published values."""
