"""Bad clients, to measure how a run withstands them."""
