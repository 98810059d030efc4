"""Runs as pictures and words: one HTML page that opens offline."""
