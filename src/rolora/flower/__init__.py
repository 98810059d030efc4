"""The same run across real machines: sites that keep their rows, a coordinator, Flower between.

Only ``carrier`` and ``apps`` import flwr; the rest is plain functions from message to message, so
that it can be tried without a network.
"""
